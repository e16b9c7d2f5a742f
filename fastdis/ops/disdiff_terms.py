"""The tail of a DisDiff training step, in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _batching, _checks
from fastdis.ops.sum_gradient_fields import as_stored, check_fields
from fastdis.reference.sum_gradient_fields import total_field


class DisDiffTerms(NamedTuple):
    """What :func:`disdiff_terms` returns."""

    noise: Tensor
    x0: Tensor
    x0_selected: Tensor
    weight: Tensor


def disdiff_terms(
    x: Tensor,
    noise: Tensor,
    fields: Tensor,
    selected: Tensor,
    alpha_bar: Tensor | float,
    alpha_bar_prev: Tensor | float,
    *,
    backend: str = "auto",
) -> DisDiffTerms:
    r"""What the losses of DisDiff need from its sub-gradient fields, reading every field once.

    .. math::
        \hat\epsilon &= \epsilon - \sqrt{\frac{\bar\alpha_t}{\bar\alpha_{t-1}}}
        \frac{1 - \bar\alpha_{t-1}}{\sqrt{1 - \bar\alpha_t}} \sum_n g_n, \qquad
        \hat x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon}{\sqrt{\bar\alpha_t}} \\
        \hat x_0^c &= \hat x_0 + \frac{1 - \bar\alpha_t}{\sqrt{\bar\alpha_t}} g_c, \qquad
        w = \frac{(1 - \bar\alpha_t)^2}{\bar\alpha_t} \operatorname{mean}(g_c^2)

    Yang et al. (2023) and their code: the reconstruction loss compares the shifted noise with the true one; the
    disentangling loss compares the encodings of the clean sample predicted without the fields and with that of the
    selected factor c, weighted by the mean squared difference of the two, which is ``weight``.

    Parameters
    ----------
    x : Tensor [B, *]
        The noisy sample x_t: float32, float64, float16 or bfloat16; arithmetic is in float32 (float64 for float64).
    noise : Tensor [B, *]
        The noise that the unconditional model predicts, in the dtype of ``x`` (under autocast, promoted).
    fields : Tensor [B, N, *]
        One sub-gradient field for each of N factors, in the dtype of ``x``.
    selected : Tensor [B] of int64
        Each sample's factor c, 0 to N - 1.
    alpha_bar, alpha_bar_prev : Tensor [B] or [], or float
        The cumulative products of the schedule at t, in (0, 1), and at t - 1, in (0, 1] (1 where t is 0).
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        A backend asked for by name fails rather than give way to another.

    Returns
    -------
    noise, x0, x0_selected : Tensor [B, *]
        The shifted noise and the two predictions, like ``x``. Differentiable in every floating tensor to any order:
        first derivatives in x, noise and fields by compiled kernels, in the schedule and of higher order through the
        reference. Forward-mode differentiation is refused.
    weight : Tensor [B]
        A constant to autograd, in float32 (float64 for float64): it ranges over nine orders of magnitude.

    Raises
    ------
    TypeError
        If a tensor has the wrong dtype.
    ValueError
        If shapes or devices do not match, there is no factor, or a number of the schedule is out of range.
    RuntimeError
        If ``selected`` is out of range (on CPU; on a GPU, where looking would stall the stream, that sample's
        x0_selected and weight are NaN), or the backend asked for cannot serve here.

    Examples
    --------
    >>> x, noise, fields = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16), torch.randn(8, 6, 3, 16, 16)
    >>> terms = disdiff_terms(x, noise, fields, torch.randint(0, 6, (8,)), 0.5, 0.51)
    """
    x, noise, fields = check_fields({"x": x, "noise": noise}, fields)
    if not isinstance(selected, Tensor):
        raise TypeError(f"selected is a {type(selected).__name__}; a tensor is needed")
    if selected.dtype != torch.int64:
        raise TypeError(f"selected has dtype {selected.dtype}; int64 is needed")
    _checks.shape("selected", selected, (x.shape[0],), "[B] of x")
    _checks.same_device("selected", selected, "x", x)
    if fields.shape[1] == 0:
        raise ValueError(f"fields has shape {list(fields.shape)}; at least one field is needed")
    if isinstance(alpha_bar, (int, float)) and not 0 < alpha_bar < 1:
        raise ValueError(f"alpha_bar is {alpha_bar}; a number in (0, 1) is needed")
    if isinstance(alpha_bar_prev, (int, float)) and not 0 < alpha_bar_prev <= 1:
        raise ValueError(f"alpha_bar_prev is {alpha_bar_prev}; a number in (0, 1] is needed")
    alpha_bar, alpha_bar_prev = _checks.per_sample("x", x, alpha_bar=alpha_bar, alpha_bar_prev=alpha_bar_prev)
    chosen = _column.choose(backend, x)
    (x, noise), fields, last = as_stored((x, noise), fields)
    if chosen == "reference":
        *images, weight = reference.disdiff_terms(x, noise, fields, selected, alpha_bar, alpha_bar_prev)
    else:
        *images, weight = _autograd.apply(_DisDiffTerms, x, noise, fields, selected, alpha_bar, alpha_bar_prev, chosen)
    shifted, x0, x0_selected = (image.movedim(-1, 1) if last else image for image in images)
    return DisDiffTerms(shifted, x0, x0_selected, weight)


class _DisDiffTerms(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, noise: Tensor, fields: Tensor, selected: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _column.kernels[backend].forward(x, noise, fields, selected, alpha_bar, alpha_bar_prev)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, noise, fields, selected, *schedule, ctx.backend = inputs
        ctx.shape = tuple(fields.shape)
        # The terms are linear in the images: they are kept only for the gradients of the schedule.
        ctx.keeps_images = any(ctx.needs_input_grad[4:6])
        ctx.save_for_backward(selected, *schedule, *((x, noise, fields) if ctx.keeps_images else ()))
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = grads[:3]
        grad = next((g for g in grads if g is not None), None)
        if grad is None:
            return (None,) * 7
        selected, alpha_bar, alpha_bar_prev, *images = ctx.saved_tensors
        if not torch.is_grad_enabled():
            arguments = (*grads, *(images or (None,) * 3), alpha_bar, alpha_bar_prev, selected)
            gradients = _gradients(ctx.backend, ctx.needs_input_grad, ctx.shape, *arguments)
        else:
            if not images:
                image = _autograd.stand_in(grad.shape, grad)
                images = [image, image, _autograd.stand_in(ctx.shape, grad)]
            gradients = _autograd.backward(
                partial(_gradients, ctx.backend, (True,) * 6, ctx.shape),
                partial(_reference, selected),
                grads,
                (*images, alpha_bar, alpha_bar_prev),
                (selected,),
            )
        return (*gradients[:3], None, *gradients[3:], None)


def _gradients(
    backend: str, needs: Sequence[bool], shape: tuple[int, ...], grad_noise: Tensor | None, grad_x0: Tensor | None,
    grad_selected: Tensor | None, x: Tensor | None, noise: Tensor | None, fields: Tensor | None, alpha_bar: Tensor,
    alpha_bar_prev: Tensor, selected: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, noise, fields, alpha_bar and alpha_bar_prev; the images only matter to the last two."""
    grads = (grad_noise, grad_x0, grad_selected)
    dx, dnoise, dfields = _column.kernels[backend].backward(
        *grads, selected, alpha_bar, alpha_bar_prev, shape[1], needs[0], needs[1], needs[2]
    )
    dschedule: tuple[Tensor | None, Tensor | None] = (None, None)
    if (needs[4] or needs[5]) and x is not None and noise is not None and fields is not None:
        dschedule = _schedule_gradients(grads, x, noise, fields, selected, alpha_bar, alpha_bar_prev)
    return (
        dx if needs[0] else None, dnoise if needs[1] else None, dfields.expand(shape) if needs[2] else None,
        *dschedule,
    )  # fmt: skip


def _schedule_gradients(
    grads: tuple[Tensor | None, ...], x: Tensor, noise: Tensor, fields: Tensor, selected: Tensor, alpha_bar: Tensor,
    alpha_bar_prev: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of alpha_bar and alpha_bar_prev, [B] each, by inner products in plain PyTorch: few need them."""

    def flat(image: Tensor | None) -> Tensor:
        return (torch.zeros_like(x) if image is None else image).to(alpha_bar.dtype).flatten(1)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1)

    of_noise, of_x0, of_selected = map(flat, grads)
    field = fields.gather(1, selected.reshape(-1, *(1,) * (fields.dim() - 1)).expand(-1, 1, *fields.shape[2:]))
    d, root = torch.sqrt(1 - alpha_bar), torch.sqrt(alpha_bar)
    x0 = (flat(x) - d.unsqueeze(1) * flat(noise)) / root.unsqueeze(1)
    of_shift, of_clean = dot(of_noise, flat(total_field(fields, None))), of_x0 + of_selected
    shift = -torch.sqrt(alpha_bar / alpha_bar_prev) * (1 - alpha_bar_prev) / d
    return (
        of_shift * shift / (2 * alpha_bar * (1 - alpha_bar))
        + (dot(of_clean, flat(noise)) * root / d - dot(of_clean, x0)) / (2 * alpha_bar)
        - dot(of_selected, flat(field)) * (1 + alpha_bar) / (2 * alpha_bar * root),
        of_shift * root / d * (1 + alpha_bar_prev) / (2 * alpha_bar_prev * torch.sqrt(alpha_bar_prev)),
    )


def _reference(selected: Tensor, x: Tensor, noise: Tensor, fields: Tensor, *schedule: Tensor) -> tuple[Tensor, ...]:
    return reference.disdiff_terms(x, noise, fields, selected, *schedule)[:3]


def _forward_fake(
    x: Tensor, noise: Tensor, fields: Tensor, selected: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = alpha_bar.new_empty(alpha_bar.shape)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape), weight


def _backward_fake(
    grad_noise: Tensor | None, grad_x0: Tensor | None, grad_selected: Tensor | None, selected: Tensor,
    alpha_bar: Tensor, alpha_bar_prev: Tensor, factors: int, for_x: bool, for_noise: bool, for_fields: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad = next(g for g in (grad_noise, grad_x0, grad_selected) if g is not None)
    nothing = (0,)
    distinct = 1 if grad_selected is None else factors
    return (
        grad.new_empty(grad.shape if for_x else nothing),
        grad.new_empty(grad.shape if for_noise else nothing),
        grad.new_empty((grad.shape[0], distinct, *grad.shape[1:]) if for_fields else nothing),
    )


def _forward_vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        size = info.batch_size
        return _batching.unfold(size, *op(*_batching.fold(size, in_dims, *tensors))), (0,) * 4

    return rule


def _backward_vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        size = info.batch_size
        gradients = op(*_batching.fold(size, in_dims, *arguments[:6]), *arguments[6:])
        return _batching.unfold(size, *gradients), (0,) * 3

    return rule


_column = _backends.register(
    "disdiff_terms",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    forward_vmap=_forward_vmap,
    backward_vmap=_backward_vmap,
)
