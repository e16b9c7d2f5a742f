"""Coloured 3D shapes, drawn from scratch into a file laid out like 3D Shapes."""

from __future__ import annotations

import colorsys
import errno
import io
import itertools
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastdis.data import _host_shapes3d as renderer
from fastdis.data.atomic import atomic_path
from fastdis.data.reading import Progress, library
from fastdis.data.selection import Selection, select

# What the labels of 3D Shapes hold.
VALUES = {
    "floor_hue": np.arange(10) / 10,
    "wall_hue": np.arange(10) / 10,
    "object_hue": np.arange(10) / 10,
    "scale": np.linspace(0.75, 1.25, 8),
    "shape": np.arange(4.0),
    "orientation": np.linspace(-30.0, 30.0, 15),
}

# Radius and height of each shape at scale 1: cube (the radius is half a side), cylinder, sphere, capsule.
PROPORTIONS = ((0.95, 1.9), (1.0, 2.0), (1.1, 2.2), (0.75, 2.6))
SAMPLES = 4
BLOCK_BYTES = 2**26  # of images drawn before they are written
CHUNK_BYTES = 2**16  # of images compressed together: neighbours share much, and one is still quickly read
GZIP_LEVEL = 1  # twice as fast as the default, for a file that is a tenth larger


def make_shapes3d(
    path: str | os.PathLike[str],
    *,
    size: int = 64,
    floor_hues: Selection = None,
    wall_hues: Selection = None,
    object_hues: Selection = None,
    scales: Selection = None,
    shapes: Selection = None,
    orientations: Selection = None,
    compress: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Draw coloured 3D shapes, or a sub-grid of them, into a file laid out like the published 3D Shapes.

    One object stands in a room, which a camera looks at from different sides. Grid, order, labels and layout are
    those of 3D Shapes (Burgess and Kim, 2018), so that whatever reads ``3dshapes.h5`` reads this file; the scene is
    our own, and no pixel is meant to be equal.

    Parameters
    ----------
    path : path-like
        The ``.h5`` to write. It appears when it is complete; a file already there is replaced.
    size : {64, 32}, optional
        Height and width in pixels.
    floor_hues, wall_hues, object_hues, scales, shapes, orientations : int or iterable of int, optional
        Which values of a factor to draw; all of them by default (10, 10, 10, 8, 4, 15). An iterable holds positions
        on the full grid, in the order they are to have in the file. A number asks for that many values evenly spread
        over the grid, first and last included (the middle one for 1); for hues, which are a circle, evenly spread over
        it from the first.
        Hues are 0, 0.1, ... 0.9 of a turn, at full saturation and value; scales go from 0.75 to 1.25; shapes are
        0 cube, 1 cylinder, 2 sphere, 3 capsule; orientations go from -30 to 30 degrees.
    compress : bool, optional
        Whether to compress the images with gzip, a few to a chunk. The whole set of 64 x 64 takes 5.9 GB as it is,
        from where it is memory-mapped when loaded, and about 0.5 GB compressed, which are held in memory until they are
        complete, at the cost of several times the time.
    progress : callable, optional
        Called as ``progress(images_done, images_in_all)`` while drawing.

    Returns
    -------
    Path
        The file written: ``images`` (uint8, [n, size, size, 3], RGB) and ``labels`` (float64, [n, 6], the values of the
        factors). Columns are floor hue, wall hue, object hue, scale, shape, orientation; the last varies fastest.

    Raises
    ------
    TypeError, ValueError
        A size or selection that does not exist.
    OSError
        The file cannot be written, or the disk has no room for it. Nothing is left behind.
    ImportError
        h5py is not installed.

    Notes
    -----
    The room has a floor and three walls, and is open towards the camera. Orientation turns the camera about the
    object, and with it, in the picture, the room, its light and the object's shadow: it shows for round objects too.
    Light from afar, Lambert's law and an ambient part give each point its brightness, from 0 to 1, by which the colour
    of its surface is multiplied. A pixel is the mean of 4 x 4 rays.

    Geometry (scale, shape, orientation) is ray-cast once, then each of up to 1,000 colourings is a sum of three
    products a pixel, in whole numbers. The file is the same for any number of threads (those of
    ``torch.get_num_threads()``) and on every instruction set, and, compiled or not, on every x86-64 machine.
    """
    if size not in (32, 64):
        raise ValueError(f"size must be 32 or 64, got {size!r}")
    chosen = (floor_hues, wall_hues, object_hues, scales, shapes, orientations)
    values = [
        full[select(selection, f"{name}s", len(full), period=len(full) if name.endswith("hue") else None)]
        for (name, full), selection in zip(VALUES.items(), chosen, strict=True)
    ]
    labels = np.stack(np.meshgrid(*values, indexing="ij"), axis=-1).reshape(-1, len(values))
    library("h5py")  # or its absence would show when there is a folder already
    write = _write_packed if compress else _write_flat
    path = Path(path)
    with atomic_path(path) as temporary:
        write(temporary, labels, _draw(values, size), size, progress)
    return path


# Drawing


def _draw(values: list[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield images, uint8 [some, size, size, 3], in file order; each block is overwritten by the next."""
    geometries = np.array([_geometry(*triple) for triple in itertools.product(*values[3:])])
    colors = np.array([[_color(hue) for hue in triple] for triple in itertools.product(*values[:3])], np.uint16)
    weights = renderer.weights(renderer.Scene().numbers(), geometries, size, SAMPLES)
    colorings = max(1, BLOCK_BYTES // (len(geometries) * size * size * 3))
    block = np.empty((min(colorings, len(colors)), len(geometries), size * size, 3), np.uint8)
    for start in range(0, len(colors), colorings):
        part = colors[start : start + colorings]
        images = block[: len(part)]
        renderer.images(weights, part, images)
        yield images.reshape(-1, size, size, 3)


def _geometry(scale: float, shape: float, orientation: float) -> tuple[float, ...]:
    radius, height = PROPORTIONS[int(shape)]
    azimuth = math.radians(orientation)
    return shape, scale * radius, scale * height, math.cos(azimuth), math.sin(azimuth)


def _color(hue: float) -> list[int]:
    return [round(channel * renderer.FULL_COLOR) for channel in colorsys.hsv_to_rgb(hue, 1.0, 1.0)]


# Writing. HDF5 takes the process down where a disk is full, so that it writes to memory, and we to the file.


def _write_flat(
    path: Path, labels: np.ndarray, blocks: Iterator[np.ndarray], size: int, progress: Progress | None
) -> None:
    """Write the images as one uncompressed block at the end of the file, where they lie as they do in memory."""
    h5py = library("h5py")
    shape = (len(labels), size, size, 3)
    needed, free = math.prod(shape) + labels.nbytes, shutil.disk_usage(path.parent).free
    if free < needed:
        problem = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        raise OSError(errno.ENOSPC, problem, str(path.parent))
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # the same images make the same file
    head = io.BytesIO()
    with h5py.File(head, "w") as file:
        file["labels"] = labels
        space = h5py.h5s.create_simple(shape)
        offset = h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, properties).get_offset()
    done = 0
    with path.open("wb") as raw:
        raw.write(head.getbuffer())
        raw.seek(offset)
        for images in blocks:
            raw.write(images.data)
            done += len(images)
            if progress is not None:
                progress(done, len(labels))


def _write_packed(
    path: Path, labels: np.ndarray, blocks: Iterator[np.ndarray], size: int, progress: Progress | None
) -> None:
    """Write the images in chunks, compressed by threads of our own, since HDF5 has one."""
    shape = (len(labels), size, size, 3)
    rows = min(len(labels), CHUNK_BYTES // math.prod(shape[1:]))
    whole = io.BytesIO()
    done = 0
    with library("h5py").File(whole, "w") as file, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        file["labels"] = labels
        images = file.create_dataset(
            "images", shape, "u1", chunks=(rows, *shape[1:]), compression="gzip", compression_opts=GZIP_LEVEL
        )
        for chunks in _chunks(blocks, rows):
            for packed in pool.map(partial(zlib.compress, level=GZIP_LEVEL), chunks):
                images.id.write_direct_chunk((done, 0, 0, 0), packed)
                done += rows
            if progress is not None:
                progress(min(done, len(labels)), len(labels))
    path.write_bytes(whole.getbuffer())


def _chunks(blocks: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Cut images [some, ...] into whole chunks [some, rows, ...]; zeros fill the last one."""
    rest = np.empty(0, np.uint8)
    for block in blocks:
        images = np.concatenate([rest, block]) if len(rest) else block
        whole = len(images) // rows * rows
        if whole:
            yield images[:whole].reshape(-1, rows, *images.shape[1:])
        rest = images[whole:].copy()  # the next block takes this one's place
    if len(rest):
        yield np.concatenate([rest, np.zeros((rows - len(rest), *rest.shape[1:]), np.uint8)])[None]
