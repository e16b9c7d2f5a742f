"""Tensors in, tensors out: the estimators compute in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def from_tensor(values: Any) -> tuple[Any, Callable[[np.ndarray], Any]]:
    """Return a tensor as an array, and a function that makes results what was given: else both leave things alone."""
    if not isinstance(values, Tensor):
        return values, lambda result: result
    dtype = values.dtype if values.is_floating_point() else torch.float32
    exact = values.detach().cpu()
    exact = exact.float() if exact.dtype in (torch.bfloat16, torch.float16) else exact
    return exact.numpy(), lambda result: torch.from_numpy(result).to(device=values.device, dtype=dtype)
