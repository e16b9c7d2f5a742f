"""dSprites: the published files and sub-grids of it, read; and the same files, drawn from scratch.

The drawing procedure reproduces the published images from their factors: every shape is a polygon whose corners are
rounded to 1/256 of a pixel, and a pixel is white where its centre lies inside by the even-odd rule. Over the 737,280
published images of 64 x 64 it differs in some tens of pixels among three thousand million.
"""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastdis.data import hdf5, npz
from fastdis.data.atomic import atomic_path
from fastdis.data.cache import Cache, FoundImages, gather_images
from fastdis.data.factor_dataset import FactorDataset
from fastdis.data.grid import grid_values
from fastdis.data.hdf5 import is_hdf5
from fastdis.data.npy import read_header
from fastdis.data.npz import read_array
from fastdis.data.reading import Progress, reading, require_file
from fastdis.data.selection import Selection, select

FULL_SIZES = {"shape": 3, "scale": 6, "orientation": 40, "posX": 32, "posY": 32}
SUB_PIXELS = 256

EXPECTED = "dSprites .npz or .h5"


def make_dsprites(
    path: str | os.PathLike[str],
    *,
    size: int = 64,
    shapes: Selection = None,
    scales: Selection = None,
    orientations: Selection = None,
    x: Selection = None,
    y: Selection = None,
    compress: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Draw dSprites, or a sub-grid of it, into a file laid out like the published one.

    Parameters
    ----------
    path : path-like
        The ``.npz`` to write. It appears when it is complete; a file already there is replaced.
    size : {64, 32}, optional
        Height and width in pixels. At 32 all coordinates are halved before they are rounded.
    shapes, scales, orientations, x, y : int or iterable of int, optional
        Which values of a factor to draw; all of them by default (3, 6, 40, 32, 32). An iterable holds positions on the
        full grid, in the order they are to have in the file. A number asks for that many values evenly spread over the
        grid, first and last included (the middle one for 1). Shapes are 0 square, 1 ellipse, 2 heart.
        Orientations 0 and 39 of the full grid are the same images, 0 and 360 degrees; a number below 40 therefore
        spreads over the turn without repeating its start.
    compress : bool, optional
        Whether to compress, as the published file is. An uncompressed file takes ``size ** 2`` bytes an image and is
        memory-mapped when loaded.
    progress : callable, optional
        Called as ``progress(images_done, images_in_all)`` while drawing.

    Returns
    -------
    Path
        The file written: ``imgs`` (uint8 zeros and ones, [n, size, size]), ``latents_classes`` (int64, [n, 6],
        positions on the grid that was drawn), ``latents_values`` (float64, [n, 6]) and ``metadata`` (a pickled dict).
        Columns are colour (one value), shape, scale, orientation, posX, posY; the last varies fastest.

    Raises
    ------
    TypeError, ValueError
        A size or selection that does not exist.
    OSError
        The file cannot be written.
    """
    if size not in (32, 64):
        raise ValueError(f"size must be 32 or 64, got {size!r}")
    chosen = [
        # Orientations come full circle: a number of them spreads over the turn without repeating its start.
        select(values, name, full, period=full - 1 if name == "orientations" else None)
        for (name, values), full in zip(
            {"shapes": shapes, "scales": scales, "orientations": orientations, "x": x, "y": y}.items(),
            FULL_SIZES.values(),
            strict=True,
        )
    ]
    possible = _possible_values(chosen)
    sizes = np.array([len(values) for values in possible.values()])
    total = int(sizes.prod())
    classes = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), axis=-1).reshape(total, len(sizes))
    values = np.stack([column[classes[:, k]] for k, column in enumerate(possible.values())], axis=-1)
    metadata = {
        "title": "dSprites dataset",
        "description": "Binary images of one sprite, drawn from every combination of its factors by fastdis.",
        "version": 1,
        "date": "",
        "author": "fastdis",
        "latents_names": tuple(possible),
        "latents_sizes": sizes,
        "latents_possible_values": possible,
    }
    path = Path(path)
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    # Level 1 packs these images within a few per cent of the default level, in a third of its time.
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", method, compresslevel=1) as archive:
        with archive.open("imgs.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (total, size, size)}
            np.lib.format.write_array_header_1_0(member, header)
            done = 0
            for images in _draw(possible, size):
                member.write(images.data)
                done += len(images)
                if progress is not None:
                    progress(done, total)
        for name, array in (
            ("latents_classes", classes),
            ("latents_values", values),
            ("metadata", np.array(metadata, dtype=object)),
        ):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array)
    return path


def load_dsprites(
    path: str | os.PathLike[str], *, cache: Cache = None, progress: bool | Progress = False
) -> FactorDataset:
    """Read the published dSprites file, ``.npz`` or ``.h5``, or a sub-grid of the same layout.

    Parameters
    ----------
    path : path-like
        ``dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz``, its twin ``.h5`` (28,024,106 bytes, SHA-256
        ``729fa22e884c9c500e1f17415d580746b4c5894fbbb780a1319bbcfa39a745bb``), or a file of :func:`make_dsprites`.
    cache : bool or path-like, optional
        Where the file is compressed: None reads the images into memory (3 GB for the whole set); True unpacks them once
        into ``<path>.cache.npy`` beside the file, a path into that file, and memory-maps it, now and the next time.
        A file that was not unpacked from ``path`` is never written over.
    progress : bool or callable, optional
        True shows a bar on stderr while packed images are read; a callable is called as
        ``progress(images_done, images_in_all)``.

    Returns
    -------
    FactorDataset
        Factors shape 3, scale 6, orientation 40, posX 32, posY 32 in the published file; images [64, 64] of zeros and
        ones. The colour factor, which has one value, is dropped, as the field's studies do. Images are memory-mapped
        where the file stores them uncompressed. ``factor_values`` are the file's.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        There is no such file.
    ValueError
        The file is truncated or damaged, is not dSprites, or contradicts itself; or the cache is some other file.
    ImportError
        The file is an ``.h5``, and h5py is not installed.

    Notes
    -----
    Layout of the ``.npz``: ``imgs`` uint8 [n, 64, 64] of zeros and ones, ``latents_classes`` int64 [n, 6],
    ``latents_values`` float64 [n, 6], ``metadata`` a pickled dict. Only the NumPy and built-in types that the published
    pickle uses are unpickled; a file that asks for anything else is refused. Layout of the ``.h5``: ``imgs``,
    ``latents/classes``, ``latents/values``. Its chunks hold 2 x 4 pixels of 23,040 images each, so that reading one
    image unpacks 94 MB: it is therefore read whole or unpacked by ``cache``.

    Images of orientation 0 and 39 are the same, 0 and 360 degrees, in the published set: no code can tell them apart.
    """
    path = Path(path)
    require_file(path, EXPECTED)
    read = _read_h5 if is_hdf5(path) else _read_npz
    with reading(path, EXPECTED):
        found, classes, values, sizes = read(path)
        names = tuple(FULL_SIZES)
        if len(classes) != found.shape[0] or math.prod(sizes) != len(classes):
            raise ValueError(
                f"it has {found.shape[0]} imgs and {len(classes)} latents, expected the grid of {math.prod(sizes)} "
                f"that its factors {sizes} make"
            )
        grid = np.indices(sizes).reshape(len(sizes), -1).T
        if not np.array_equal(classes[:, 1:], grid):
            raise ValueError(f"its latents are not the grid of sizes {sizes} in order, the last factor fastest")
        factor_values = None if values is None else grid_values(values[:, 1:], sizes)
    images = gather_images(found, cache=cache, progress=progress)
    if images[:: max(1, len(images) // 1000)].max() > 1:
        raise ValueError(f"{path}: not a readable {EXPECTED} (its imgs hold values other than 0 and 1)")
    return FactorDataset(images, sizes, names, max_value=1, factor_values=factor_values)


# Drawing


def _possible_values(chosen: list[list[int]]) -> dict[str, np.ndarray]:
    """Return the values of each factor, colour included, at the chosen positions on the full grid."""
    full = (
        np.arange(1.0, 4.0),
        np.linspace(0.5, 1.0, 6),
        np.linspace(0.0, 2 * np.pi, 40),
        np.linspace(0.0, 1.0, 32),
        np.linspace(0.0, 1.0, 32),
    )
    columns = (values[positions] for values, positions in zip(full, chosen, strict=True))
    return {"color": np.ones(1), **dict(zip(FULL_SIZES, columns, strict=True))}


def _outline(shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners (a, b) of a shape of scale 1 about its centre, in pixels of a 64 x 64 image."""
    if shape == 1:
        return np.array([-9.6, 9.6, 9.6, -9.6]), np.array([-9.6, -9.6, 9.6, 9.6])
    if shape == 2:
        t = 2 * np.pi * np.arange(100) / 100
        return 9.6 * 1.33 * np.cos(t), 9.6 / 1.33 * np.sin(t)
    t = 2 * np.pi * np.arange(150) / 150
    b = -(19.2 / 29) * (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) - 1.44
    return 9.6 * np.sin(t) ** 3, b


def _draw(possible: dict[str, np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the images of one shape, scale and orientation at a time, uint8 [positions, size, size], in file order."""
    unit = SUB_PIXELS * size / 64
    centre_x = 16 + 32 * possible["posX"]
    centre_y = 16 + 32 * possible["posY"]
    for shape in possible["shape"]:
        a, b = _outline(int(shape))
        for scale in possible["scale"]:
            for angle in possible["orientation"]:
                cos, sin = np.cos(angle), np.sin(angle)
                corners_x = np.rint(unit * (centre_x[:, None] + scale * (a * cos + b * sin))).astype(np.int64)
                corners_y = np.rint(unit * (centre_y[:, None] + scale * (b * cos - a * sin))).astype(np.int64)
                yield _fill(corners_x, corners_y, size)


def _fill(corners_x: np.ndarray, corners_y: np.ndarray, size: int) -> np.ndarray:
    """Fill one polygon at every combination of horizontal and vertical positions, by the even-odd rule.

    ``corners_x`` is [X, corners] and ``corners_y`` [Y, corners], in 1/256 pixel; returns uint8 [X * Y, size, size].
    Which edges cross which rows depends on the vertical position alone, so it is found once for all X. A row of
    pixels is the bits of one 64-bit word: an edge that crosses the row toggles all pixels whose centre lies left of
    the crossing, which is an exclusive or with a mask of low bits.
    """
    next_x, next_y = np.roll(corners_x, -1, axis=1), np.roll(corners_y, -1, axis=1)
    row_centres = SUB_PIXELS * np.arange(size) + SUB_PIXELS // 2
    above = corners_y[:, None, :] >= row_centres[:, None]
    crossed = above != (next_y[:, None, :] >= row_centres[:, None])
    at_y, row, edge = np.nonzero(crossed)  # ordered by vertical position, then row

    # Number of pixels c with 256 c + 128 < x1 + (py - y1) (x2 - x1) / (y2 - y1), in whole numbers: exact.
    rise = next_y[at_y, edge] - corners_y[at_y, edge]
    run = (next_x[:, edge] - corners_x[:, edge]) * np.sign(rise)
    rise = np.abs(rise)
    numerator = (corners_x[:, edge] - SUB_PIXELS // 2) * rise + (row_centres[row] - corners_y[at_y, edge]) * run
    toggled = np.clip(-(-numerator // (SUB_PIXELS * rise)), 0, size)

    masks = np.array([(1 << count) - 1 for count in range(size + 1)], dtype="<u8")
    line = at_y * size + row
    lines, first = np.unique(line, return_index=True)
    words = np.zeros((len(corners_x), len(corners_y) * size), dtype="<u8")
    words[:, lines] = np.bitwise_xor.reduceat(masks[toggled], first, axis=1)
    bits = np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1, count=size, bitorder="little")
    return bits.reshape(-1, size, size)


# Reading


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles arrays, numbers, strings and containers, and nothing that could run code."""

    ALLOWED = frozenset(
        {
            ("_codecs", "encode"),
            ("collections", "OrderedDict"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed type or function."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"its metadata asks for {module}.{name}, which a dSprites file does not use")
        return super().find_class(module, name)


#: Images, latents_classes, latents_values where the file has them, and the sizes of the factors without the colour.
Parts = tuple[FoundImages, np.ndarray, np.ndarray | None, tuple[int, ...]]


def _read_npz(path: Path) -> Parts:
    with zipfile.ZipFile(path) as archive:
        missing = {"imgs.npy", "latents_classes.npy", "metadata.npy"} - set(archive.namelist())
        if missing:
            lacking = ", ".join(sorted(name.removesuffix(".npy") for name in missing))
            raise ValueError(f"it lacks {lacking}, which a dSprites file has")
        metadata = _read_metadata(archive)
        names = tuple(str(name) for name in metadata["latents_names"])
        sizes = tuple(int(size) for size in metadata["latents_sizes"])
        if names != ("color", *FULL_SIZES) or len(sizes) != len(names) or sizes[0] != 1:
            raise ValueError(
                f"its factors are {names} of sizes {sizes}, expected {('color', *FULL_SIZES)} with one colour"
            )
        classes = read_array(archive, "latents_classes")
        _require_six_columns(classes, "latents_classes")
        values = read_array(archive, "latents_values") if "latents_values.npy" in archive.namelist() else None
        return npz.find_images(archive, path, "imgs", ndim=3, expected=EXPECTED), classes, values, sizes[1:]


def _read_h5(path: Path) -> Parts:
    with hdf5.open_hdf5(path) as file:
        classes = hdf5.require_array(file, "latents/classes")[...]
        values = hdf5.require_array(file, "latents/values")[...]
        _require_six_columns(classes, "latents/classes")
        # The file does not say how many values a factor takes.
        sizes = tuple(int(size) for size in classes.max(axis=0, initial=0) + 1)
        if sizes[0] != 1:
            raise ValueError(f"its latents/classes have {sizes[0]} colours, expected one")
        return hdf5.find_images(file, path, "imgs", ndim=3, expected=EXPECTED), classes, values, sizes[1:]


def _require_six_columns(classes: np.ndarray, name: str) -> None:
    if classes.ndim != 2 or classes.shape[1] != 1 + len(FULL_SIZES) or classes.dtype.kind not in "iu":
        raise ValueError(f"its {name} are {classes.dtype} {list(classes.shape)}, expected whole numbers [n, 6]")


def _read_metadata(archive: zipfile.ZipFile) -> dict[str, Any]:
    with archive.open("metadata.npy") as member:
        if not read_header(member)[2].hasobject:
            raise ValueError("its metadata is not a pickled dict")
        # The published file was pickled by Python 2; latin-1 keeps its byte strings, arrays among them, as they are.
        metadata = _PlainUnpickler(member, encoding="latin1").load()
    if isinstance(metadata, np.ndarray) and metadata.shape == ():
        metadata = metadata.item()
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata is not a dict but {type(metadata).__name__}")
    return metadata
