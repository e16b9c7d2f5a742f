"""CelebA: aligned photographs of faces with binary attributes; not a grid of factors."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastdis.data.factor_dataset import Indices, check_indices
from fastdis.data.reading import library, reading
from fastdis.data.resizing import check_resizing, resampling

Split = Literal["all", "train", "valid", "test"]
SPLITS = ("train", "valid", "test")

Crop = int | tuple[int, int, int, int] | None

FOLDER, ARCHIVE = "img_align_celeba", "img_align_celeba.zip"
ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"


class CelebA(Dataset[tuple[Tensor, Tensor]]):
    """Photographs that are decoded when they are asked for, with their attributes; :func:`load_celeba` makes it.

    A ``torch.utils.data.DataLoader`` takes it as it is: each worker opens the archive for itself.

    Attributes
    ----------
    attributes : Tensor of int64, [n, 40]
        1 where an image has an attribute, 0 where it has not.
    attribute_names : tuple of str, [40]
        As the file calls them: ``5_o_Clock_Shadow``, ``Arched_Eyebrows`` and so on.
    file_names : list of str, [n]
        ``000001.jpg`` and so on.
    split : str
        ``"all"``, ``"train"``, ``"valid"`` or ``"test"``.
    image_shape : tuple of int
        Shape of one image as a model sees it, (3, H, W).
    max_value : int
        255, the pixel value that means full intensity.
    """

    max_value = 255

    def __init__(
        self,
        store: _Folder | _Archive,
        file_names: list[str],
        attributes: Tensor,
        attribute_names: tuple[str, ...],
        *,
        split: str,
        crop: Crop,
        size: int | None,
        resample: str,
    ) -> None:
        self.file_names = file_names
        self.attributes = attributes
        self.attribute_names = attribute_names
        self.split = split
        self._store = store
        self._crop = crop
        self._size = size
        self._resample = resample
        self.image_shape = (3, *self._decode(file_names[0]).shape[:2])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.file_names)

    def __repr__(self) -> str:
        return (
            f"CelebA({len(self)} images of {list(self.image_shape)}, {len(self.attribute_names)} attributes, "
            f"split {self.split!r})"
        )

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        """Return one image, uint8 [3, H, W], and its attributes, int64 [40].

        Raises
        ------
        IndexError
            ``item`` lies outside the dataset.
        ValueError
            The image is damaged.
        """
        if not -len(self) <= item < len(self):
            raise IndexError(f"index {item} lies outside a dataset of {len(self)} images")
        item = int(item) % len(self)
        return self._images([item])[0], self.attributes[item]

    def batch(self, indices: Indices) -> Tensor:
        """Return images as a model takes them.

        Parameters
        ----------
        indices : int64, [b]
            Which images.

        Returns
        -------
        Tensor of float32, [b, 3, H, W]
            Intensities in [0, 1].

        Raises
        ------
        TypeError, ValueError
            The indices are not whole numbers, or lie outside the dataset; or an image is damaged.
        """
        chosen = check_indices(indices, "indices", len(self))
        if chosen.dim() != 1:
            raise ValueError(f"indices must have shape [b], got {list(chosen.shape)}")
        return self._images(chosen.tolist()).to(torch.float32).div_(self.max_value)

    def _images(self, items: Sequence[int]) -> Tensor:
        """Decode images, uint8 [b, 3, H, W]."""
        images = np.empty((len(items), *self.image_shape), np.uint8)
        for row, item in enumerate(items):
            image = self._decode(self.file_names[item])
            if image.shape[:2] != self.image_shape[1:]:
                raise ValueError(
                    f"{self._store.path}: {self.file_names[item]} is {list(image.shape[:2])} pixels, and "
                    f"{self.file_names[0]} is {list(self.image_shape[1:])}; give size to bring them to one"
                )
            images[row] = image.transpose(2, 0, 1)
        return torch.from_numpy(images)

    def _decode(self, name: str) -> np.ndarray:
        """Return one image, cropped and resized, uint8 [H, W, 3]."""
        pillow = library("PIL.Image")
        try:
            with pillow.open(io.BytesIO(self._store.read(name))) as file:
                image = file.convert("RGB")
        # A damaged image or archive can fail anywhere, with any error.
        except Exception as error:
            raise ValueError(f"{self._store.path}: {name} is not a readable image ({error})") from error
        if self._crop is not None:
            image = image.crop(_box(self._crop, image.size, f"{self._store.path}: {name}"))
        if self._size is not None:
            image = image.resize((self._size, self._size), resampling(self._resample))
        return np.asarray(image)


def load_celeba(
    path: str | os.PathLike[str],
    *,
    split: Split = "all",
    crop: Crop = 148,
    size: int | None = 64,
    resample: str = "bilinear",
) -> CelebA:
    """Read the aligned and cropped images of CelebA.

    Parameters
    ----------
    path : path-like
        The folder that holds ``img_align_celeba.zip`` (1,443,490,838 bytes, SHA-256
        ``46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74``) or the folder ``img_align_celeba``
        unpacked from it, and ``list_attr_celeba.txt`` (26,721,026 bytes, ``f0e5da28...``); or that zip or folder
        itself, with the list beside it. Where both are there the unpacked folder is read.
    split : {"all", "train", "valid", "test"}, optional
        The published partition, 162,770, 19,867 and 19,962 images, which needs ``list_eval_partition.txt`` (2,836,386
        bytes, ``fc955bcb...``) beside the other list.
    crop : int or (left, upper, right, lower), optional
        What part of the 178 x 218 pixels: a square of that many in the middle, or a box; None takes all.
    size : int, optional
        Height and width to resize to; None keeps the pixels of the crop.
    resample : {"nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"}, optional
        Pillow's filter for that.

    Returns
    -------
    CelebA
        202,599 images in the published set, with 40 attributes of 0 and 1.

    Raises
    ------
    FileNotFoundError
        The images or a list are missing.
    ValueError
        A list is truncated or damaged, names images that are not there, or an argument does not exist.
    ImportError
        Pillow is not installed.

    Notes
    -----
    The attributes are not factors of a grid: they are correlated, not independent, and most combinations have no image.
    The list stores them as -1 and 1.

    There is no agreed crop, and scores on different crops do not compare. Common are the middle 148 x 148 (the default
    here), the box (15, 40, 163, 188) or a middle square of 178, and no crop at all, ``crop=None``, which squeezes the
    faces; then mostly 64 x 64.

    The archive is opened by every process for itself, a second or so each; an unpacked folder needs no opening.
    """
    if split not in ("all", *SPLITS):
        raise ValueError(f"split must be all, train, valid or test, got {split!r}")
    check_resizing(size, resample)
    _check_crop(crop)
    library("PIL.Image")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected CelebA")
    store, beside = _find_images(path)
    names, attribute_names, attributes = _read_attributes(_find_list(beside, ATTRIBUTES))
    if split != "all":
        chosen = _read_partition(_find_list(beside, PARTITION), names) == SPLITS.index(split)
        names = [name for name, keep in zip(names, chosen, strict=True) if keep]
        attributes = attributes[torch.from_numpy(chosen)]
        if not names:
            raise ValueError(f"{beside / PARTITION}: no image is in the split {split!r}")
    missing = [name for name in names if name not in store]
    if missing:
        raise ValueError(f"{store.path}: lacks {len(missing)} of {len(names)} images of the list, {missing[0]} first")
    return CelebA(store, names, attributes, attribute_names, split=split, crop=crop, size=size, resample=resample)


def holds_celeba(folder: Path) -> bool:
    """Tell whether a folder has the images in one of the places where they are looked for."""
    return folder.name == FOLDER or (folder / FOLDER).is_dir() or (folder / ARCHIVE).is_file()


class _Folder:
    """Images as files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = frozenset(file.name for file in path.iterdir())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class _Archive:
    """Images in a zip archive, opened by each process for itself: a shared handle has one position in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened_by = -1
        self._members: dict[str, str] = {}
        with reading(path, ARCHIVE):
            for member in self._open().namelist():
                place = PurePosixPath(member)
                if place.parent.name == FOLDER:
                    self._members[place.name] = member
            if not self._members:
                raise ValueError(f"it lacks {FOLDER}/")

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_members": self._members, "_opened_by": -1}

    def read(self, name: str) -> bytes:
        return self._open().read(self._members[name])

    def _open(self) -> zipfile.ZipFile:
        if self._opened_by != os.getpid():
            self._archive = zipfile.ZipFile(self.path)
            self._opened_by = os.getpid()
        return self._archive


def _find_images(path: Path) -> tuple[_Folder | _Archive, Path]:
    """Return where the images are, and the folder that holds them and the lists."""
    if path.is_file():
        return _Archive(path), path.parent
    if path.name == FOLDER and not (path / FOLDER).is_dir() and not (path / ARCHIVE).is_file():
        return _Folder(path), path.parent
    if (path / FOLDER).is_dir():
        # Some copies unpack to a folder of the same name within.
        inner = path / FOLDER / FOLDER
        return _Folder(inner if inner.is_dir() else path / FOLDER), path
    if (path / ARCHIVE).is_file():
        return _Archive(path / ARCHIVE), path
    raise FileNotFoundError(f"{path}: no {ARCHIVE} and no folder {FOLDER}; expected CelebA")


def _find_list(folder: Path, name: str) -> Path:
    for place in (folder / name, folder / "Anno" / name, folder / "Eval" / name, folder.parent / name):
        if place.is_file():
            return place
    raise FileNotFoundError(f"{folder / name}: no such file; CelebA has it beside its images")


def _read_attributes(path: Path) -> tuple[list[str], tuple[str, ...], Tensor]:
    """Return the names of the images, those of the attributes, and the attributes, int64 [n, 40]."""
    with reading(path, f"CelebA {ATTRIBUTES}"):
        lines = path.read_text().splitlines()
        count, attribute_names = int(lines[0]), tuple(lines[1].split())
        rows = [line for line in lines[2:] if line.strip()]
        if len(rows) != count or not rows:
            raise ValueError(f"it has {len(rows)} lines of attributes, expected the {count} of its first line")
        names, values = [], bytearray()
        for number, row in enumerate(rows, start=3):
            name, *tokens = row.split()
            if len(tokens) != len(attribute_names) or not {"1", "-1"}.issuperset(tokens):
                raise ValueError(f"its line {number} is not a name and {len(attribute_names)} numbers, -1 or 1")
            names.append(name)
            values.extend(token == "1" for token in tokens)
        table = np.frombuffer(values, np.uint8).reshape(len(rows), -1)
    return names, attribute_names, torch.from_numpy(table.astype(np.int64))


def _read_partition(path: Path, names: list[str]) -> np.ndarray:
    """Return the split of each image, int64 [n]: 0 train, 1 valid, 2 test."""
    with reading(path, f"CelebA {PARTITION}"):
        table = dict(line.split() for line in path.read_text().splitlines() if line.strip())
        missing = [name for name in names if table.get(name) not in ("0", "1", "2")]
        if missing:
            raise ValueError(f"it has no 0, 1 or 2 for {len(missing)} of {len(names)} images, {missing[0]} first")
    return np.array([int(table[name]) for name in names])


def _check_crop(crop: object) -> None:
    sides = crop if isinstance(crop, tuple) else (crop,)
    if crop is None or (
        len(sides) in (1, 4)
        and all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in sides)
        and (len(sides) == 4 or sides[0] > 0)
    ):
        return
    raise ValueError(f"crop must be a positive number of pixels, (left, upper, right, lower) or None, got {crop!r}")


def _box(crop: int | tuple[int, int, int, int], size: tuple[int, int], name: str) -> tuple[int, int, int, int]:
    """Return the part of an image of (width, height), refusing one that reaches beyond it."""
    width, height = size
    if isinstance(crop, int):
        left, upper = (width - crop) // 2, (height - crop) // 2
        box = (left, upper, left + crop, upper + crop)
    else:
        box = crop
    if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        raise ValueError(f"{name}: a crop of {crop} does not fit {width} x {height} pixels")
    return box
