"""dSprites: the published file and sub-grids of it, read; and the same files, drawn from scratch.

The drawing procedure reproduces the published images from their factors: every shape is a polygon whose corners are
rounded to 1/256 of a pixel, and a pixel is white where its centre lies inside by the even-odd rule. Over the 737,280
published images of 64 x 64 it differs in some tens of pixels among three thousand million.
"""

from __future__ import annotations

import operator
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastdis.data.atomic import atomic_path
from fastdis.data.factor_dataset import FactorDataset

FULL_SIZES = {"shape": 3, "scale": 6, "orientation": 40, "posX": 32, "posY": 32}
SUB_PIXELS = 256

Selection = int | Iterable[int] | None
Progress = Callable[[int, int], None]


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
        _select(values, name, full)
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


def load_dsprites(path: str | os.PathLike[str]) -> FactorDataset:
    """Read the published dSprites file, or a sub-grid of the same layout.

    Parameters
    ----------
    path : path-like
        ``dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz``, or a file of :func:`make_dsprites`.

    Returns
    -------
    FactorDataset
        The colour factor, which has one value, is dropped: five factors are left. Images are memory-mapped where the
        file stores them uncompressed, and read into memory (3 GB for the whole set) where it does not.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is truncated or damaged, is not dSprites, or contradicts itself.

    Notes
    -----
    The file holds its metadata as a pickle. Only the NumPy and built-in types the published file uses are unpickled;
    a file that asks for anything else is refused.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a dSprites .npz")
    try:
        with zipfile.ZipFile(path) as archive:
            missing = {"imgs.npy", "latents_classes.npy", "metadata.npy"} - set(archive.namelist())
            if missing:
                names = ", ".join(sorted(name.removesuffix(".npy") for name in missing))
                raise ValueError(f"it lacks {names}, which a dSprites file has")
            metadata = _read_metadata(archive)
            classes = _read_array(archive, "latents_classes")
            images = _map_array(archive, path, "imgs")
            if images is None:
                images = _read_array(archive, "imgs")
        return _dataset(images, classes, metadata)
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError, OSError) as error:
        raise ValueError(f"{path}: not a readable dSprites .npz ({error})") from error


# Drawing


def _select(values: Selection, name: str, full: int) -> list[int]:
    """Return positions on a factor's full grid."""
    if values is None:
        return list(range(full))
    if isinstance(values, bool | str | bytes):
        raise TypeError(f"{name} must be a whole number or an iterable of them, got {values!r}")
    if isinstance(values, int | np.integer):
        if not 1 <= values <= full:
            raise ValueError(f"{name} must ask for 1 to {full} values, got {values}")
        if values == full:
            return list(range(full))
        if name == "orientations":
            return [round(i * (full - 1) / values) for i in range(values)]
        if values == 1:
            return [(full - 1) // 2]
        return [round(i * (full - 1) / (values - 1)) for i in range(values)]
    try:
        positions = [operator.index(value) for value in values]
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number or an iterable of them, got {values!r}") from error
    if not positions or len(set(positions)) != len(positions) or not all(0 <= p < full for p in positions):
        raise ValueError(f"{name} must hold distinct positions from 0 to {full - 1}, at least one, got {positions}")
    return positions


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


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    if np.lib.format.read_magic(member) == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _read_metadata(archive: zipfile.ZipFile) -> dict[str, Any]:
    with archive.open("metadata.npy") as member:
        if not _read_header(member)[2].hasobject:
            raise ValueError("its metadata is not a pickled dict")
        # The published file was pickled by Python 2; latin-1 keeps its byte strings, arrays among them, as they are.
        metadata = _PlainUnpickler(member, encoding="latin1").load()
    if isinstance(metadata, np.ndarray) and metadata.shape == ():
        metadata = metadata.item()
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata is not a dict but {type(metadata).__name__}")
    return metadata


def _map_array(archive: zipfile.ZipFile, path: Path, name: str) -> np.ndarray | None:
    """Memory-map a member that is stored uncompressed; None where it is compressed."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # lengths of the file name and of the extra field in the local header
        lengths = file.read(4)
        file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), os.SEEK_CUR)
        shape, fortran_order, dtype = _read_header(file)
        order: Any = "F" if fortran_order else "C"
        return np.memmap(file, mode="r", dtype=dtype, shape=shape, order=order, offset=file.tell())


def _dataset(images: np.ndarray, classes: np.ndarray, metadata: dict[str, Any]) -> FactorDataset:
    """Check that the parts of a file agree, and put them together without the colour factor."""
    names = tuple(str(name) for name in metadata["latents_names"])
    sizes = tuple(int(size) for size in metadata["latents_sizes"])
    if names != ("color", *FULL_SIZES) or len(sizes) != len(names) or sizes[0] != 1:
        raise ValueError(f"its factors are {names} of sizes {sizes}, expected {('color', *FULL_SIZES)} with one colour")
    if images.ndim != 3 or images.dtype != np.uint8:
        raise ValueError(f"its imgs are {images.dtype} {list(images.shape)}, expected uint8 [n, height, width]")
    if classes.shape != (len(images), len(sizes)):
        raise ValueError(f"its latents_classes are {list(classes.shape)}, expected {[len(images), len(sizes)]}")
    dataset = FactorDataset(images, sizes[1:], names[1:], max_value=1)
    if not np.array_equal(classes[:, 1:], dataset.factors(np.arange(len(images))).numpy()):
        raise ValueError("its latents_classes are not the grid of its latents_sizes in order, the last factor fastest")
    if images[:: max(1, len(images) // 1000)].max() > 1:
        raise ValueError("its imgs hold values other than 0 and 1")
    return dataset
