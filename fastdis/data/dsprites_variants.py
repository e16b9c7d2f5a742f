"""Colour, noisy and scream dSprites, made from the black and white images as they are asked for."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

import numpy as np

from fastdis.data.factor_dataset import FactorDataset
from fastdis.data.images import Images, ReopensMaps
from fastdis.data.reading import library, reading

Kind = Literal["color", "noisy", "scream"]
KINDS = ("color", "noisy", "scream")

#: The scream is shrunk to fit into this width and height, its proportions kept.
SCREAM_SIZE = (350, 274)


def dsprites_variant(
    dataset: FactorDataset,
    kind: Kind,
    *,
    seed: int = 0,
    scream_image: str | os.PathLike[str] | np.ndarray | None = None,
) -> FactorDataset:
    """Return dSprites with a nuisance that is none of the factors: a colour, noise, or a painting behind the sprite.

    Parameters
    ----------
    dataset : FactorDataset
        dSprites: images [H, W] of zeros and ones, as :func:`load_dsprites` returns them.
    kind : {"color", "noisy", "scream"}
        color: the sprite in one colour, each channel uniform in [0.5, 1], on black. noisy: a white sprite on noise,
        each channel of each pixel uniform in [0, 1]; that is min(image + noise, 1). scream: the background is the mean
        of a random crop of a painting and of one random colour, each channel uniform in [0, 1]; where the sprite is,
        the background is inverted, 1 - x.
    seed : int, optional
        Which nuisance the images get.
    scream_image : path-like or ndarray of uint8 [height, width, 3], optional
        The painting for ``"scream"``: the studies take Munch's The Scream, which is not shipped. A file is shrunk, its
        proportions kept, to fit into 350 x 274 pixels (Pillow's ``thumbnail``, bicubic), as the studies do; an array is
        taken as it is. It must be larger than the images on both sides.

    Returns
    -------
    FactorDataset
        The same grid of factors, with images [H, W, 3]. They are made when they are asked for and take no memory.

    Raises
    ------
    TypeError, ValueError
        The dataset is not black and white sprites, there is no such kind, the seed is not a whole number from 0 to
        2^64 - 1, or the painting is missing, superfluous or too small.
    FileNotFoundError
        There is no such file of a painting.
    ImportError
        The painting is a file, and Pillow is not installed.

    Notes
    -----
    The definitions are those of Locatello et al., "Challenging Common Assumptions in the Unsupervised Learning of
    Disentangled Representations" (ICML 2019), section 5 and appendix, and of the library that came with it. Two things
    differ. There, a new nuisance is drawn at every access; here it is a function of ``seed`` and the number of the
    image alone, so that image i is one image, in every epoch, batch and worker, and a finite dataset that can be
    encoded once. And intensities are 8 bits: colours are uniform over 128 to 255, noise over 0 to 255. In a model's
    eye the difference is at most 1/255; the published numbers were not made with these very images.

    The random bits are SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of a counter, which gives any image its own
    without drawing those before it.
    """
    if not isinstance(dataset, FactorDataset):
        raise TypeError(f"dataset must be a FactorDataset of dSprites, got {type(dataset).__name__}")
    if len(dataset.images.shape) != 3 or dataset.max_value != 1:
        raise ValueError(
            f"dataset must have images [n, H, W] of zeros and ones, got {list(dataset.images.shape)} "
            f"with values up to {dataset.max_value}"
        )
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be a whole number from 0 to 2^64 - 1, got {seed!r}")
    if (scream_image is not None) != (kind == "scream"):
        raise ValueError(
            'kind "scream" needs scream_image, the file of a painting'
            if scream_image is None
            else f'scream_image is for kind "scream" alone, and kind is {kind!r}'
        )
    # The kind takes part in the key, so that the variants of one seed do not share their random bits.
    key = int(_mixed(np.array([seed], np.uint64))[0]) ^ KINDS.index(kind)
    images: Images
    if scream_image is not None:
        images = _Scream(dataset.images, key, _painting(scream_image, dataset.images.shape[1:]))
    else:
        images = (_Coloured if kind == "color" else _Noisy)(dataset.images, key)
    return FactorDataset(images, dataset.factor_sizes, dataset.factor_names, factor_values=dataset.factor_values)


class _Variant(ReopensMaps):
    """Sprites with a nuisance keyed by the number of the image, uint8 [n, H, W, 3]."""

    dtype = np.dtype(np.uint8)

    def __init__(self, sprites: Images, key: int) -> None:
        self.shape = (*sprites.shape, 3)
        self._sprites = sprites
        self._key = np.uint64(key)

    def __len__(self) -> int:
        return len(self._sprites)

    def _random_bytes(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Return uint8 [b, count], a function of the key and the rows."""
        words = -(-count // 8)
        counters = rows.astype(np.uint64)[:, None] * np.uint64(words) + np.arange(words, dtype=np.uint64)
        counters *= np.uint64(0x9E3779B97F4A7C15)
        counters += self._key
        return _mixed(counters).astype("<u8", copy=False).view(np.uint8)[:, :count]

    def _mask(self, rows: np.ndarray) -> np.ndarray:
        """Return 255 where the sprites are, uint8 [b, H, 3 W].

        Colours lie along the rows here and below: NumPy is slow at a last axis of three.
        """
        return np.repeat(self._sprites[rows] * np.uint8(255), 3, axis=2)

    def _along_rows(self, colours: np.ndarray) -> np.ndarray:
        """Return colours [b, 3] so that they broadcast over rows of pixels, [b, 1, 3 W]."""
        return np.tile(colours, (1, self.shape[2]))[:, None, :]


class _Coloured(_Variant):
    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        colours = 128 + (self._random_bytes(rows, 3) >> 1)
        return (self._mask(rows) & self._along_rows(colours)).reshape(-1, *self.shape[1:])


class _Noisy(_Variant):
    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        mask = self._mask(rows)
        noise = self._random_bytes(rows, math.prod(self.shape[1:])).reshape(mask.shape)
        return (noise | mask).reshape(-1, *self.shape[1:])


class _Scream(_Variant):
    def __init__(self, sprites: Images, key: int, painting: np.ndarray) -> None:
        super().__init__(sprites, key)
        self._painting = painting.reshape(len(painting), -1)
        # The last place in either direction is left out, as in the studies.
        self._places = np.array([painting.shape[0] - self.shape[1], painting.shape[1] - self.shape[2]], np.uint64)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        _, height, width, _ = self.shape
        bits = self._random_bytes(rows, 16)
        # 32 random bits choose among some hundred places: none is favoured by more than 1e-7.
        draws = bits[:, :8].view("<u4").astype(np.uint64)
        top, left = ((draws * self._places) >> np.uint64(32)).astype(np.int64).T
        crops = np.lib.stride_tricks.sliding_window_view(self._painting, (height, 3 * width))[top, 3 * left]
        colours = self._along_rows(bits[:, 8:11])
        # The mean, rounded half up, of two numbers of 8 bits within 8 bits; an exclusive or with 255 is 255 - x.
        background = (crops | colours) - ((crops ^ colours) >> 1)
        return (background ^ self._mask(rows)).reshape(-1, *self.shape[1:])


def _mixed(counters: np.ndarray) -> np.ndarray:
    """Scramble uint64 counters in place: the output function of SplitMix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        counters ^= counters >> np.uint64(shift)
        counters *= np.uint64(factor)
    counters ^= counters >> np.uint64(31)
    return counters


def _painting(image: str | os.PathLike[str] | np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Return the painting as uint8 [height, width, 3], larger than the images."""
    if isinstance(image, np.ndarray):
        painting, name = image, "scream_image"
    else:
        path = Path(image)
        with reading(path, "image"), library("PIL.Image").open(path) as file:
            shrunk = file.convert("RGB")
            shrunk.thumbnail(SCREAM_SIZE)
            painting, name = np.asarray(shrunk), str(path)
    if painting.dtype != np.uint8 or painting.ndim != 3 or painting.shape[2] != 3:
        raise ValueError(f"scream_image must be uint8 [height, width, 3], got {painting.dtype} {list(painting.shape)}")
    if painting.shape[0] <= size[0] or painting.shape[1] <= size[1]:
        raise ValueError(
            f"{name} is {painting.shape[0]} x {painting.shape[1]} pixels within {SCREAM_SIZE[1]} x {SCREAM_SIZE[0]}, "
            f"and must be larger than the images of {size[0]} x {size[1]}"
        )
    return painting
