"""Readers of the standard datasets, and generators of the same formats."""

from fastdis.data.cars3d import load_cars3d
from fastdis.data.celeba import CelebA, load_celeba
from fastdis.data.dsprites import load_dsprites, make_dsprites
from fastdis.data.dsprites_variants import dsprites_variant
from fastdis.data.factor_dataset import FactorDataset
from fastdis.data.formats import load
from fastdis.data.manifolds import (
    Manifold,
    flat_torus,
    fourier_isometry,
    growing_shapes,
    moving_colours,
    moving_shapes,
    swiss_roll,
    turning_shapes,
)
from fastdis.data.mpi3d import load_mpi3d
from fastdis.data.point_dataset import PointDataset
from fastdis.data.read_shapes3d import load_shapes3d
from fastdis.data.shapes3d import make_shapes3d
from fastdis.data.small_norb import load_small_norb

__all__ = [
    "CelebA",
    "FactorDataset",
    "Manifold",
    "PointDataset",
    "dsprites_variant",
    "flat_torus",
    "fourier_isometry",
    "growing_shapes",
    "load",
    "load_cars3d",
    "load_celeba",
    "load_dsprites",
    "load_mpi3d",
    "load_shapes3d",
    "load_small_norb",
    "make_dsprites",
    "make_shapes3d",
    "moving_colours",
    "moving_shapes",
    "swiss_roll",
    "turning_shapes",
]
