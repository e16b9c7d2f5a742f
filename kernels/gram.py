"""What the two Gram ops share: ``G = J J^T`` of each sample in one read of J, and ``A J`` in one read and one write.

A Jacobian is [B, K, D] with rows contiguous in D. Samples and tangents may have any strides, so that the transpose of a
contiguous [K, B, D] is taken as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels import on_device, statistics_dtype

# Up to this many tangents a thread keeps all products of its dimensions in registers; beyond, tl.dot takes over.
SMALL = 8
# Programs with enough loads in flight, together, to saturate the memory of a large GPU.
PROGRAMS = 1024


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
    block_k, block_d, warps = _gram_tile(latents, jacobian.element_size())
    tiles_k, tiles_d = triton.cdiv(latents, block_k), max(triton.cdiv(dims, block_d), 1)
    # Where the samples are too few to fill the chip, each is divided along D, and the parts are summed in order.
    programs = batch * tiles_k * (tiles_k + 1) // 2
    tiles_per_part = triton.cdiv(tiles_d, max(PROGRAMS // programs, 1))
    parts = triton.cdiv(tiles_d, tiles_per_part)
    partial = out.unsqueeze(0) if parts == 1 else out.new_empty(parts, *out.shape)
    with on_device(jacobian):
        _gram_kernel[(batch * parts * tiles_k * tiles_k,)](
            jacobian, partial, batch, latents, dims, *jacobian.stride()[:2], parts, tiles_per_part,
            PAIRWISE=latents <= SMALL, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return out if parts == 1 else torch.sum(partial, 0, out=out)


def product(weights: Tensor, jacobian: Tensor) -> Tensor:
    """``A J`` of A [B, K, K], contiguous and in the statistics dtype, and J [B, K, D]: in J's dtype and layout."""
    jacobian = as_rows(jacobian)
    batch, latents, dims = jacobian.shape
    out = torch.empty_like(jacobian)
    if out.numel() == 0:
        return out
    block_k, block_j, block_d, warps = _product_tile(latents)
    grid = (batch * triton.cdiv(latents, block_k) * triton.cdiv(dims, block_d),)
    with on_device(jacobian):
        _product_kernel[grid](
            weights, jacobian, out, latents, dims, *jacobian.stride()[:2], *out.stride()[:2],
            PAIRWISE=latents <= SMALL, BLOCK_K=block_k, BLOCK_J=block_j, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return out


def _gram_tile(latents: int, itemsize: int) -> tuple[int, int, int]:
    """Tangents and dimensions of a tile, and the warps for it."""
    block_k = triton.next_power_of_2(latents)
    if latents <= SMALL:
        # The products of a thread's dimensions fill 64 registers.
        return block_k, min(8192 // block_k**2, 1024), 4
    block_k = min(block_k, 64)
    if itemsize == 2:
        return block_k, 128, 4 if block_k == 64 else 2
    return block_k, 32, {16: 1, 32: 4, 64: 8}[block_k]


def _product_tile(latents: int) -> tuple[int, int, int, int]:
    """Tangents of a tile of the product, those it sums over at a time, dimensions, and warps."""
    block_k = triton.next_power_of_2(latents)
    if latents <= SMALL:
        return block_k, block_k, min(4096 // block_k, 1024), 4
    block_k = min(block_k, 64)
    return block_k, 16, 4096 // max(block_k, 32), 4 if block_k == 16 else 8


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
    last = tl.minimum(first + tiles_per_part, tl.cdiv(dims, BLOCK_D))
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
    tiles_d = tl.cdiv(dims, BLOCK_D)
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
