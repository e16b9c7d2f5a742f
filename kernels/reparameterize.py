"""Draws from a diagonal Gaussian posterior in Triton; both passes make the noise in registers and never store it."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels import statistics_dtype
from fastdis.kernels.gaussians import exp
from fastdis.kernels.launch import Tile, Tiling, block, launch, span, tiles_along

_TURN = tl.constexpr(2 * math.pi)


def forward(mean: Tensor, logvar: Tensor, seed: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Compute ``mean + exp(logvar / 2) * noise``.

    Parameters
    ----------
    mean, logvar : Tensor of one shape
    seed : Tensor [S] of int64
        The elements, in order, are cut into S runs of one length, one for each seed: see
        ``fastdis.reference.reparameterize`` for the noise that a seed stands for.
    keep : bool
        Of the CPU kernels; noise is never kept here.

    Returns
    -------
    Tensor
        Like mean.
    kept : Tensor [0]
    """
    return _draw(mean, logvar, seed, backward=False), mean.new_empty((0,), dtype=statistics_dtype(mean))


def backward(grad: Tensor, logvar: Tensor, seed: Tensor, kept: Tensor) -> Tensor:
    """Gradient of :func:`forward` in logvar, ``grad * noise * exp(logvar / 2) / 2``; that in mean is grad itself."""
    return _draw(grad, logvar, seed, backward=True)


def _draw(x: Tensor, logvar: Tensor, seed: Tensor, backward: bool) -> Tensor:
    x, logvar, seed = x.contiguous(), logvar.contiguous(), seed.contiguous()
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    length = out.numel() // seed.numel()
    quads = triton.cdiv(length, 4)

    def run(tile: Tile) -> None:
        programs = (seed.numel() * triton.cdiv(quads, tile["BLOCK"]),)
        _draw_kernel[programs](x, logvar, seed, out, length, BACKWARD=backward, **tile)

    size = block(quads, span(out.numel()) // 4)
    tiling = Tiling({"BLOCK": size, "num_warps": max(size // 64, 1)}, "BLOCK", 16, block(quads, 1024))
    launch(run, tiling, x, seed.numel(), length)
    return out


@triton.jit
def _draw_kernel(x, logvar, seed, out, run, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """From x, which is the mean, or in backward the grad. One counter of Philox serves four neighbours."""
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    tiles = tiles_along(run, 4 * BLOCK)
    first = program % tiles * BLOCK
    i = first * 4 + tl.arange(0, 4 * BLOCK)
    at = program // tiles * run + i
    value = tl.load(x + at, i < run, other=0.0).to(dtype)
    deviation = exp(0.5 * tl.load(logvar + at, i < run, other=0.0).to(dtype))
    noise = _standard_normal(tl.load(seed + program // tiles), first + tl.arange(0, BLOCK), dtype)
    if BACKWARD:
        value *= 0.5 * (noise * deviation)
    else:
        value += deviation * noise
    tl.store(out + at, value.to(out.dtype.element_ty), i < run)


@triton.jit
def _standard_normal(seed, counter, dtype):
    """Noise of the elements ``4 counter`` to ``4 counter + 3``, in order: [4 * BLOCK]."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, tl.zeros_like(low), tl.zeros_like(low))
    even, odd = _box_muller(a, b, dtype)
    next_even, next_odd = _box_muller(c, d, dtype)
    return tl.interleave(tl.interleave(even, next_even), tl.interleave(odd, next_odd))


@triton.jit
def _box_muller(first, second, dtype):
    """Two normal numbers out of two words: radius times the cosine and the sine of the angle."""
    radius = tl.sqrt(-2.0 * _log_uniform(first, dtype))
    cosine, sine = _cosine_sine(second, dtype)
    return radius * cosine, radius * sine


@triton.jit
def _log_uniform(word, dtype):
    """``log u`` of ``u = (word + 1/2) / 2^32``, to the last digits also next to 1, where float32 knows no such u.

    There it is log(1 - t) of the distance t to 1, as ``log(w) t / (1 - w)`` with w the rounded 1 - t (Kahan).
    """
    lower = word < 0x80000000
    t = (tl.minimum(word, 0xFFFFFFFF - word).to(dtype) + 0.5) * 2.0**-32
    w = tl.where(lower, t, 1.0 - t)
    log = tl.log(w)
    return tl.where(lower, log, tl.where(w == 1.0, -t, log * (t / (1.0 - w))))


@triton.jit
def _cosine_sine(word, dtype):
    """Cosine and sine of ``2 pi word / 2^32``.

    The nearest quarter turn is taken off the integer, exactly; the rest, within pi/4 of zero, goes through Taylor's
    series: cos = 1 - s/(1 2) (1 - s/(3 4) (1 - ...)), sin = t (1 - s/(2 3) (1 - s/(4 5) (1 - ...))), s = t^2.
    """
    quarter = (word + 0x20000000) >> 30
    t = (word - (quarter << 30)).to(tl.int32, bitcast=True).to(dtype) * (_TURN * 2.0**-32)
    s = t * t
    cosine = tl.full(t.shape, 1.0, dtype)
    sine = tl.full(t.shape, 1.0, dtype)
    terms: tl.constexpr = 8 if dtype == tl.float64 else 5
    for k in tl.static_range(terms, 0, -1):
        cosine = 1.0 - s * (1.0 / (2 * k * (2 * k - 1))) * cosine
        sine = 1.0 - s * (1.0 / (2 * k * (2 * k + 1))) * sine
    sine *= t
    swap = (quarter & 1) == 1
    x = tl.where(swap, sine, cosine)
    y = tl.where(swap, cosine, sine)
    return tl.where(((quarter + 1) & 2) == 2, -x, x), tl.where((quarter & 2) == 2, -y, y)
