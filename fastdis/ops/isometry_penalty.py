"""Penalties on the pull-back metric of a decoder, from one read of its Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _batching, _checks
from fastdis.ops.jacobian_gram import as_rows, empty_rows
from fastdis.reference.isometry_penalty import KINDS, penalty_of_gram


def isometry_penalty(jacobian: Tensor, kind: str = "isometry", *, backend: str = "auto") -> Tensor:
    r"""How far a decoder is from a local isometry, by its Jacobian.

    With :math:`G = J J^\top` a sample, :math:`t = \operatorname{tr} G`, :math:`q = \|G\|_F^2`, and means over samples:

    ====================  ==============================================  ========================================
    kind                  penalty                                         from
    ====================  ==============================================  ========================================
    isometry              :math:`\overline{\|G - I\|^2}`                  Gropp et al. (2020), in expectation
    scaled_isometry       :math:`\overline{\|G - c I\|^2}, c = \bar t/K`  FMVAE, Chen et al. (2020)
    conformal             :math:`\overline{\|G - (t/K) I\|^2}`            a scale for each sample
    relaxed_distortion    :math:`\bar q / \bar t^2`                       IRVAE, Lee et al. (2022); least at 1/K
    orthogonality         :math:`\overline{\sum_{i \ne j} G_{ij}^2}`      OroJaR, Wei et al. (2021), exactly
    ====================  ==============================================  ========================================

    Where the papers estimate these by random directions, this is exact: no variance, no double backward.

    Parameters
    ----------
    jacobian : Tensor [B, K, *]
        Tangents by rows, D numbers each: float32, float64, float16 or bfloat16. Read where it lies if contiguous, or
        if it is the transpose of a contiguous [K, B, *], as :func:`decoder_jacobian` returns it; the gradient then is
        laid out like it.
    kind : {"isometry", "scaled_isometry", "conformal", "relaxed_distortion", "orthogonality"}
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        A backend asked for by name fails rather than give way to another.

    Returns
    -------
    Tensor []
        In float32 (float64 for float64): squares of G leave the range of float16. NaN for an empty batch.
        Differentiable to any order: first derivatives by compiled kernels, which keep the [B, K, K] Gram matrices,
        higher ones through the reference. Forward-mode differentiation is refused.

    Raises
    ------
    TypeError
        If the tensor is not of a floating dtype.
    ValueError
        If it has fewer than three dimensions, or ``kind`` is unknown.
    RuntimeError
        If the backend asked for cannot serve here.

    Examples
    --------
    >>> jacobian = torch.randn(32, 8, 12288, requires_grad=True)
    >>> isometry_penalty(jacobian, "relaxed_distortion").backward()
    """
    _checks.one_of("kind", kind, KINDS)
    jacobian = as_rows(jacobian)
    chosen = _column.choose(backend, jacobian)
    if chosen == "reference":
        return reference.isometry_penalty(jacobian, kind)
    return _autograd.apply(_IsometryPenalty, jacobian, KINDS.index(kind), chosen)[0]


class _IsometryPenalty(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(jacobian: Tensor, kind: int, backend: str) -> tuple[Tensor, Tensor]:
        return _column.kernels[backend].forward(jacobian, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        jacobian, ctx.kind, ctx.backend = inputs
        ctx.save_for_backward(jacobian, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 3
        jacobian, gram = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _column.kernels[ctx.backend].backward(grad, jacobian, gram, ctx.kind), None, None
        kernel = partial(_backward_kernel, ctx.kind, ctx.backend)
        return *_autograd.backward(kernel, partial(_reference, ctx.kind), (grad,), (jacobian,), (gram,)), None, None


def _backward_kernel(kind: int, backend: str, grad: Tensor, jacobian: Tensor, gram: Tensor) -> tuple[Tensor]:
    return (_column.kernels[backend].backward(grad, jacobian, gram, kind),)


def _reference(kind: int, jacobian: Tensor) -> Tensor:
    return reference.isometry_penalty(jacobian, KINDS[kind])


def _forward_fake(jacobian: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    batch, latents, _ = jacobian.shape
    gram = jacobian.new_empty((batch, latents, latents), dtype=_checks.statistics_dtype(jacobian.dtype))
    return gram.new_empty(()), gram


def _backward_fake(grad: Tensor, jacobian: Tensor, gram: Tensor, kind: int) -> Tensor:
    return empty_rows(jacobian)


def _gram_op(op: Any, direction: str) -> Any:
    """The op of jacobian_gram beside this one: folded maps share its kernels, their means are taken apart."""
    return getattr(getattr(torch.ops, op.namespace), f"jacobian_gram_{direction}").default


def _gram_gradient(gram: Tensor, kind: str) -> Tensor:
    """Gradients by gram [V, B, K, K] of V penalties."""
    diagonal = torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    scale = 2 / gram.shape[1]
    if kind == "orthogonality":
        return scale * gram.masked_fill(diagonal, 0)
    if kind == "relaxed_distortion":
        mean = trace.mean(1).reshape(-1, 1, 1, 1)
        square = gram.square().sum((-2, -1)).mean(1).reshape(-1, 1, 1, 1)
        return scale / mean.square() * (gram - square / mean * diagonal)
    if kind == "isometry":
        return scale * (gram - diagonal.to(gram.dtype))
    target = trace.mean(1, keepdim=True).expand_as(trace) if kind == "scaled_isometry" else trace
    return scale * (gram - (target / gram.shape[-1]).unsqueeze(-1).unsqueeze(-1) * diagonal)


def _forward_vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, jacobian: Tensor, kind: int) -> Any:
        size = info.batch_size
        (gram,) = _batching.unfold(size, _gram_op(op, "forward")(*_batching.fold(size, in_dims, jacobian)))
        loss = torch.stack([penalty_of_gram(g, KINDS[kind]) for g in gram])
        return (loss, gram), (0, 0)

    return rule


def _backward_vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, grad: Tensor, jacobian: Tensor, gram: Tensor, kind: int) -> Any:
        size = info.batch_size
        grad, gram = _batching.in_front(size, in_dims[0], grad), _batching.in_front(size, in_dims[2], gram)
        (rows,) = _batching.fold(size, in_dims[1:], jacobian)
        dgram = grad.reshape(-1, 1, 1, 1) * _gram_gradient(gram, KINDS[kind])
        return *_batching.unfold(size, _gram_op(op, "backward")(dgram.flatten(0, 1), rows)), 0

    return rule


_column = _backends.register(
    "isometry_penalty",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    forward_vmap=_forward_vmap,
    backward_vmap=_backward_vmap,
)
