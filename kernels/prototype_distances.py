"""Squared Euclidean distances to prototypes in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels.launch import FULL_GRID, Tile, Tiling, launch, split
from fastdis.kernels.prototypes import centered_products, load_centered, prototype_center, side, warps


def forward(queries: Tensor, prototypes: Tensor) -> Tensor:
    """Compute ``|q - p|^2``, never negative.

    Parameters
    ----------
    queries : Tensor [E, Q, D]
    prototypes : Tensor [E, N, D]

    Returns
    -------
    Tensor [E, Q, N]
        In the dtype of queries.
    """
    queries, prototypes = queries.contiguous(), prototypes.contiguous()
    episodes, num_queries, dims = queries.shape
    num_prototypes = prototypes.shape[1]
    distances = queries.new_empty(episodes, num_queries, num_prototypes)
    if distances.numel() == 0:
        return distances
    block_q, block_n, block_d = side(num_queries, 64), side(num_prototypes, 64), side(dims, 32)
    tiles_n = triton.cdiv(num_prototypes, block_n)
    if episodes * triton.cdiv(num_queries, block_q) * tiles_n < FULL_GRID:
        block_q = 16
    center = prototype_center(prototypes)

    def run(tile: Tile) -> None:
        _distances_kernel[(episodes * triton.cdiv(num_queries, tile["BLOCK_Q"]) * tiles_n,)](
            queries, prototypes, center, distances, num_queries, num_prototypes, dims, **tile
        )

    tile = {"BLOCK_Q": block_q, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps(block_q, block_n, block_d)}
    tiling = Tiling(tile, "BLOCK_Q", 16, side(num_queries, 128))
    launch(run, tiling, queries, episodes, num_queries, num_prototypes, dims)
    return distances


def backward(grad: Tensor, queries: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`forward` from grad G [E, Q, N].

    With c the mean prototype, which translation invariance lets us subtract everywhere::

        dq = 2 (rowsum(G) (q - c) - G (p - c))        dp = 2 (colsum(G) (p - c) - G^T (q - c))

    Returns
    -------
    dqueries : Tensor [E, Q, D]
    dprototypes : Tensor [E, N, D]
    """
    grad, queries, prototypes = grad.contiguous(), queries.contiguous(), prototypes.contiguous()
    if grad.numel() == 0 or queries.numel() == 0:
        return torch.zeros_like(queries), torch.zeros_like(prototypes)
    center = prototype_center(prototypes)
    return _gradient(grad, queries, prototypes, center), _gradient(grad.mT, prototypes, queries, center)


def _gradient(grad: Tensor, rows: Tensor, columns: Tensor, center: Tensor) -> Tensor:
    """Gradient of rows [E, R, D] against columns [E, C, D], from grad [E, R, C] of any strides within an episode."""
    episodes, num_rows, dims = rows.shape
    num_columns = columns.shape[1]
    block_r, block_c, block_d = side(num_rows, 32), side(num_columns, 32), side(dims, 64)

    def run(tile: Tile) -> Tensor:
        tiles = episodes * triton.cdiv(num_rows, tile["BLOCK_R"]) * triton.cdiv(dims, block_d)
        tiles_per_part, parts = split(triton.cdiv(num_columns, block_c), tiles)
        out = torch.empty_like(rows) if parts == 1 else center.new_empty(parts, *rows.shape)
        _gradient_kernel[(tiles * parts,)](
            grad, rows, columns, center, out, episodes, num_rows, num_columns, dims, *grad.stride()[1:],
            tiles_per_part, **tile,
        )  # fmt: skip
        return out if parts == 1 else out.sum(0).to(rows.dtype)

    tile = {"BLOCK_R": block_r, "BLOCK_C": block_c, "BLOCK_D": block_d, "num_warps": warps(block_r, block_c, block_d)}
    tiling = Tiling(tile, "BLOCK_R", 16, side(num_rows, 64))
    return launch(run, tiling, rows, episodes, num_rows, num_columns, dims)


@triton.jit
def _distances_kernel(
    queries,
    prototypes,
    center,
    distances,
    num_queries,
    num_prototypes,
    dims,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tiles_n = tl.cdiv(num_prototypes, BLOCK_N)
    tiles_q = tl.cdiv(num_queries, BLOCK_Q)
    episode = program // tiles_n // tiles_q
    q = (program // tiles_n % tiles_q).to(tl.int32) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = (program % tiles_n).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    product, q_norm, n_norm = centered_products(
        queries + episode * num_queries * dims,
        prototypes + episode * num_prototypes * dims,
        center + episode * dims,
        q,
        num_queries,
        n,
        num_prototypes,
        dims,
        BLOCK_Q,
        BLOCK_N,
        BLOCK_D,
    )
    q_norm = q_norm[:, None]
    n_norm = n_norm[None, :]
    d = q_norm - 2.0 * product + n_norm
    # Written so that NaN stays NaN; and where one of the two points is infinitely far, so is the distance.
    d = tl.where(d < 0, 0.0, d)
    inf = float("inf")
    d = tl.where(((q_norm == inf) & (n_norm < inf)) | ((q_norm < inf) & (n_norm == inf)), inf, d)
    mask = (q < num_queries)[:, None] & (n < num_prototypes)[None, :]
    at = (episode * num_queries + q)[:, None] * num_prototypes + n[None, :]
    tl.store(distances + at, d.to(distances.dtype.element_ty), mask)


@triton.jit
def _gradient_kernel(
    grad,
    rows,
    columns,
    center,
    out,
    episodes,
    num_rows,
    num_columns,
    dims,
    stride_row,
    stride_column,
    tiles_per_part,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write ``2 (rowsum(G) (r - c) - G (y - c))`` of one tile of rows and dimensions, over one part of the columns."""
    program = tl.program_id(0).to(tl.int64)
    tiles_d = tl.cdiv(dims, BLOCK_D)
    tiles_r = tl.cdiv(num_rows, BLOCK_R)
    d = (program % tiles_d).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (program // tiles_d % tiles_r).to(tl.int32) * BLOCK_R + tl.arange(0, BLOCK_R)
    episode = program // tiles_d // tiles_r % episodes
    part = program // tiles_d // tiles_r // episodes
    grad += episode * num_rows * num_columns
    columns += episode * num_columns * dims
    center += episode * dims
    dtype: tl.constexpr = center.dtype.element_ty
    pull = tl.zeros((BLOCK_R, BLOCK_D), dtype)
    total = tl.zeros((BLOCK_R,), dtype)
    first = part.to(tl.int32) * tiles_per_part * BLOCK_C
    for start in range(first, tl.minimum(first + tiles_per_part * BLOCK_C, num_columns), BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        at = row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
        g = tl.load(grad + at, mask, other=0.0).to(dtype)
        y = load_centered(columns, center, column, num_columns, d, dims)
        pull = tl.dot(g, y, pull, input_precision="ieee", out_dtype=dtype)
        total += tl.sum(g, 1)
    r = load_centered(rows + episode * num_rows * dims, center, row, num_rows, d, dims)
    mask = (row < num_rows)[:, None] & (d < dims)[None, :]
    at = ((part * episodes + episode) * num_rows + row)[:, None] * dims + d[None, :]
    tl.store(out + at, (2.0 * (total[:, None] * r - pull)).to(out.dtype.element_ty), mask)
