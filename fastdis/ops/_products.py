"""Products of matrices for autograd functions, by the faster of the two libraries that torch has for them on a CPU.

torch gives products in float32 to MKL, which keeps its AVX-512 kernels to Intel's processors. oneDNN, which torch has
for convolutions, does not ask who made the processor: on an AMD EPYC with AVX-512 it takes two fifths to two thirds of
the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdis.ops import _backends

SMALLEST = 2**21  # multiplications from which on oneDNN's longer call pays

MKL_HOLDS_BACK = (
    _backends.extension is not None
    and _backends.extension.build_info()["processor"] != "Intel"
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer, as ``torch.nn.functional.linear`` does, to rows [*, H] with a weight [D, H]."""
    if _by_onednn(rows, weight, bias):
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
        return product
    return F.linear(rows, weight, bias)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply ``left @ right``, [*, H] by [H, D]."""
    return linear(left, right.mT)


def add_matmul_(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two matrices to a third."""
    if _by_onednn(left, right.mT, None):
        to += matmul(left, right)
    else:
        to.addmm_(left, right)


def _by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        MKL_HOLDS_BACK
        and not torch.compiler.is_compiling()
        and rows.numel() * weight.shape[0] >= SMALLEST
        and rows.dtype == weight.dtype == torch.float32
        and rows.is_cpu
        and weight.is_cpu
        and (bias is None or bias.dtype == torch.float32)
        and _dense(rows)
        and _dense(weight)
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        # It has no derivative and no batching rule.
        and not (torch.is_grad_enabled() and torch._C._any_requires_grad(rows, weight, bias))
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _dense(matrix: Tensor) -> bool:
    """Whether it lies row by row or, if it is a matrix, column by column: not expanded, for example."""
    return matrix.is_contiguous() or (matrix.dim() == 2 and matrix.mT.is_contiguous())
