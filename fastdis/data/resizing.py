"""Images brought to another size, by Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdis.data.reading import library

FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


def check_resizing(size: int | None, resample: str) -> None:
    """Check what a user asked for.

    Raises
    ------
    ValueError
        ``size`` is not a positive number or None, or ``resample`` names no filter.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1):
        raise ValueError(f"size must be a positive whole number of pixels, or None to keep the file's, got {size!r}")
    if resample not in FILTERS:
        raise ValueError(f"resample must be one of {', '.join(FILTERS)}, got {resample!r}")


def resampling(name: str) -> Any:
    """Return Pillow's filter of that name."""
    return library("PIL.Image").Resampling[name.upper()]


def resized(images: np.ndarray, size: int, resample: str) -> np.ndarray:
    """Return uint8 images [n, H, W] or [n, H, W, 3] as [n, size, size] or [n, size, size, 3]."""
    pillow, chosen = library("PIL.Image"), resampling(resample)
    result = np.empty((len(images), size, size, *images.shape[3:]), np.uint8)
    for row, image in enumerate(images):
        result[row] = pillow.fromarray(np.ascontiguousarray(image)).resize((size, size), chosen)
    return result
