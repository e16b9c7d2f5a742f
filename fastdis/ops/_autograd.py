"""Second derivatives of compiled ops: through the reference, so that they are right to any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _DifferentiableBackward(torch.autograd.Function):
    """The compiled backward kernel, itself differentiated as the reference's vector-Jacobian product is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        kernel: Callable[..., Any], reference: Callable[..., Tensor], count: int, grad: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(kernel(grad, *tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.reference, ctx.count, grad, *tensors = inputs
        ctx.extra = len(tensors) - ctx.count
        ctx.save_for_backward(grad, *tensors[: ctx.count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        def pull_back(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(ctx.reference, *inputs)[1](grad)

        second = torch.func.vjp(pull_back, *ctx.saved_tensors)[1]
        return (None, None, None, *second(tuple(cotangents)), *[None] * ctx.extra)


def backward(
    kernel: Callable[..., Any],
    reference: Callable[..., Tensor],
    grad: Tensor,
    inputs: tuple[Tensor, ...],
    statistics: tuple[Tensor, ...] = (),
) -> tuple[Tensor, ...]:
    """Gradients of ``reference(*inputs)`` by ``kernel(grad, *inputs, *statistics)``, differentiable where asked for.

    ``once_differentiable`` would let a ``create_graph=True`` pass drop the second derivative in silence when the
    incoming gradient needs none; here it is computed.
    """
    if torch.is_grad_enabled():
        return _DifferentiableBackward.apply(kernel, reference, len(inputs), grad, *inputs, *statistics)
    return tuple(kernel(grad, *inputs, *statistics))
