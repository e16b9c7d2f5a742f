"""A DDIM step under sub-gradient fields in Triton.

With S the weighted sum of the fields, a = alpha_bar, d = sqrt(1 - a), p = sqrt(alpha_bar_prev) and
q = sqrt(1 - alpha_bar_prev - sigma^2)::

    e = noise - d S        x0 = (x - d e) / sqrt(a)        x_prev = p x0 + q e + sigma eta_noise
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels.gradient_fields import (
    grid,
    load_or_zero,
    locate,
    per_sample,
    size_of,
    strided,
    tiling,
    total_field,
)
from fastdis.kernels.launch import Tile, launch


def forward(
    x: Tensor,
    noise: Tensor,
    fields: Tensor,
    alpha_bar: Tensor,
    alpha_bar_prev: Tensor,
    sigma: Tensor,
    weights: Tensor | None,
    eta_noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Step from x to the previous sample, in one pass over memory.

    Parameters
    ----------
    x, noise : Tensor [B, *]
    fields : Tensor [B, N, *]
    alpha_bar, alpha_bar_prev, sigma : Tensor [B]
        In the statistics dtype (float64 for float64 x, else float32).
    weights : Tensor [N] or [B, N], or None
        In the statistics dtype; ones where None.
    eta_noise : Tensor [B, *] or None

    Returns
    -------
    x_prev, x0 : Tensor [B, *]
        In the dtype of x.
    """
    x, noise, fields = x.contiguous(), noise.contiguous(), fields.contiguous()
    eta_noise = None if eta_noise is None else eta_noise.contiguous()
    x_prev, x0 = x.new_empty(x.shape), x.new_empty(x.shape)
    if x.numel() == 0:
        return x_prev, x0
    schedule = [t.contiguous() for t in (alpha_bar, alpha_bar_prev, sigma)]
    samples, factors = fields.shape[:2]
    size = size_of(x)

    def run(tile: Tile) -> None:
        programs, _ = grid(tile, samples, size)
        _forward_kernel[programs](
            x, noise, fields, *schedule, *strided(weights), eta_noise, x_prev, x0, samples, factors, size, **tile
        )

    launch(run, tiling(samples, size), x, samples, factors, size)
    return x_prev, x0


def backward(
    grad_prev: Tensor | None,
    grad_x0: Tensor | None,
    alpha_bar: Tensor,
    alpha_bar_prev: Tensor,
    sigma: Tensor,
    for_x: bool,
    for_noise: bool,
    for_fields: bool,
    for_eta_noise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward` from those of its outputs, [B, *], at least one of which is there.

    ::

        G0 = grad_x0 + p grad_prev        dx = G0 / sqrt(a)        dnoise = q grad_prev - d / sqrt(a) G0
        dS = -d dnoise        deta_noise = sigma grad_prev

    Returns
    -------
    dx, dnoise, deta_noise : Tensor [B, *] or [0]
    dtotal : Tensor [B, 1, *] or [0]
        Of S. Each is empty unless asked for.
    """
    grad_prev, grad_x0 = (None if g is None else g.contiguous() for g in (grad_prev, grad_x0))
    like = grad_x0 if grad_prev is None else grad_prev
    asked = (for_x, for_noise, for_fields, for_eta_noise)
    total = (like.shape[0], 1, *like.shape[1:])
    shapes = (like.shape, like.shape, total, like.shape)
    gradients = tuple(like.new_empty(shape if there else 0) for shape, there in zip(shapes, asked, strict=True))
    if like.numel() == 0:
        return gradients
    schedule = [t.contiguous() for t in (alpha_bar, alpha_bar_prev, sigma)]
    outputs = [g if there else None for g, there in zip(gradients, asked, strict=True)]
    samples, size = like.shape[0], size_of(like)

    def run(tile: Tile) -> None:
        programs, _ = grid(tile, samples, size)
        _backward_kernel[programs](grad_prev, grad_x0, *schedule, *outputs, samples, size, **tile)

    launch(run, tiling(samples, size), like, samples, size)
    return gradients


@triton.jit
def _coefficients(alpha_bar, alpha_bar_prev, sigma, sample, mask):
    """Return sqrt(a), d, p, q and sigma, [BLOCK_R, 1] each."""
    a = per_sample(alpha_bar, sample, mask)
    prev = per_sample(alpha_bar_prev, sample, mask)
    s = per_sample(sigma, sample, mask)
    rest = 1.0 - prev - s * s
    # Written so that NaN stays NaN.
    rest = tl.where(rest < 0, 0.0, rest)
    return tl.sqrt(a), tl.sqrt(1.0 - a), tl.sqrt(prev), tl.sqrt(rest), s


@triton.jit
def _forward_kernel(
    x,
    noise,
    fields,
    alpha_bar,
    alpha_bar_prev,
    sigma,
    weights,
    weight_stride,
    eta_noise,
    x_prev,
    x0,
    samples,
    factors,
    size,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    sample, sample_mask, m, mask, _ = locate(samples, size, BLOCK_R, BLOCK_M)
    dtype: tl.constexpr = alpha_bar.dtype.element_ty
    root, d, p, q, s = _coefficients(alpha_bar, alpha_bar_prev, sigma, sample, sample_mask)
    at = (sample * size)[:, None] + m
    current = tl.load(x + at, mask, other=0.0).to(dtype)
    e = tl.load(noise + at, mask, other=0.0).to(dtype)
    fresh = load_or_zero(eta_noise, at, mask, dtype)
    total, _ = total_field(fields, weights, weight_stride, None, sample, sample_mask, m, mask, factors, size, dtype)
    e -= d * total
    clean = (current - d * e) / root
    previous = p * clean + q * e
    if eta_noise is not None:
        previous += s * fresh
    tl.store(x_prev + at, previous.to(x_prev.dtype.element_ty), mask)
    tl.store(x0 + at, clean.to(x0.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    grad_prev,
    grad_x0,
    alpha_bar,
    alpha_bar_prev,
    sigma,
    dx,
    dnoise,
    dtotal,
    deta_noise,
    samples,
    size,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    sample, sample_mask, m, mask, _ = locate(samples, size, BLOCK_R, BLOCK_M)
    dtype: tl.constexpr = alpha_bar.dtype.element_ty
    root, d, p, q, s = _coefficients(alpha_bar, alpha_bar_prev, sigma, sample, sample_mask)
    at = (sample * size)[:, None] + m
    previous = load_or_zero(grad_prev, at, mask, dtype)
    clean = load_or_zero(grad_x0, at, mask, dtype)
    if grad_prev is not None:
        clean += p * previous
    of_x = clean / root
    of_noise = -d * of_x
    if grad_prev is not None:
        of_noise += q * previous
    if dx is not None:
        tl.store(dx + at, of_x.to(dx.dtype.element_ty), mask)
    if dnoise is not None:
        tl.store(dnoise + at, of_noise.to(dnoise.dtype.element_ty), mask)
    if dtotal is not None:
        tl.store(dtotal + at, (-d * of_noise).to(dtotal.dtype.element_ty), mask)
    if deta_noise is not None:
        tl.store(deta_noise + at, (s * previous).to(deta_noise.dtype.element_ty), mask)
