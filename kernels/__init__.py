"""Triton kernels, one file per op: ``forward`` and ``backward`` with the arguments and returns of its two schemas.

Importing this package imports neither Triton nor any kernel; importing ``fastdis.kernels.<op>`` does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(x: Tensor) -> AbstractContextManager:
    """Make x's GPU the current one, which is the one Triton launches on; a no-op for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Dtype of accumulators and saved statistics: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
