"""The decomposition of the aggregate divergence in Triton; no [B, B, K] tensor in either pass.

With ``l_ijk = log N(z_ik; mean_jk, exp(logvar_jk))`` and weights w of three values::

    log_joint_i = log sum_j w_ij exp(sum_k l_ijk)        log_marginals_ik = log sum_j w_ij exp(l_ijk)

The marginals of one k know nothing of the other k: their kernels take one k a program, which bounds the registers for
any K. The joint alone couples the k; its kernels loop over them. Backward is two sweeps of each, over rows i for dz and
over columns j for dmean and dlogvar, which compute l again.

Everything between the inputs and the results is in planes [E, K, B], read along B, with
``l = offset - rate (z - mean)^2``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels import on_device, statistics_dtype
from fastdis.kernels.launch import FULL_GRID, Tile, Tiling, block, launch, split

MSS = 1

LOG_2_PI = tl.constexpr(math.log(2.0 * math.pi))


def forward(
    z: Tensor, mean: Tensor, logvar: Tensor, dataset_size: int, estimator: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Estimate the three terms.

    Parameters
    ----------
    z, mean, logvar : Tensor [B, K] or [E, B, K]
    dataset_size : int
    estimator : int
        0 mws, 1 mss.

    Returns
    -------
    mutual_information, total_correlation, dimension_wise_kl : Tensor [] or [E]
        In the statistics dtype, as are the others.
    log_joint : Tensor [B] or [E, B]
    log_marginals : Tensor [B, K] or [E, B, K]
    """
    z, mean, logvar = (t.contiguous() for t in (z, mean, logvar))
    episodes, batch, dims = _sizes(z)
    log_marginals = z.new_empty(z.shape, dtype=statistics_dtype(z))
    log_joint = log_marginals.new_empty(z.shape[:-1])
    terms = [log_marginals.new_empty(z.shape[:-2]) for _ in range(3)]
    if log_joint.numel() == 0:
        return *(t.fill_(math.nan) for t in terms), log_joint, log_marginals
    stratified = estimator == MSS
    rows = log_marginals.new_empty(3, episodes, batch)
    planes, weights = _planes(z, mean, logvar, None, dataset_size, estimator)

    def marginals(tile: Tile) -> None:
        _marginals_kernel[(episodes * dims * triton.cdiv(batch, tile["BLOCK_O"]),)](
            *planes, log_marginals, batch, dims, weights, STRATIFIED=stratified, **tile, GROUP=_group(tile)
        )

    def joint(tile: Tile) -> None:
        _joint_kernel[(episodes * triton.cdiv(batch, tile["BLOCK_O"]),)](
            *planes, z, mean, logvar, log_marginals, log_joint, rows, episodes, batch, dims, weights,
            STRATIFIED=stratified, **tile, GROUP=_group(tile), BLOCK_K=block(max(dims, 1), 64),
        )  # fmt: skip

    if dims > 0:
        launch(marginals, _tiling(planes[0], episodes * dims, 16), z, episodes, batch, dims)
    launch(joint, _tiling(planes[0], episodes, 16), z, episodes, batch, dims)
    with on_device(z):
        _means_kernel[(episodes,)](rows, *terms, episodes, batch, BLOCK=block(batch, 1024))
    return *terms, log_joint, log_marginals


def backward(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    logvar: Tensor,
    log_joint: Tensor,
    log_marginals: Tensor,
    dataset_size: int,
    estimator: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward` from grad [3] or [3, E] of the three terms and what forward took and returned.

    With ``u_ijk = (z_ik - mean_jk) exp(-logvar_jk)`` and the responsibilities of both mixtures::

        dl_ijk  = (g_tc - g_mi) / B  w_ij exp(sum_k l_ijk - log_joint_i)
                + (g_dw - g_tc) / B  w_ij exp(l_ijk - log_marginals_ik)  +  [i == j] g_mi / B
        dz      = -sum_j dl u + g_dw z / B
        dmean   = sum_i dl u
        dlogvar = sum_i dl ((z - mean) u - 1) / 2

    Returns
    -------
    dz, dmean, dlogvar : Tensor [B, K] or [E, B, K]
    """
    z, mean, logvar, log_joint = (t.contiguous() for t in (z, mean, logvar, log_joint))
    gradients = tuple(torch.empty_like(t) for t in (z, mean, logvar))
    if z.numel() == 0:
        return gradients
    episodes, batch, dims = _sizes(z)
    stratified = estimator == MSS
    planes, weights = _planes(z, mean, logvar, log_marginals.contiguous(), dataset_size, estimator)

    def marginal_sums(over_rows: bool) -> Tensor:
        out = planes[0].new_empty(1 if over_rows else 2, *planes[0].shape)

        def run(tile: Tile) -> None:
            _marginal_sums_kernel[(episodes * dims * triton.cdiv(batch, tile["BLOCK_O"]),)](
                *planes, out, episodes, batch, dims, weights, STRATIFIED=stratified, OVER_ROWS=over_rows, **tile
            )

        launch(run, _tiling(planes[0], episodes * dims, 8), z, over_rows, episodes, batch, dims)
        return out

    def joint_sums(over_rows: bool) -> Tensor:
        def run(tile: Tile) -> Tensor:
            programs = episodes * triton.cdiv(batch, tile["BLOCK_O"])
            steps_per_part, parts = split(triton.cdiv(batch, tile["BLOCK_R"]), programs, 8 * FULL_GRID)
            out = planes[0].new_empty(parts, 1 if over_rows else 2, *planes[0].shape)
            _joint_sums_kernel[(parts * programs,)](
                *planes[:4], log_joint, out, episodes, batch, dims, steps_per_part, weights,
                STRATIFIED=stratified, OVER_ROWS=over_rows, **tile,
            )  # fmt: skip
            return out

        # One warp a program: the sums of every tile, and every k, are then sums within a warp.
        tile = {**_tiling(planes[0], episodes, 4).tile, "num_warps": 1}
        tiling = Tiling(tile, "BLOCK_O", 1, block(batch, 8), most_warps=1)
        return launch(run, tiling, z, over_rows, episodes, batch, dims)

    sums = [summed(over_rows) for over_rows in (True, False) for summed in (marginal_sums, joint_sums)]
    block_b, block_k = block(batch, 32), block(dims, 32)
    with on_device(z):
        _combine_kernel[(episodes * triton.cdiv(batch, block_b) * triton.cdiv(dims, block_k),)](
            grad.contiguous(), z, mean, logvar, *sums, *gradients, episodes, batch, dims, len(sums[1]), len(sums[3]),
            BLOCK_B=block_b, BLOCK_K=block_k,
        )  # fmt: skip
    return gradients


def _sizes(z: Tensor) -> tuple[int, int, int]:
    """Episodes, batch and dimensions."""
    return (1, *z.shape) if z.dim() == 2 else tuple(z.shape)


def _planes(
    z: Tensor, mean: Tensor, logvar: Tensor, log_marginals: Tensor | None, dataset_size: int, estimator: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Planes [E, K, B] of z, mean, rate, offset and, in backward, log_marginals; and the log weights [3]."""
    episodes, batch, dims = _sizes(z)
    dtype = statistics_dtype(z)
    planes = z.new_empty(4 if log_marginals is None else 5, episodes, dims, batch, dtype=dtype)
    weights = z.new_empty(3, dtype=dtype)
    block_b, block_k = block(batch, 32), block(max(dims, 1), 32)
    with on_device(z):
        _planes_kernel[(episodes * triton.cdiv(batch, block_b) * max(triton.cdiv(dims, block_k), 1),)](
            z, mean, logvar, log_marginals, planes, weights, episodes, batch, dims, dataset_size,
            STRATIFIED=estimator == MSS, BLOCK_B=block_b, BLOCK_K=block_k,
        )  # fmt: skip
    return planes.unbind(0), weights


def _tiling(plane: Tensor, programs_per_row: int, most: int) -> Tiling:
    """Tile of [BLOCK_O, BLOCK_R]: samples to write for, at most so many, and samples to sum over at a time.

    Of float64, whose exponentials need registers as well, a quarter. Programs for every SM come before larger tiles.
    """
    batch = plane.shape[-1]
    block_o = block(max(batch * programs_per_row // FULL_GRID, 1), most if plane.element_size() == 4 else most // 4)
    block_r = block(batch, 512)
    tile = {"BLOCK_O": block_o, "BLOCK_R": block_r, "num_warps": max(block_r // 128, 1)}
    return Tiling(tile, "BLOCK_R", 32, block(batch, 1024))


def _group(tile: dict) -> int:
    """Neighbouring samples of which a thread takes the maximum before it rescales its running sum."""
    return min(max(tile["BLOCK_R"] // 32, 1), 4)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces shared by the kernels


@triton.jit
def _store_log_weights(weights, batch, dataset_size, STRATIFIED: tl.constexpr):
    """Store the logarithm of the common weight, and of the diagonal's and its right neighbour's relative to it.

    In float64, since an error here is the same in every pair, where others average out. Both passes add the weights
    before they take the logarithm of the sum or subtract it, so that a lone component has a responsibility of 1.
    """
    size = tl.cast(dataset_size, tl.float64)
    if STRATIFIED:
        others = tl.cast(batch, tl.float64) - 1.0
        most = tl.maximum(others, 1.0)
        base = -tl.log(most)
        tl.store(weights + 1, tl.log(most / size).to(weights.dtype.element_ty))
        tl.store(weights + 2, tl.log((size - others) / size).to(weights.dtype.element_ty))
    else:
        base = -tl.log(tl.cast(batch, tl.float64) * size)
    tl.store(weights, base.to(weights.dtype.element_ty))


@triton.jit
def _reweighted(log, row, column, batch, weights, STRATIFIED: tl.constexpr):
    """Add the logarithm of w_ij over the common weight."""
    if STRATIFIED:
        diagonal = tl.load(weights + 1)
        neighbour = tl.load(weights + 2)
        row = _as_tile(row)
        column = _as_tile(column)
        right = tl.where(row + 1 == batch, 0, row + 1)
        log += tl.where(row == column, diagonal, tl.where(right == column, neighbour, 0.0))
    return log


@triton.jit
def _as_tile(values):
    """Samples to write for are [BLOCK_O], which loads without repetition, and stand in a tile as [BLOCK_O, 1].

    Samples to sum over are [1, BLOCK_R] from the start.
    """
    if len(values.shape) == 1:
        values = values[:, None]
    return values


@triton.jit
def _load_row(plane, row, batch, other: tl.constexpr):
    return _as_tile(tl.load(plane + row, row < batch, other=other))


@triton.jit
def _load_column(mean, rate, offset, column, batch):
    """Parameters of x_j; beyond the batch its density is zero."""
    mask = column < batch
    m = tl.load(mean + column, mask, other=0.0)
    r = tl.load(rate + column, mask, other=0.0)
    c = tl.load(offset + column, mask, other=float("-inf"))
    return _as_tile(m), _as_tile(r), _as_tile(c)


@triton.jit
def _add_to_logsumexp(peak, total, log, GROUP: tl.constexpr):
    """Add [BLOCK_O, BLOCK_R] logarithms to running sums of [BLOCK_O, BLOCK_R / GROUP] relative to their peaks."""
    groups = tl.reshape(log, (log.shape[0], log.shape[1] // GROUP, GROUP))
    new_peak = tl.maximum(peak, tl.max(groups, 2))
    # A finite stand-in while all are -inf, whose difference to themselves would be NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    total = total * tl.exp(peak - base) + tl.sum(tl.exp(groups - base[:, :, None]), 2)
    return new_peak, total


@triton.jit
def _logsumexp(peak, total):
    """Merge the running sums of each row: the logarithm [BLOCK_O] of their sum."""
    row_peak = tl.max(peak, 1)
    base = tl.where(row_peak == float("-inf"), 0.0, row_peak)
    return base + tl.log(tl.sum(total * tl.exp(peak - base[:, None]), 1))


@triton.jit
def _joint_log_density(z, mean, rate, offset, row, column, batch, dims, zero):
    """sum_k l_ijk of a tile of pairs; -inf outside the batch."""
    log = zero
    for k in tl.range(0, dims, loop_unroll_factor=2):
        at = k * tl.cast(batch, tl.int64)
        m, r, c = _load_column(mean + at, rate + at, offset + at, column, batch)
        d = _load_row(z + at, row, batch, 0.0) - m
        log += c - r * (d * d)
    return tl.where(_as_tile(column) < batch, log, float("-inf"))


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def _planes_kernel(
    z,
    mean,
    logvar,
    log_marginals,
    planes,
    weights,
    episodes,
    batch,
    dims,
    dataset_size,
    STRATIFIED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        _store_log_weights(weights, batch, dataset_size, STRATIFIED)
    tiles_k = tl.maximum(tl.cdiv(dims, BLOCK_K), 1)
    tiles_b = tl.cdiv(batch, BLOCK_B)
    k = program % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    b = program // tiles_k % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    episode = program // tiles_k // tiles_b
    mask = (b < batch) & (k < dims)
    at = (episode * batch + b) * dims + k
    dtype: tl.constexpr = planes.dtype.element_ty
    lv = tl.load(logvar + at, mask, other=0.0).to(dtype)
    out = planes + (episode * dims + k) * batch + b
    plane = tl.cast(episodes, tl.int64) * batch * dims
    tl.store(out, tl.load(z + at, mask, other=0.0).to(dtype), mask)
    tl.store(out + plane, tl.load(mean + at, mask, other=0.0).to(dtype), mask)
    tl.store(out + 2 * plane, 0.5 * tl.exp(-lv), mask)
    tl.store(out + 3 * plane, -0.5 * (lv + LOG_2_PI), mask)
    if log_marginals is not None:
        tl.store(out + 4 * plane, tl.load(log_marginals + at, mask, other=0.0), mask)


@triton.jit
def _marginals_kernel(
    z,
    mean,
    rate,
    offset,
    log_marginals,
    batch,
    dims,
    weights,
    STRATIFIED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write log_marginals of one k for a tile of rows."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(batch, BLOCK_O)
    plane = program // tiles
    dtype: tl.constexpr = z.dtype.element_ty
    row = (program % tiles).to(tl.int32) * BLOCK_O + tl.arange(0, BLOCK_O)
    x = _load_row(z + plane * batch, row, batch, 0.0)
    peak = tl.full((BLOCK_O, BLOCK_R // GROUP), float("-inf"), dtype)
    total = tl.zeros((BLOCK_O, BLOCK_R // GROUP), dtype)
    for start in range(0, batch, BLOCK_R):
        column = start + tl.arange(0, BLOCK_R)[None, :]
        m, r, c = _load_column(mean + plane * batch, rate + plane * batch, offset + plane * batch, column, batch)
        d = x - m
        log = _reweighted(c + tl.load(weights) - r * (d * d), row, column, batch, weights, STRATIFIED)
        peak, total = _add_to_logsumexp(peak, total, log, GROUP)
    value = _logsumexp(peak, total)
    tl.store(log_marginals + (plane // dims * batch + row) * dims + plane % dims, value, row < batch)


@triton.jit
def _joint_kernel(
    z_plane,
    mean_plane,
    rate,
    offset,
    z,
    mean,
    logvar,
    log_marginals,
    log_joint,
    rows,
    episodes,
    batch,
    dims,
    weights,
    STRATIFIED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write log_joint of a tile of rows, and what they add to the three terms, to [3, E, B]."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(batch, BLOCK_O)
    episode = program // tiles
    first = episode * dims * batch
    dtype: tl.constexpr = log_joint.dtype.element_ty
    row = (program % tiles).to(tl.int32) * BLOCK_O + tl.arange(0, BLOCK_O)
    peak = tl.full((BLOCK_O, BLOCK_R // GROUP), float("-inf"), dtype)
    total = tl.zeros((BLOCK_O, BLOCK_R // GROUP), dtype)
    zero = tl.zeros((BLOCK_O, BLOCK_R), dtype)
    for start in range(0, batch, BLOCK_R):
        column = start + tl.arange(0, BLOCK_R)[None, :]
        log = _joint_log_density(
            z_plane + first, mean_plane + first, rate + first, offset + first, row, column, batch, dims, zero
        )
        log = _reweighted(log + tl.load(weights), row, column, batch, weights, STRATIFIED)
        peak, total = _add_to_logsumexp(peak, total, log, GROUP)
    joint = _logsumexp(peak, total)
    posterior = tl.zeros((BLOCK_O, BLOCK_K), dtype)
    prior = tl.zeros((BLOCK_O, BLOCK_K), dtype)
    marginals = tl.zeros((BLOCK_O, BLOCK_K), dtype)
    for start in range(0, dims, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        mask = (row < batch)[:, None] & (k < dims)
        at = (episode * batch + row)[:, None] * dims + k
        x = tl.load(z + at, mask, other=0.0).to(dtype)
        d = x - tl.load(mean + at, mask, other=0.0).to(dtype)
        lv = tl.load(logvar + at, mask, other=0.0).to(dtype)
        posterior -= tl.where(mask, 0.5 * (d * d * tl.exp(-lv) + lv + LOG_2_PI), 0.0)
        prior -= tl.where(mask, 0.5 * (x * x + LOG_2_PI), 0.0)
        marginals += tl.load(log_marginals + at, mask, other=0.0)
    log_marginal = tl.sum(marginals, 1)
    at = episode * batch + row
    plane = tl.cast(episodes, tl.int64) * batch
    tl.store(log_joint + at, joint, row < batch)
    tl.store(rows + at, tl.sum(posterior, 1) - joint, row < batch)
    tl.store(rows + plane + at, joint - log_marginal, row < batch)
    tl.store(rows + 2 * plane + at, log_marginal - tl.sum(prior, 1), row < batch)


@triton.jit
def _means_kernel(rows, mutual_information, total_correlation, dimension_wise_kl, episodes, batch, BLOCK: tl.constexpr):
    episode = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = rows.dtype.element_ty
    plane = tl.cast(episodes, tl.int64) * batch
    first = tl.zeros((BLOCK,), dtype)
    second = tl.zeros((BLOCK,), dtype)
    third = tl.zeros((BLOCK,), dtype)
    for start in range(0, batch, BLOCK):
        b = start + tl.arange(0, BLOCK)
        at = rows + episode * batch + b
        first += tl.load(at, b < batch, other=0.0)
        second += tl.load(at + plane, b < batch, other=0.0)
        third += tl.load(at + 2 * plane, b < batch, other=0.0)
    tl.store(mutual_information + episode, tl.sum(first, 0) / batch)
    tl.store(total_correlation + episode, tl.sum(second, 0) / batch)
    tl.store(dimension_wise_kl + episode, tl.sum(third, 0) / batch)


# ---------------------------------------------------------------------------------------------------------------------
# Backward: sums under the responsibilities. Over rows, samples i are written for and j summed over, and there is one
# sum, of u; over columns the other way about, and there are two, of u and of (z - mean) u - 1.


@triton.jit
def _marginal_sums_kernel(
    z,
    mean,
    rate,
    offset,
    log_marginals,
    out,
    episodes,
    batch,
    dims,
    weights,
    STRATIFIED: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write the sums of one k for a tile of samples, to [1 or 2, E, K, B]."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(batch, BLOCK_O)
    first = program // tiles * batch
    dtype: tl.constexpr = z.dtype.element_ty
    o = (program % tiles).to(tl.int32) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_O, BLOCK_R), dtype)
    squares = tl.zeros((BLOCK_O, BLOCK_R), dtype)
    for start in range(0, batch, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)[None, :]
        if OVER_ROWS:
            row, column = o, r
        else:
            row, column = r, o
        m, h, c = _load_column(mean + first, rate + first, offset + first, column, batch)
        d = _load_row(z + first, row, batch, 0.0) - m
        log = _reweighted(c + tl.load(weights) - h * (d * d), row, column, batch, weights, STRATIFIED)
        p = tl.exp(log - _load_row(log_marginals + first, row, batch, float("inf")))
        precision = 2.0 * h
        if OVER_ROWS:
            total += p * (d * precision)
        else:
            total += p * d
            squares += p * (d * d * precision - 1.0)
    out += first + o
    if OVER_ROWS:
        tl.store(out, tl.sum(total, 1), o < batch)
    else:
        precision = 2.0 * tl.load(rate + first + o, o < batch, other=0.0)
        tl.store(out, precision * tl.sum(total, 1), o < batch)
        tl.store(out + tl.cast(episodes, tl.int64) * dims * batch, tl.sum(squares, 1), o < batch)


@triton.jit
def _joint_sums_kernel(
    z,
    mean,
    rate,
    offset,
    log_joint,
    out,
    episodes,
    batch,
    dims,
    steps_per_part,
    weights,
    STRATIFIED: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write the sums of all k for a tile of samples, over one part of the others, to [parts, 1 or 2, E, K, B]."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(batch, BLOCK_O)
    episode = program // tiles % episodes
    part = program // tiles // episodes
    first = episode * dims * batch
    z += first
    mean += first
    rate += first
    offset += first
    log_joint += episode * batch
    plane = tl.cast(episodes, tl.int64) * dims * batch
    out += part * plane * (1 if OVER_ROWS else 2) + first
    dtype: tl.constexpr = z.dtype.element_ty
    o = (program % tiles).to(tl.int32) * BLOCK_O + tl.arange(0, BLOCK_O)
    zero = tl.zeros((BLOCK_O, BLOCK_R), dtype)
    first_step = part.to(tl.int32) * steps_per_part
    for step in range(first_step, tl.minimum(first_step + steps_per_part, tl.cdiv(batch, BLOCK_R))):
        r = step * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        if OVER_ROWS:
            row, column = o, r
        else:
            row, column = r, o
        log = _joint_log_density(z, mean, rate, offset, row, column, batch, dims, zero)
        log = _reweighted(log + tl.load(weights), row, column, batch, weights, STRATIFIED)
        p = tl.exp(log - _load_row(log_joint, row, batch, float("inf")))
        # What the part's earlier steps have written is added to.
        mask = (o < batch) & (step > first_step)
        for k in range(dims):
            at = k * tl.cast(batch, tl.int64)
            m, h, _ = _load_column(mean + at, rate + at, offset + at, column, batch)
            d = _load_row(z + at, row, batch, 0.0) - m
            precision = 2.0 * h
            target = out + at + o
            u = tl.sum(p * (d * precision), 1)
            tl.store(target, u + tl.load(target, mask, other=0.0), o < batch)
            if not OVER_ROWS:
                squares = tl.sum(p * (d * d * precision - 1.0), 1)
                tl.store(target + plane, squares + tl.load(target + plane, mask, other=0.0), o < batch)
        # The next step reads back what other threads of this program may have written.
        tl.debug_barrier()


@triton.jit
def _sum_of_parts(joint, plane, parts, mask, zero):
    total = zero
    for part in range(parts):
        total += tl.load(joint + part * plane, mask, other=0.0)
    return total


@triton.jit
def _combine_kernel(
    grad,
    z,
    mean,
    logvar,
    row_marginal,
    row_joint,
    column_marginal,
    column_joint,
    dz,
    dmean,
    dlogvar,
    episodes,
    batch,
    dims,
    row_parts,
    column_parts,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weight the sums by the gradients of the three terms, and add the posterior's and the prior's own."""
    program = tl.program_id(0).to(tl.int64)
    tiles_k = tl.cdiv(dims, BLOCK_K)
    tiles_b = tl.cdiv(batch, BLOCK_B)
    k = program % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    b = program // tiles_k % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    episode = program // tiles_k // tiles_b
    mask = (b < batch) & (k < dims)
    dtype: tl.constexpr = row_marginal.dtype.element_ty
    g_mi = tl.load(grad + episode).to(dtype) / batch
    g_tc = tl.load(grad + episodes + episode).to(dtype) / batch
    g_dw = tl.load(grad + 2 * episodes + episode).to(dtype) / batch
    at = (episode * batch + b) * dims + k
    x = tl.load(z + at, mask, other=0.0).to(dtype)
    d = x - tl.load(mean + at, mask, other=0.0).to(dtype)
    u = d * tl.exp(-tl.load(logvar + at, mask, other=0.0).to(dtype))
    at_plane = (episode * dims + k) * batch + b
    plane = tl.cast(episodes, tl.int64) * dims * batch
    zero = tl.zeros((BLOCK_B, BLOCK_K), dtype)

    total = (g_tc - g_mi) * _sum_of_parts(row_joint + at_plane, plane, row_parts, mask, zero)
    total += (g_dw - g_tc) * tl.load(row_marginal + at_plane, mask, other=0.0)
    tl.store(dz + at, (g_dw * x - g_mi * u - total).to(dz.dtype.element_ty), mask)

    total = (g_tc - g_mi) * _sum_of_parts(column_joint + at_plane, 2 * plane, column_parts, mask, zero)
    total += (g_dw - g_tc) * tl.load(column_marginal + at_plane, mask, other=0.0)
    tl.store(dmean + at, (total + g_mi * u).to(dmean.dtype.element_ty), mask)

    total = (g_tc - g_mi) * _sum_of_parts(column_joint + plane + at_plane, 2 * plane, column_parts, mask, zero)
    total += (g_dw - g_tc) * tl.load(column_marginal + plane + at_plane, mask, other=0.0)
    tl.store(dlogvar + at, (0.5 * (total + g_mi * (d * u - 1.0))).to(dlogvar.dtype.element_ty), mask)
