"""One door for every dataset format that is read."""

from __future__ import annotations

import inspect
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdis.data.cars3d import find_cars, load_cars3d
from fastdis.data.celeba import FOLDER, CelebA, holds_celeba, load_celeba
from fastdis.data.dsprites import load_dsprites
from fastdis.data.factor_dataset import FactorDataset
from fastdis.data.hdf5 import is_hdf5, open_hdf5
from fastdis.data.mpi3d import load_mpi3d
from fastdis.data.read_shapes3d import load_shapes3d
from fastdis.data.reading import reading
from fastdis.data.small_norb import find_files, load_small_norb

Reader = Callable[..., FactorDataset | CelebA]

LOOKED_FOR = (
    "looked for dSprites (.npz with imgs and latents_classes, .h5 with imgs), 3D Shapes (.h5 with images and labels), "
    "MPI3D (.npz with images), Cars3D (.tar.gz, or a folder with list.txt and car_*.mat), SmallNORB (a folder with "
    "smallnorb-*.mat) and CelebA (a folder or zip with img_align_celeba)"
)


def load(path: str | os.PathLike[str], **options: Any) -> FactorDataset | CelebA:
    """Read a dataset, telling its format from what is in the file or folder.

    Parameters
    ----------
    path : path-like
        dSprites, ``.npz`` or ``.h5``; 3D Shapes, ``.h5``; MPI3D, ``.npz``; Cars3D, ``.tar.gz`` or a folder;
        SmallNORB, a folder or one of its files; CelebA, a folder or ``.zip``. The published files, or those of
        :func:`fastdis.data.make_dsprites` and :func:`fastdis.data.make_shapes3d`.
    **options
        Options of the format's reader: ``cache`` and ``progress`` of :func:`load_dsprites`, :func:`load_shapes3d` and
        :func:`load_mpi3d`; ``size`` of :func:`load_cars3d`, :func:`load_small_norb` and :func:`load_celeba`; and so on.

    Returns
    -------
    FactorDataset or CelebA
        Images and the grid of factors they were made from; for CelebA, which has no factors, images and attributes.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder, or files that belong to it are missing.
    TypeError
        The format's reader has no such option.
    ValueError
        The file has a format that is not read, or is damaged.
    ImportError
        A library that the format needs is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; {LOOKED_FOR}")
    reader = _reader_of_folder(path) if path.is_dir() else _reader_of_file(path)
    if reader is None:
        kind = "folder" if path.is_dir() else f"file ending in {path.suffix!r}" if path.suffix else "file"
        raise ValueError(f"{path}: a {kind} that is no dataset known here; {LOOKED_FOR}")
    known = [name for name in inspect.signature(reader).parameters if name != "path"]
    for name in options:
        if name not in known:
            raise TypeError(f"load got the option {name!r}, and {path} is read with {', '.join(known)}")
    return reader(path, **options)


def load_grid(path: str | os.PathLike[str], **options: Any) -> FactorDataset:
    """Read a dataset as :func:`load` does, and refuse one without a grid of factors.

    Raises
    ------
    ValueError
        The dataset has no factors; and whatever :func:`load` raises.
    """
    dataset = load(path, **options)
    if not isinstance(dataset, FactorDataset):
        raise ValueError(f"{path}: {type(dataset).__name__} has no grid of factors, which is needed here")
    return dataset


def _reader_of_folder(path: Path) -> Reader | None:
    if find_cars(path) is not None:
        return load_cars3d
    if any(find_files(path, "*", "dat")):
        return load_small_norb
    return load_celeba if holds_celeba(path) else None


def _reader_of_file(path: Path) -> Reader | None:
    with path.open("rb") as file:
        start = file.read(4)
    if path.name.startswith("smallnorb-"):
        return load_small_norb
    if zipfile.is_zipfile(path) or path.suffix.lower() == ".npz":
        with reading(path, "dSprites or MPI3D .npz"), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if "images.npy" in names and "imgs.npy" not in names:
            return load_mpi3d
        if {"imgs.npy", "latents_classes.npy", "metadata.npy"}.intersection(names):
            return load_dsprites
        return load_celeba if any(f"{FOLDER}/" in name for name in names) else None
    if is_hdf5(path):
        with reading(path, "dSprites or 3D Shapes .h5"), open_hdf5(path) as file:
            arrays = set(file)
        if "images" in arrays and "imgs" not in arrays:
            return load_shapes3d
        return load_dsprites if "imgs" in arrays else None
    # A damaged archive is left to its reader, which says what is wrong with it.
    if start[:2] == b"\x1f\x8b" or path.name.endswith((".tar.gz", ".tgz")) or tarfile.is_tarfile(path):
        return load_cars3d
    return None
