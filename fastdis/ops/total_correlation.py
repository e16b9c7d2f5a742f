"""The decomposition of the aggregate divergence, without a [B, B, K] tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _batching, _checks
from fastdis.reference.total_correlation import ESTIMATORS


class AggregateDivergence(NamedTuple):
    """What :func:`total_correlation` returns."""

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_wise_kl: Tensor


def total_correlation(
    z: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    dataset_size: int,
    estimator: str = "mws",
    backend: str = "auto",
) -> AggregateDivergence:
    r"""Mutual information, total correlation and dimension-wise divergence of a batch of posteriors.

    .. math::
        \mathrm{MI} &= \overline{\log q(z|x) - \log q(z)}, \qquad
        \mathrm{TC} = \overline{\log q(z) - \textstyle\sum_k \log q(z_k)}, \qquad
        \mathrm{DW} = \overline{\textstyle\sum_k \log q(z_k) - \log p(z)} \\
        \log q(z_i) &\approx \log \textstyle\sum_j w_{ij} \prod_k \mathcal{N}(z_{ik}; \mu_{jk}, \sigma_{jk}^2), \qquad
        \log q(z_{ik}) \approx \log \textstyle\sum_j w_{ij}\, \mathcal{N}(z_{ik}; \mu_{jk}, \sigma_{jk}^2)

    beta-TCVAE (Chen et al., 2018), eq. 2; the sum of the three is the KL divergence of the posteriors from the prior,
    in expectation. All pairs of samples are visited in both passes, and none is stored: memory is that of the inputs.

    Parameters
    ----------
    z, mean, logvar : Tensor [B, K]
        A draw from each sample's posterior, its mean and log-variance; float32, float64, float16 or bfloat16, in one
        dtype (under autocast, mixed dtypes are promoted). Leading dimensions [*, B, K] are batches of their own.
    dataset_size : int
        N, the number of samples that batches are drawn from.
    estimator : {"mws", "mss"}
        Minibatch-weighted sampling (their eq. 5): every weight is 1 / (B N). It is biased: the total correlation can
        come out negative, as users of other implementations wonder at. Minibatch-stratified sampling (their appendix
        C.2), with M = B - 1: 1 / N on the diagonal, (N - M) / (N M) right of it, 1 / M elsewhere; rows sum to 1. Widely
        copied code puts the 1 / N into the first column instead of onto the diagonal, and so overestimates the total
        correlation.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        A backend asked for by name fails rather than give way to another.

    Returns
    -------
    mutual_information, total_correlation, dimension_wise_kl : Tensor [*]
        Means over the batch in nats, constants kept, in float32 (float64 for float64). NaN for an empty batch.
        Differentiable in the three tensors to any order: first derivatives by compiled kernels, higher ones through
        the reference. Forward-mode differentiation is refused.

    Raises
    ------
    TypeError
        If a tensor has the wrong dtype or ``dataset_size`` is not an integer.
    ValueError
        If shapes or devices do not match, ``dataset_size`` is not positive, or for "mss" the batch has one sample or
        more than ``dataset_size``.
    RuntimeError
        If the backend asked for cannot serve here.

    Examples
    --------
    >>> mean, logvar = torch.randn(64, 10), torch.zeros(64, 10)
    >>> z = mean + torch.randn(64, 10)
    >>> terms = total_correlation(z, mean, logvar, dataset_size=737_280)
    >>> loss = terms.mutual_information + 6 * terms.total_correlation + terms.dimension_wise_kl
    """
    _checks.floating("z", z)
    if z.dim() < 2:
        raise ValueError(f"z has shape {list(z.shape)}; [*, B, K] is needed")
    for name, value in (("mean", mean), ("logvar", logvar)):
        _checks.beside(name, value, z.shape, "that of z", "z", z)
    z, mean, logvar = _checks.one_dtype(z=z, mean=mean, logvar=logvar)
    _checks.one_of("estimator", estimator, ESTIMATORS)
    if not isinstance(dataset_size, int) or isinstance(dataset_size, bool):
        raise TypeError(f"dataset_size is {dataset_size!r}; an integer is needed")
    batch = z.shape[-2]
    if dataset_size < 1:
        raise ValueError(f"dataset_size is {dataset_size}; a positive number of samples is needed")
    if estimator == "mss" and (batch == 1 or batch > dataset_size):
        raise ValueError(
            f"z has a batch of {batch} samples; estimator 'mss' needs from 2 to dataset_size = {dataset_size}"
        )
    chosen = _column.choose(backend, z)
    if chosen == "reference":
        return AggregateDivergence(
            *reference.total_correlation(z, mean, logvar, dataset_size=dataset_size, estimator=estimator)
        )
    leading = z.shape[:-2]
    if len(leading) > 1:
        z, mean, logvar = (t.flatten(0, -3) for t in (z, mean, logvar))
    terms = _autograd.apply(_TotalCorrelation, z, mean, logvar, dataset_size, ESTIMATORS.index(estimator), chosen)[:3]
    return AggregateDivergence(*(t.reshape(leading) if len(leading) > 1 else t for t in terms))


class _TotalCorrelation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor, mean: Tensor, logvar: Tensor, dataset_size: int, estimator: int, backend: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return _column.kernels[backend].forward(z, mean, logvar, dataset_size, estimator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z, mean, logvar, *ctx.options = inputs
        ctx.save_for_backward(z, mean, logvar, *output[3:])
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = grads[:3]
        if all(g is None for g in grads):
            return (None,) * 6
        z, mean, logvar, *statistics = ctx.saved_tensors
        gradients = _autograd.backward(
            partial(_backward_kernel, *ctx.options),
            partial(_reference, *ctx.options[:2]),
            grads,
            (z, mean, logvar),
            tuple(statistics),
        )
        return (*gradients, None, None, None)


def _backward_kernel(
    dataset_size: int, estimator: int, backend: str, *tensors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    *grads, z, mean, logvar, log_joint, log_marginals = tensors
    nothing = torch.zeros_like(next(g for g in grads if g is not None)) if any(g is None for g in grads) else None
    grad = torch.stack([nothing if g is None else g for g in grads])  # type: ignore[misc]
    return _column.kernels[backend].backward(grad, z, mean, logvar, log_joint, log_marginals, dataset_size, estimator)


def _reference(dataset_size: int, estimator: int, z: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    return reference.total_correlation(z, mean, logvar, dataset_size=dataset_size, estimator=ESTIMATORS[estimator])


def _forward_fake(
    z: Tensor, mean: Tensor, logvar: Tensor, dataset_size: int, estimator: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    log_marginals = z.new_empty(z.shape, dtype=_checks.statistics_dtype(z.dtype))
    terms = [log_marginals.new_empty(z.shape[:-2]) for _ in range(3)]
    return terms[0], terms[1], terms[2], log_marginals.new_empty(z.shape[:-1]), log_marginals


def _backward_fake(
    grad: Tensor, z: Tensor, mean: Tensor, logvar: Tensor, log_joint: Tensor, log_marginals: Tensor,
    dataset_size: int, estimator: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape)


def _forward_vmap(op: Any) -> Callable[..., Any]:
    """The mapped dimension becomes the op's own leading one, or is folded into it."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        size = info.batch_size
        z, *others = (_batching.in_front(size, d, t) for d, t in zip(in_dims, arguments[:3], strict=False))
        if z.dim() == 3:
            return op(z, *others, *arguments[3:]), (0,) * 5
        outputs = op(*(t.flatten(0, 1) for t in (z, *others)), *arguments[3:])
        return _batching.unfold(size, *outputs), (0,) * 5

    return rule


def _backward_vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, grad: Tensor, *arguments: Any) -> Any:
        size = info.batch_size
        grad = _batching.in_front(size, in_dims[0], grad).movedim(0, 1)
        z, *others = (_batching.in_front(size, d, t) for d, t in zip(in_dims[1:], arguments[:5], strict=False))
        if z.dim() == 3:
            return op(grad.contiguous(), z, *others, *arguments[5:]), (0,) * 3
        gradients = op(grad.flatten(1, 2), *(t.flatten(0, 1) for t in (z, *others)), *arguments[5:])
        return _batching.unfold(size, *gradients), (0,) * 3

    return rule


_column = _backends.register(
    "total_correlation",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    forward_vmap=_forward_vmap,
    backward_vmap=_backward_vmap,
)
