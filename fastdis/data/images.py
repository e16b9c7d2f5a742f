"""Where the images of a dataset come from: arrays, files mapped into memory, rows of either."""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple, Protocol

import numpy as np


class Images(Protocol):
    """What :class:`~fastdis.data.FactorDataset` asks of its images; a NumPy array of uint8 is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, H, W] or [n, H, W, C]."""

    @property
    def dtype(self) -> np.dtype:
        """Always uint8."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return a copy of the images at ``rows``, int64 [b]."""


class ReopensMaps:
    """Pickles memory-mapped arrays as the path they are mapped from, so that a worker process maps them anew.

    NumPy pickles the content of a map, which for a dataset is gigabytes for every worker that is spawned.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: _packed(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {
            name: value.open() if isinstance(value, _MappedPart) else value for name, value in state.items()
        }


class SelectedImages(ReopensMaps):
    """Rows of other images, which are not copied.

    Parameters
    ----------
    images : Images
        The images to choose from, [n, H, W] or [n, H, W, C].
    rows : ndarray of int64, [m]
        Which of them, in order.
    """

    def __init__(self, images: Images, rows: np.ndarray) -> None:
        self._images = images
        self._rows = rows
        self.shape = (len(rows), *images.shape[1:])
        self.dtype = images.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self._images[self._rows[rows]]


class _MappedPart(NamedTuple):
    """Where in which file an array lies."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def open(self) -> np.memmap:
        return np.memmap(self.path, mode="r", dtype=self.dtype, shape=self.shape, offset=self.offset)


def _packed(value: Any) -> Any:
    """Return the place of a memory-mapped array in its file, and anything else as it is."""
    if not isinstance(value, np.memmap) or value.filename is None or value.mode == "c" or not value.flags.c_contiguous:
        return value
    # A slice of a map keeps the offset of the whole: where the slice starts is told from the addresses. The map
    # itself starts at a multiple of the granularity.
    start = np.frombuffer(value._mmap, np.uint8).ctypes.data  # type: ignore[attr-defined]
    offset = value.offset - value.offset % mmap.ALLOCATIONGRANULARITY + value.ctypes.data - start
    return _MappedPart(str(value.filename), offset, value.shape, value.dtype)
