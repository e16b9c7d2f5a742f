"""Tensors in, tensors out: points on a GPU stay there, all else is computed in NumPy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def on_device(values: Any) -> bool:
    """Return whether values are computed with where they lie: a tensor on a GPU. Other devices may lack float64."""
    return isinstance(values, Tensor) and values.is_cuda


def to_array(values: Any) -> Any:
    """Return a tensor as an array, and anything else as it is."""
    if not isinstance(values, Tensor):
        return values
    exact = values.detach().cpu()
    return (exact.float() if exact.dtype in (torch.bfloat16, torch.float16) else exact).numpy()


def to_tensor(values: Any) -> Tensor:
    """Return an array as a tensor on its memory, which is only to be read, and a tensor as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.as_tensor(values)


def restorer(values: Any) -> Callable[[np.ndarray], Any]:
    """Return a function that makes results what was given: a tensor of its dtype and device, else an array."""
    if not isinstance(values, Tensor):
        return lambda result: result
    dtype = values.dtype if values.is_floating_point() else torch.float32
    return lambda result: torch.from_numpy(result).to(device=values.device, dtype=dtype)


def like(values: Any, points: Any) -> Any:
    """Return values as points are: an array or a tensor of their dtype, where they lie."""
    if isinstance(points, Tensor):
        return to_tensor(values).to(points)
    return to_array(values).astype(points.dtype, copy=False)
