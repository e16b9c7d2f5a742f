"""One door for every dataset format that is read."""

from __future__ import annotations

import os
from pathlib import Path

from fastdis.data.dsprites import load_dsprites
from fastdis.data.factor_dataset import FactorDataset


def load(path: str | os.PathLike[str]) -> FactorDataset:
    """Read a dataset, telling its format from the file.

    Parameters
    ----------
    path : path-like
        A dSprites ``.npz``: the published file, or one written by :func:`fastdis.data.make_dsprites`.

    Returns
    -------
    FactorDataset
        Images and the grid of factors they were made from.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file has a format that is not read, or is damaged.
    """
    path = Path(path)
    if path.exists() and path.suffix.lower() != ".npz":
        raise ValueError(f"{path}: files ending in {path.suffix!r} are not read; expected a dSprites .npz")
    return load_dsprites(path)
