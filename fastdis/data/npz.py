"""Arrays inside NumPy's ``.npz`` archives: read whole, mapped in place, or unpacked once."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastdis.data.cache import SLAB, FoundImages, PackedImages, require_images
from fastdis.data.npy import read_header
from fastdis.data.reading import reading


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array of numbers into memory."""
    _described(archive, name)
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def find_images(archive: zipfile.ZipFile, path: Path, name: str, *, ndim: int, expected: str) -> FoundImages:
    """Return uint8 images, mapped where they are stored uncompressed, else still packed."""
    shape, fortran_order, dtype = _described(archive, name)
    require_images(name, shape, dtype, ndim)
    if archive.getinfo(f"{name}.npy").compress_type == zipfile.ZIP_STORED:
        return _map_array(archive, path, name)
    return PackedImages(path, shape, _slabs(path, name, fortran_order, expected))


def _described(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return an array's header, after checking that the member is as long as the header says."""
    with archive.open(f"{name}.npy") as member:
        shape, fortran_order, dtype = read_header(member)
        start = member.tell()
    if dtype.hasobject:
        raise ValueError(f"its {name} are pickled objects, expected numbers")
    held = archive.getinfo(f"{name}.npy").file_size - start
    if held != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"its {name} are {dtype} {list(shape)} in {held} bytes, which do not fit")
    return shape, fortran_order, dtype


def _map_array(archive: zipfile.ZipFile, path: Path, name: str) -> np.ndarray:
    """Memory-map a member that is stored uncompressed."""
    with path.open("rb") as file:
        file.seek(archive.getinfo(f"{name}.npy").header_offset + 26)  # lengths of the file name and of the extra field
        lengths = file.read(4)
        file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), os.SEEK_CUR)
        shape, fortran_order, dtype = read_header(file)
        order: Any = "F" if fortran_order else "C"
        return np.memmap(path, mode="r", dtype=dtype, shape=shape, order=order, offset=file.tell())


def _slabs(path: Path, name: str, fortran_order: bool, expected: str) -> Iterator[np.ndarray]:
    """Unpack images some at a time."""
    with reading(path, expected), zipfile.ZipFile(path) as archive:
        if fortran_order:
            yield read_array(archive, name)
            return
        with archive.open(f"{name}.npy") as member:
            shape, _, _ = read_header(member)
            image = math.prod(shape[1:])
            rows = max(1, SLAB // image)
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                yield np.frombuffer(member.read(count * image), np.uint8).reshape(count, *shape[1:])
            member.read(1)  # at its end the member's checksum is compared
