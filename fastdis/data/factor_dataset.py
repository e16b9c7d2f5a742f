"""Images on a complete grid of known factors of variation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Indices = int | Sequence[int] | np.ndarray | Tensor


class FactorDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images on a complete grid of factors, one image for every combination, the last factor varying fastest.

    Image ``i`` has the factors ``v`` with ``i = sum_k v_k * prod_{j>k} sizes_j``.

    Parameters
    ----------
    images : ndarray of uint8, [n, H, W] or [n, H, W, C]
        The images, in memory or memory-mapped. They stay as they are until a batch is asked for.
    factor_sizes : sequence of int, [K]
        How many values each factor takes; their product is n.
    factor_names : sequence of str, [K], optional
        Distinct names. ``factor_0``, ``factor_1`` and so on where none are given.
    max_value : int, optional
        The pixel value that means full intensity: 255, or 1 for images of zeros and ones.

    Raises
    ------
    TypeError
        ``images`` is not an array of uint8.
    ValueError
        The sizes, names and images do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> dataset = FactorDataset(np.zeros((6, 8, 8), np.uint8), (2, 3), ("shape", "x"))
    >>> dataset.factors(5).tolist()
    [1, 2]
    >>> int(dataset.index([1, 2]))
    5
    """

    def __init__(
        self,
        images: np.ndarray,
        factor_sizes: Sequence[int],
        factor_names: Sequence[str] | None = None,
        *,
        max_value: int = 255,
    ) -> None:
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            found = f"an array of {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
            raise TypeError(f"images must be a NumPy array of uint8, got {found}")
        if images.ndim not in (3, 4):
            raise ValueError(f"images must have shape [n, H, W] or [n, H, W, C], got {list(images.shape)}")
        sizes = tuple(int(size) for size in factor_sizes)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"factor_sizes must be one or more positive numbers, got {sizes}")
        if math.prod(sizes) != len(images):
            raise ValueError(
                f"factor_sizes {sizes} make a grid of {math.prod(sizes)} images, but images has {len(images)} of them"
            )
        names = tuple(f"factor_{k}" for k in range(len(sizes))) if factor_names is None else tuple(factor_names)
        if len(names) != len(sizes) or len(set(names)) != len(names):
            raise ValueError(f"factor_names must be {len(sizes)} distinct names, one for each factor, got {names}")
        if not 1 <= max_value <= 255:
            raise ValueError(f"max_value must be between 1 and 255, got {max_value}")
        self.images = images
        self.factor_sizes = sizes
        self.factor_names = names
        self.max_value = max_value
        self._sizes = torch.tensor(sizes)
        self._strides = torch.tensor([math.prod(sizes[k + 1 :]) for k in range(len(sizes))])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __repr__(self) -> str:
        grid = ", ".join(f"{name} {size}" for name, size in zip(self.factor_names, self.factor_sizes, strict=True))
        return f"FactorDataset({len(self)} images of {list(self.image_shape)}; {grid})"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image as a model sees it, (C, H, W)."""
        height, width = self.images.shape[1:3]
        return (self.images.shape[3] if self.images.ndim == 4 else 1, height, width)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        """Return one image, uint8 [C, H, W], and its factors, int64 [K].

        Raises
        ------
        IndexError
            ``item`` lies outside the dataset.
        """
        if not -len(self) <= item < len(self):
            raise IndexError(f"index {item} lies outside a dataset of {len(self)} images")
        item = int(item) % len(self)
        return self._gather(np.array([item]))[0], self.factors(item)

    def batch(self, indices: Indices) -> Tensor:
        """Return images as a model takes them.

        Parameters
        ----------
        indices : int64, [b]
            Which images.

        Returns
        -------
        Tensor of float32, [b, C, H, W]
            Intensities in [0, 1].

        Raises
        ------
        TypeError, ValueError
            The indices are not whole numbers, or lie outside the dataset.
        """
        chosen = self._check_indices(indices, "indices")
        if chosen.dim() != 1:
            raise ValueError(f"indices must have shape [b], got {list(chosen.shape)}")
        return self._gather(chosen.numpy()).to(torch.float32).div_(self.max_value)

    def factors(self, index: Indices) -> Tensor:
        """Return the factor values of images.

        Parameters
        ----------
        index : int64, [*]
            Which images: a number, a sequence, an array or a tensor.

        Returns
        -------
        Tensor of int64, [*, K]
            Position of each factor on its grid, from 0.

        Raises
        ------
        TypeError, ValueError
            The indices are not whole numbers, or lie outside the dataset.
        """
        chosen = self._check_indices(index, "index")
        return chosen.unsqueeze(-1).div(self._strides, rounding_mode="floor").remainder(self._sizes)

    def index(self, factors: Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Tensor) -> Tensor:
        """Return which images have the given factor values.

        Parameters
        ----------
        factors : int64, [*, K]
            Position of each factor on its grid, from 0.

        Returns
        -------
        Tensor of int64, [*]
            Rows of ``images``; the inverse of :meth:`factors`.

        Raises
        ------
        TypeError, ValueError
            The factors are not whole numbers, are not K in number, or lie outside their grid.
        """
        values = _whole_numbers(factors, "factors")
        if values.dim() == 0 or values.shape[-1] != len(self.factor_sizes):
            raise ValueError(f"factors must have shape [*, {len(self.factor_sizes)}], got {list(values.shape)}")
        outside = (values < 0) | (values >= self._sizes)
        if outside.any():
            k = int(outside.nonzero()[0, -1])
            value = int(values[..., k][outside[..., k]][0])
            raise ValueError(
                f"factors holds {value} for {self.factor_names[k]!r}, which takes 0 to {self.factor_sizes[k] - 1}"
            )
        return (values * self._strides).sum(-1)

    def sample_factors(
        self, n: int, *, generator: torch.Generator, fixed: Mapping[str | int, int] | None = None
    ) -> Tensor:
        """Draw factor values uniformly and independently.

        Parameters
        ----------
        n : int
            How many draws.
        generator : torch.Generator
            Source of randomness, on the CPU.
        fixed : mapping of str or int to int, optional
            Factors, by name or position, that keep one value in all draws. The other factors come out the same
            whether or not a factor is fixed.

        Returns
        -------
        Tensor of int64, [n, K]
            Position of each factor on its grid, from 0.

        Raises
        ------
        ValueError
            ``n`` is negative, or ``fixed`` names a factor or value that does not exist.
        """
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        draws = [torch.randint(size, (n,), generator=generator) for size in self.factor_sizes]
        for key, value in (fixed or {}).items():
            k = self._factor_position(key)
            if not 0 <= value < self.factor_sizes[k]:
                raise ValueError(
                    f"fixed sets {self.factor_names[k]!r} to {value}, and it takes 0 to {self.factor_sizes[k] - 1}"
                )
            draws[k] = torch.full((n,), value)
        return torch.stack(draws, dim=-1)

    def _gather(self, rows: np.ndarray) -> Tensor:
        """Copy images out as uint8 [b, C, H, W]."""
        images = torch.from_numpy(self.images[rows])
        return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()

    def _check_indices(self, indices: Indices, name: str) -> Tensor:
        chosen = _whole_numbers(indices, name)
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
            worst = int(chosen.min()) if int(chosen.min()) < 0 else int(chosen.max())
            raise ValueError(f"{name} holds {worst}, and the dataset has images 0 to {len(self) - 1}")
        return chosen

    def _factor_position(self, key: str | int) -> int:
        if key in self.factor_names:
            return self.factor_names.index(str(key))
        if isinstance(key, int) and 0 <= key < len(self.factor_sizes):
            return key
        raise ValueError(f"fixed names the factor {key!r}, and the factors are {', '.join(self.factor_names)}")


def _whole_numbers(values: object, name: str) -> Tensor:
    """Return values as an int64 tensor on the CPU, refusing anything that would have to be rounded."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be whole numbers, got {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))
