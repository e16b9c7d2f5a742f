"""Sums of sub-gradient fields: noise + coefficient * sum of weighted fields, in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _batching, _checks


def sum_gradient_fields(
    noise: Tensor,
    fields: Tensor,
    coefficient: Tensor | float,
    *,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Shift predicted noise by the weighted sum of sub-gradient fields, reading every field once.

    .. math:: \hat\epsilon = \epsilon + k \sum_n w_n g_n

    DisDiff (Yang et al., 2023): with :math:`k = -\sqrt{1 - \bar\alpha_t}` this is the noise for DDIM sampling and for
    predicting the clean sample, with :math:`k = -\sqrt{\alpha_t} (1 - \bar\alpha_{t-1}) / \sqrt{1 - \bar\alpha_t}` the
    shifted noise of training. :func:`ddim_step` and :func:`disdiff_terms` go on from here in the same pass.

    Parameters
    ----------
    noise : Tensor [B, *]
        float32, float64, float16 or bfloat16; sums are in float32 (float64 for float64). Contiguous tensors, and
        channels-last ones if fields are so as well, are read where they lie.
    fields : Tensor [B, N, *]
        One field for each of N factors, in the dtype of ``noise`` (under autocast, mixed dtypes are promoted).
    coefficient : Tensor [B] or [], or float
        One number for each sample, or one for all; a tensor may have any of the four dtypes.
    weights : Tensor [N] or [B, N], optional
        Of the factors, in any of the four dtypes; all 1 where it is None.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        A backend asked for by name fails rather than give way to another.

    Returns
    -------
    Tensor [B, *]
        Like ``noise``. Differentiable in every tensor to any order: first derivatives by compiled kernels, higher ones
        through the reference. Without weights the gradient of ``fields`` is one field's, expanded over N without
        copies; the fields are kept for backward only where the coefficient or the weights need a gradient.
        Forward-mode differentiation is refused.

    Raises
    ------
    TypeError
        If a tensor has the wrong dtype, or ``coefficient`` is neither a tensor nor a number.
    ValueError
        If shapes or devices do not match.
    RuntimeError
        If the backend asked for cannot serve here.

    Examples
    --------
    >>> noise, fields = torch.randn(8, 3, 16, 16), torch.randn(8, 6, 3, 16, 16)
    >>> shifted = sum_gradient_fields(noise, fields, -0.5)
    """
    noise, fields = check_fields({"noise": noise}, fields)
    (coefficient,) = _checks.per_sample("noise", noise, coefficient=coefficient)
    weights = None if weights is None else check_weights(weights, fields)
    chosen = _column.choose(backend, noise)
    (noise,), fields, last = as_stored((noise,), fields)
    if chosen == "reference":
        shifted = reference.sum_gradient_fields(noise, fields, coefficient, weights=weights)
    else:
        shifted = _autograd.apply(_SumGradientFields, noise, fields, coefficient, weights, chosen)
    return shifted.movedim(-1, 1) if last else shifted


def check_fields(images: dict[str, Tensor], fields: Tensor) -> list[Tensor]:
    """Check images [B, *] of one shape, by name, and fields [B, N, *]; return them all in one dtype.

    Raises
    ------
    TypeError, ValueError
        As :func:`sum_gradient_fields`.
    """
    first_name = next(iter(images))
    first = images[first_name]
    _checks.floating(first_name, first)
    shape, dtype = first.shape, first.dtype
    if len(shape) < 2:
        raise ValueError(f"{first_name} has shape {list(shape)}; [B, *] with a dimension besides B is needed")
    alike = True
    for name, image in images.items():
        if image is not first:
            _checks.beside(name, image, shape, f"that of {first_name}", first_name, first)
            alike = alike and image.dtype is dtype
    if not isinstance(fields, Tensor) or fields.dtype is not dtype:
        _checks.floating("fields", fields)
        alike = False
    found = fields.shape
    if len(found) != len(shape) + 1 or found[0] != shape[0] or found[2:] != shape[1:]:
        batch, *rest = shape
        raise ValueError(
            f"fields has shape {list(found)}; [B, N, *] = [{', '.join(map(str, (batch, 'N', *rest)))}] as "
            f"{first_name} has it is needed"
        )
    _checks.same_device("fields", fields, first_name, first)
    return [*images.values(), fields] if alike else _checks.one_dtype(**images, fields=fields)


def check_weights(weights: Tensor, fields: Tensor) -> Tensor:
    """Check weights [N] or [B, N] of fields [B, N, *]; return them in the statistics dtype.

    Raises
    ------
    TypeError, ValueError
        As :func:`sum_gradient_fields`.
    """
    _checks.floating("weights", weights)
    _checks.same_device("weights", weights, "fields", fields)
    if tuple(weights.shape) not in (tuple(fields.shape[:2]), tuple(fields.shape[1:2])):
        batch, factors = fields.shape[:2]
        raise ValueError(
            f"weights has shape {list(weights.shape)}; [N] = [{factors}] or [B, N] = [{batch}, {factors}] is needed"
        )
    return weights.to(_checks.statistics_dtype(fields.dtype))


def as_stored(images: Sequence[Tensor], fields: Tensor) -> tuple[Sequence[Tensor], Tensor, bool]:
    """Channels-last images and fields as contiguous ones with the channels last; whether that was done.

    The kernels see [B, *] as B runs of numbers, whatever the order in them, if it is the same for all.
    """
    first = images[0]
    if first.dim() < 3 or (first.is_contiguous() and fields.is_contiguous()):
        return images, fields, False
    moved = tuple(image.movedim(1, -1) for image in images)
    moved_fields = fields.movedim(2, -1)
    if moved_fields.is_contiguous() and all(image.is_contiguous() for image in moved):
        return moved, moved_fields, True
    return images, fields, False


def field_gradients(
    backend: str,
    grad: Tensor,
    shape: tuple[int, ...],
    fields: Tensor | None,
    coefficient: Tensor,
    weights: Tensor | None,
    for_fields: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradient of fields of this shape under grad [B, *] of their weighted sum times the coefficient [B].

    And the inner products [B, N] of grad with the fields, if these are given.
    """
    dfields, products = _column.kernels[backend].backward(grad, fields, coefficient, weights, for_fields)
    return (dfields.expand(shape) if for_fields else None), products


def weight_gradient(products: Tensor, coefficient: Tensor, weights: Tensor) -> Tensor:
    """Gradient of weights [N] or [B, N] from the products [B, N] and the coefficient [B]."""
    scaled = products * coefficient.unsqueeze(1)
    return scaled if weights.dim() == 2 else scaled.sum(0)


class _SumGradientFields(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(noise: Tensor, fields: Tensor, coefficient: Tensor, weights: Tensor | None, backend: str) -> Tensor:
        return _column.kernels[backend].forward(noise, fields, coefficient, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, fields, coefficient, weights, ctx.backend = inputs
        ctx.shape, ctx.weighted = tuple(fields.shape), weights is not None
        ctx.keeps_fields = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        kept = (coefficient, weights, fields if ctx.keeps_fields else None)
        ctx.save_for_backward(*(t for t in kept if t is not None))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        coefficient, *rest = ctx.saved_tensors
        weights = rest[0] if ctx.weighted else None
        fields = rest[-1] if ctx.keeps_fields else None
        if not torch.is_grad_enabled():
            needs = ctx.needs_input_grad
            return (*_gradients(ctx.backend, needs, ctx.shape, grad, fields, coefficient, weights), None)
        inputs = (grad, _autograd.stand_in(ctx.shape, grad) if fields is None else fields, coefficient)
        gradients = _autograd.backward(
            partial(_all_gradients, ctx.backend, ctx.shape),
            _reference,
            (grad,),
            inputs if weights is None else (*inputs, weights),
        )
        return (*gradients, *[None] * (5 - len(gradients)))


def _gradients(
    backend: str, needs: Sequence[bool], shape: tuple[int, ...], grad: Tensor, fields: Tensor | None,
    coefficient: Tensor, weights: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of noise, fields, the coefficient and weights, those that are needed."""
    dfields = dcoefficient = dweights = None
    by_products = needs[2] or needs[3]
    if needs[1] or by_products:
        kept = fields if by_products else None
        dfields, products = field_gradients(backend, grad, shape, kept, coefficient, weights, needs[1])
        if needs[2]:
            dcoefficient = (products if weights is None else products * weights).sum(1)
        if needs[3] and weights is not None:
            dweights = weight_gradient(products, coefficient, weights)
    return grad, dfields, dcoefficient, dweights


def _all_gradients(
    backend: str, shape: tuple[int, ...], grad: Tensor, noise: Tensor, fields: Tensor, coefficient: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    needs = (True, True, True, weights is not None)
    return _gradients(backend, needs, shape, grad, fields, coefficient, weights)[: 3 if weights is None else 4]


def _reference(noise: Tensor, fields: Tensor, coefficient: Tensor, weights: Tensor | None = None) -> Tensor:
    return reference.sum_gradient_fields(noise, fields, coefficient, weights=weights)


def _forward_fake(noise: Tensor, fields: Tensor, coefficient: Tensor, weights: Tensor | None) -> Tensor:
    return noise.new_empty(noise.shape)


def _backward_fake(
    grad: Tensor, fields: Tensor | None, coefficient: Tensor, weights: Tensor | None, for_fields: bool
) -> tuple[Tensor, Tensor]:
    factors = 1 if weights is None else weights.shape[-1]
    dfields = grad.new_empty((grad.shape[0], factors, *grad.shape[1:]) if for_fields else (0,))
    return dfields, coefficient.new_empty((0,) if fields is None else fields.shape[:2])


def fold_weights(size: int, in_dim: int | None, weights: Tensor | None, batch: int) -> Tensor | None:
    """Fold the mapped dimension of weights [N] or [B, N] into the batch; those that all maps share stay [N]."""
    if weights is None or (in_dim is None and weights.dim() == 1):
        return weights
    weights = _batching.in_front(size, in_dim, weights)
    if weights.dim() == 2:
        weights = weights.unsqueeze(1).expand(-1, batch, -1)
    return weights.flatten(0, 1)


def _forward_vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *tensors: Any) -> Any:
        size, *_, weights = info.batch_size, *tensors
        noise, fields, coefficient = _batching.fold(size, in_dims, *tensors[:3])
        weights = fold_weights(size, in_dims[3], weights, noise.shape[0] // size)
        return *_batching.unfold(size, op(noise, fields, coefficient, weights)), 0

    return rule


def _backward_vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        size, *_, weights, for_fields = info.batch_size, *arguments
        grad, fields, coefficient = _batching.fold(size, in_dims, *arguments[:3])
        weights = fold_weights(size, in_dims[3], weights, grad.shape[0] // size)
        return _batching.unfold(size, *op(grad, fields, coefficient, weights, for_fields)), (0, 0)

    return rule


_column = _backends.register(
    "sum_gradient_fields",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    forward_vmap=_forward_vmap,
    backward_vmap=_backward_vmap,
)
