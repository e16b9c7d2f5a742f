"""Style modulation in Triton: ``y = act(gamma * x_hat + beta)``, gamma = weight * scale, beta = bias * scale + shift.

Three ways through memory, in one vocabulary: a *row* is one (sample, channel) pair of ``size`` pixels, a group is
``width`` adjacent rows.

* ``groups == 0``: one elementwise pass.
* A group fits in one program's registers: that program reads x once and writes y once (backward: x, dy, dx).
* It does not: per-tile partial sums, a merge in a fixed order, then an elementwise pass. No atomics anywhere.

Channels-first tensors are treated as one sample of ``B * C`` channels, so that tiles of small images may span samples;
channels-last tensors keep their samples apart, and their tiles run along channels. The same kernels serve both.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels import on_device, statistics_dtype
from fastdis.kernels.launch import Tile, Tiling, block, launch, span, tiles_along

NONE, RELU, LEAKY_RELU, SILU = (tl.constexpr(code) for code in range(4))


def forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Modulate x and return the statistics that backward needs.

    Parameters
    ----------
    x : Tensor [B, C, *]
        Contiguous or channels-last; anything else is copied.
    scale, shift : Tensor [B, C]
        In the statistics dtype (float64 for float64 x, else float32).
    weight, bias : Tensor [C] or None
        In the statistics dtype.
    groups : int
        0 for no normalisation, else a divisor of C.
    eps : float
        Added to the biased variance.
    activation : int
        0 none, 1 relu, 2 leaky_relu, 3 silu.
    negative_slope : float
        Of leaky_relu.

    Returns
    -------
    y : Tensor [B, C, *]
        In x's dtype and layout.
    mean, rstd : Tensor [B, groups]
        In the statistics dtype.
    """
    x, channels_last = _to_layout(x)
    layout = _Layout(x, groups, channels_last)
    y = _empty_like(x, channels_last)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=statistics_dtype(x)) for _ in range(2))
    if x.numel() == 0:
        return y, mean.fill_(math.nan), rstd.fill_(math.nan)
    scale, shift, weight, bias = _contiguous(scale, shift, weight, bias)
    affine = (scale, shift, weight, bias)
    act = {"ACTIVATION": activation, "SLOPE": negative_slope}

    def plain(tile: Tile) -> None:
        grid, _ = layout.grid(tile)
        _apply_kernel[grid](x, y, None, None, *affine, *layout.sizes, **act, **tile)

    def resident(tile: Tile) -> None:
        grid = layout.resident_grid(tile)
        _resident_forward_kernel[grid](x, y, mean, rstd, *affine, *layout.group_sizes, EPS=eps, **act, **tile)

    def divided(tile: Tile) -> None:
        grid, splits = layout.grid(tile)
        means, m2s = torch.empty((2, layout.rows, splits), dtype=mean.dtype, device=x.device)
        _partial_moments_kernel[grid](x, means, m2s, *layout.sizes, **tile)
        _merge_moments_kernel[(mean.numel(),)](
            means, m2s, mean, rstd, layout.width * splits, splits, layout.size, layout.width * layout.size,
            EPS=eps, BLOCK_S=tile["BLOCK_S"], BLOCK=1024,
        )  # fmt: skip
        _apply_kernel[grid](x, y, mean, rstd, *affine, *layout.sizes, **act, **tile)

    whole = layout.resident_tiling() if groups > 0 else None
    if groups == 0:
        launch(plain, layout.tiling(), x, *layout.sizes)
    elif whole is not None:
        launch(resident, whole, x, *layout.sizes)
    else:
        launch(divided, layout.tiling(), x, *layout.sizes)
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    activation: int,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward` from dy [B, C, *] and what forward took and returned.

    With ``dt = act'(t) * dy`` and, per row, ``dgamma = sum dt * x_hat`` and ``dbeta = sum dt``::

        dx     = gamma * dt                                                             groups == 0
        dx     = rstd * (gamma * dt - mean_g(gamma * dt) - x_hat * mean_g(gamma * dt * x_hat))
        dscale = dgamma * weight + dbeta * bias        dshift = dbeta
        dweight = sum_b dgamma * scale                 dbias  = sum_b dbeta * scale

    Returns
    -------
    dx : Tensor [B, C, *]
        In x's dtype and layout.
    dscale, dshift : Tensor [B, C]
        In the statistics dtype.
    dweight, dbias : Tensor [C]
        In the statistics dtype, of shape [0] where weight or bias is None.
    """
    x, channels_last = _to_layout(x)
    dy = dy.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else dy.contiguous()
    layout = _Layout(x, groups, channels_last)
    dx = _empty_like(x, channels_last)
    dweight, dbias = (scale.new_zeros(0 if v is None else v.shape[0]) for v in (weight, bias))
    if x.numel() == 0:
        return dx, torch.zeros_like(scale), torch.zeros_like(scale), dweight, dbias
    scale, shift, weight, bias, mean, rstd = _contiguous(scale, shift, weight, bias, mean, rstd)
    affine = (scale, shift, weight, bias)
    act = {"ACTIVATION": activation, "SLOPE": negative_slope}
    dgamma, dbeta = torch.empty_like(scale), torch.empty_like(scale)

    def resident(tile: Tile) -> None:
        grid = layout.resident_grid(tile)
        _resident_backward_kernel[grid](
            dy, x, dx, mean, rstd, *affine, dgamma, dbeta, *layout.group_sizes, **act, **tile
        )

    def divided(tile: Tile) -> None:
        grid, splits = layout.grid(tile)
        stats = (mean, rstd) if groups > 0 else (None, None)
        partials = (dgamma, dbeta)
        if splits > 1:
            partials = torch.empty((2, layout.rows, splits), dtype=scale.dtype, device=x.device)
        # Without normalisation dx needs no group means, and the pass that sums also writes it.
        _partial_gradients_kernel[grid](
            dy, x, None if groups > 0 else dx, *stats, *affine, *partials, *layout.sizes, **act, **tile
        )
        means = (None, None)
        if groups > 0:
            means = torch.empty((2, *mean.shape), dtype=mean.dtype, device=x.device)
        if splits > 1 or groups > 0:
            rows = layout.width if groups > 0 else 32
            _merge_gradients_kernel[(triton.cdiv(layout.rows, rows),)](
                *partials, dgamma, dbeta, *means, scale, weight, layout.rows, rows, splits, layout.period,
                layout.width * layout.size, BLOCK_R=32, BLOCK_K=block(splits, 128 // scale.element_size()),
            )  # fmt: skip
        if groups > 0:
            _input_gradient_kernel[grid](dy, x, dx, *stats, *means, *affine, *layout.sizes, **act, **tile)

    whole = layout.resident_tiling() if groups > 0 else None
    if whole is not None:
        launch(resident, whole, x, *layout.sizes)
    else:
        launch(divided, layout.tiling(), x, *layout.sizes)
    if weight is None and bias is None:
        return dx, dgamma, dbeta, dweight, dbias
    dscale = torch.empty_like(scale)
    samples, channels = scale.shape
    with on_device(x):
        _parameter_gradients_kernel[(triton.cdiv(channels, 32),)](
            dgamma, dbeta, scale, weight, bias, dscale, dweight, dbias, samples, channels,
            BLOCK_B=block(samples, 64), BLOCK_C=32,
        )  # fmt: skip
    return dx, dscale, dbeta, dweight, dbias


# ---------------------------------------------------------------------------------------------------------------------
# Layouts and tiles


# Bytes of float32 (float64) accumulators that a program keeps in registers: 64 KB for x, as much again for dy in
# backward, and half of it where channels-last tiles need more registers for their addresses. More than that spills.
RESIDENT = 64 * 1024


def _to_layout(x: Tensor) -> tuple[Tensor, bool]:
    """Return x, copied only where it is neither contiguous nor channels-last, and whether it is channels-last."""
    if x.is_contiguous():
        return x, False
    if x.movedim(1, -1).is_contiguous():
        return x, True
    return x.contiguous(), False


def _empty_like(x: Tensor, channels_last: bool) -> Tensor:
    if channels_last:
        return x.new_empty(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return x.new_empty(x.shape)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


class _Layout:
    """Sizes and tilings of x [B, C, *] as the kernels see it: ``samples`` of ``channels`` rows of ``size`` pixels."""

    def __init__(self, x: Tensor, groups: int, channels_last: bool):
        self.period = x.shape[1]
        self.rows = x.shape[0] * x.shape[1]
        self.size = math.prod(x.shape[2:])
        self.width = self.period // groups if groups > 0 else 1
        self.samples, self.channels = (x.shape[0], self.period) if channels_last else (1, self.rows)
        self.channels_last = channels_last
        self.itemsize = x.element_size()

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.channels, self.size, self.period, self.width

    @property
    def group_sizes(self) -> tuple[int, int, int, int]:
        return self.channels // self.width, self.width, self.size, self.period

    def tiling(self) -> Tiling:
        """Tile of [BLOCK_C, BLOCK_S] elements for the elementwise kernels."""
        # A small tensor is cut finer, so that it still reaches every SM.
        budget = 4 * span(self.rows * self.size)
        if self.channels_last:
            block_c = block(self.channels, 64)
            block_s = block(self.size, budget // block_c)
        else:
            block_s = block(self.size, 1024)
            block_c = block(self.channels, budget // block_s)
        warps = max(block_c * block_s // 512, 1)
        tile = {"CHANNELS_LAST": self.channels_last, "BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": warps}
        if self.channels_last:
            return Tiling(tile, "BLOCK_S", 1, block(self.size, 8192 // block_c))
        return Tiling(tile, "BLOCK_C", 1, block(self.channels, 8192 // block_s))

    def grid(self, tile: Tile) -> tuple[tuple[int], int]:
        """Return the grid of such tiles, and how many stand along a row."""
        splits = triton.cdiv(self.size, tile["BLOCK_S"])
        return (self.samples * triton.cdiv(self.channels, tile["BLOCK_C"]) * splits,), splits

    def resident_tiling(self) -> Tiling | None:
        """Tile of [BLOCK_G groups, BLOCK_C, BLOCK_S] that holds whole groups; None where none fits.

        One SM works through a full tile in about the time of the two launches that splitting it would add, so a grid
        too small to fill the chip is no reason to split what fits.
        """
        groups = self.channels // self.width
        block_c, block_s = triton.next_power_of_2(self.width), triton.next_power_of_2(self.size)
        capacity = RESIDENT // max(self.itemsize, 4) // (2 if self.channels_last else 1)
        elements = block_c * block_s
        block_g = max(2048 // elements, 1)
        if self.channels_last:
            # Neighbouring channels share a 32-byte sector: take half of it at least, or L2 reads it over and over.
            block_g = max(block_g, 16 // self.itemsize // block_c)
        block_g = min(block_g, triton.next_power_of_2(groups))
        addressable = not self.channels_last or self.channels * self.size < 2**31
        if block_g * elements > capacity or not addressable:
            return None
        most_warps = 32 if self.channels_last else 16
        warps = min(max(block_g * elements // 256, 1), most_warps)
        blocks = {"BLOCK_G": block_g, "BLOCK_C": block_c, "BLOCK_S": block_s}
        tile = {"CHANNELS_LAST": self.channels_last, **blocks, "num_warps": warps}
        return Tiling(tile, "BLOCK_G", 1, block(groups, capacity // elements), most_warps)

    def resident_grid(self, tile: Tile) -> tuple[int]:
        return (self.samples * triton.cdiv(self.channels // self.width, tile["BLOCK_G"]),)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces shared by the kernels


@triton.jit
def _tile(
    channels,
    size,
    period,
    width,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Locate this program's tile.

    Returns its rows [BLOCK_C], their groups, channels and mask, the offsets [BLOCK_C, BLOCK_S] of its elements and
    their mask, and the tile's place along the row.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles_c = tiles_along(channels, BLOCK_C)
    tiles_s = tiles_along(size, BLOCK_S)
    # Neighbouring programs read neighbouring memory.
    if CHANNELS_LAST:
        tile_s = program // tiles_c % tiles_s
        tile_c = program % tiles_c
    else:
        tile_s = program % tiles_s
        tile_c = program // tiles_s % tiles_c
    sample = program // tiles_c // tiles_s
    # 64-bit divisions are slow: divide the scalar, and 32-bit what a vector adds to it.
    i = tl.arange(0, BLOCK_C)
    first = tile_c * BLOCK_C
    first_row = sample * channels + first
    row = first_row + i
    group = first_row // width + ((first_row % width).to(tl.int32) + i) // width
    channel = ((first_row % period).to(tl.int32) + i) % period
    s = tile_s * BLOCK_S + tl.arange(0, BLOCK_S)
    if CHANNELS_LAST:
        offset = (sample * size + s)[None, :] * channels + (first + i)[:, None]
    else:
        offset = row[:, None] * size + s[None, :]
    row_mask = first + i < channels
    return row, group, channel, row_mask, offset, row_mask[:, None] & (s < size)[None, :], tile_s


@triton.jit
def _group_tile(
    groups,
    width,
    size,
    period,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Locate this program's groups.

    Returns the groups [BLOCK_G] and their mask, their rows [BLOCK_G, BLOCK_C] with channels and mask, and where their
    elements [BLOCK_G, BLOCK_C, BLOCK_S] lie, as ``base + local`` with a mask: only the scalar is 64 bits wide, which
    leaves the registers to the elements.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles = tiles_along(groups, BLOCK_G)
    sample = program // tiles
    first = program % tiles * BLOCK_G
    i = tl.arange(0, BLOCK_G)
    j = tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    group = sample * groups + first + i
    c = i[:, None] * width + j[None, :]
    first_row = (sample * groups + first) * width
    channel = ((first_row % period).to(tl.int32) + c) % period
    if CHANNELS_LAST:
        base = sample * groups * width * size + first * width
        local = c[:, :, None] + s[None, None, :] * (groups * width)
    else:
        base = first_row * size
        local = c[:, :, None] * size + s[None, None, :]
    group_mask = first + i < groups
    row_mask = group_mask[:, None] & (j < width)[None, :]
    mask = row_mask[:, :, None] & (s < size)[None, None, :]
    return group, group_mask, first_row + c, channel, row_mask, base, local, mask


@triton.jit
def _affine(scale, shift, weight, bias, row, channel, mask):
    """Fold ``(x_hat * weight + bias) * scale + shift`` into gamma and beta, per row."""
    gamma = tl.load(scale + row, mask, other=0.0)
    beta = tl.load(shift + row, mask, other=0.0)
    if bias is not None:
        beta += gamma * tl.load(bias + channel, mask, other=0.0)
    if weight is not None:
        gamma *= tl.load(weight + channel, mask, other=0.0)
    return gamma, beta


@triton.jit
def _activate(t, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    if ACTIVATION == RELU:
        t = tl.where(t <= 0, 0.0, t)
    elif ACTIVATION == LEAKY_RELU:
        t = tl.where(t > 0, t, t * SLOPE)
    elif ACTIVATION == SILU:
        t = t / (1.0 + tl.exp(-t))
    return t


@triton.jit
def _activate_backward(t, dy, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    if ACTIVATION == RELU:
        dy = tl.where(t <= 0, 0.0, dy)
    elif ACTIVATION == LEAKY_RELU:
        dy = tl.where(t > 0, dy, dy * SLOPE)
    elif ACTIVATION == SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-t))
        dy = dy * sigmoid * (1.0 + t * (1.0 - sigmoid))
    return dy


@triton.jit
def _normalize(x, mean, rstd, group, row_mask):
    """Return x_hat of a [rows, pixels] tile, and its rstd."""
    r = tl.load(rstd + group, row_mask, other=0.0)[:, None]
    return (x - tl.load(mean + group, row_mask, other=0.0)[:, None]) * r, r


# ---------------------------------------------------------------------------------------------------------------------
# A whole group per program


@triton.jit
def _resident_forward_kernel(
    x,
    y,
    mean,
    rstd,
    scale,
    shift,
    weight,
    bias,
    groups,
    width,
    size,
    period,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    group, group_mask, row, channel, row_mask, base, local, mask = _group_tile(
        groups, width, size, period, CHANNELS_LAST, BLOCK_G, BLOCK_C, BLOCK_S
    )
    v = tl.load(x + base + local, mask, other=0.0).to(scale.dtype.element_ty)
    m = tl.sum(tl.sum(v, 2), 1) / (width * size)
    centred = tl.where(mask, v - m[:, None, None], 0.0)
    r = tl.rsqrt(tl.sum(tl.sum(centred * centred, 2), 1) / (width * size) + EPS)
    tl.store(mean + group, m, group_mask)
    tl.store(rstd + group, r, group_mask)
    gamma, beta = _affine(scale, shift, weight, bias, row, channel, row_mask)
    t = gamma[:, :, None] * (centred * r[:, None, None]) + beta[:, :, None]
    tl.store(y + base + local, _activate(t, ACTIVATION, SLOPE).to(y.dtype.element_ty), mask)


@triton.jit
def _resident_backward_kernel(
    dy,
    x,
    dx,
    mean,
    rstd,
    scale,
    shift,
    weight,
    bias,
    dgamma,
    dbeta,
    groups,
    width,
    size,
    period,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    group, group_mask, row, channel, row_mask, base, local, mask = _group_tile(
        groups, width, size, period, CHANNELS_LAST, BLOCK_G, BLOCK_C, BLOCK_S
    )
    v = tl.load(x + base + local, mask, other=0.0).to(scale.dtype.element_ty)
    dt = tl.load(dy + base + local, mask, other=0.0).to(scale.dtype.element_ty)
    m = tl.load(mean + group, group_mask, other=0.0)
    r = tl.load(rstd + group, group_mask, other=0.0)
    gamma, beta = _affine(scale, shift, weight, bias, row, channel, row_mask)
    x_hat = (v - m[:, None, None]) * r[:, None, None]
    dt = _activate_backward(gamma[:, :, None] * x_hat + beta[:, :, None], dt, ACTIVATION, SLOPE)
    dt = tl.where(mask, dt, 0.0)
    row_dgamma = tl.sum(dt * x_hat, 2)
    row_dbeta = tl.sum(dt, 2)
    tl.store(dgamma + row, row_dgamma, row_mask)
    tl.store(dbeta + row, row_dbeta, row_mask)
    mean_dgamma = tl.sum(gamma * row_dgamma, 1) / (width * size)
    mean_dbeta = tl.sum(gamma * row_dbeta, 1) / (width * size)
    d = gamma[:, :, None] * dt - mean_dbeta[:, None, None] - x_hat * mean_dgamma[:, None, None]
    tl.store(dx + base + local, (r[:, None, None] * d).to(dx.dtype.element_ty), mask)


# ---------------------------------------------------------------------------------------------------------------------
# A group over several programs


@triton.jit
def _partial_moments_kernel(
    x,
    partial_mean,
    partial_m2,
    channels,
    size,
    period,
    width,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Mean and sum of squared deviations of each row of the tile, to [rows, tiles per row]."""
    row, _, _, row_mask, offset, mask, tile_s = _tile(channels, size, period, width, CHANNELS_LAST, BLOCK_C, BLOCK_S)
    v = tl.load(x + offset, mask, other=0.0).to(partial_mean.dtype.element_ty)
    m = tl.sum(v, 1) / tl.minimum(size - tile_s * BLOCK_S, BLOCK_S)
    centred = tl.where(mask, v - m[:, None], 0.0)
    partial = row * tiles_along(size, BLOCK_S) + tile_s
    tl.store(partial_mean + partial, m, row_mask)
    tl.store(partial_m2 + partial, tl.sum(centred * centred, 1), row_mask)


@triton.jit
def _merge_moments_kernel(
    partial_mean,
    partial_m2,
    mean,
    rstd,
    partials,
    splits,
    size,
    count,
    EPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge a group's partial moments (Chan et al., 1979): M2 = sum_i M2_i + n_i (mean_i - mean)^2."""
    group = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), mean.dtype.element_ty)
    for start in range(0, partials, BLOCK):
        i = start + index
        n = tl.minimum(size - i % splits * BLOCK_S, BLOCK_S)
        total += n * tl.load(partial_mean + group * partials + i, i < partials, other=0.0)
    m = tl.sum(total, 0) / count
    m2 = tl.zeros((BLOCK,), mean.dtype.element_ty)
    for start in range(0, partials, BLOCK):
        i = start + index
        n = tl.minimum(size - i % splits * BLOCK_S, BLOCK_S)
        deviation = tl.load(partial_mean + group * partials + i, i < partials, other=0.0) - m
        m2 += tl.load(partial_m2 + group * partials + i, i < partials, other=0.0)
        m2 += tl.where(i < partials, n * deviation * deviation, 0.0)
    tl.store(mean + group, m)
    tl.store(rstd + group, tl.rsqrt(tl.sum(m2, 0) / count + EPS))


@triton.jit
def _apply_kernel(
    x,
    y,
    mean,
    rstd,
    scale,
    shift,
    weight,
    bias,
    channels,
    size,
    period,
    width,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row, group, channel, row_mask, offset, mask, _ = _tile(
        channels, size, period, width, CHANNELS_LAST, BLOCK_C, BLOCK_S
    )
    x_hat = tl.load(x + offset, mask, other=0.0).to(scale.dtype.element_ty)
    if mean is not None:
        x_hat, _ = _normalize(x_hat, mean, rstd, group, row_mask)
    gamma, beta = _affine(scale, shift, weight, bias, row, channel, row_mask)
    t = gamma[:, None] * x_hat + beta[:, None]
    tl.store(y + offset, _activate(t, ACTIVATION, SLOPE).to(y.dtype.element_ty), mask)


@triton.jit
def _partial_gradients_kernel(
    dy,
    x,
    dx,
    mean,
    rstd,
    scale,
    shift,
    weight,
    bias,
    partial_dgamma,
    partial_dbeta,
    channels,
    size,
    period,
    width,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sum dt * x_hat and dt over each row of the tile, to [rows, tiles per row]; without statistics, also dx."""
    row, group, channel, row_mask, offset, mask, tile_s = _tile(
        channels, size, period, width, CHANNELS_LAST, BLOCK_C, BLOCK_S
    )
    x_hat = tl.load(x + offset, mask, other=0.0).to(scale.dtype.element_ty)
    dt = tl.load(dy + offset, mask, other=0.0).to(scale.dtype.element_ty)
    if mean is not None:
        x_hat, _ = _normalize(x_hat, mean, rstd, group, row_mask)
    gamma, beta = _affine(scale, shift, weight, bias, row, channel, row_mask)
    dt = _activate_backward(gamma[:, None] * x_hat + beta[:, None], dt, ACTIVATION, SLOPE)
    dt = tl.where(mask, dt, 0.0)
    partial = row * tiles_along(size, BLOCK_S) + tile_s
    tl.store(partial_dgamma + partial, tl.sum(dt * x_hat, 1), row_mask)
    tl.store(partial_dbeta + partial, tl.sum(dt, 1), row_mask)
    if dx is not None:
        tl.store(dx + offset, (gamma[:, None] * dt).to(dx.dtype.element_ty), mask)


@triton.jit
def _merge_gradients_kernel(
    partial_dgamma,
    partial_dbeta,
    dgamma,
    dbeta,
    mean_dgamma,
    mean_dbeta,
    scale,
    weight,
    rows,
    span,
    splits,
    period,
    count,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum the partials of ``span`` rows; where those are a group, also average gamma * dt * x_hat and gamma * dt."""
    program = tl.program_id(0).to(tl.int64)
    group_dgamma = tl.zeros((BLOCK_R,), dgamma.dtype.element_ty)
    group_dbeta = tl.zeros((BLOCK_R,), dgamma.dtype.element_ty)
    for start in range(0, span, BLOCK_R):
        j = start + tl.arange(0, BLOCK_R)
        row = program * span + j
        row_mask = (j < span) & (row < rows)
        total_dgamma = tl.zeros((BLOCK_R, BLOCK_K), dgamma.dtype.element_ty)
        total_dbeta = tl.zeros((BLOCK_R, BLOCK_K), dgamma.dtype.element_ty)
        for first in range(0, splits, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            mask = row_mask[:, None] & (k < splits)[None, :]
            partial = row[:, None] * splits + k[None, :]
            total_dgamma += tl.load(partial_dgamma + partial, mask, other=0.0)
            total_dbeta += tl.load(partial_dbeta + partial, mask, other=0.0)
        row_dgamma = tl.sum(total_dgamma, 1)
        row_dbeta = tl.sum(total_dbeta, 1)
        tl.store(dgamma + row, row_dgamma, row_mask)
        tl.store(dbeta + row, row_dbeta, row_mask)
        if mean_dgamma is not None:
            gamma = tl.load(scale + row, row_mask, other=0.0)
            if weight is not None:
                gamma *= tl.load(weight + row % period, row_mask, other=0.0)
            group_dgamma += gamma * row_dgamma
            group_dbeta += gamma * row_dbeta
    if mean_dgamma is not None:
        tl.store(mean_dgamma + program, tl.sum(group_dgamma, 0) / count)
        tl.store(mean_dbeta + program, tl.sum(group_dbeta, 0) / count)


@triton.jit
def _input_gradient_kernel(
    dy,
    x,
    dx,
    mean,
    rstd,
    mean_dgamma,
    mean_dbeta,
    scale,
    shift,
    weight,
    bias,
    channels,
    size,
    period,
    width,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row, group, channel, row_mask, offset, mask, _ = _tile(
        channels, size, period, width, CHANNELS_LAST, BLOCK_C, BLOCK_S
    )
    v = tl.load(x + offset, mask, other=0.0).to(scale.dtype.element_ty)
    dt = tl.load(dy + offset, mask, other=0.0).to(scale.dtype.element_ty)
    x_hat, r = _normalize(v, mean, rstd, group, row_mask)
    gamma, beta = _affine(scale, shift, weight, bias, row, channel, row_mask)
    dt = _activate_backward(gamma[:, None] * x_hat + beta[:, None], dt, ACTIVATION, SLOPE)
    d = gamma[:, None] * dt - tl.load(mean_dbeta + group, row_mask, other=0.0)[:, None]
    d -= x_hat * tl.load(mean_dgamma + group, row_mask, other=0.0)[:, None]
    tl.store(dx + offset, (r * d).to(dx.dtype.element_ty), mask)


@triton.jit
def _parameter_gradients_kernel(
    dgamma,
    dbeta,
    scale,
    weight,
    bias,
    dscale,
    dweight,
    dbias,
    samples,
    channels,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From dgamma, dbeta [B, C]: dscale [B, C], and dweight, dbias [C] summed over the samples in order."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    total_dweight = tl.zeros((BLOCK_B, BLOCK_C), scale.dtype.element_ty)
    total_dbias = tl.zeros((BLOCK_B, BLOCK_C), scale.dtype.element_ty)
    for start in range(0, samples, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = (b < samples)[:, None] & c_mask[None, :]
        offset = b[:, None] * channels + c[None, :]
        dg = tl.load(dgamma + offset, mask, other=0.0)
        db = tl.load(dbeta + offset, mask, other=0.0)
        style = tl.load(scale + offset, mask, other=0.0)
        d = dg
        if weight is not None:
            d = dg * tl.load(weight + c, c_mask, other=0.0)[None, :]
            total_dweight += dg * style
        if bias is not None:
            d += db * tl.load(bias + c, c_mask, other=0.0)[None, :]
            total_dbias += db * style
        tl.store(dscale + offset, d, mask)
    if weight is not None:
        tl.store(dweight + c, tl.sum(total_dweight, 0), c_mask)
    if bias is not None:
        tl.store(dbias + c, tl.sum(total_dbias, 0), c_mask)
