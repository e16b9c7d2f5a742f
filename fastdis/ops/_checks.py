"""Checks of arguments: each says in one sentence which argument it was, what it was, and what is allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype of statistics and accumulators: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def floating(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a tensor of an allowed floating dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; a tensor is needed")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are float32, float64, float16 and bfloat16")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless the two tensors are on one device."""
    if value.device != other.device:
        raise ValueError(
            f"{name} is on {value.device}, {other_name} on {other.device}; all tensors must be on one device"
        )


def shape(name: str, value: Tensor, wanted: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless ``value`` has the wanted shape."""
    if tuple(value.shape) != tuple(wanted):
        raise ValueError(f"{name} has shape {list(value.shape)}; {meaning} = {list(wanted)} is needed")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


def one_dtype(**tensors: Tensor) -> list[Tensor]:
    """Return the tensors, which must have the dtype of the first; under autocast they are promoted to a common one.

    Raises
    ------
    TypeError
        If the dtypes differ outside autocast.
    """
    (first_name, first), *others = tensors.items()
    if all(value.dtype == first.dtype for _, value in others):
        return list(tensors.values())
    common = first.dtype
    for name, value in others:
        if value.dtype != first.dtype and not torch.is_autocast_enabled(first.device.type):
            raise TypeError(f"{name} has dtype {value.dtype}; that of {first_name}, {first.dtype}, is needed")
        common = torch.promote_types(common, value.dtype)
    return [value.to(common) for value in tensors.values()]


def per_sample(name: str, value: Any, like_name: str, like: Tensor) -> Tensor:
    """A number, a tensor [] or a tensor [B] as a tensor [B] in the statistics dtype of ``like`` [B, *].

    Raises
    ------
    TypeError, ValueError
        If it is none of these, or on another device.
    """
    dtype = statistics_dtype(like.dtype)
    as_is = isinstance(value, Tensor) and value.dtype == dtype and value.shape == like.shape[:1]
    if as_is and value.device == like.device:
        return value  # soon, as most calls have it so
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full((like.shape[0],), float(value), dtype=dtype, device=like.device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; a tensor is needed, [B] or [], or a number")
    floating(name, value)
    same_device(name, value, like_name, like)
    if value.dim() == 0:
        value = value.expand(like.shape[0])
    shape(name, value, (like.shape[0],), f"[B] of {like_name}")
    return value.to(dtype)
