"""Readers of the standard datasets, and generators of the same formats."""

from fastdis.data.dsprites import load_dsprites, make_dsprites
from fastdis.data.factor_dataset import FactorDataset
from fastdis.data.formats import load

__all__ = ["FactorDataset", "load", "load_dsprites", "make_dsprites"]
