"""Images of a packed file, gathered in memory or unpacked once into a file that is memory-mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from fastdis.data.atomic import atomic_path
from fastdis.data.npy import read_header
from fastdis.data.reading import Progress, reporting

Cache = bool | str | os.PathLike[str] | None

#: Read and written at once, in bytes.
SLAB = 1 << 26


class PackedImages(NamedTuple):
    """Images of a file that is too slow to be read an image at a time."""

    source: Path
    #: [n, H, W] or [n, H, W, C]
    shape: tuple[int, ...]
    #: All images in order, uint8 [*, H, W] or [*, H, W, C]. The file is opened when the first is asked for, and what
    #: goes wrong in it is reported under its name.
    slabs: Iterator[np.ndarray]


FoundImages = np.ndarray | PackedImages


def require_images(name: str, shape: tuple[int, ...], dtype: np.dtype, ndim: int) -> None:
    """Check what a file calls its images, before any of them is read.

    Raises
    ------
    ValueError
        They are not uint8 [n, height, width], or [n, height, width, 3] where ``ndim`` is 4, or there are none.
    """
    if dtype != np.uint8 or len(shape) != ndim or not all(shape) or (ndim == 4 and shape[3] != 3):
        wanted = "[n, height, width]" if ndim == 3 else "[n, height, width, 3]"
        raise ValueError(f"its {name} are {dtype} {list(shape)}, expected uint8 {wanted}")


def gather_images(images: FoundImages, *, cache: Cache = None, progress: bool | Progress = False) -> np.ndarray:
    """Return images as an array.

    Parameters
    ----------
    images : ndarray or PackedImages
        An array comes back as it is.
    cache : bool or path-like, optional
        None or False: the images are read into memory. True: they are unpacked into ``<source>.cache.npy`` beside the
        file; a path: into that file. It is written whole or not at all and mapped from then on, for as long as the
        source keeps its name, size and time of modification; it is written anew when the source of that name changes.
        It is an ordinary ``.npy`` with a note of its source after the array.
    progress : bool or callable, optional
        True shows a bar on stderr; a callable is called as ``progress(images_done, images_in_all)``.

    Returns
    -------
    ndarray of uint8
        In memory, or memory-mapped for reading.

    Raises
    ------
    ValueError
        The source is damaged, or the cache is a file that was not written for this source: it is not replaced.
    OSError
        The cache cannot be written.
    """
    if isinstance(images, np.ndarray):
        return images
    source, shape, slabs = images
    if cache is None or cache is False:
        result = np.empty(shape, np.uint8)
        done = 0
        with reporting(progress, f"reading {source.name}") as report:
            for slab in slabs:
                result[done : done + len(slab)] = slab
                done += len(slab)
                report(done, len(result))
        return result

    path = source.with_name(f"{source.name}.cache.npy") if cache is True else Path(cache)
    note = {"source": source.name, "bytes": source.stat().st_size, "modified_ns": source.stat().st_mtime_ns}
    if not _is_fresh(path, shape, note):
        with (
            reporting(progress, f"unpacking {source.name}") as report,
            atomic_path(path) as temporary,
            temporary.open("wb") as file,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            done = 0
            for slab in slabs:
                file.write(np.ascontiguousarray(slab).data)
                done += len(slab)
                report(done, shape[0])
            file.write(json.dumps({"fastdis_cache": note}).encode())
    return np.load(path, mmap_mode="r")


def _is_fresh(path: Path, shape: tuple[int, ...], note: dict[str, Any]) -> bool:
    """Tell whether a cache holds the images of a source as it is now; refuse a file that is not its cache."""
    if not path.exists():
        return False
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder; expected the file to unpack {note['source']} into")
    with path.open("rb") as file:
        found = _read_note(file)
    if found is None or found[1].get("source") != note["source"]:
        raise ValueError(
            f"{path}: not a cache of {note['source']}, and it is not written over; "
            "remove it, or name another file for the cache"
        )
    return found == (shape, note)


def _read_note(file: IO[bytes]) -> tuple[tuple[int, ...], dict[str, Any]] | None:
    """Return the shape and the note of a cache; None where the file is none."""
    try:
        shape, _, dtype = read_header(file)
        if dtype != np.uint8:
            return None
        file.seek(int(np.prod(shape, dtype=np.int64)), os.SEEK_CUR)
        return shape, json.loads(file.read(1 << 16))["fastdis_cache"]
    except (ValueError, KeyError, TypeError, EOFError):
        return None
