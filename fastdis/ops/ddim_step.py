"""A DDIM step under sub-gradient fields, in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _batching, _checks
from fastdis.ops.sum_gradient_fields import (
    as_stored,
    check_fields,
    check_weights,
    field_gradients,
    fold_weights,
    weight_gradient,
)
from fastdis.reference.sum_gradient_fields import total_field


def ddim_step(
    x: Tensor,
    noise: Tensor,
    fields: Tensor,
    alpha_bar: Tensor | float,
    alpha_bar_prev: Tensor | float,
    *,
    weights: Tensor | None = None,
    sigma: Tensor | float = 0.0,
    eta_noise: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""One step of DDIM sampling guided by sub-gradient fields, reading every field once and writing no temporary.

    .. math::
        e &= \epsilon - \sqrt{1 - \bar\alpha_t} \sum_n w_n g_n, \qquad
        \hat x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t}\, e}{\sqrt{\bar\alpha_t}} \\
        x_{t-1} &= \sqrt{\bar\alpha_{t-1}}\, \hat x_0 + \sqrt{1 - \bar\alpha_{t-1} - \sigma^2}\, e + \sigma \eta

    Song et al. (2021), eq. 12, under the guidance of DisDiff (Yang et al., 2023).

    Parameters
    ----------
    x : Tensor [B, *]
        The noisy sample x_t: float32, float64, float16 or bfloat16; arithmetic is in float32 (float64 for float64).
    noise : Tensor [B, *]
        The predicted noise, in the dtype of ``x`` (under autocast, mixed dtypes are promoted).
    fields : Tensor [B, N, *]
        One sub-gradient field for each of N factors, in the dtype of ``x``.
    alpha_bar, alpha_bar_prev : Tensor [B] or [], or float
        The cumulative products of the schedule at this step and at the one to go to, in (0, 1] and [0, 1].
    weights : Tensor [N] or [B, N], optional
        Of the factors; all 1 where it is None. One-hot weights give the partial swap of DisDiff.
    sigma : Tensor [B] or [], or float
        Deviation of the fresh noise; rounding may not take it above sqrt(1 - alpha_bar_prev), so what is left under
        the root is never below 0.
    eta_noise : Tensor [B, *], optional
        Fresh standard normal noise; it may be left out where sigma is 0.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        A backend asked for by name fails rather than give way to another.

    Returns
    -------
    x_prev, x0 : Tensor [B, *]
        The sample at the previous step and the predicted clean one, like ``x``. Differentiable in every tensor to any
        order: first derivatives in x, noise, fields, weights and eta_noise by compiled kernels, in the schedule and of
        higher order through the reference. Forward-mode differentiation is refused.

    Raises
    ------
    TypeError
        If a tensor has the wrong dtype, or a number of the schedule is neither a tensor nor a number.
    ValueError
        If shapes or devices do not match, a number of the schedule that is a float is out of range, or ``sigma`` is
        not 0 and ``eta_noise`` is missing.
    RuntimeError
        If the backend asked for cannot serve here.

    Examples
    --------
    >>> x, noise, fields = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16), torch.randn(8, 6, 3, 16, 16)
    >>> x_prev, x0 = ddim_step(x, noise, fields, 0.5, 0.6)
    """
    images = {"x": x, "noise": noise} | ({} if eta_noise is None else {"eta_noise": eta_noise})
    *stored, fields = check_fields(images, fields)
    x = stored[0]
    _check_schedule(alpha_bar, alpha_bar_prev, sigma, eta_noise)
    schedule = _checks.per_sample("x", x, alpha_bar=alpha_bar, alpha_bar_prev=alpha_bar_prev, sigma=sigma)
    weights = None if weights is None else check_weights(weights, fields)
    chosen = _column.choose(backend, x)
    (x, noise, *eta), fields, last = as_stored(stored, fields)
    eta_noise = eta[0] if eta else None
    if chosen == "reference":
        step = reference.ddim_step(
            x, noise, fields, schedule[0], schedule[1], weights=weights, sigma=schedule[2], eta_noise=eta_noise
        )
    else:
        step = _autograd.apply(_DdimStep, x, noise, fields, *schedule, weights, eta_noise, chosen)
    return (step[0].movedim(-1, 1), step[1].movedim(-1, 1)) if last else step


def _check_schedule(alpha_bar: Any, alpha_bar_prev: Any, sigma: Any, eta_noise: Tensor | None) -> None:
    """Check what are numbers; looking into tensors would stall a GPU."""
    if isinstance(alpha_bar, (int, float)) and not 0 < alpha_bar <= 1:
        raise ValueError(f"alpha_bar is {alpha_bar}; a number in (0, 1] is needed")
    if isinstance(alpha_bar_prev, (int, float)) and not 0 <= alpha_bar_prev <= 1:
        raise ValueError(f"alpha_bar_prev is {alpha_bar_prev}; a number in [0, 1] is needed")
    if isinstance(sigma, (int, float)):
        most = math.sqrt(1 - alpha_bar_prev) if isinstance(alpha_bar_prev, (int, float)) else 1.0
        if not 0 <= sigma <= most * (1 + 1e-6):
            raise ValueError(f"sigma is {sigma}; a number from 0 to sqrt(1 - alpha_bar_prev) = {most:.6g} is needed")
    if eta_noise is None and (isinstance(sigma, Tensor) or sigma != 0):
        raise ValueError("eta_noise is None; where sigma is not the number 0, standard normal noise [B, *] is needed")


class _DdimStep(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, noise: Tensor, fields: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, sigma: Tensor,
        weights: Tensor | None, eta_noise: Tensor | None, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        kernel = _column.kernels[backend].forward
        return kernel(x, noise, fields, alpha_bar, alpha_bar_prev, sigma, weights, eta_noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, noise, fields, *schedule, weights, eta_noise, ctx.backend = inputs
        ctx.shape = tuple(fields.shape)
        ctx.has_weights, ctx.has_eta = weights is not None, eta_noise is not None
        # The step is linear in the images: they are kept only for the gradients of its coefficients.
        ctx.keeps_images = any(ctx.needs_input_grad[3:7])
        images = (x, noise, fields, eta_noise) if ctx.keeps_images else ()
        ctx.save_for_backward(*(t for t in (*schedule, weights, *images) if t is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_prev: Tensor | None, grad_x0: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grad_x0 if grad_prev is None else grad_prev
        if grad is None:
            return (None,) * 9
        alpha_bar, alpha_bar_prev, sigma, *rest = ctx.saved_tensors
        schedule = (alpha_bar, alpha_bar_prev, sigma)
        weights = rest.pop(0) if ctx.has_weights else None
        if not torch.is_grad_enabled():
            images = (*rest, None)[:4] if ctx.keeps_images else (None,) * 4
            needs = ctx.needs_input_grad
            return (*_gradients(ctx.backend, needs, ctx.shape, (grad_prev, grad_x0), schedule, weights, *images), None)
        if not ctx.keeps_images:
            image = _autograd.stand_in(grad.shape, grad)
            rest = [image, image, _autograd.stand_in(ctx.shape, grad), *([image] if ctx.has_eta else [])]
        # Where the schedule needs no gradient it is a constant to the second derivatives as well: at the last step,
        # with alpha_bar_prev = 1, the derivative by it is infinite.
        fixed = () if any(ctx.needs_input_grad[3:6]) else schedule
        options = (ctx.has_weights, ctx.has_eta)
        gradients = iter(
            _autograd.backward(
                partial(_all_gradients, *options, bool(fixed), ctx.backend, ctx.shape),
                partial(_reference, *options, fixed),
                (grad_prev, grad_x0),
                (*rest[:3], *(() if fixed else schedule), *([] if weights is None else [weights]), *rest[3:]),
                fixed,
            )
        )
        present = (*(True,) * 3, *(not fixed,) * 3, *options)
        return (*(next(gradients) if there else None for there in present), None)


def _named(has_weights: bool, has_eta: bool, optional: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Weights and fresh noise out of those that are there."""
    return optional[0] if has_weights else None, optional[-1] if has_eta else None


def _gradients(
    backend: str, needs: Sequence[bool], shape: tuple[int, ...], grads: tuple[Tensor | None, Tensor | None],
    schedule: tuple[Tensor, ...], weights: Tensor | None, x: Tensor | None, noise: Tensor | None,
    fields: Tensor | None, eta_noise: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the eight tensors in their order, those that are needed; images only where these depend on them."""
    dx, dnoise, dtotal, deta = _column.kernels[backend].backward(
        *grads, *schedule, needs[0], needs[1], needs[2] or needs[6], needs[7]
    )
    dfields = dweights = None
    if weights is not None and (needs[2] or needs[6]):
        one, kept = torch.ones_like(schedule[0]), fields if needs[6] else None
        dfields, products = field_gradients(backend, dtotal.squeeze(1), shape, kept, one, weights, needs[2])
        dweights = weight_gradient(products, one, weights) if needs[6] else None
    elif needs[2]:
        dfields = dtotal.expand(shape)
    dschedule: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs[3:6]):
        assert x is not None
        assert noise is not None
        assert fields is not None
        dschedule = _schedule_gradients(*grads, x, noise, fields, schedule, weights, eta_noise)
    return (
        dx if needs[0] else None, dnoise if needs[1] else None, dfields, *dschedule, dweights,
        deta if needs[7] else None,
    )  # fmt: skip


def _all_gradients(
    has_weights: bool, has_eta: bool, fixed: bool, backend: str, shape: tuple[int, ...], grad_prev: Tensor | None,
    grad_x0: Tensor | None, x: Tensor, noise: Tensor, fields: Tensor, *rest: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    schedule, optional = (rest[-3:], rest[:-3]) if fixed else (rest[:3], rest[3:])
    weights, eta_noise = _named(has_weights, has_eta, optional)
    needs = (*(True,) * 3, *(not fixed,) * 3, has_weights, has_eta)
    gradients = _gradients(backend, needs, shape, (grad_prev, grad_x0), schedule, weights, x, noise, fields, eta_noise)
    return tuple(g for g, there in zip(gradients, needs, strict=True) if there)


def _schedule_gradients(
    grad_prev: Tensor | None, grad_x0: Tensor | None, x: Tensor, noise: Tensor, fields: Tensor,
    schedule: tuple[Tensor, ...], weights: Tensor | None, eta_noise: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of alpha_bar, alpha_bar_prev and sigma, [B] each, by inner products in plain PyTorch: few need them."""
    alpha_bar, alpha_bar_prev, sigma = schedule
    dtype = alpha_bar.dtype

    def flat(image: Tensor | None) -> Tensor:
        return (torch.zeros_like(x) if image is None else image).to(dtype).flatten(1)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1)

    d, root, previous = torch.sqrt(1 - alpha_bar), torch.sqrt(alpha_bar), torch.sqrt(alpha_bar_prev)
    left = torch.sqrt((1 - alpha_bar_prev - sigma.square()).clamp(min=0))
    field, before, clean = flat(total_field(fields, weights)), flat(grad_prev), flat(grad_x0)
    e = flat(noise) - d.unsqueeze(1) * field
    x0 = (flat(x) - d.unsqueeze(1) * e) / root.unsqueeze(1)
    of_x0 = clean + previous.unsqueeze(1) * before
    of_e = left.unsqueeze(1) * before - (d / root).unsqueeze(1) * of_x0
    of_left = dot(before, e) / left
    return (
        (dot(of_e, field) + dot(of_x0, e) / root) / (2 * d) - dot(of_x0, x0) / (2 * alpha_bar),
        dot(before, x0) / (2 * previous) - of_left / 2,
        dot(before, flat(eta_noise)) - sigma * of_left,
    )


def _reference(
    has_weights: bool, has_eta: bool, fixed: tuple[Tensor, ...], x: Tensor, noise: Tensor, fields: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor]:
    (alpha_bar, alpha_bar_prev, sigma), optional = (fixed, rest) if fixed else (rest[:3], rest[3:])
    weights, eta_noise = _named(has_weights, has_eta, optional)
    return reference.ddim_step(
        x, noise, fields, alpha_bar, alpha_bar_prev, weights=weights, sigma=sigma, eta_noise=eta_noise
    )


def _forward_fake(
    x: Tensor, noise: Tensor, fields: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, sigma: Tensor,
    weights: Tensor | None, eta_noise: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _backward_fake(
    grad_prev: Tensor | None, grad_x0: Tensor | None, alpha_bar: Tensor, alpha_bar_prev: Tensor, sigma: Tensor,
    for_x: bool, for_noise: bool, for_fields: bool, for_eta_noise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad = grad_x0 if grad_prev is None else grad_prev
    assert grad is not None
    nothing = (0,)
    return (
        grad.new_empty(grad.shape if for_x else nothing),
        grad.new_empty(grad.shape if for_noise else nothing),
        grad.new_empty((grad.shape[0], 1, *grad.shape[1:]) if for_fields else nothing),
        grad.new_empty(grad.shape if for_eta_noise else nothing),
    )


def _forward_vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *tensors: Any) -> Any:
        size = info.batch_size
        x, *others = _batching.fold(size, in_dims, *tensors[:6])
        weights = fold_weights(size, in_dims[6], tensors[6], x.shape[0] // size)
        (eta_noise,) = _batching.fold(size, in_dims[7:], tensors[7])
        return _batching.unfold(size, *op(x, *others, weights, eta_noise)), (0, 0)

    return rule


def _backward_vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        size = info.batch_size
        gradients = op(*_batching.fold(size, in_dims, *arguments[:5]), *arguments[5:])
        return _batching.unfold(size, *gradients), (0,) * 4

    return rule


_column = _backends.register(
    "ddim_step",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    forward_vmap=_forward_vmap,
    backward_vmap=_backward_vmap,
)
