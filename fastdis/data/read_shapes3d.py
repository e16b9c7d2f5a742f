"""3D Shapes: the published file, and files of its layout."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastdis.data import hdf5
from fastdis.data.cache import Cache, gather_images
from fastdis.data.factor_dataset import FactorDataset
from fastdis.data.grid import grid_values, sizes_in_order
from fastdis.data.reading import Progress, reading

#: The columns of ``labels``.
FACTOR_NAMES = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")

EXPECTED = "3D Shapes .h5"


def load_shapes3d(
    path: str | os.PathLike[str], *, cache: Cache = None, progress: bool | Progress = False
) -> FactorDataset:
    """Read the published 3D Shapes file, or a sub-grid of the same layout.

    Parameters
    ----------
    path : path-like
        ``3dshapes.h5`` (267,573,662 bytes, SHA-256
        ``0a0f6ed98baff276a50f3a081a7434d788da63cb135a98189b2a5b5769be1785``, MD5
        ``099a2078d58cec4daad0702c55d06868``), or a file of the same layout with other values of the factors or
        another image size.
    cache : bool or path-like, optional
        Where the file is compressed, as the published one is: None reads all images into memory (5.9 GB for the whole
        set); True unpacks them once into ``<path>.cache.npy`` beside the file, a path into
        that file, and memory-maps it, now and the next time. The cache is written whole or not at all, and anew
        when the source has changed; a file that was not unpacked from ``path`` is never written over.
    progress : bool or callable, optional
        True shows a bar on stderr while packed images are read; a callable is called as
        ``progress(images_done, images_in_all)``.

    Returns
    -------
    FactorDataset
        Factors floor_hue 10, wall_hue 10, object_hue 10, scale 8, shape 4, orientation 15 in the published file;
        images [64, 64, 3]. Sizes and ``factor_values`` are told from the labels. Images that the file stores
        uncompressed in one block are memory-mapped in place.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        There is no such file.
    ValueError
        The file is truncated or damaged, is not 3D Shapes, or its labels are not a complete grid in order; or the
        cache is some other file.
    ImportError
        h5py is not installed.

    Notes
    -----
    Layout: ``images`` uint8 [480000, 64, 64, 3] and ``labels`` float64 [480000, 6]; the last factor varies fastest.
    The labels are hues 0 to 0.9, scale 0.75 to 1.25, shape 0 to 3 and orientation -30 to 30 degrees; the set's own
    description says that scale lies in [0, 1], which it does not. Reading one image of the compressed file unpacks a
    whole chunk, which makes shuffled reading slow: hence ``cache``. Some libraries read the set from an ``.npz`` that
    was never published.
    """
    path = Path(path)
    with reading(path, EXPECTED), hdf5.open_hdf5(path) as file:
        labels = hdf5.require_array(file, "labels")
        if len(labels.shape) != 2 or labels.shape[1] != len(FACTOR_NAMES):
            raise ValueError(f"its labels are {list(labels.shape)}, expected [n, {len(FACTOR_NAMES)}]")
        values = np.asarray(labels[...])
        images = hdf5.find_images(file, path, "images", ndim=4, expected=EXPECTED)
        if len(values) != images.shape[0]:
            raise ValueError(f"it has {images.shape[0]} images and {len(values)} labels")
        sizes = sizes_in_order(values)
        factor_values = grid_values(values, sizes)
    return FactorDataset(
        gather_images(images, cache=cache, progress=progress), sizes, FACTOR_NAMES, factor_values=factor_values
    )
