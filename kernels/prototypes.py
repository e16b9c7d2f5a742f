"""What the two prototype ops share: episodes centred on their mean prototype, and products of centred vectors.

With c that mean, ``|q - p|^2 = |q - c|^2 - 2 (q - c) . (p - c) + |p - c|^2``: no [Q, N, D] tensor, and a common offset
of queries and prototypes, however large, cancels before it can eat digits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels import on_device, statistics_dtype
from fastdis.kernels.launch import block


def side(size: int, most: int) -> int:
    """Return the side of a tile over ``size`` elements, not below the 16 that tl.dot wants."""
    return block(size, most, least=16)


def warps(*sides: int) -> int:
    """Return the warps for a product of tiles: 8 where a float32 product would press on the registers of 4."""
    return 8 if math.prod(sides) > 16**3 else 4


def prototype_center(prototypes: Tensor) -> Tensor:
    """Mean prototype of each episode: [E, N, D] to [E, D], in the statistics dtype.

    Non-finite entries are left out. Any center is correct, and one prototype's NaN must not reach the others.
    """
    episodes, count, dims = prototypes.shape
    center = torch.empty((episodes, dims), dtype=statistics_dtype(prototypes), device=prototypes.device)
    if center.numel() > 0:
        block_d = side(dims, 64)
        with on_device(prototypes):
            _center_kernel[(episodes * triton.cdiv(dims, block_d),)](
                prototypes, center, count, dims, BLOCK_N=side(count, 32), BLOCK_D=block_d
            )
    return center


@triton.jit
def _center_kernel(prototypes, center, count, dims, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(dims, BLOCK_D)
    episode = program // tiles
    d = program % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), center.dtype.element_ty)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < count)[:, None] & (d < dims)[None, :]
        at = (episode * count + n)[:, None] * dims + d[None, :]
        value = tl.load(prototypes + at, mask, other=0.0).to(center.dtype.element_ty)
        total += tl.where(tl.abs(value) < float("inf"), value, 0.0)
    tl.store(center + episode * dims + d, tl.sum(total, 0) / count, d < dims)


@triton.jit
def load_centered(vectors, center, index, count, d, dims):
    """Vectors [index, d] minus the center, in the statistics dtype, and zero outside [count, dims]."""
    mask = (index < count)[:, None] & (d < dims)[None, :]
    at = index.to(tl.int64)[:, None] * dims + d[None, :]
    value = tl.load(vectors + at, mask, other=0.0).to(center.dtype.element_ty)
    return tl.where(mask, value - tl.load(center + d, d < dims, other=0.0)[None, :], 0.0)


@triton.jit
def centered_products(
    rows,
    columns,
    center,
    row,
    num_rows,
    column,
    num_columns,
    dims,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Inner products [BLOCK_R, BLOCK_C] of centered rows and columns, and the squared norms of both."""
    dtype: tl.constexpr = center.dtype.element_ty
    product = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    row_norm = tl.zeros((BLOCK_R,), dtype)
    column_norm = tl.zeros((BLOCK_C,), dtype)
    for start in range(0, dims, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = load_centered(rows, center, row, num_rows, d, dims)
        b = load_centered(columns, center, column, num_columns, d, dims)
        product = tl.dot(a, tl.trans(b), product, input_precision="ieee", out_dtype=dtype)
        row_norm += tl.sum(a * a, 1)
        column_norm += tl.sum(b * b, 1)
    return product, row_norm, column_norm
