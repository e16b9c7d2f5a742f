"""What the ops' autograd functions share: cheap calls, and second derivatives through the reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class _AsGiven(inspect.Signature):
    """A signature that binds arguments by leaving them as they are."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return _Bound(args, kwargs)


class _Bound:
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    def apply_defaults(self) -> None:
        """There are none."""


def positional(forward: F) -> F:
    """Mark a ``forward`` that is always called with all its arguments, by position.

    ``Function.apply`` builds and binds the signature of ``forward`` at every call, to fill in defaults: for a small
    input that takes longer than the kernel.
    """
    forward.__signature__ = _AsGiven(list(inspect.signature(forward).parameters.values()))  # type: ignore[attr-defined]
    return forward


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
