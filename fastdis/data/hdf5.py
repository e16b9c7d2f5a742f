"""Images in HDF5 files: mapped where they lie uncompressed, else gathered once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastdis.data.cache import SLAB, FoundImages, PackedImages, require_images
from fastdis.data.reading import library, reading


def is_hdf5(path: Path) -> bool:
    """Tell whether a file has the signature of HDF5, at its start or after a block of the user's."""
    with path.open("rb") as file:
        size = path.stat().st_size
        places = [0, *(1 << n for n in range(9, max(9, size.bit_length())))]
        for place in places:
            file.seek(place)
            if file.read(8) == b"\x89HDF\r\n\x1a\n":
                return True
    return False


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Open a file for reading."""
    with library("h5py").File(path, "r") as file:
        yield file


def require_array(file: Any, name: str) -> Any:
    """Return an array of the file, not yet read.

    Raises
    ------
    ValueError
        There is none of that name.
    """
    array = file.get(name)
    if not isinstance(array, library("h5py").Dataset):
        raise ValueError(f"it lacks the array {name}; it has {', '.join(file) or 'nothing'}")
    return array


def find_images(file: Any, path: Path, name: str, *, ndim: int, expected: str) -> FoundImages:
    """Return uint8 images, mapped where they are stored as one uncompressed block, else still packed."""
    array = require_array(file, name)
    require_images(name, array.shape, array.dtype, ndim)
    offset = array.id.get_offset()  # None where it is packed, in chunks, in another file, or was never written
    if offset is not None:
        return np.memmap(path, mode="r", dtype=np.uint8, shape=array.shape, offset=offset)
    return PackedImages(path, array.shape, _slabs(path, name, expected))


def _slabs(path: Path, name: str, expected: str) -> Iterator[np.ndarray]:
    """Read some images at a time, whole chunks of the file so that each is unpacked once."""
    with reading(path, expected), open_hdf5(path) as file:
        array = file[name]
        rows = max(1, SLAB // math.prod(array.shape[1:]))
        height = array.shape[1]
        if array.chunks is not None:
            rows = max(1, rows // array.chunks[0]) * array.chunks[0]
            height = array.chunks[1]
        for start in range(0, array.shape[0], rows):
            slab = np.empty((min(rows, array.shape[0] - start), *array.shape[1:]), np.uint8)
            # A band of pixel rows at a time: chunks of a few pixels of very many images, as dSprites has them, are
            # otherwise scattered over all of the memory, which takes four times as long.
            for top in range(0, array.shape[1], height):
                slab[:, top : top + height] = array[start : start + rows, top : top + height]
            yield slab
