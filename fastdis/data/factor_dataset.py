"""Images on a complete grid of known factors of variation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastdis.data.images import Images, ReopensMaps, SelectedImages

Indices = int | Sequence[int] | np.ndarray | Tensor


class FactorDataset(ReopensMaps, Dataset[tuple[Tensor, Tensor]]):
    """Images on a complete grid of factors, one image for every combination, the last factor varying fastest.

    Image ``i`` has the factors ``v`` with ``i = sum_k v_k * prod_{j>k} sizes_j``.

    A ``torch.utils.data.DataLoader`` takes it as it is, with any number of workers, and yields images as uint8
    [b, C, H, W] with their factors, int64 [b, K]; a batch is fetched at once. Memory-mapped images are handed to
    spawned workers by the path of their file.

    Parameters
    ----------
    images : ndarray of uint8, [n, H, W] or [n, H, W, C]
        The images, in memory or memory-mapped; or anything with the ``shape``, ``dtype`` and length of such an array
        that returns the images ``[b, ...]`` for an int64 array of rows ``[b]``. They stay as they are until a batch
        is asked for.
    factor_sizes : sequence of int, [K]
        How many values each factor takes; their product is n.
    factor_names : sequence of str, [K], optional
        Distinct names. ``factor_0``, ``factor_1`` and so on where none are given.
    max_value : int, optional
        The pixel value that means full intensity: 255, or 1 for images of zeros and ones.
    factor_values : sequence of K arrays of numbers, optional
        What the positions of each factor mean, in its own unit: one number for each. None where that is not known.

    Raises
    ------
    TypeError
        ``images`` is not an array of uint8.
    ValueError
        The sizes, names, values and images do not fit together.

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
        images: Images,
        factor_sizes: Sequence[int],
        factor_names: Sequence[str] | None = None,
        *,
        max_value: int = 255,
        factor_values: Sequence[Sequence[float] | np.ndarray] | None = None,
    ) -> None:
        dtype = getattr(images, "dtype", None)
        if not isinstance(dtype, np.dtype) or dtype != np.uint8:
            found = f"an array of {dtype}" if isinstance(images, np.ndarray) else type(images).__name__
            raise TypeError(f"images must be a NumPy array of uint8, got {found}")
        if len(images.shape) not in (3, 4):
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
        self.factor_values = None if factor_values is None else _checked_values(factor_values, sizes, names)
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
        height, width, *channels = self.images.shape[1:]
        return (channels[0] if channels else 1, height, width)

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

    def __getitems__(self, items: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return what ``[self[item] for item in items]`` does, fetched at once: ``DataLoader`` asks for batches so.

        Raises
        ------
        IndexError
            An item lies outside the dataset.
        """
        rows = np.asarray(items, dtype=np.int64)
        outside = (rows < -len(self)) | (rows >= len(self))
        if outside.any():
            raise IndexError(f"index {rows[outside][0]} lies outside a dataset of {len(self)} images")
        rows = rows % len(self)
        return list(zip(self._gather(rows), self.factors(rows), strict=True))

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
        chosen = check_indices(indices, "indices", len(self))
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
        chosen = check_indices(index, "index", len(self))
        return chosen.unsqueeze(-1).div(self._strides, rounding_mode="floor").remainder(self._sizes)

    def values(self, index: Indices) -> Tensor:
        """Return what the factors of images mean, each in its own unit.

        Parameters
        ----------
        index : int64, [*]
            Which images: a number, a sequence, an array or a tensor.

        Returns
        -------
        Tensor of float64, [*, K]
            ``factor_values[k]`` at each factor's position.

        Raises
        ------
        TypeError, ValueError
            The indices are not whole numbers, or lie outside the dataset; or the dataset does not know its values.
        """
        if self.factor_values is None:
            raise ValueError("this dataset does not know the values of its factors; factors() returns their positions")
        positions = self.factors(index)
        columns = [torch.from_numpy(column)[positions[..., k]] for k, column in enumerate(self.factor_values)]
        return torch.stack(columns, dim=-1)

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
            k = self._factor_position(key, "fixed")
            if not 0 <= value < self.factor_sizes[k]:
                raise ValueError(
                    f"fixed sets {self.factor_names[k]!r} to {value}, and it takes 0 to {self.factor_sizes[k] - 1}"
                )
            draws[k] = torch.full((n,), value)
        return torch.stack(draws, dim=-1)

    def sample(
        self, n: int, *, generator: torch.Generator, fixed: Mapping[str | int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw factor values uniformly and independently, and fetch their images.

        Parameters
        ----------
        n : int
            How many draws.
        generator : torch.Generator
            Source of randomness, on the CPU.
        fixed : mapping of str or int to int, optional
            Factors, by name or position, that keep one value in all draws.

        Returns
        -------
        factors : Tensor of int64, [n, K]
            As :meth:`sample_factors` draws them.
        images : Tensor of float32, [n, C, H, W]
            Their images, as :meth:`batch` returns them.

        Raises
        ------
        ValueError
            ``n`` is negative, or ``fixed`` names a factor or value that does not exist.
        """
        factors = self.sample_factors(n, generator=generator, fixed=fixed)
        return factors, self.batch(self.index(factors))

    def subgrid(self, keep: Mapping[str | int, int | Iterable[int]]) -> FactorDataset:
        """Return the images at some of the values of some factors, which are a complete grid again.

        Parameters
        ----------
        keep : mapping of str or int to int or iterable of int
            For factors by name or position, the positions to keep, in the order they are to have. Factors that are
            not named keep all. A factor that keeps one position stays, with one value.

        Returns
        -------
        FactorDataset
            Reads the same images, and copies none.

        Raises
        ------
        TypeError
            A position is not a whole number.
        ValueError
            ``keep`` names a factor or position that does not exist, a position twice, or none at all.

        Examples
        --------
        >>> import numpy as np
        >>> dataset = FactorDataset(np.zeros((6, 8, 8), np.uint8), (2, 3), ("shape", "x"))
        >>> dataset.subgrid({"x": [2, 0]}).factor_sizes
        (2, 2)
        """
        chosen = [np.arange(size) for size in self.factor_sizes]
        for key, positions in keep.items():
            k = self._factor_position(key, "keep")
            listed = list(positions) if isinstance(positions, Iterable) else [positions]
            wanted = _whole_numbers(listed, "keep")
            size = self.factor_sizes[k]
            if not len(wanted) or len(wanted.unique()) != len(wanted) or wanted.min() < 0 or wanted.max() >= size:
                raise ValueError(
                    f"keep must hold distinct positions from 0 to {size - 1} for {self.factor_names[k]!r}, at least "
                    f"one, got {wanted.tolist()}"
                )
            chosen[k] = wanted.numpy()
        rows = self.index(np.stack(np.meshgrid(*chosen, indexing="ij"), axis=-1).reshape(-1, len(chosen))).numpy()
        return FactorDataset(
            SelectedImages(self.images, rows),
            [len(positions) for positions in chosen],
            self.factor_names,
            max_value=self.max_value,
            factor_values=None
            if self.factor_values is None
            else [values[positions] for values, positions in zip(self.factor_values, chosen, strict=True)],
        )

    def _gather(self, rows: np.ndarray) -> Tensor:
        """Copy images out as uint8 [b, C, H, W]."""
        images = torch.from_numpy(self.images[rows])
        return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()

    def _factor_position(self, key: str | int, argument: str) -> int:
        if key in self.factor_names:
            return self.factor_names.index(str(key))
        if isinstance(key, int) and 0 <= key < len(self.factor_sizes):
            return key
        raise ValueError(f"{argument} names the factor {key!r}, and the factors are {', '.join(self.factor_names)}")


def check_indices(indices: Indices, name: str, count: int) -> Tensor:
    """Return indices as an int64 tensor, after checking that a dataset of ``count`` images has them all.

    Raises
    ------
    TypeError, ValueError
        They are not whole numbers, or lie outside.
    """
    chosen = _whole_numbers(indices, name)
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < count:
        worst = int(chosen.min()) if int(chosen.min()) < 0 else int(chosen.max())
        raise ValueError(f"{name} holds {worst}, and the dataset has images 0 to {count - 1}")
    return chosen


def _checked_values(
    values: Sequence[Sequence[float] | np.ndarray], sizes: tuple[int, ...], names: tuple[str, ...]
) -> tuple[np.ndarray, ...]:
    """Return the values of each factor as float64 [sizes_k]."""
    columns = tuple(np.asarray(column, dtype=np.float64) for column in values)
    if len(columns) != len(sizes):
        raise ValueError(f"factor_values must hold {len(sizes)} arrays, one for each factor, got {len(columns)}")
    for column, size, name in zip(columns, sizes, names, strict=True):
        if column.shape != (size,):
            raise ValueError(f"factor_values must hold {size} numbers for {name!r}, got shape {list(column.shape)}")
    return columns


def _whole_numbers(values: object, name: str) -> Tensor:
    """Return values as an int64 tensor on the CPU, refusing anything that would have to be rounded."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be whole numbers, got {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))
