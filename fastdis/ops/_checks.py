"""Checks of arguments: each says in one sentence which argument it was, what it was, and what is allowed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KEPT_SIZE = 1024  # numbers in a constant that is kept


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
    if value.shape != wanted:
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
    values = list(tensors.values())
    for value in values:
        if value.dtype != values[0].dtype:
            break
    else:
        return values
    (first_name, first), *others = tensors.items()
    common = first.dtype
    for name, value in others:
        if value.dtype != first.dtype and not torch.is_autocast_enabled(first.device.type):
            raise TypeError(f"{name} has dtype {value.dtype}; that of {first_name}, {first.dtype}, is needed")
        common = torch.promote_types(common, value.dtype)
    return [value.to(common) for value in values]


def per_sample(like_name: str, like: Tensor, **values: Any) -> list[Tensor]:
    """Numbers, tensors [] or tensors [B], by name, as tensors [B] in the statistics dtype of ``like`` [B, *].

    Raises
    ------
    TypeError, ValueError
        If one is none of these, or on another device.
    """
    dtype, size, device = statistics_dtype(like.dtype), like.shape[0], like.device
    kept = like.is_cpu and size <= KEPT_SIZE and _plain()
    found = []
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = (_kept_full if kept else _full)(size, float(value), dtype, device)
        elif not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; a tensor is needed, [B] or [], or a number")
        elif value.dtype != dtype or value.shape != (size,) or value.device != device:
            floating(name, value)
            same_device(name, value, like_name, like)
            if value.dim() == 0:
                value = value.expand(size)
            shape(name, value, (size,), f"[B] of {like_name}")
            value = value.to(dtype)
        found.append(value)
    return found


def _plain() -> bool:
    """Whether a tensor made now is one for everybody: none of a compiler's, a transform's or a mode's own."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.is_inference_mode_enabled()
    )


def _full(size: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((size,), value, dtype=dtype, device=device)


# Not to be written to. Making a few numbers anew at every call would take longer than a small kernel.
_kept_full = lru_cache(maxsize=64)(_full)
