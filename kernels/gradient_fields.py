"""What the ops on sub-gradient fields share: tiles over samples [B, M], and one pass over their fields [B, N, M].

M stands for the product of the trailing dimensions.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels.launch import Tile, Tiling, block, span, tiles_along


def size_of(x: Tensor) -> int:
    """M of x [B, *], which its number of elements does not tell where B is 0."""
    return math.prod(x.shape[1:])


def tiling(rows: int, size: int) -> Tiling:
    """Cut [rows, size] into tiles of [BLOCK_R, BLOCK_M].

    A thread has eight elements of a tile: two 16-byte loads of float32, one of float16.
    """
    elements = span(rows * size)
    block_m = block(size, elements)
    block_r = block(rows, elements // block_m)
    tile = {"BLOCK_R": block_r, "BLOCK_M": block_m, "num_warps": max(block_r * block_m // 256, 1)}
    if block_m < elements:  # whole rows
        return Tiling(tile, "BLOCK_R", 1, block(rows, 4096 // block_m))
    return Tiling(tile, "BLOCK_M", 128, block(size, 4096))


def grid(tile: Tile, rows: int, size: int) -> tuple[tuple[int], int]:
    """Return the grid of the tiles of [rows, size], and how many stand along a row."""
    per_row = triton.cdiv(size, tile["BLOCK_M"])
    return (triton.cdiv(rows, tile["BLOCK_R"]) * per_row,), per_row


def strided(weights: Tensor | None) -> tuple[Tensor | None, int]:
    """Weights [N] or [B, N], and the distance between those of two samples."""
    if weights is None:
        return None, 0
    return weights.contiguous(), weights.shape[1] if weights.dim() == 2 else 0


@triton.jit
def locate(rows, size, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr):
    """Locate this program's tile of [rows, size].

    Returns its rows [BLOCK_R] and their mask, the positions [BLOCK_R, BLOCK_M] of its elements within their rows and
    their mask, and the tile's place along the row.
    """
    program = tl.program_id(0).to(tl.int64)
    per_row = tiles_along(size, BLOCK_M)
    row = program // per_row * BLOCK_R + tl.arange(0, BLOCK_R)
    place = program % per_row
    m = place * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    return row, row_mask, m[None, :], row_mask[:, None] & (m < size)[None, :], place


@triton.jit
def per_sample(values, sample, mask):
    """Load one number a sample, to stand beside a tile: [BLOCK_R, 1]. One half where there is no sample."""
    return tl.load(values + sample, mask, other=0.5)[:, None]


@triton.jit
def load_or_zero(values, at, mask, dtype):
    """Load a tile of what is optional; zeros where it is None."""
    if values is None:
        return tl.zeros(mask.shape, dtype)
    else:  # noqa: RET505 -- Triton compiles what follows a return.
        return tl.load(values + at, mask, other=0.0).to(dtype)


@triton.jit
def total_field(fields, weights, weight_stride, selected, sample, sample_mask, m, mask, factors, size, dtype):
    """``sum_n weights_n fields_n`` over a tile, and the field that each sample selected, NaN where there is none such.

    Every field is read once; those of four factors are on their way at a time.
    """
    total = tl.zeros(mask.shape, dtype)
    caught = tl.full(mask.shape, float("nan"), dtype)
    for n in tl.range(0, factors, loop_unroll_factor=4):
        field = tl.load(fields + ((sample * factors + n) * size)[:, None] + m, mask, other=0.0).to(dtype)
        if selected is not None:
            caught = tl.where(selected == n, field, caught)
        if weights is not None:
            field *= per_sample(weights, sample * weight_stride + n, sample_mask)
        total += field
    return total, caught
