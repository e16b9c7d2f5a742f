"""The divergence of diagonal Gaussians from the standard normal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _batching, _checks
from fastdis.reference.gaussian_kl import REDUCTIONS


def gaussian_kl(
    mean: Tensor, logvar: Tensor, *, weights: Tensor | None = None, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    r"""Kullback-Leibler divergence of diagonal Gaussians from the standard normal.

    .. math:: \mathrm{KL} = \tfrac12 \sum_k w_k \left( \mu_k^2 + e^{\log\sigma_k^2} - 1 - \log\sigma_k^2 \right)

    Kingma and Welling (2014), appendix B. Weights of the dimensions serve masks that open one latent at a time
    (DOT-VAE), per-dimension beta and controlled capacity.

    Parameters
    ----------
    mean, logvar : Tensor [B, K]
        float32, float64, float16 or bfloat16, in one dtype (under autocast, mixed dtypes are promoted); sums are in
        float32 (float64 for float64).
    weights : Tensor [K], optional
        In any of the four dtypes; all 1 where it is None.
    reduction : {"mean", "sum", "none"}
        Over the batch; the dimensions are always summed.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        A backend asked for by name fails rather than give way to another.

    Returns
    -------
    Tensor
        A scalar, or [B] for ``reduction="none"``, in nats, in the dtype of ``mean``. Differentiable in every tensor to
        any order: first derivatives by compiled kernels, higher ones through the reference. Forward-mode
        differentiation is refused.

    Raises
    ------
    TypeError
        If a tensor has the wrong dtype.
    ValueError
        If shapes or devices do not match, or ``reduction`` is unknown.
    RuntimeError
        If the backend asked for cannot serve here.

    Examples
    --------
    >>> mean, logvar = torch.randn(64, 10), torch.zeros(64, 10)
    >>> divergence = gaussian_kl(mean, logvar, weights=torch.linspace(0, 1, 10))
    """
    _checks.one_of("reduction", reduction, REDUCTIONS)
    _checks.floating("mean", mean)
    if mean.dim() != 2:
        raise ValueError(f"mean has shape {list(mean.shape)}; [B, K] is needed")
    _checks.beside("logvar", logvar, mean.shape, "that of mean", "mean", mean)
    mean, logvar = _checks.one_dtype(mean=mean, logvar=logvar)
    chosen = _column.choose(backend, mean)
    if weights is not None:
        _checks.beside("weights", weights, mean.shape[1:], "[K] of mean", "mean", mean)
        weights = weights.to(mean.dtype if chosen == "reference" else _checks.statistics_dtype(mean.dtype))
    if chosen == "reference":
        return reference.gaussian_kl(mean, logvar, weights=weights, reduction=reduction)
    return _autograd.apply(_GaussianKl, mean, logvar, weights, REDUCTIONS.index(reduction), chosen)


class _GaussianKl(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, logvar: Tensor, weights: Tensor | None, reduction: int, backend: str) -> Tensor:
        return _column.kernels[backend].forward(mean, logvar, weights, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        mean, logvar, weights, *ctx.options = inputs
        ctx.save_for_backward(mean, logvar, *([] if weights is None else [weights]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradients = _autograd.backward(
            partial(_gradients, *ctx.options), partial(_reference, ctx.options[0]), (grad,), inputs
        )
        return (*gradients, *[None] * (5 - len(gradients)))


def _gradients(
    reduction: int, backend: str, grad: Tensor, mean: Tensor, logvar: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, ...]:
    gradients = _column.kernels[backend].backward(grad, mean, logvar, weights, reduction)
    return gradients[:2] if weights is None else gradients


def _reference(reduction: int, mean: Tensor, logvar: Tensor, weights: Tensor | None = None) -> Tensor:
    divergence = reference.gaussian_kl(mean, logvar, weights=weights, reduction=REDUCTIONS[reduction])
    return divergence.to(mean.dtype)


def _forward_fake(mean: Tensor, logvar: Tensor, weights: Tensor | None, reduction: int) -> Tensor:
    return mean.new_empty(mean.shape[:1] if reduction == 0 else ())


def _backward_fake(
    grad: Tensor, mean: Tensor, logvar: Tensor, weights: Tensor | None, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    dweights = mean.new_empty((0 if weights is None else mean.shape[1],), dtype=_checks.statistics_dtype(mean.dtype))
    return mean.new_empty(mean.shape), mean.new_empty(mean.shape), dweights


def _per_element(size: int, in_dims: Any, mean: Tensor, logvar: Tensor, weights: Tensor | None) -> tuple[Any, ...]:
    """Mean and logvar [V B, K] and weights [K], or with mapped weights all as columns [V B K, 1] and weights apart."""
    folded = _batching.fold(size, in_dims, mean, logvar)
    if weights is None or in_dims[2] is None:
        return *folded, weights, None
    each = _batching.in_front(size, in_dims[2], weights)
    return *(t.reshape(-1, 1) for t in folded), None, each


def _forward_vmap(op: Any) -> Callable[..., Any]:
    """Fold the mapped dimension into the batch, and reduce each map's samples apart."""

    def rule(info: Any, in_dims: Any, mean: Tensor, logvar: Tensor, weights: Tensor | None, reduction: int) -> Any:
        size = info.batch_size
        *folded, each = _per_element(size, in_dims, mean, logvar, weights)
        divergence = op(*folded, 0)
        if each is None:
            divergence = divergence.unflatten(0, (size, -1))
        else:
            divergence = (divergence.reshape(size, -1, each.shape[1]) * each.unsqueeze(1)).sum(2).to(mean.dtype)
        if reduction != 0:
            divergence = divergence.mean(1) if REDUCTIONS[reduction] == "mean" else divergence.sum(1)
        return divergence, 0

    return rule


def _backward_vmap(op: Any) -> Callable[..., Any]:
    def rule(
        info: Any, in_dims: Any, grad: Tensor, mean: Tensor, logvar: Tensor, weights: Tensor | None, reduction: int
    ) -> Any:
        size = info.batch_size
        m, lv = (_batching.in_front(size, d, t) for d, t in zip(in_dims[1:3], (mean, logvar), strict=True))
        batch = m.shape[1]
        grad = _batching.in_front(size, in_dims[0], grad)
        if reduction != 0:
            grad = (grad / (batch if REDUCTIONS[reduction] == "mean" else 1)).unsqueeze(1).expand(size, batch)
        # Every element is a sample of its own, so that each map's weights and their gradient stay apart.
        each = grad.unsqueeze(2).expand(m.shape).to(_checks.statistics_dtype(m.dtype))
        scaled = each if weights is None else each * _batching.in_front(size, in_dims[3], weights).unsqueeze(1)
        columns = (t.reshape(-1, 1) for t in (scaled.to(m.dtype), m, lv))
        dmean, dlogvar, _ = op(*columns, None, 0)
        dweights = each.new_empty((size, 0))
        if weights is not None:
            divergence = reference.gaussian_kl(*(t.to(each).reshape(-1, 1) for t in (m, lv)), reduction="none")
            dweights = (each * divergence.reshape(m.shape)).sum(1)
        return (dmean.reshape(m.shape), dlogvar.reshape(m.shape), dweights), (0, 0, 0)

    return rule


_column = _backends.register(
    "gaussian_kl",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    forward_vmap=_forward_vmap,
    backward_vmap=_backward_vmap,
)
