"""What the batching rules share: the mapped dimension in front, folded into the batch, and taken out again."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def in_front(size: int, in_dim: int | None, value: Tensor) -> Tensor:
    """The mapped dimension in front, or one made by expansion."""
    return value.expand(size, *value.shape) if in_dim is None else value.movedim(in_dim, 0)


def fold(size: int, in_dims: Any, *values: Tensor | None) -> list[Any]:
    """Fold the mapped dimension of each tensor into its first one; what is None stays so."""
    return [None if v is None else in_front(size, d, v).flatten(0, 1) for d, v in zip(in_dims, values, strict=False)]


def unfold(size: int, *values: Tensor) -> tuple[Tensor, ...]:
    """Undo :func:`fold` on results; an empty one, which was not asked for, stays empty."""
    return tuple(v.unflatten(0, (size, v.shape[0] // size)) for v in values)
