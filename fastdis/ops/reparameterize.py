"""Draws from a diagonal Gaussian posterior, with noise that depends on the seed and the position alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _batching, _checks


def reparameterize(
    mean: Tensor, logvar: Tensor, *, generator: torch.Generator | None = None, backend: str = "auto"
) -> Tensor:
    r"""Draw from a diagonal Gaussian by the reparameterisation trick.

    .. math:: z = \mu + e^{\frac12 \log \sigma^2} \epsilon, \qquad \epsilon \sim \mathcal{N}(0, I)

    Kingma and Welling (2014), eq. 10. The noise is Philox4x32-10 (Salmon et al., 2011) through Box and Muller: a
    function of a seed, which is drawn from the generator, and of the element's position. So a generator's seed gives
    the same draw whatever the number of threads and, to rounding, the backend and the dtype. On a GPU backward makes
    the noise again; on a CPU, where that takes longer than to read it, it is kept if ``logvar`` needs a gradient.

    Parameters
    ----------
    mean, logvar : Tensor [*]
        Of one shape; float32, float64, float16 or bfloat16, in one dtype (under autocast, mixed dtypes are promoted).
    generator : torch.Generator, optional
        Where the seed comes from, one number a call, on the generator's own device; torch's default generator of the
        device of ``mean`` where it is None.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        A backend asked for by name fails rather than give way to another.

    Returns
    -------
    Tensor [*]
        Like ``mean``, contiguous. Differentiable in both to any order: first derivatives by compiled kernels, higher
        ones through the reference. Under ``torch.func.vmap`` the ``randomness`` argument says whether maps share their
        noise. Forward-mode differentiation is refused.

    Raises
    ------
    TypeError
        If a tensor has the wrong dtype, or ``generator`` is no generator.
    ValueError
        If shapes or devices do not match.
    RuntimeError
        If the backend asked for cannot serve here.

    Notes
    -----
    The noise is made from two 32-bit words for each pair of numbers, for float64 as well: the largest is 6.7.

    Examples
    --------
    >>> z = reparameterize(torch.zeros(64, 10), torch.zeros(64, 10), generator=torch.Generator().manual_seed(0))
    """
    _checks.floating("mean", mean)
    _checks.beside("logvar", logvar, mean.shape, "that of mean", "mean", mean)
    mean, logvar = _checks.one_dtype(mean=mean, logvar=logvar)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; a torch.Generator or None is needed")
    device = mean.device if generator is None else generator.device
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=device).to(mean.device)
    chosen = _column.choose(backend, mean)
    if chosen == "reference":
        return reference.reparameterize(mean, logvar, seed)
    keep = chosen == "cpu" and torch.is_grad_enabled() and logvar.requires_grad
    return _autograd.apply(_Reparameterize, mean, logvar, seed, keep, chosen)[0]


class _Reparameterize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, logvar: Tensor, seed: Tensor, keep: bool, backend: str) -> tuple[Tensor, Tensor]:
        return _column.kernels[backend].forward(mean, logvar, seed, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, logvar, seed, _, ctx.backend = inputs
        ctx.save_for_backward(logvar, seed, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        logvar, seed, kept = ctx.saved_tensors
        if grad is None or not torch.is_grad_enabled():
            wanted = grad is not None and ctx.needs_input_grad[1]
            dlogvar = _column.kernels[ctx.backend].backward(grad, logvar, seed, kept) if wanted else None
            return grad, dlogvar, None, None, None
        gradients = _autograd.backward(
            partial(_gradients, ctx.backend), partial(_reference, seed), (grad,),
            (_autograd.stand_in(logvar.shape, logvar), logvar), (seed, kept),
        )  # fmt: skip
        return (*gradients, None, None, None)


def _gradients(
    backend: str, grad: Tensor, mean: Tensor, logvar: Tensor, seed: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    return grad, _column.kernels[backend].backward(grad, logvar, seed, kept)


def _reference(seed: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return reference.reparameterize(mean, logvar, seed)


def _forward_fake(mean: Tensor, logvar: Tensor, seed: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    kept = mean.new_empty(mean.shape if keep else (0,), dtype=_checks.statistics_dtype(mean.dtype))
    return mean.new_empty(mean.shape), kept


def _backward_fake(grad: Tensor, logvar: Tensor, seed: Tensor, kept: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


def _runs(size: int, in_dims: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Each map's elements as runs of their own, with the map's seeds."""
    first, logvar, seed = (_batching.in_front(size, d, t) for d, t in zip(in_dims, tensors, strict=False))
    return first, logvar, seed.reshape(-1)


def _forward_vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        z, kept = op(*_runs(info.batch_size, in_dims, arguments[:3]), arguments[3])
        return (z, kept if arguments[3] else kept.new_empty((info.batch_size, 0))), (0, 0)

    return rule


def _backward_vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        kept = _batching.in_front(info.batch_size, in_dims[3], arguments[3])
        return op(*_runs(info.batch_size, in_dims, arguments[:3]), kept if kept.numel() else kept.flatten()), 0

    return rule


_column = _backends.register(
    "reparameterize",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    forward_vmap=_forward_vmap,
    backward_vmap=_backward_vmap,
)
