"""Divergence of a diagonal Gaussian from the standard normal in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels import statistics_dtype
from fastdis.kernels.gaussians import exp
from fastdis.kernels.launch import Tile, Tiling, block, launch, span, tiles_along

NONE, MEAN, SUM = range(3)


def forward(mean: Tensor, logvar: Tensor, weights: Tensor | None, reduction: int) -> Tensor:
    """Compute ``sum_k w_k (mean_k^2 + exp(logvar_k) - 1 - logvar_k) / 2``.

    Parameters
    ----------
    mean, logvar : Tensor [B, K]
    weights : Tensor [K] or None
        In the statistics dtype (float64 for float64 mean, else float32); ones where None.
    reduction : int
        0 none, 1 mean, 2 sum.

    Returns
    -------
    Tensor [B] or []
        In the dtype of mean.
    """
    mean, logvar = mean.contiguous(), logvar.contiguous()
    weights = None if weights is None else weights.contiguous()
    samples, latents = mean.shape
    loss = mean.new_empty(samples, dtype=mean.dtype if reduction == NONE else statistics_dtype(mean))
    if samples > 0:

        def run(tile: Tile) -> None:
            programs = (triton.cdiv(samples, tile["BLOCK_B"]),)
            _forward_kernel[programs](mean, logvar, weights, loss, samples, latents, **tile)

        # Whole rows, so that one program sums one.
        launch(run, _tiling(samples, latents, 1024), mean, samples, latents)
    if reduction == MEAN:
        loss = loss.mean().to(mean.dtype)
    elif reduction == SUM:
        loss = loss.sum().to(mean.dtype)
    return loss


def backward(
    grad: Tensor, mean: Tensor, logvar: Tensor, weights: Tensor | None, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward` from grad [B] or [] and what forward took.

    With ``g`` that grad, divided by B for the mean::

        dmean = g w mean        dlogvar = g w (exp(logvar) - 1) / 2
        dweights = sum_b g (mean^2 + exp(logvar) - 1 - logvar) / 2

    Returns
    -------
    dmean, dlogvar : Tensor [B, K]
        In the dtype of mean.
    dweights : Tensor [K] or [0]
        In the statistics dtype; empty where weights is None.
    """
    grad, mean, logvar = grad.contiguous(), mean.contiguous(), logvar.contiguous()
    samples, latents = mean.shape
    dmean, dlogvar = mean.new_empty(mean.shape), mean.new_empty(mean.shape)
    weights = None if weights is None else weights.contiguous()
    if mean.numel() == 0:
        count = 0 if weights is None else latents
        return dmean, dlogvar, torch.zeros(count, dtype=statistics_dtype(mean), device=mean.device)

    def run(tile: Tile) -> Tensor:
        tiles_b, tiles_k = triton.cdiv(samples, tile["BLOCK_B"]), triton.cdiv(latents, tile["BLOCK_K"])
        partials = None if weights is None else weights.new_empty(tiles_b, latents)
        _backward_kernel[(tiles_b * tiles_k,)](
            grad, mean, logvar, weights, dmean, dlogvar, partials, samples, latents,
            samples if reduction == MEAN else 1, GRAD_PER_SAMPLE=reduction == NONE, **tile,
        )  # fmt: skip
        return mean.new_empty(0, dtype=statistics_dtype(mean)) if partials is None else partials.sum(0)

    # Tiles of few columns have many rows, whose sum is what is left of dweights to add up.
    return dmean, dlogvar, launch(run, _tiling(samples, latents, 64), mean, samples, latents)


def _tiling(samples: int, latents: int, limit: int) -> Tiling:
    """Tiles of [samples, latents] with at most ``limit`` columns."""
    elements = span(samples * latents)
    block_k = block(max(latents, 1), min(limit, elements))
    block_b = block(samples, elements // block_k)
    tile = {"BLOCK_B": block_b, "BLOCK_K": block_k, "num_warps": max(block_b * block_k // 256, 1)}
    return Tiling(tile, "BLOCK_B", 1, block(samples, max(4096 // block_k, 1)))


@triton.jit
def _divergence(mean, logvar):
    """Each dimension's share, and the variance less 1."""
    excess = exp(logvar) - 1.0
    return 0.5 * (mean * mean + (excess - logvar)), excess


@triton.jit
def _forward_kernel(
    mean,
    logvar,
    weights,
    loss,
    samples,
    latents,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if mean.dtype.element_ty == tl.float64 else tl.float32
    sample = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    sample_mask = sample < samples
    total = tl.zeros((BLOCK_B, BLOCK_K), dtype)
    for start in range(0, latents, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = sample_mask[:, None] & (k < latents)[None, :]
        at = (sample * latents)[:, None] + k[None, :]
        m = tl.load(mean + at, mask, other=0.0).to(dtype)
        v = tl.load(logvar + at, mask, other=0.0).to(dtype)
        share, _ = _divergence(m, v)
        if weights is not None:
            share *= tl.load(weights + k, k < latents, other=0.0)[None, :]
        total += share
    tl.store(loss + sample, tl.sum(total, 1).to(loss.dtype.element_ty), sample_mask)


@triton.jit
def _backward_kernel(
    grad,
    mean,
    logvar,
    weights,
    dmean,
    dlogvar,
    partials,
    samples,
    latents,
    count,
    GRAD_PER_SAMPLE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write one tile of dmean and dlogvar, and its part of dweights, to [tiles of samples, latents]."""
    dtype: tl.constexpr = tl.float64 if mean.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    tiles_k = tiles_along(latents, BLOCK_K)
    tile_b = program // tiles_k
    sample = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    k = program % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    k_mask = k < latents
    mask = (sample < samples)[:, None] & k_mask[None, :]
    at = (sample * latents)[:, None] + k[None, :]
    g = tl.load(grad + (sample if GRAD_PER_SAMPLE else sample * 0), sample < samples, other=0.0).to(dtype) / count
    g = g[:, None]
    m = tl.load(mean + at, mask, other=0.0).to(dtype)
    v = tl.load(logvar + at, mask, other=0.0).to(dtype)
    share, excess = _divergence(m, v)
    if weights is not None:
        tl.store(partials + tile_b * latents + k, tl.sum(g * share, 0), k_mask)
        g = g * tl.load(weights + k, k_mask, other=0.0)[None, :]
    tl.store(dmean + at, (g * m).to(dmean.dtype.element_ty), mask)
    tl.store(dlogvar + at, (0.5 * g * excess).to(dlogvar.dtype.element_ty), mask)
