"""Sums of sub-gradient fields in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels.gradient_fields import grid, locate, per_sample, size_of, strided, tiling, total_field
from fastdis.kernels.launch import Tile, launch, tiles_along


def forward(noise: Tensor, fields: Tensor, coefficient: Tensor, weights: Tensor | None) -> Tensor:
    """Compute ``noise + coefficient * sum_n weights_n fields_n``.

    Parameters
    ----------
    noise : Tensor [B, *]
    fields : Tensor [B, N, *]
    coefficient : Tensor [B]
        In the statistics dtype (float64 for float64 noise, else float32).
    weights : Tensor [N] or [B, N], or None
        In the statistics dtype; ones where None.

    Returns
    -------
    Tensor [B, *]
        In the dtype of noise.
    """
    noise, fields, coefficient = noise.contiguous(), fields.contiguous(), coefficient.contiguous()
    out = noise.new_empty(noise.shape)
    if out.numel() == 0:
        return out
    samples, factors = fields.shape[:2]
    size = size_of(noise)

    def run(tile: Tile) -> None:
        programs, _ = grid(tile, samples, size)
        _forward_kernel[programs](noise, fields, coefficient, *strided(weights), out, samples, factors, size, **tile)

    launch(run, tiling(samples, size), noise, samples, factors, size)
    return out


def backward(
    grad: Tensor, fields: Tensor | None, coefficient: Tensor, weights: Tensor | None, for_fields: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`forward` from grad [B, *]; that of noise is grad itself.

    ::

        dfields_n = coefficient * weights_n * grad        products_n = sum_m grad * fields_n

    Returns
    -------
    dfields : Tensor [B, N, *], [B, 1, *] or [0]
        In the dtype of grad: one for all factors where weights is None, empty unless ``for_fields``.
    products : Tensor [B, N] or [0]
        In the statistics dtype: what the gradients of coefficient and weights are made of; empty where fields is None.
    """
    grad, coefficient = grad.contiguous(), coefficient.contiguous()
    samples, size = grad.shape[0], size_of(grad)
    dfields, products = grad.new_empty(0), coefficient.new_empty(0)
    if for_fields:
        dfields = grad.new_empty(samples, 1 if weights is None else weights.shape[-1], *grad.shape[1:])
    if fields is not None:
        products = coefficient.new_zeros(fields.shape[:2])
        fields = fields.contiguous() if fields.numel() > 0 else None
    factors = dfields.shape[1] if fields is None and for_fields else products.shape[-1]
    if samples * factors * size == 0:
        return dfields, products
    rows = samples * factors

    def run(tile: Tile) -> Tensor | None:
        programs, per_row = grid(tile, rows, size)
        partials = None if fields is None else products.new_empty(samples, factors, per_row)
        _backward_kernel[programs](
            grad, fields, coefficient, *strided(weights), dfields if for_fields else None, partials,
            rows, factors, size, SHARED=weights is None, **tile,
        )  # fmt: skip
        return None if partials is None else partials.sum(-1)

    sums = launch(run, tiling(rows, size), grad, rows, size)
    return dfields, products if sums is None else sums


@triton.jit
def _forward_kernel(
    noise,
    fields,
    coefficient,
    weights,
    weight_stride,
    out,
    samples,
    factors,
    size,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    sample, sample_mask, m, mask, _ = locate(samples, size, BLOCK_R, BLOCK_M)
    dtype: tl.constexpr = coefficient.dtype.element_ty
    at = (sample * size)[:, None] + m
    value = tl.load(noise + at, mask, other=0.0).to(dtype)
    total, _ = total_field(fields, weights, weight_stride, None, sample, sample_mask, m, mask, factors, size, dtype)
    value += per_sample(coefficient, sample, sample_mask) * total
    tl.store(out + at, value.to(out.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    grad,
    fields,
    coefficient,
    weights,
    weight_stride,
    dfields,
    partials,
    rows,
    factors,
    size,
    SHARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A row is one (sample, factor) pair: its part of products, to [rows, tiles per row], and its dfields.

    Where all factors of a sample share one row of dfields, the first writes it.
    """
    row, row_mask, m, mask, place = locate(rows, size, BLOCK_R, BLOCK_M)
    dtype: tl.constexpr = coefficient.dtype.element_ty
    sample = row // factors
    factor = row % factors
    g = tl.load(grad + (sample * size)[:, None] + m, mask, other=0.0).to(dtype)
    if fields is not None:
        field = tl.load(fields + (row * size)[:, None] + m, mask, other=0.0).to(dtype)
        tl.store(partials + row * tiles_along(size, BLOCK_M) + place, tl.sum(g * field, 1), row_mask)
    if dfields is not None:
        scale = per_sample(coefficient, sample, row_mask)
        if SHARED:
            row = sample
            mask &= (factor == 0)[:, None]
        else:
            scale *= per_sample(weights, sample * weight_stride + factor, row_mask)
        tl.store(dfields + (row * size)[:, None] + m, (scale * g).to(dfields.dtype.element_ty), mask)
