"""Cars3D: renderings of car models, in the archive of the visual analogy paper or unpacked from it."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from fastdis.data.factor_dataset import FactorDataset
from fastdis.data.reading import Progress, library, reading, reporting
from fastdis.data.resizing import check_resizing, resized

FACTOR_NAMES = ("elevation", "azimuth", "type")
ELEVATIONS, AZIMUTHS = 4, 24

#: Where the cars are within a folder that a user may point at.
PLACES = (".", "cars", "data/cars")


def load_cars3d(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    resample: str = "lanczos",
    progress: bool | Progress = False,
) -> FactorDataset:
    """Read Cars3D.

    Parameters
    ----------
    path : path-like
        ``nips2015-analogy-data.tar.gz`` (MD5 ``4e866a7919c1beedf53964e6f7a23686``), or the folder it unpacks to, its
        ``data`` or its ``cars``: the one that holds ``list.txt``.
    size : int, optional
        Height and width to resize to; studies take 64. None keeps the 128 of the files.
    resample : {"nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"}, optional
        Pillow's filter for that. It changes scores: the reference library takes Lanczos, others bilinear.
    progress : bool or callable, optional
        True shows a bar on stderr; a callable is called as ``progress(cars_done, cars_in_all)``.

    Returns
    -------
    FactorDataset
        Factors elevation 4, azimuth 24 and type, 183 in the published set: as many as ``list.txt`` names, in its order.
        Images [128, 128, 3], or [size, size, 3], in memory: 864 MB at 128 and 216 MB at 64.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder, or ``list.txt`` names a car that is not there.
    ValueError
        A file is truncated or damaged, is not Cars3D, or ``size`` or ``resample`` is not one that exists.
    ImportError
        SciPy, or Pillow where images are resized, is not installed.

    Notes
    -----
    Layout: ``cars/list.txt`` with a name a line, and for each ``cars/<name>.mat`` (``car_001_mesh.mat`` and so on) with
    ``im`` uint8 [128, 128, 3, 24, 4]: height, width, colour, azimuth, elevation. The grid has the type fastest, as the
    field's studies have it.

    Pitfall: the reference library takes the cars in the order in which the folder happens to list them, so that its
    types have other numbers on every machine; here the order is that of ``list.txt``.
    """
    check_resizing(size, resample)
    path = Path(path)
    names, content, where = _open_folder(path) if path.is_dir() else _open_archive(path)
    images = None
    with reporting(progress, "reading Cars3D") as report:
        for position, name in enumerate(names):
            file = where / f"{name}.mat"
            with reading(file, "Cars3D .mat") if path.is_dir() else reading(path, f"Cars3D archive, in {file}"):
                car = _read_car(content(name))
                if size is not None:
                    car = resized(car, size, resample)
                if images is None:
                    images = np.empty((ELEVATIONS * AZIMUTHS, len(names), *car.shape[1:]), np.uint8)
                if car.shape[1:] != images.shape[2:]:
                    raise ValueError(f"its images are {list(car.shape[1:3])}, and the others {list(images.shape[2:4])}")
                images[:, position] = car
            report(position + 1, len(names))
    assert images is not None  # there is at least one name
    sizes = (ELEVATIONS, AZIMUTHS, len(names))
    return FactorDataset(images.reshape(-1, *images.shape[2:]), sizes, FACTOR_NAMES)


def find_cars(path: Path) -> Path | None:
    """Return the folder that holds ``list.txt`` and cars, if ``path`` is it or holds it."""
    for place in PLACES:
        folder = path / place
        if (folder / "list.txt").is_file() and any(folder.glob("car_*.mat")):
            return folder
    return None


def _open_folder(path: Path) -> tuple[list[str], Callable[[str], bytes], Path]:
    """Return the names of the cars, what reads the file of one, and where these files are."""
    folder = find_cars(path)
    if folder is None:
        raise FileNotFoundError(f"{path}: no cars/list.txt with cars/car_001_mesh.mat and so on; expected Cars3D")
    with reading(folder / "list.txt", "Cars3D list.txt"):
        names = _names((folder / "list.txt").read_text())
    return names, lambda name: (folder / f"{name}.mat").read_bytes(), folder


def _open_archive(path: Path) -> tuple[list[str], Callable[[str], bytes], Path]:
    """Do what ``_open_folder`` does, by one pass over the archive, which cannot be read at random."""
    files: dict[str, bytes] = {}
    with reading(path, "Cars3D folder or nips2015-analogy-data.tar.gz"):
        with tarfile.open(path) as archive:
            for member in archive:
                place = PurePosixPath(member.name)
                # The archive holds other sets as well.
                if member.isfile() and place.parent.name == "cars" and place.suffix in (".txt", ".mat"):
                    data = archive.extractfile(member)
                    assert data is not None  # a file has content
                    files[place.name] = data.read()
            # To the very end, where gzip compares its checksum.
            while archive.fileobj is not None and archive.fileobj.read(1 << 20):
                pass
        if "list.txt" not in files:
            raise ValueError("it lacks cars/list.txt")
        names = _names(files["list.txt"].decode())
        missing = [name for name in names if f"{name}.mat" not in files]
        if missing:
            raise ValueError(f"it lacks cars/{missing[0]}.mat, which its list.txt names")
    return names, lambda name: files[f"{name}.mat"], Path("cars")


def _names(text: str) -> list[str]:
    names = [PurePosixPath(line.strip()).name.removesuffix(".mat") for line in text.splitlines() if line.strip()]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"it holds {len(names)} names, {len(set(names))} of them distinct; expected a car a line")
    return names


def _read_car(data: bytes) -> np.ndarray:
    """Return the images of one car, uint8 [elevations * azimuths, H, W, 3]."""
    variables = library("scipy.io").loadmat(io.BytesIO(data), variable_names=["im"])
    if "im" not in variables:
        raise ValueError("it lacks im")
    images = variables["im"]
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[2:] != (3, AZIMUTHS, ELEVATIONS):
        raise ValueError(f"its im is {images.dtype} {list(images.shape)}, expected uint8 [128, 128, 3, 24, 4]")
    return images.transpose(4, 3, 0, 1, 2).reshape(-1, *images.shape[:2], 3)
