"""Checks of arguments: each says in one sentence which argument it was, what it was, and what is allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KEPT_SIZE, KEPT = 1024, 64  # numbers in a constant that is kept, and how many such constants there are at most


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
    if not (value.is_cpu and other.is_cpu) and value.device != other.device:  # the former is cheaper to ask
        raise ValueError(
            f"{name} is on {value.device}, {other_name} on {other.device}; all tensors must be on one device"
        )


def shape(name: str, value: Tensor, wanted: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless ``value`` has the wanted shape."""
    if value.shape != wanted:
        raise ValueError(f"{name} has shape {list(value.shape)}; {meaning} = {list(wanted)} is needed")


def beside(name: str, value: Any, wanted: tuple[int, ...], meaning: str, other_name: str, other: Tensor) -> None:
    """Check all of a floating tensor: its dtype, its shape, and that it is on the device of another."""
    # One step where nothing is wrong: what a call does before its kernel is read from memory where others run between.
    if (
        isinstance(value, Tensor)
        and value.dtype in DTYPES
        and value.shape == wanted
        and ((value.is_cpu and other.is_cpu) or value.device == other.device)
    ):
        return
    floating(name, value)
    shape(name, value, wanted, meaning)
    same_device(name, value, other_name, other)


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
    size, dtype = like.shape[0], torch.float64 if like.dtype is torch.float64 else torch.float32
    keeps = type(like) is Tensor and like.is_cpu and not is_dynamo_compiling()
    found = []
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            constant = _kept.get((value, size, dtype)) if keeps else None
            value = _constant(value, size, dtype, like, keeps) if constant is None else constant
        elif not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; a tensor is needed, [B] or [], or a number")
        elif value.dtype is not dtype or value.shape != (size,) or value.device != like.device:
            floating(name, value)
            same_device(name, value, like_name, like)
            if value.dim() == 0:
                value = value.expand(size)
            shape(name, value, (size,), f"[B] of {like_name}")
            value = value.to(dtype)
        found.append(value)
    return found


# Not to be written to. Making a few numbers anew at every call would take longer than a small kernel.
_kept: dict[tuple[float, int, torch.dtype], Tensor] = {}


def _constant(value: float, size: int, dtype: torch.dtype, like: Tensor, keeps: bool) -> Tensor:
    """[size] times the value beside ``like``, kept for the next call if it may be and is one for everybody."""
    constant = torch.full((size,), float(value), dtype=dtype, device=like.device)
    if keeps and size <= KEPT_SIZE and _plain():
        if len(_kept) >= KEPT:
            _kept.clear()
        _kept[value, size, dtype] = constant
    return constant


def _plain() -> bool:
    """Whether a tensor made now is none of a transform's or a mode's own."""
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.is_inference_mode_enabled()
    )
