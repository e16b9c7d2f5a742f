"""Points or images held in memory, such as a sample of a manifold."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastdis.data.factor_dataset import Indices


class PointDataset(Dataset[tuple[Tensor, Tensor]]):
    """Points, and the latents that they were made from, as one tensor each.

    Parameters
    ----------
    points : Tensor or ndarray, [n, *]
        Real numbers; kept as float32.
    latents : Tensor or ndarray, [n, K], optional
        Kept as float64; no columns where none are given.

    Raises
    ------
    TypeError
        They are not real numbers.
    ValueError
        There are no points, they have no shape, one is NaN or infinite, or the latents are not as many.

    Examples
    --------
    >>> from fastdis.data import swiss_roll
    >>> dataset = PointDataset(*swiss_roll().sample(1000))
    >>> dataset.image_shape
    (64,)
    """

    def __init__(self, points: Tensor | np.ndarray, latents: Tensor | np.ndarray | None = None) -> None:
        self.points = _real("points", points, torch.float32)
        if self.points.dim() < 2 or self.points.numel() == 0:
            raise ValueError(f"points must have shape [n, *] with n at least 1, got {list(self.points.shape)}")
        n = len(self.points)
        self.latents = torch.empty(n, 0, dtype=torch.float64)
        if latents is not None:
            self.latents = _real("latents", latents, torch.float64)
            if self.latents.dim() != 2 or len(self.latents) != n:
                raise ValueError(f"latents must have shape [{n}, K], got {list(self.latents.shape)}")

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one point."""
        return tuple(self.points.shape[1:])

    def __len__(self) -> int:
        """Return how many points there are, n."""
        return len(self.points)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        """Return one point, float32 [*], and its latents, float64 [K]."""
        return self.points[item], self.latents[item]

    def batch(self, indices: Indices) -> Tensor:
        """Return points, float32 [b, *], for any one-dimensional kind of index."""
        return self.points[torch.as_tensor(indices).reshape(-1)]


def _real(name: str, values: Tensor | np.ndarray, dtype: torch.dtype) -> Tensor:
    if not isinstance(values, Tensor | np.ndarray):
        raise TypeError(f"{name} must be a tensor or an array, got {type(values).__name__}")
    tensor = torch.as_tensor(values)
    if tensor.is_complex():
        raise TypeError(f"{name} must be real, got {tensor.dtype}")
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite in {dtype}, and some are NaN or infinite")
    return tensor
