"""MPI3D: toy, realistic, real and real_complex."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from fastdis.data import npz
from fastdis.data.cache import Cache, gather_images
from fastdis.data.factor_dataset import FactorDataset
from fastdis.data.reading import Progress, reading

FACTOR_NAMES = (
    "object_color",
    "object_shape",
    "object_size",
    "camera_height",
    "background_color",
    "horizontal_axis",
    "vertical_axis",
)

#: The grids that were published, by their number of images, which is all that tells them apart.
GRIDS = {1_036_800: (6, 6, 2, 3, 3, 40, 40), 460_800: (4, 4, 2, 3, 3, 40, 40)}

EXPECTED = "MPI3D .npz"


def load_mpi3d(
    path: str | os.PathLike[str], *, cache: Cache = None, progress: bool | Progress = False
) -> FactorDataset:
    """Read a published MPI3D file.

    Parameters
    ----------
    path : path-like
        The ``.npz`` of toy, realistic, real or real_complex.
    cache : bool or path-like, optional
        Where the file is compressed: None reads all images into memory (12.7 GB for 1,036,800 images, 5.7 GB for
        460,800); True unpacks them once into ``<path>.cache.npy`` beside the file, a path into that file, and
        memory-maps it, now and the next time. A file that was not unpacked from ``path`` is never written over.
    progress : bool or callable, optional
        True shows a bar on stderr while packed images are read; a callable is called as
        ``progress(images_done, images_in_all)``.

    Returns
    -------
    FactorDataset
        Images [64, 64, 3]; factors object_color, object_shape, object_size 2, camera_height 3, background_color 3,
        horizontal_axis 40 and vertical_axis 40. Colour and shape take 6 values each in a file of 1,036,800 images
        (toy, realistic, real), and 4 in one of 460,800 (real_complex). Images are memory-mapped where the file stores
        them uncompressed.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        There is no such file.
    ValueError
        The file is truncated or damaged, is not MPI3D, or has another number of images; or the cache is some other
        file.

    Notes
    -----
    Layout: ``images`` uint8 [n, 64, 64, 3] and no labels; the last factor varies fastest. Published MD5:
    toy ``55889cb7...``, realistic ``59a6225b...``, real ``0f33f609918fb5c97996692f91129802``.

    Pitfalls. The reference library gives toy and realistic 4 colours and 4 shapes, which fits only a file of a
    challenge, ``sim_toy_64x_ordered_without_heldout_factors.npz``, of 460,800 images as well; the public file of
    1,036,800 images read so is indexed wrongly without a word. Here sizes are told from the number of images. The two
    kinds of 460,800 images have the same grid and cannot be told apart. disent had colour and shape wrong before 0.6.0.
    ``mpi3d_real.npz`` as published until 2025-04-17 was corrupt: fetch a later copy. Of an uncompressed file, which is
    mapped, the checksum is not verified.
    """
    path = Path(path)
    with reading(path, EXPECTED), zipfile.ZipFile(path) as archive:
        if "images.npy" not in archive.namelist():
            raise ValueError(f"it lacks images; it has {', '.join(archive.namelist()) or 'nothing'}")
        images = npz.find_images(archive, path, "images", ndim=4, expected=EXPECTED)
        sizes = GRIDS.get(images.shape[0])
        if sizes is None:
            known = " or ".join(f"{length:,} ({' x '.join(map(str, grid))})" for length, grid in GRIDS.items())
            raise ValueError(f"it has {images.shape[0]:,} images, expected {known}")
    return FactorDataset(gather_images(images, cache=cache, progress=progress), sizes, FACTOR_NAMES)
