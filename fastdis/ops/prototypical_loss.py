"""Prototypical loss: distances, softmax and cross entropy in one op that keeps one number a query."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _batching, _checks
from fastdis.ops.prototype_distances import as_episodes
from fastdis.reference.prototypical_loss import REDUCTIONS


def prototypical_loss(
    queries: Tensor, prototypes: Tensor, labels: Tensor, *, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    r"""Cross entropy of queries' softmax over prototypes by negative squared distance.

    .. math:: \ell_q = -\log \frac{\exp(-\|q - p_{y_q}\|^2)}{\sum_n \exp(-\|q - p_n\|^2)}

    Snell, Swersky and Zemel (2017), eq. 2. :math:`\|q\|^2` cancels and only the log-sum-exp of each query is kept for
    backward; neither pass forms a [Q, N, D] tensor, or on CPU and GPU a [Q, N] one.

    Parameters
    ----------
    queries : Tensor [*, Q, D]
        float32, float64, float16 or bfloat16; products and sums are in float32 (float64 for float64).
    prototypes : Tensor [*, N, D]
        In the dtype of ``queries`` (under autocast, mixed dtypes are promoted). Leading dimensions broadcast.
    labels : Tensor [*, Q] of int64
        The prototype of each query, 0 to N - 1; its leading dimensions are those of the result.
    reduction : {"mean", "sum", "none"}
        Over all queries of all episodes.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        A backend asked for by name fails rather than give way to another.

    Returns
    -------
    Tensor
        A scalar, or [*, Q] for ``reduction="none"``, in the dtype of ``queries``. Differentiable in queries and
        prototypes to any order: first derivatives by compiled kernels, higher ones through the reference.
        Forward-mode differentiation is refused.

    Raises
    ------
    TypeError
        If a tensor has the wrong dtype.
    ValueError
        If shapes or devices do not match, or there is no prototype.
    RuntimeError
        If a label is out of range (on CPU; on a GPU, where looking would stall the stream, that query's loss and
        gradients are NaN), or the backend asked for cannot serve here.

    Examples
    --------
    >>> queries, prototypes = torch.randn(75, 64), torch.randn(5, 64)
    >>> loss = prototypical_loss(queries, prototypes, torch.arange(5).repeat_interleave(15))
    """
    _checks.one_of("reduction", reduction, REDUCTIONS)
    queries, prototypes, leading = as_episodes(queries, prototypes)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}; a tensor is needed")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels has dtype {labels.dtype}; int64 is needed")
    _checks.shape("labels", labels, (*leading, queries.shape[1]), "[*, Q] of queries")
    _checks.same_device("labels", labels, "queries", queries)
    if prototypes.shape[1] == 0:
        raise ValueError("prototypes has no rows; at least one prototype is needed")
    if len(leading) != 1:
        labels = labels.reshape(queries.shape[:2])
    chosen = _column.choose(backend, queries)
    if chosen == "reference":
        loss = reference.prototypical_loss(queries, prototypes, labels, reduction=reduction)
    else:
        loss, _ = _autograd.apply(_PrototypicalLoss, queries, prototypes, labels, REDUCTIONS.index(reduction), chosen)
    return loss.reshape(*leading, -1) if reduction == "none" and len(leading) != 1 else loss


class _PrototypicalLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        queries: Tensor, prototypes: Tensor, labels: Tensor, reduction: int, backend: str
    ) -> tuple[Tensor, Tensor]:
        return _column.kernels[backend].forward(queries, prototypes, labels, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        queries, prototypes, labels, *ctx.options = inputs
        ctx.save_for_backward(queries, prototypes, labels, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        queries, prototypes, labels, logsumexp = ctx.saved_tensors
        gradients = _autograd.backward(
            partial(_backward_kernel, *ctx.options),
            partial(_reference, ctx.options[0], labels),
            (grad,),
            (queries, prototypes),
            (labels, logsumexp),
        )
        return (*gradients, None, None, None)


def _backward_kernel(
    reduction: int, backend: str, grad: Tensor, queries: Tensor, prototypes: Tensor, labels: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor]:
    return _column.kernels[backend].backward(grad, queries, prototypes, labels, logsumexp, reduction)


def _reference(reduction: int, labels: Tensor, queries: Tensor, prototypes: Tensor) -> Tensor:
    return reference.prototypical_loss(queries, prototypes, labels, reduction=REDUCTIONS[reduction])


def _forward_fake(queries: Tensor, prototypes: Tensor, labels: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    loss = queries.new_empty(labels.shape if reduction == 0 else ())
    return loss, queries.new_empty(labels.shape, dtype=_checks.statistics_dtype(queries.dtype))


def _backward_fake(
    grad: Tensor, queries: Tensor, prototypes: Tensor, labels: Tensor, logsumexp: Tensor, reduction: int
) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), prototypes.new_empty(prototypes.shape)


def _forward_vmap(op: Any) -> Callable[..., Any]:
    """Fold the mapped dimension into the episodes, and reduce each map's queries apart."""

    def rule(info: Any, in_dims: Any, queries: Tensor, prototypes: Tensor, labels: Tensor, reduction: int) -> Any:
        loss, logsumexp = op(*_batching.fold(info.batch_size, in_dims, queries, prototypes, labels), 0)
        loss, logsumexp = _batching.unfold(info.batch_size, loss, logsumexp)
        if reduction != 0:
            loss = loss.mean((1, 2)) if REDUCTIONS[reduction] == "mean" else loss.sum((1, 2))
        return (loss, logsumexp), (0, 0)

    return rule


def _backward_vmap(op: Any) -> Callable[..., Any]:
    def rule(
        info: Any, in_dims: Any, grad: Tensor, queries: Tensor, prototypes: Tensor, labels: Tensor, logsumexp: Tensor,
        reduction: int,
    ) -> Any:  # fmt: skip
        size = info.batch_size
        q, p, y, lse = _batching.fold(size, in_dims[1:], queries, prototypes, labels, logsumexp)
        grad = _batching.in_front(size, in_dims[0], grad)
        per_map = lse.unflatten(0, (size, -1))
        if reduction != 0:
            count = per_map[0].numel() if REDUCTIONS[reduction] == "mean" else 1
            grad = (grad / count).reshape(size, 1, 1).expand_as(per_map)
        dq, dp = op(grad.flatten(0, 1).contiguous(), q, p, y, lse, 0)
        return _batching.unfold(size, dq, dp), (0, 0)

    return rule


_column = _backends.register(
    "prototypical_loss",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    forward_vmap=_forward_vmap,
    backward_vmap=_backward_vmap,
)
