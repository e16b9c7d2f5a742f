"""Prototypical loss in Triton: distances, softmax and cross entropy at once, keeping one number a query.

``|q|^2`` cancels in the softmax, so with c the mean prototype the logits are
``s_qn = 2 (q - c) . (p_n - c) - |p_n - c|^2``. Both passes compute them tile by tile; no [E, Q, N] tensor exists.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels import statistics_dtype
from fastdis.kernels.launch import FULL_GRID, Tile, Tiling, launch, split
from fastdis.kernels.prototypes import centered_products, load_centered, prototype_center, side, warps

NONE, MEAN, SUM = range(3)


def forward(queries: Tensor, prototypes: Tensor, labels: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """Cross entropy of ``softmax(-|q - p|^2)``.

    Parameters
    ----------
    queries : Tensor [E, Q, D]
    prototypes : Tensor [E, N, D]
    labels : Tensor [E, Q] of int64
        A query whose label lies outside [0, N) gets a loss of NaN.
    reduction : int
        0 none, 1 mean, 2 sum.

    Returns
    -------
    loss : Tensor [E, Q] or []
        In the dtype of queries.
    logsumexp : Tensor [E, Q]
        Of the centered logits, in the statistics dtype.
    """
    queries, prototypes, labels = queries.contiguous(), prototypes.contiguous(), labels.contiguous()
    episodes, num_queries, dims = queries.shape
    num_prototypes = prototypes.shape[1]
    logsumexp = torch.empty((episodes, num_queries), dtype=statistics_dtype(queries), device=queries.device)
    loss = logsumexp.new_empty(logsumexp.shape, dtype=queries.dtype if reduction == NONE else logsumexp.dtype)
    if loss.numel() > 0:
        center = prototype_center(prototypes)

        def run(tile: Tile) -> None:
            _loss_kernel[(episodes * triton.cdiv(num_queries, tile["BLOCK_Q"]),)](
                queries, prototypes, center, labels, loss, logsumexp, num_queries, num_prototypes, dims, **tile
            )

        block_q, block_n, block_d = side(num_queries, 64), side(num_prototypes, 64), side(dims, 32)
        if episodes * triton.cdiv(num_queries, block_q) < FULL_GRID:
            block_q = 16
        blocks = {"BLOCK_Q": block_q, "BLOCK_N": block_n, "BLOCK_D": block_d}
        tile = {**blocks, "num_warps": warps(block_q, block_n, block_d)}
        tiling = Tiling(tile, "BLOCK_Q", 16, side(num_queries, 128))
        launch(run, tiling, queries, episodes, num_queries, num_prototypes, dims)
    if reduction == MEAN:
        loss = loss.mean().to(queries.dtype)
    elif reduction == SUM:
        loss = loss.sum().to(queries.dtype)
    return loss, logsumexp


def backward(
    grad: Tensor, queries: Tensor, prototypes: Tensor, labels: Tensor, logsumexp: Tensor, reduction: int
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`forward` from grad [E, Q] or [] and what forward took and returned.

    With ``R = (softmax(s) - onehot(label)) * grad``, divided by E Q for the mean::

        dq = 2 R (p - c)        dp = 2 (R^T (q - c) - colsum(R) (p - c))

    A label outside [0, N) makes its query's row of R NaN, and with it the gradients of the episode's prototypes.

    Returns
    -------
    dqueries : Tensor [E, Q, D]
    dprototypes : Tensor [E, N, D]
    """
    queries, prototypes = queries.contiguous(), prototypes.contiguous()
    if queries.numel() == 0 or prototypes.numel() == 0:
        return torch.zeros_like(queries), torch.zeros_like(prototypes)
    weights = (prototype_center(prototypes), labels.contiguous(), logsumexp.contiguous(), grad.contiguous(), reduction)
    return _gradient(queries, prototypes, *weights, True), _gradient(prototypes, queries, *weights, False)


def _gradient(
    rows: Tensor,
    columns: Tensor,
    center: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    reduction: int,
    queries_are_rows: bool,
) -> Tensor:
    """Gradient of rows [E, R, D] against columns [E, C, D], which are queries and prototypes in either order."""
    episodes, num_rows, dims = rows.shape
    num_columns = columns.shape[1]
    block_r, block_c, block_d = side(num_rows, 32), side(num_columns, 32), side(dims, 32)
    if episodes * triton.cdiv(num_rows, block_r) < FULL_GRID:
        block_r = 16

    def run(tile: Tile) -> Tensor:
        tiles = episodes * triton.cdiv(num_rows, tile["BLOCK_R"])
        tiles_per_part, parts = split(triton.cdiv(num_columns, block_c), tiles)
        # A program that passes over several tiles of columns adds each to what it wrote before: in full precision.
        dtype = rows.dtype if tiles_per_part == 1 and parts == 1 else center.dtype
        out = rows.new_empty(parts, *rows.shape, dtype=dtype)
        _gradient_kernel[(tiles * parts,)](
            rows, columns, center, labels, logsumexp, grad, out, episodes, num_rows, num_columns, dims,
            labels.numel() if reduction == MEAN else 1, tiles_per_part,
            GRAD_PER_QUERY=reduction == NONE, QUERIES_ARE_ROWS=queries_are_rows, **tile,
        )  # fmt: skip
        return (out[0] if parts == 1 else out.sum(0)).to(rows.dtype)

    tile = {"BLOCK_R": block_r, "BLOCK_C": block_c, "BLOCK_D": block_d, "num_warps": warps(block_r, block_c, block_d)}
    tiling = Tiling(tile, "BLOCK_R", 16, side(num_rows, 64))
    return launch(run, tiling, rows, episodes, num_rows, num_columns, dims)


@triton.jit
def _logits(product, prototype_norm):
    """Logits ``2 (q - c) . (p - c) - |p - c|^2``, with -inf for a prototype infinitely far away."""
    return tl.where(prototype_norm == float("inf"), float("-inf"), 2.0 * product - prototype_norm)


@triton.jit
def _loss_kernel(
    queries,
    prototypes,
    center,
    labels,
    loss,
    logsumexp,
    num_queries,
    num_prototypes,
    dims,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tiles_q = tl.cdiv(num_queries, BLOCK_Q)
    episode = program // tiles_q
    q = (program % tiles_q).to(tl.int32) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    at = episode * num_queries + q
    q_mask = q < num_queries
    label = tl.load(labels + at, q_mask, other=0)
    dtype: tl.constexpr = center.dtype.element_ty
    inf = float("inf")
    peak = tl.full((BLOCK_Q,), -inf, dtype)
    total = tl.zeros((BLOCK_Q,), dtype)
    target = tl.zeros((BLOCK_Q,), dtype)
    for start in range(0, num_prototypes, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        product, _, norm = centered_products(
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
        s = tl.where((n < num_prototypes)[None, :], _logits(product, norm[None, :]), -inf)
        target += tl.sum(tl.where(n[None, :] == label[:, None], s, 0.0), 1)
        new_peak = tl.maximum(peak, tl.max(s, 1))
        # A finite stand-in while all logits are -inf, whose difference to themselves would be NaN.
        base = tl.where(new_peak == -inf, 0.0, new_peak)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(s - base[:, None]), 1)
        peak = new_peak
    lse = tl.where(peak == -inf, 0.0, peak) + tl.log(total)
    value = tl.where((label >= 0) & (label < num_prototypes), lse - target, float("nan"))
    tl.store(logsumexp + at, lse, q_mask)
    tl.store(loss + at, value.to(loss.dtype.element_ty), q_mask)


@triton.jit
def _gradient_kernel(
    rows,
    columns,
    center,
    labels,
    logsumexp,
    grad,
    out,
    episodes,
    num_rows,
    num_columns,
    dims,
    count,
    tiles_per_part,
    GRAD_PER_QUERY: tl.constexpr,
    QUERIES_ARE_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write ``2 (R (y - c) - rowsum(R) (r - c))`` of one tile of rows over one part of the columns.

    R is transposed where the rows are prototypes; where they are queries, its rows sum to zero.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles_r = tl.cdiv(num_rows, BLOCK_R)
    row = (program % tiles_r).to(tl.int32) * BLOCK_R + tl.arange(0, BLOCK_R)
    episode = program // tiles_r % episodes
    part = program // tiles_r // episodes
    rows += episode * num_rows * dims
    columns += episode * num_columns * dims
    center += episode * dims
    dtype: tl.constexpr = center.dtype.element_ty
    out += (part * episodes + episode) * num_rows * dims
    first = part.to(tl.int32) * tiles_per_part
    for tile in range(first, tl.minimum(first + tiles_per_part, tl.cdiv(num_columns, BLOCK_C))):
        column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        product, row_norm, column_norm = centered_products(
            rows, columns, center, row, num_rows, column, num_columns, dims, BLOCK_R, BLOCK_C, BLOCK_D
        )
        mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        if QUERIES_ARE_ROWS:
            s = _logits(product, column_norm[None, :])
            query = (episode * num_rows + row)[:, None]
            query_mask = (row < num_rows)[:, None]
            prototype = column[None, :]
            num_prototypes = num_columns
        else:
            s = _logits(product, row_norm[:, None])
            query = (episode * num_columns + column)[None, :]
            query_mask = (column < num_columns)[None, :]
            prototype = row[:, None]
            num_prototypes = num_rows
        label = tl.load(labels + query, query_mask, other=0)
        lse = tl.load(logsumexp + query, query_mask, other=0.0)
        g = tl.load(grad + (query if GRAD_PER_QUERY else query * 0), query_mask, other=0.0).to(dtype) / count
        g = tl.where((label >= 0) & (label < num_prototypes), g, float("nan"))
        weight = tl.where(mask, (tl.exp(s - lse) - tl.where(prototype == label, 1.0, 0.0)) * g, 0.0)
        total = tl.sum(weight, 1)[:, None]
        for start in range(0, dims, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            y = load_centered(columns, center, column, num_columns, d, dims)
            pull = tl.dot(weight, y, input_precision="ieee", out_dtype=dtype)
            if not QUERIES_ARE_ROWS:
                pull -= total * load_centered(rows, center, row, num_rows, d, dims)
            out_mask = (row < num_rows)[:, None] & (d < dims)[None, :]
            at = row.to(tl.int64)[:, None] * dims + d[None, :]
            pull = 2.0 * pull + tl.load(out + at, out_mask & (tile > first), other=0.0).to(dtype)
            tl.store(out + at, pull.to(out.dtype.element_ty), out_mask)
        # The next tile reads back what other threads of this program may have written.
        tl.debug_barrier()
