"""An activation and its derivative on tangents in Triton: ``phi(a + bias)`` and ``phi'(a + bias) t_k``.

Samples are rows of ``size`` = C * S elements. A program takes a tile of samples and elements, evaluates phi there once,
and passes over the K tangents while phi' stays in its registers.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels import statistics_dtype
from fastdis.kernels.launch import SATURATING_GRID, Tile, Tiling, block, launch, span, split, tiles_along

NONE, RELU, LEAKY_RELU, ELU, SILU, GELU, GELU_TANH, TANH, SIGMOID, SOFTPLUS = (tl.constexpr(code) for code in range(10))
# The activations up to leaky_relu: phi'' = 0, and the sign of phi gives phi'.
PIECEWISE_LINEAR = tl.constexpr(3)


def forward(rows: Tensor, directions: Tensor | None, bias: Tensor | None, activation: int, parameter: float) -> Tensor:
    """Activate the primal and multiply the tangents.

    Parameters
    ----------
    rows : Tensor [1 + K, B, C, *]
        The primal first; or [1, B, C, *] beside directions.
    directions : Tensor [K, C, *] or None
        Tangents that all samples share.
    bias : Tensor [C] or None
        Added to the primal.
    activation : int
        0 none, 1 relu, 2 leaky_relu, 3 elu, 4 silu, 5 gelu, 6 gelu_tanh, 7 tanh, 8 sigmoid, 9 softplus.
    parameter : float
        Slope of leaky_relu, alpha of elu, beta of softplus.

    Returns
    -------
    Tensor [1 + K, B, C, *]
    """
    rows = rows.contiguous()
    directions, bias = (None if t is None else t.contiguous() for t in (directions, bias))
    tangents = rows.shape[0] - 1 if directions is None else directions.shape[0]
    out = rows.new_empty(1 + tangents, *rows.shape[1:])
    if out.numel() == 0:
        return out
    samples, size, inner = _sizes(rows)

    def run(tile: Tile) -> None:
        # Where the tiles are too few to fill the chip, the tangents are divided as well.
        tiles = math.prod(_counts(tile, samples, size))
        tangents_per_part, parts = split(max(tangents, 1), tiles, SATURATING_GRID)
        _forward_kernel[(tiles * parts,)](
            rows, directions, bias, out, samples, size, inner, tangents, tangents_per_part,
            ACTIVATION=activation, PARAMETER=parameter, **tile,
        )  # fmt: skip

    launch(run, _tiling(samples, size), rows, tangents, samples, size)
    return out


def backward(
    grad_primal: Tensor | None,
    grad_tangents: Tensor | None,
    saved: Tensor,
    directions: Tensor | None,
    bias: Tensor | None,
    activation: int,
    parameter: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward` from grad_primal [B, C, *] and grad_tangents [K, B, C, *], at least one of them.

    For activations 0 to 2, saved is the primal [1, B, C, *] that forward returned, whose sign gives phi'; directions
    and bias are then not read. For the others it is the rows that forward took. With ``a`` the primal and bias::

        dt_k = phi'(a) grad_tangents_k
        da   = phi'(a) grad_primal + phi''(a) sum_k grad_tangents_k t_k

    Returns
    -------
    drows : Tensor [1 + K, B, C, *]
        Of da and dt_k; da alone where there are directions.
    ddirections : Tensor [K, C, *]
        The sum of dt_k over the samples; of shape [0] where directions is None.
    dbias : Tensor [C]
        The sum of da; of shape [0] where bias is None.
    """
    saved = saved.contiguous()
    shared = directions is not None
    if activation < PIECEWISE_LINEAR.value:
        tangents = 0 if grad_tangents is None else grad_tangents.shape[0]
    else:
        tangents = directions.shape[0] if shared else saved.shape[0] - 1
    drows = saved.new_empty(1 if shared else 1 + tangents, *saved.shape[1:])
    ddirections = saved.new_zeros(directions.shape if shared else (0,))
    dbias = saved.new_zeros((0,) if bias is None else bias.shape)
    if drows.numel() == 0:
        return drows, ddirections, dbias
    grad_primal, grad_tangents = (None if t is None else t.contiguous() for t in (grad_primal, grad_tangents))
    if activation < PIECEWISE_LINEAR.value:
        values, shift = None, None
    else:
        values = directions.contiguous() if shared else saved[1:]
        shift = None if bias is None else bias.contiguous()
    samples, size, inner = _sizes(saved)
    act = {"ACTIVATION": activation, "PARAMETER": parameter}

    def run(tile: Tile) -> Tensor:
        # A program that goes through several tiles of samples sums them before it writes: fewer sums for the bias.
        tiles_b, tiles_s = _counts(tile, samples, size)
        tiles_per_part, parts = split(tiles_b, tiles_s, SATURATING_GRID)
        sums = None if bias is None else saved.new_empty(parts, size, dtype=statistics_dtype(saved))
        _backward_kernel[(parts * tiles_s,)](
            grad_primal, grad_tangents, saved, values, shift, drows, sums, samples, size, inner, tangents,
            tiles_per_part, SHARED=shared, **act, **tile,
        )  # fmt: skip
        return dbias if sums is None else sums.view(parts, -1, inner).sum((0, 2)).to(saved.dtype)

    dbias = launch(run, _tiling(samples, size), saved, tangents, samples, size)
    if shared and tangents > 0 and grad_tangents is not None:
        ddirections = _direction_gradients(grad_tangents, saved, shift, samples, size, inner, act)
    return drows, ddirections.view(directions.shape) if shared else ddirections, dbias


def _direction_gradients(
    grad_tangents: Tensor, saved: Tensor, bias: Tensor | None, samples: int, size: int, inner: int, act: dict
) -> Tensor:
    """Sum ``phi' grad_tangents`` [K, B, *] over the samples."""
    tangents = grad_tangents.shape[0]
    block_k = block(tangents, 4)

    def run(tile: Tile) -> Tensor:
        tiles_b, tiles_s = _counts(tile, samples, size)
        columns = tiles_s * triton.cdiv(tangents, block_k)
        tiles_per_part, parts = split(tiles_b, columns, SATURATING_GRID)
        out = saved.new_empty(parts, tangents, size, dtype=saved.dtype if parts == 1 else statistics_dtype(saved))
        _directions_kernel[(parts * columns,)](
            grad_tangents, saved, bias, out, samples, size, inner, tangents, tiles_per_part,
            BLOCK_K=block_k, **act, **tile,
        )  # fmt: skip
        return out[0] if parts == 1 else out.sum(0).to(saved.dtype)

    return launch(run, _tiling(samples, size), saved, tangents, samples, size)


def _sizes(rows: Tensor) -> tuple[int, int, int]:
    """Samples, elements of a sample, and elements of a channel."""
    return rows.shape[1], math.prod(rows.shape[2:]), math.prod(rows.shape[3:])


def _tiling(samples: int, size: int) -> Tiling:
    """Tiles of [BLOCK_B samples, BLOCK_S elements]."""
    elements = span(samples * size)
    block_s = block(size, elements)
    block_b = block(samples, elements // block_s)
    tile = {"BLOCK_B": block_b, "BLOCK_S": block_s, "num_warps": max(block_b * block_s // 256, 1)}
    if block_s < elements:  # whole samples
        return Tiling(tile, "BLOCK_B", 1, block(samples, 2048 // block_s))
    return Tiling(tile, "BLOCK_S", 128, block(size, 2048))


def _counts(tile: Tile, samples: int, size: int) -> tuple[int, int]:
    """Return the tiles along the samples, and along the elements of one."""
    return triton.cdiv(samples, tile["BLOCK_B"]), triton.cdiv(size, tile["BLOCK_S"])


@triton.jit
def _expm1(x):
    """``exp(x) - 1`` without cancellation, of x <= 0 (Kahan): the error of exp cancels in the quotient."""
    u = tl.exp(x)
    quotient = (u - 1.0) * (x / tl.log(tl.where((u == 1.0) | (u == 0.0), 0.5, u)))
    return tl.where(u == 1.0, x, tl.where(u == 0.0, -1.0, quotient))


@triton.jit
def _log1p(x):
    """``log(1 + x)`` of x >= 0, likewise."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _sigmoid(x):
    """The logistic function and its derivative, which does not cancel where the function is nearly 1."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e), e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _phi(x, ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr):
    """Value, first and second derivative of the activation; its callers' compilers drop what they do not use."""
    value = x
    slope = tl.full(x.shape, 1.0, x.dtype)
    curvature = tl.zeros_like(x)
    if ACTIVATION == RELU:
        value = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, slope)
    elif ACTIVATION == LEAKY_RELU:
        value = tl.where(x > 0, x, x * PARAMETER)
        slope = tl.where(x > 0, slope, PARAMETER * slope)
    elif ACTIVATION == ELU:
        negative = tl.where(x > 0, 0.0, x)
        value = tl.where(x > 0, x, PARAMETER * _expm1(negative))
        curvature = tl.where(x > 0, 0.0, PARAMETER * tl.exp(negative))
        slope = tl.where(x > 0, 1.0, curvature)
    elif ACTIVATION == SILU:
        s, ds = _sigmoid(x)
        value = x * s
        slope = s + x * ds
        curvature = ds * (2.0 + x * (1.0 - 2.0 * s))
    elif ACTIVATION == GELU:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        pdf = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        value = x * cdf
        slope = cdf + x * pdf
        curvature = pdf * (2.0 - x * x)
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh(u)) / 2 is the logistic function of 2 u.
        v = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        dv = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        s, ds = _sigmoid(v)
        value = x * s
        slope = s + x * ds * dv
        curvature = ds * (2.0 * dv + x * (1.5957691216057308 * 0.26829 * x + dv * dv * (1.0 - 2.0 * s)))
    elif ACTIVATION == TANH:
        n = _expm1(-2.0 * tl.abs(x))
        magnitude = -n / (2.0 + n)
        value = tl.where(x < 0, -magnitude, magnitude)
        _, ds = _sigmoid(2.0 * x)
        slope = 4.0 * ds
        curvature = -2.0 * value * slope
    elif ACTIVATION == SIGMOID:
        value, slope = _sigmoid(x)
        curvature = slope * (1.0 - 2.0 * value)
    elif ACTIVATION == SOFTPLUS:
        v = x * PARAMETER
        s, ds = _sigmoid(v)
        value = tl.where(v > 20.0, x, (tl.where(v < 0, 0.0, v) + _log1p(tl.exp(-tl.abs(v)))) / PARAMETER)
        slope = tl.where(v > 20.0, 1.0, s)
        curvature = tl.where(v > 20.0, 0.0, PARAMETER * ds)
    return value, slope, curvature


@triton.jit
def _primal(rows, bias, sample, s, samples, size, inner, dtype: tl.constexpr):
    """Where the tile's elements lie, their mask, and the primal and bias there."""
    mask = (sample < samples)[:, None] & (s < size)[None, :]
    at = sample.to(tl.int64)[:, None] * size + s[None, :]
    a = tl.load(rows + at, mask, other=0.0).to(dtype)
    if bias is not None:
        a += tl.load(bias + s // inner, s < size, other=0.0).to(dtype)[None, :]
    return at, mask, a


@triton.jit
def _forward_kernel(
    rows,
    directions,
    bias,
    out,
    samples,
    size,
    inner,
    tangents,
    tangents_per_part,
    ACTIVATION: tl.constexpr,
    PARAMETER: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tiles_s = tiles_along(size, BLOCK_S)
    tiles_b = tiles_along(samples, BLOCK_B)
    s = program % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)
    sample = program // tiles_s % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
    part = (program // tiles_s // tiles_b).to(tl.int32)
    dtype: tl.constexpr = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    at, mask, a = _primal(rows, bias, sample, s, samples, size, inner, dtype)
    value, slope, _ = _phi(a, ACTIVATION, PARAMETER)
    if part == 0:
        tl.store(out + at, value.to(out.dtype.element_ty), mask)
    wide_size = tl.cast(size, tl.int64)
    row = samples * wide_size
    first = part * tangents_per_part
    for k in range(first, tl.minimum(first + tangents_per_part, tangents)):
        if directions is None:
            t = tl.load(rows + (k + 1) * row + at, mask, other=0.0).to(dtype)
        else:
            t = tl.load(directions + k * wide_size + s, s < size, other=0.0).to(dtype)[None, :]
        tl.store(out + (k + 1) * row + at, (slope * t).to(out.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    grad_primal,
    grad_tangents,
    saved,
    values,
    bias,
    drows,
    sums,
    samples,
    size,
    inner,
    tangents,
    tiles_per_part,
    SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARAMETER: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write the gradient of the rows; and the sum of da over one part of the samples, to [parts, size]."""
    program = tl.program_id(0).to(tl.int64)
    tiles_s = tiles_along(size, BLOCK_S)
    s = program % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)
    part = program // tiles_s
    dtype: tl.constexpr = tl.float64 if saved.dtype.element_ty == tl.float64 else tl.float32
    wide_size = tl.cast(size, tl.int64)
    row = samples * wide_size
    total = tl.zeros((BLOCK_B, BLOCK_S), dtype)
    first = part * tiles_per_part
    for tile in range(first, tl.minimum(first + tiles_per_part, tiles_along(samples, BLOCK_B))):
        sample = tile * BLOCK_B + tl.arange(0, BLOCK_B)
        at, mask, a = _primal(saved, bias, sample, s, samples, size, inner, dtype)
        _, slope, curvature = _phi(a, ACTIVATION, PARAMETER)
        products = tl.zeros((BLOCK_B, BLOCK_S), dtype)
        for k in range(tangents):
            g = tl.zeros((BLOCK_B, BLOCK_S), dtype)
            if grad_tangents is not None:
                g = tl.load(grad_tangents + k * row + at, mask, other=0.0).to(dtype)
                if ACTIVATION >= PIECEWISE_LINEAR:
                    if SHARED:
                        at_direction = k * wide_size + s
                        products += g * tl.load(values + at_direction, s < size, other=0.0).to(dtype)[None, :]
                    else:
                        products += g * tl.load(values + k * row + at, mask, other=0.0).to(dtype)
            if not SHARED:
                tl.store(drows + (k + 1) * row + at, (slope * g).to(drows.dtype.element_ty), mask)
        da = curvature * products
        if grad_primal is not None:
            da += slope * tl.load(grad_primal + at, mask, other=0.0).to(dtype)
        tl.store(drows + at, da.to(drows.dtype.element_ty), mask)
        total += tl.where(mask, da, 0.0)
    if sums is not None:
        tl.store(sums + part * size + s, tl.sum(total, 0), s < size)


@triton.jit
def _directions_kernel(
    grad_tangents,
    saved,
    bias,
    out,
    samples,
    size,
    inner,
    tangents,
    tiles_per_part,
    ACTIVATION: tl.constexpr,
    PARAMETER: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sum phi' grad_tangents over one part of the samples, to [parts, K, size]."""
    program = tl.program_id(0).to(tl.int64)
    tiles_s = tiles_along(size, BLOCK_S)
    tiles_k = tl.cdiv(tangents, BLOCK_K)
    s = program % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)
    k = program // tiles_s % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    part = program // tiles_s // tiles_k
    dtype: tl.constexpr = tl.float64 if saved.dtype.element_ty == tl.float64 else tl.float32
    wide_size = tl.cast(size, tl.int64)
    row = samples * wide_size
    total = tl.zeros((BLOCK_K, BLOCK_B, BLOCK_S), dtype)
    first = part * tiles_per_part
    for tile in range(first, tl.minimum(first + tiles_per_part, tiles_along(samples, BLOCK_B))):
        sample = tile * BLOCK_B + tl.arange(0, BLOCK_B)
        at, mask, a = _primal(saved, bias, sample, s, samples, size, inner, dtype)
        _, slope, _ = _phi(a, ACTIVATION, PARAMETER)
        at_tangent = k[:, None, None] * row + at[None, :, :]
        g = tl.load(grad_tangents + at_tangent, (k < tangents)[:, None, None] & mask[None, :, :], other=0.0).to(dtype)
        total += tl.where(mask[None, :, :], slope[None, :, :] * g, 0.0)
    at_out = (part * tangents + k)[:, None] * size + s[None, :]
    mask = (k < tangents)[:, None] & (s < size)[None, :]
    tl.store(out + at_out, tl.sum(total, 1).to(out.dtype.element_ty), mask)
