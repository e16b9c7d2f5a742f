"""Codes and factors as users have them, made into arrays that every metric can trust."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import Tensor


def as_codes(codes: np.ndarray | Tensor, name: str = "codes") -> np.ndarray:
    """Return codes as float64 [n, d], refusing what is not finite, not two-dimensional, or empty.

    Double precision, so that codes score the same in whatever precision they come.
    """
    array = as_reals(codes, name)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} must have shape [n, d] with at least one code, got {list(array.shape)}")
    if len(array) == 0:
        raise ValueError(f"{name} must have at least one row, got none")
    finite = np.isfinite(array)
    if not finite.all():
        columns = ", ".join(map(str, np.flatnonzero(~finite.all(axis=0))))
        raise ValueError(f"{name} must be finite, and hold NaN or infinity in column {columns}")
    return array.astype(np.float64)


def as_reals(values: np.ndarray | Tensor, name: str) -> np.ndarray:
    """Return real numbers as an array of their own shape, refusing any other kind."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    return array


def as_factors(
    factors: np.ndarray | Tensor, n: int, *, name: str = "factors", codes_name: str = "codes", varying: bool = True
) -> np.ndarray:
    """Return factors as int64 [n, K], refusing what is not integers, does not fit ``n`` codes, or never varies.

    ``varying=False`` lets a factor keep one value, for test sets and for metrics that give that case a meaning.
    """
    array = factors.detach().cpu().numpy() if isinstance(factors, Tensor) else np.asarray(factors)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}; number the values of a continuous factor first")
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} must have shape [n, K] with at least one factor, got {list(array.shape)}")
    _check_rows(array, n, name, codes_name)
    if varying:
        _refuse_constant(array, name)
    return array.astype(np.int64)


def as_latents(factors: np.ndarray | Tensor, n: int) -> np.ndarray:
    """Return factors that may be any real numbers as float64 [n, K], refusing what :func:`as_factors` refuses."""
    array = as_codes(factors, "factors")
    _check_rows(array, n, "factors", "codes")
    _refuse_constant(array, "factors")
    return array


def _check_rows(array: np.ndarray, n: int, name: str, codes_name: str) -> None:
    if len(array) != n:
        raise ValueError(f"{codes_name} and {name} must have as many rows, got {n} and {len(array)}")


def _refuse_constant(array: np.ndarray, name: str) -> None:
    # Some rows tell nearly always, and columns are slow to read.
    suspects = np.flatnonzero((array[:256] == array[:1]).all(axis=0))
    constant = [k for k in suspects if (array[:, k] == array[0, k]).all()]
    if constant:
        raise ValueError(f"{name} column {constant[0]} never varies: leave it out, there is nothing to tell about it")


def as_generator(seed: int) -> np.random.Generator:
    """Return NumPy's generator for a seed, refusing what is not a whole number from 0."""
    return np.random.default_rng(as_seed(seed))


def as_seed(seed: int) -> int:
    """Return a seed that is a whole number below 2**63, or say what it was."""
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise TypeError(f"seed must be a whole number, got {type(seed).__name__}") from error
    if not 0 <= number < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {number}")
    return number


def as_count(value: int, name: str, *, least: int = 1, most: int = 2**31 - 1) -> int:
    """Return a whole number from ``least`` to ``most``, or say what it was."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}") from error
    if not least <= number <= most:
        raise ValueError(f"{name} must be at least {least} and at most {most}, got {number}")
    return number
