"""What the two Gram ops share: ``G = J J^T`` of each sample in one read of J, and ``A J`` in one read and one write.

A Jacobian is [B, K, D] with rows contiguous in D. Samples and tangents may have any strides, so that the transpose of a
contiguous [K, B, D] is taken as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels import statistics_dtype
from fastdis.kernels.launch import SATURATING_GRID, Tile, Tiling, block, launch, split, tiles_along

# Up to this many tangents a thread keeps all products of its dimensions in registers; beyond, tl.dot takes over.
SMALL = 8


def as_rows(jacobian: Tensor) -> Tensor:
    """Return the Jacobian, copied only where it is neither contiguous nor the transpose of a contiguous [K, B, D]."""
    if jacobian.transpose(0, 1).is_contiguous():
        return jacobian
    return jacobian.contiguous()


def gram(jacobian: Tensor) -> Tensor:
    """``J J^T`` of J [B, K, D]: [B, K, K], in the statistics dtype."""
    jacobian = as_rows(jacobian)
    batch, latents, dims = jacobian.shape
    out = jacobian.new_empty(batch, latents, latents, dtype=statistics_dtype(jacobian))
    if out.numel() == 0:
        return out
    tiling = _gram_tiling(latents, dims, jacobian.element_size())
    tiles_k = triton.cdiv(latents, tiling.tile["BLOCK_K"])

    def run(tile: Tile) -> None:
        # Where the samples are too few to fill the chip, each is divided along D, and the parts are summed in order.
        tiles_d = max(triton.cdiv(dims, tile["BLOCK_D"]), 1)
        tiles_per_part, parts = split(tiles_d, batch * tiles_k * (tiles_k + 1) // 2, SATURATING_GRID)
        partial = out.unsqueeze(0) if parts == 1 else out.new_empty(parts, *out.shape)
        _gram_kernel[(batch * parts * tiles_k * tiles_k,)](
            jacobian, partial, batch, latents, dims, *jacobian.stride()[:2], parts, tiles_per_part,
            PAIRWISE=latents <= SMALL, **tile,
        )  # fmt: skip
        if parts > 1:
            torch.sum(partial, 0, out=out)

    launch(run, tiling, jacobian, batch, latents, dims)
    return out


def product(weights: Tensor, jacobian: Tensor) -> Tensor:
    """``A J`` of A [B, K, K], contiguous and in the statistics dtype, and J [B, K, D]: in J's dtype and layout."""
    jacobian = as_rows(jacobian)
    batch, latents, dims = jacobian.shape
    out = torch.empty_like(jacobian)
    if out.numel() == 0:
        return out

    def run(tile: Tile) -> None:
        tiles = triton.cdiv(latents, tile["BLOCK_K"]) * triton.cdiv(dims, tile["BLOCK_D"])
        _product_kernel[(batch * tiles,)](
            weights, jacobian, out, latents, dims, *jacobian.stride()[:2], *out.stride()[:2],
            PAIRWISE=latents <= SMALL, **tile,
        )  # fmt: skip

    launch(run, _product_tiling(latents, dims), jacobian, batch, latents, dims)
    return out


def _gram_tiling(latents: int, dims: int, itemsize: int) -> Tiling:
    """Tangents and dimensions of a tile, and the warps for it."""
    block_k = block(latents, 64)
    if latents <= SMALL:
        # The products of a thread's dimensions fill 64 registers.
        block_d, warps = min(8192 // block_k**2, 1024), 4
    elif itemsize == 2:
        block_d, warps = {16: (128, 2), 32: (128, 2), 64: (64, 4)}[block_k]
    else:
        block_d, warps = {16: (32, 1), 32: (32, 4), 64: (16, 8)}[block_k]
    return Tiling({"BLOCK_K": block_k, "BLOCK_D": block_d, "num_warps": warps}, "BLOCK_D", 16, block(dims, 2048))


def _product_tiling(latents: int, dims: int) -> Tiling:
    """Tangents of a tile of the product, those it sums over at a time, dimensions, and warps."""
    block_k = block(latents, 64)
    if latents <= SMALL:
        block_j, block_d, warps = block_k, min(4096 // block_k, 1024), 4
    else:
        block_j, block_d, warps = 16, 4096 // max(block_k, 32), 4 if block_k == 16 else 8
    tile = {"BLOCK_K": block_k, "BLOCK_J": block_j, "BLOCK_D": block_d, "num_warps": warps}
    return Tiling(tile, "BLOCK_D", 16, block(dims, 2048))


@triton.jit
def _load_rows(rows, k, latents, d, dims, stride):
    mask = (k < latents)[:, None] & (d < dims)[None, :]
    return tl.load(rows + k.to(tl.int64)[:, None] * stride + d[None, :], mask, other=0.0)


@triton.jit
def _gram_kernel(
    jacobian,
    out,
    batch,
    latents,
    dims,
    stride_b,
    stride_k,
    parts,
    tiles_per_part,
    PAIRWISE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a tile of G, and its mirror image, over one part of the dimensions, to [parts, B, K, K]."""
    program = tl.program_id(0).to(tl.int64)
    tiles_k = tl.cdiv(latents, BLOCK_K)
    column_tile = (program % tiles_k).to(tl.int32)
    row_tile = (program // tiles_k % tiles_k).to(tl.int32)
    if row_tile > column_tile:
        return
    part = program // tiles_k // tiles_k % parts
    sample = program // tiles_k // tiles_k // parts
    jacobian += sample * stride_b
    i = row_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    j = column_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = out.dtype.element_ty
    first = part.to(tl.int32) * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tiles_along(dims, BLOCK_D).to(tl.int32))
    if PAIRWISE:
        products = tl.zeros((BLOCK_K, BLOCK_K, BLOCK_D), dtype)
        for tile in range(first, last):
            d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            a = _load_rows(jacobian, i, latents, d, dims, stride_k).to(dtype)
            products += a[:, None, :] * a[None, :, :]
        total = tl.sum(products, 2)
    else:
        total = tl.zeros((BLOCK_K, BLOCK_K), dtype)
        for tile in range(first, last):
            d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            # Half-precision products are exact in float32, so these go to the tensor cores as they are.
            a = _load_rows(jacobian, i, latents, d, dims, stride_k)
            b = _load_rows(jacobian, j, latents, d, dims, stride_k)
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee", out_dtype=dtype)
    out += (part * batch + sample) * latents * latents
    mask = (i < latents)[:, None] & (j < latents)[None, :]
    tl.store(out + i.to(tl.int64)[:, None] * latents + j[None, :], total, mask)
    if row_tile < column_tile:
        tl.store(out + j.to(tl.int64)[None, :] * latents + i[:, None], total, mask)


@triton.jit
def _product_kernel(
    weights,
    jacobian,
    out,
    latents,
    dims,
    stride_b,
    stride_k,
    out_stride_b,
    out_stride_k,
    PAIRWISE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write one tile of rows and dimensions of A J."""
    program = tl.program_id(0).to(tl.int64)
    tiles_k = tl.cdiv(latents, BLOCK_K)
    tiles_d = tiles_along(dims, BLOCK_D)
    # Tiles of the same dimensions are neighbours, which find each other's rows of J in the cache.
    k = (program % tiles_k).to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = (program // tiles_k % tiles_d).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    sample = program // tiles_k // tiles_d
    weights += sample * latents * latents
    jacobian += sample * stride_b
    dtype: tl.constexpr = weights.dtype.element_ty
    if PAIRWISE:
        a = _load_rows(weights, k, latents, k, latents, latents)
        rows = _load_rows(jacobian, k, latents, d, dims, stride_k).to(dtype)
        total = tl.sum(a[:, :, None] * rows[None, :, :], 1)
    else:
        total = tl.zeros((BLOCK_K, BLOCK_D), dtype)
        for start in range(0, latents, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            a = _load_rows(weights, k, latents, j, latents, latents)
            rows = _load_rows(jacobian, j, latents, d, dims, stride_k).to(dtype)
            total = tl.dot(a, rows, total, input_precision="ieee", out_dtype=dtype)
    mask = (k < latents)[:, None] & (d < dims)[None, :]
    at = sample * out_stride_b + k.to(tl.int64)[:, None] * out_stride_k + d[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask)
