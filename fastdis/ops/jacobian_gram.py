"""Gram matrices of Jacobians: the pull-back metric of a decoder, from one read of its tangents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _batching, _checks


def jacobian_gram(jacobian: Tensor, *, backend: str = "auto") -> Tensor:
    r"""Gram matrix :math:`G = J J^\top` of each sample's tangents: the metric that a decoder pulls back.

    Only the symmetric half is computed, with D split in a fixed way, so that results do not change from run to run.

    Parameters
    ----------
    jacobian : Tensor [B, K, *]
        Tangents by rows, D numbers each: float32, float64, float16 or bfloat16. Read where it lies if contiguous, or
        if it is the transpose of a contiguous [K, B, *], as :func:`decoder_jacobian` returns it.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        A backend asked for by name fails rather than give way to another.

    Returns
    -------
    Tensor [B, K, K]
        In float32 (float64 for float64): penalties of G take differences, which 16 bits do not hold. Differentiable to
        any order: first derivatives by compiled kernels, higher ones through the reference. Forward-mode
        differentiation is refused.

    Raises
    ------
    TypeError
        If the tensor is not of a floating dtype.
    ValueError
        If it has fewer than three dimensions.
    RuntimeError
        If the backend asked for cannot serve here.

    Examples
    --------
    >>> gram = jacobian_gram(torch.randn(32, 8, 12288))
    """
    jacobian = as_rows(jacobian)
    chosen = _column.choose(backend, jacobian)
    if chosen == "reference":
        return reference.jacobian_gram(jacobian)
    return _autograd.apply(_JacobianGram, jacobian, chosen)


def as_rows(jacobian: Tensor) -> Tensor:
    """Check a Jacobian [B, K, *] and return it as [B, K, D].

    Raises
    ------
    TypeError, ValueError
        As :func:`jacobian_gram`.
    """
    _checks.floating("jacobian", jacobian)
    if jacobian.dim() < 3:
        raise ValueError(f"jacobian has shape {list(jacobian.shape)}; [B, K, *], tangents by rows, is needed")
    if jacobian.dim() == 3:
        return jacobian
    if jacobian.dim() > 4 and jacobian.stride(2) == 1:
        jacobian = jacobian.movedim(
            2, -1
        )  # channels-last images, in the order that they lie in: G does not depend on it
    return jacobian.flatten(2)


class _JacobianGram(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(jacobian: Tensor, backend: str) -> Tensor:
        return _column.kernels[backend].forward(jacobian)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        jacobian, ctx.backend = inputs
        ctx.save_for_backward(jacobian)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel = partial(_backward_kernel, ctx.backend)
        return (*_autograd.backward(kernel, reference.jacobian_gram, (grad,), ctx.saved_tensors), None)


def _backward_kernel(backend: str, grad: Tensor, jacobian: Tensor) -> tuple[Tensor]:
    return (_column.kernels[backend].backward(grad, jacobian),)


def empty_rows(jacobian: Tensor) -> Tensor:
    """Allocate what the kernels do: a transposed [K, B, D] for such a Jacobian, else a contiguous tensor."""
    batch, latents, dimensions = jacobian.shape
    if not jacobian.is_contiguous() and jacobian.transpose(0, 1).is_contiguous():
        return jacobian.new_empty((latents, batch, dimensions)).transpose(0, 1)
    return jacobian.new_empty((batch, latents, dimensions))


def _forward_fake(jacobian: Tensor) -> Tensor:
    batch, latents, _ = jacobian.shape
    return jacobian.new_empty((batch, latents, latents), dtype=_checks.statistics_dtype(jacobian.dtype))


def _backward_fake(grad: Tensor, jacobian: Tensor) -> Tensor:
    return empty_rows(jacobian)


def _vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        return *_batching.unfold(info.batch_size, op(*_batching.fold(info.batch_size, in_dims, *tensors))), 0

    return rule


_column = _backends.register(
    "jacobian_gram",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    forward_vmap=_vmap,
    backward_vmap=_vmap,
)
