"""The tail of a DisDiff training step in Triton.

With a = alpha_bar, d = sqrt(1 - a), S the sum of the fields, s the selected factor and
k = -sqrt(a / alpha_bar_prev) (1 - alpha_bar_prev) / d::

    shifted = noise + k S                                   x0 = (x - d noise) / sqrt(a)
    x0_selected = x0 + (1 - a) / sqrt(a) fields_s           weight = (1 - a)^2 / a mean_m fields_s^2
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels.gradient_fields import grid, load_or_zero, locate, per_sample, size_of, tiling, total_field
from fastdis.kernels.launch import Tile, launch, tiles_along


def forward(
    x: Tensor, noise: Tensor, fields: Tensor, selected: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what the losses need, reading every field once: the selected one is caught as it passes.

    Parameters
    ----------
    x, noise : Tensor [B, *]
    fields : Tensor [B, N, *]
    selected : Tensor [B] of int64
        A sample whose index lies outside [0, N) gets an x0_selected and a weight of NaN.
    alpha_bar, alpha_bar_prev : Tensor [B]
        In the statistics dtype (float64 for float64 x, else float32).

    Returns
    -------
    shifted, x0, x0_selected : Tensor [B, *]
        In the dtype of x.
    weight : Tensor [B]
        In the statistics dtype.
    """
    x, noise, fields, selected = x.contiguous(), noise.contiguous(), fields.contiguous(), selected.contiguous()
    shifted, x0, x0_selected = (x.new_empty(x.shape) for _ in range(3))
    samples, factors = fields.shape[:2]
    if x.numel() == 0:
        return shifted, x0, x0_selected, alpha_bar.new_full((samples,), math.nan)
    schedule = alpha_bar.contiguous(), alpha_bar_prev.contiguous()
    size = size_of(x)

    def run(tile: Tile) -> Tensor:
        programs, per_row = grid(tile, samples, size)
        weight = alpha_bar.new_empty(samples, per_row)
        _forward_kernel[programs](
            x, noise, fields, selected, *schedule, shifted, x0, x0_selected, weight, samples, factors, size, **tile
        )
        return weight.sum(1)

    weight = launch(run, tiling(samples, size), x, samples, factors, size)
    return shifted, x0, x0_selected, weight


def backward(
    grad_noise: Tensor | None,
    grad_x0: Tensor | None,
    grad_selected: Tensor | None,
    selected: Tensor,
    alpha_bar: Tensor,
    alpha_bar_prev: Tensor,
    factors: int,
    for_x: bool,
    for_noise: bool,
    for_fields: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward` from those of its first three outputs, [B, *], at least one of which is there.

    ::

        dx = (grad_x0 + grad_selected) / sqrt(a)        dnoise = grad_noise - d dx
        dfields_n = k grad_noise + [n == s] (1 - a) / sqrt(a) grad_selected

    Returns
    -------
    dx, dnoise : Tensor [B, *] or [0]
    dfields : Tensor [B, factors, *], [B, 1, *] or [0]
        One for all factors where grad_selected is None. Each of the three is empty unless asked for.
    """
    grads = [None if g is None else g.contiguous() for g in (grad_noise, grad_x0, grad_selected)]
    like = next(g for g in grads if g is not None)
    samples = like.shape[0]
    factors = 1 if grad_selected is None else factors
    asked = (for_x, for_noise, for_fields)
    shapes = (like.shape, like.shape, (samples, factors, *like.shape[1:]))
    gradients = tuple(like.new_empty(shape if there else 0) for shape, there in zip(shapes, asked, strict=True))
    if like.numel() == 0:
        return gradients
    schedule = [t.contiguous() for t in (selected, alpha_bar, alpha_bar_prev)]
    outputs = [g if there else None for g, there in zip(gradients, asked, strict=True)]
    size = size_of(like)

    def run(tile: Tile) -> None:
        programs, _ = grid(tile, samples, size)
        _backward_kernel[programs](*grads, *schedule, *outputs, samples, factors, size, **tile)

    launch(run, tiling(samples, size), like, samples, factors, size)
    return gradients


@triton.jit
def _coefficients(alpha_bar, alpha_bar_prev, sample, mask):
    """Return sqrt(a), d, k and (1 - a) / sqrt(a), [BLOCK_R, 1] each."""
    a = per_sample(alpha_bar, sample, mask)
    prev = per_sample(alpha_bar_prev, sample, mask)
    d = tl.sqrt(1.0 - a)
    return tl.sqrt(a), d, -tl.sqrt(a / prev) * (1.0 - prev) / d, (1.0 - a) / tl.sqrt(a)


@triton.jit
def _forward_kernel(
    x,
    noise,
    fields,
    selected,
    alpha_bar,
    alpha_bar_prev,
    shifted,
    x0,
    x0_selected,
    weight,
    samples,
    factors,
    size,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write one tile of the first three outputs, and its part of the fourth, to [samples, tiles per sample]."""
    sample, sample_mask, m, mask, place = locate(samples, size, BLOCK_R, BLOCK_M)
    dtype: tl.constexpr = alpha_bar.dtype.element_ty
    root, d, k, rise = _coefficients(alpha_bar, alpha_bar_prev, sample, sample_mask)
    at = (sample * size)[:, None] + m
    choice = tl.load(selected + sample, sample_mask, other=0)[:, None]
    current = tl.load(x + at, mask, other=0.0).to(dtype)
    e = tl.load(noise + at, mask, other=0.0).to(dtype)
    total, field = total_field(fields, None, 0, choice, sample, sample_mask, m, mask, factors, size, dtype)
    clean = (current - d * e) / root
    change = rise * field
    tl.store(shifted + at, (e + k * total).to(shifted.dtype.element_ty), mask)
    tl.store(x0 + at, clean.to(x0.dtype.element_ty), mask)
    tl.store(x0_selected + at, (clean + change).to(x0_selected.dtype.element_ty), mask)
    part = tl.sum(tl.where(mask, change * change, 0.0), 1) / size
    tl.store(weight + sample * tiles_along(size, BLOCK_M) + place, part, sample_mask)


@triton.jit
def _backward_kernel(
    grad_noise,
    grad_x0,
    grad_selected,
    selected,
    alpha_bar,
    alpha_bar_prev,
    dx,
    dnoise,
    dfields,
    samples,
    factors,
    size,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    sample, sample_mask, m, mask, _ = locate(samples, size, BLOCK_R, BLOCK_M)
    dtype: tl.constexpr = alpha_bar.dtype.element_ty
    root, d, k, rise = _coefficients(alpha_bar, alpha_bar_prev, sample, sample_mask)
    at = (sample * size)[:, None] + m
    of_shifted = load_or_zero(grad_noise, at, mask, dtype)
    of_selected = load_or_zero(grad_selected, at, mask, dtype)
    of_x = load_or_zero(grad_x0, at, mask, dtype) + of_selected
    # What no grad reaches is zero, also where alpha_bar is 0 or 1 and its coefficient has no limit.
    if grad_x0 is not None or grad_selected is not None:
        of_x /= root
    of_fields = of_shifted
    if grad_noise is not None:
        of_fields = k * of_shifted
    if dx is not None:
        tl.store(dx + at, of_x.to(dx.dtype.element_ty), mask)
    if dnoise is not None:
        tl.store(dnoise + at, (of_shifted - d * of_x).to(dnoise.dtype.element_ty), mask)
    if dfields is not None:
        choice = tl.load(selected + sample, sample_mask, other=0)[:, None]
        for n in range(factors):
            value = of_fields
            if grad_selected is not None:
                value = tl.where(choice == n, of_fields + rise * of_selected, of_fields)
            to = dfields + ((sample * factors + n) * size)[:, None] + m
            tl.store(to, value.to(dfields.dtype.element_ty), mask)
