"""What the ops' autograd functions share: cheap calls, and second derivatives through the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Return ``function.apply(*args)``, given all arguments of its ``forward``, for less.

    ``apply`` binds the signature of ``forward`` at every call, to fill in defaults: for a small input that takes longer
    than the kernel. Where nothing is to be differentiated, ``forward`` is all there is to call.
    """
    if is_dynamo_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return function.apply(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        living = [unwrap_if_dead(arg) if isinstance(arg, Tensor) else arg for arg in args]
        return super(torch.autograd.Function, function).apply(*living)  # type: ignore[misc]
    return function.forward(*args)


class _DifferentiableBackward(torch.autograd.Function):
    """The compiled backward kernel, itself differentiated as the reference's vector-Jacobian product is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        kernel: Callable[..., Any],
        reference: Callable[..., Any],
        present: tuple[bool, ...],
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        gradients = kernel(*_spread(present, tensors))
        # What is returned as it came must not be saved as well.
        return tuple(g.view_as(g) if any(g is t for t in tensors) else g for g in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.reference, ctx.present, count, *tensors = inputs
        ctx.extra = len(tensors) - sum(ctx.present) - count
        ctx.save_for_backward(*tensors[: len(tensors) - ctx.extra])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
            found = ctx.reference(*inputs)
            found = (found,) if isinstance(found, Tensor) else found
            return tuple(o for o, there in zip(found, ctx.present, strict=True) if there)

        def pull_back(*tensors: Tensor) -> tuple[Tensor, ...]:
            grads, inputs = tensors[: sum(ctx.present)], tensors[sum(ctx.present) :]
            return torch.func.vjp(outputs, *inputs)[1](tuple(grads))

        second = torch.func.vjp(pull_back, *ctx.saved_tensors)[1]
        return (None, None, None, None, *second(tuple(cotangents)), *[None] * ctx.extra)


def _spread(present: tuple[bool, ...], tensors: tuple[Tensor, ...]) -> list[Tensor | None]:
    """The output gradients, None where there is none, and the other tensors after them."""
    rest = iter(tensors)
    return [*(next(rest) if there else None for there in present), *rest]


def backward(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    grads: tuple[Tensor | None, ...],
    inputs: tuple[Tensor, ...],
    statistics: tuple[Tensor, ...] = (),
) -> tuple[Any, ...]:
    """Gradients of ``reference(*inputs)`` by ``kernel(*grads, *inputs, *statistics)``, differentiable where asked for.

    A gradient of an output that nothing depends on is None. Under ``create_graph=True`` the kernel has to return a
    gradient for every input. ``once_differentiable`` would let such a pass drop the second derivative in silence when
    the incoming gradient needs none; here it is computed.
    """
    if torch.is_grad_enabled():
        present = tuple(g is not None for g in grads)
        tensors = (*(g for g in grads if g is not None), *inputs, *statistics)
        return _DifferentiableBackward.apply(kernel, reference, present, len(inputs), *tensors)
    return tuple(kernel(*grads, *inputs, *statistics))


def stand_in(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of no memory for an input that was not kept, because no derivative depends on its values."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(shape)
