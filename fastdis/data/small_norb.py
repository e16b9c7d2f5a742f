"""SmallNORB: photographs of toys, in the binary matrices it was published in."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path
from typing import Literal

import numpy as np

from fastdis.data.factor_dataset import FactorDataset
from fastdis.data.reading import reading
from fastdis.data.resizing import check_resizing, resized

Split = Literal["both", "training", "testing"]
SPLITS = ("training", "testing")

FACTOR_NAMES = ("category", "instance", "elevation", "azimuth", "lighting")

#: Element types, by the number that a file starts with.
TYPES = {0x1E3D4C51: "<f4", 0x1E3D4C53: "<f8", 0x1E3D4C54: "<i4", 0x1E3D4C55: "|u1", 0x1E3D4C56: "<i2"}


def load_small_norb(
    path: str | os.PathLike[str], *, split: Split = "both", size: int | None = None, resample: str = "lanczos"
) -> FactorDataset:
    """Read SmallNORB.

    Parameters
    ----------
    path : path-like
        The folder with the six published files, ``smallnorb-5x46789x9x18x6x2x96x96-training-{dat,cat,info}.mat`` and
        ``smallnorb-5x01235x9x18x6x2x96x96-testing-{dat,cat,info}.mat``, as they are or packed, ``.mat.gz``; or one of
        them.
    split : {"both", "training", "testing"}, optional
        Which toys. ``"both"``: all 48,600 images, with 10 instances of each category. ``"training"`` and
        ``"testing"``: 24,300 images, with the 5 instances of that split (4, 6, 7, 8, 9 and 0, 1, 2, 3, 5).
    size : int, optional
        Height and width to resize to; studies take 64. None keeps the 96 of the files.
    resample : {"nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"}, optional
        Pillow's filter for that. It changes scores: the reference library takes Lanczos.

    Returns
    -------
    FactorDataset
        Factors category 5 (animal, human, airplane, truck, car), instance 10 or 5, elevation 9, azimuth 18 and
        lighting 6, put into the order of the grid; the left image of each stereo pair, [96, 96] or [size, size], in
        memory: 448 MB for both splits at 96. ``factor_values`` are the published numbers of category, instance and
        lighting, and elevation (30 to 70) and azimuth (0 to 340) in degrees.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or a file of the split is missing.
    ValueError
        A file is truncated or damaged, or the files are not a complete grid; or an argument is not one that exists.
    ImportError
        Pillow is needed to resize, and not installed.

    Notes
    -----
    A file starts with a number for its element type (0x1E3D4C55 uint8, 0x1E3D4C54 int32), the number of dimensions,
    and the sizes of at least three dimensions, all int32, low byte first. ``dat`` is uint8 [24300, 2, 96, 96], ``cat``
    int32 [24300], ``info`` int32 [24300, 4]: instance, elevation, azimuth, lighting. Packed sizes: training dat
    131,896,188 bytes (SHA-256 ``5ffd6272...``), testing dat 130,799,817 (``cf7104ee...``), cat 348 and 347, info
    71,052 and 10,428.

    Two conventions for the instance are in use. disent takes one split, and the instance is a factor of 5 values: that
    is ``split="training"``. The reference library takes both splits, and the instance is no factor but is drawn at
    random for each image: that is ``split="both"`` with the instance's column left out of what a metric is given,
    ``factors[:, [0, 2, 3, 4]]``.

    Azimuths are stored as 0, 2, .., 34, and halved here. The azimuths of two toys are not aligned: 0 is another side of
    each. The reference library declares pixels as signed, which they are not.
    """
    if split not in ("both", *SPLITS):
        raise ValueError(f"split must be both, training or testing, got {split!r}")
    check_resizing(size, resample)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder; expected one with the files of SmallNORB")
    folder = path if path.is_dir() else path.parent

    images, columns = [], []
    for part in SPLITS if split == "both" else (split,):
        pixels, labels = _read_split(folder, part)
        images.append(pixels if size is None else resized(pixels, size, resample))
        columns.append(labels)
    labels = np.concatenate(columns)
    values = [np.unique(column) for column in labels.T]
    sizes = tuple(len(column) for column in values)
    rows = np.ravel_multi_index([np.searchsorted(v, column) for v, column in zip(values, labels.T, strict=True)], sizes)
    if len(rows) != math.prod(sizes) or len(np.unique(rows)) != len(rows):
        grid = ", ".join(f"{name} {count}" for name, count in zip(FACTOR_NAMES, sizes, strict=True))
        raise ValueError(f"{folder}: {len(rows)} images of SmallNORB, expected one for each combination of {grid}")
    ordered = np.empty((len(rows), *images[0].shape[1:]), np.uint8)
    start = 0
    for pixels in images:
        ordered[rows[start : start + len(pixels)]] = pixels
        start += len(pixels)
    category, instance, elevation, azimuth, lighting = values
    units = (category, instance, 30 + 5 * elevation, 20 * azimuth, lighting)
    return FactorDataset(ordered, sizes, FACTOR_NAMES, factor_values=units)


def find_files(folder: Path, split: str, kind: str) -> list[Path]:
    """Return the files of one kind, ``dat``, ``cat`` or ``info``, of a split."""
    return sorted(folder.glob(f"smallnorb-*-{split}-{kind}.mat")) or sorted(
        folder.glob(f"smallnorb-*-{split}-{kind}.mat.gz")
    )


def _read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the left images, uint8 [n, H, W], and the labels, int64 [n, 5], in the order of the factors."""
    pairs, categories, infos = (_read_matrix(_find_file(folder, split, kind), kind) for kind in ("dat", "cat", "info"))
    if not len(pairs) == len(categories) == len(infos):
        raise ValueError(
            f"{folder}: the {split} files of SmallNORB hold {len(pairs)} images, {len(categories)} categories and "
            f"{len(infos)} infos, expected as many of each"
        )
    labels = np.column_stack([categories, infos]).astype(np.int64)
    if labels.min() < 0 or (labels[:, 3] % 2).any():
        info = _find_file(folder, split, "info")
        raise ValueError(f"{info}: azimuths are odd or numbers negative, expected azimuths 0, 2, .., 34")
    labels[:, 3] //= 2
    return pairs[:, 0].copy(), labels  # a copy, so that the right images are let go


def _find_file(folder: Path, split: str, kind: str) -> Path:
    files = find_files(folder, split, kind)
    if not files:
        other = SPLITS[1 - SPLITS.index(split)]
        hint = f'; for one split alone, split="{other}"' if find_files(folder, other, kind) else ""
        raise FileNotFoundError(f"{folder}: no smallnorb-...-{split}-{kind}.mat or .mat.gz{hint}")
    return files[0]


def _read_matrix(path: Path, kind: str) -> np.ndarray:
    """Read one of the files and check that it is what its name says."""
    with reading(path, f"SmallNORB {kind} file"):
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        start = np.frombuffer(data, "<i4", count=2)
        if int(start[0]) not in TYPES:
            raise ValueError(f"it starts with {int(start[0]):#x}, expected one of {', '.join(map(hex, TYPES))}")
        dtype, ndim = np.dtype(TYPES[int(start[0])]), int(start[1])
        if not 0 <= ndim <= 8:
            raise ValueError(f"it has {ndim} dimensions")
        # At least three sizes are written, whatever the number of dimensions.
        header = 4 * (2 + max(3, ndim))
        shape = tuple(np.frombuffer(data, "<i4", count=ndim, offset=8).tolist())
        wanted = header + math.prod(shape) * dtype.itemsize
        if len(data) != wanted or min(shape, default=0) < 1:
            raise ValueError(f"it holds {len(data)} bytes, expected {wanted} for {dtype} {list(shape)}")
        array = np.frombuffer(data, dtype, offset=header).reshape(shape)
        fits = {
            "dat": dtype == np.uint8 and ndim == 4 and shape[1] == 2,
            "cat": dtype == np.int32 and ndim == 1,
            "info": dtype == np.int32 and ndim == 2 and shape[1] == 4,
        }
        if not fits[kind]:
            layout = {"dat": "uint8 [n, 2, H, W]", "cat": "int32 [n]", "info": "int32 [n, 4]"}[kind]
            raise ValueError(f"it holds {dtype} {list(shape)}, expected {layout}")
        return array
