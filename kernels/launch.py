"""How finely work is cut, and which tile a kernel is launched with.

Every launcher computes its tile by heuristics, and that tile is what it runs: nobody's first step waits for a search.
``FASTDIS_AUTOTUNE=1`` asks for one. Then the first call in each bucket of shapes times the heuristics' tile and its few
neighbours, and later calls take the fastest.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fastdis.kernels import on_device

Result = TypeVar("Result")
Tile = dict[str, int]  # blocks, as the kernels name them, and num_warps

# Programs that keep every SM of a large GPU busy, and programs with enough loads in flight to saturate its memory.
FULL_GRID = 256
SATURATING_GRID = 1024

tuning = os.environ.get("FASTDIS_AUTOTUNE") == "1"

# What tuning looks at, as doublings of the heuristics' block and warps: their choice, programs of another size with as
# much and with other work for a thread, and as much work for more and fewer warps.
_NEIGHBOURS = ((0, 0), (1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))

_fastest: dict[tuple, tuple[int, int]] = {}


class Tiling(NamedTuple):
    """A tile that heuristics chose, and what tuning may make of it: the block to vary, within [least, most]."""

    tile: Tile
    vary: str
    least: int
    most: int
    most_warps: int = 16


def block(size: int, most: int, least: int = 1) -> int:
    """Return the side of a tile over ``size`` elements: a power of two that covers them, within [least, most]."""
    return min(max(triton.next_power_of_2(size), least), most)


def span(elements: int) -> int:
    """Return the elements of a tile: a small tensor is cut finer, so that it still reaches every SM."""
    return 1024 if elements >= 1024 * FULL_GRID else 256


def split(tiles: int, programs: int, wanted: int = FULL_GRID) -> tuple[int, int]:
    """Divide a loop over ``tiles`` so that ``programs`` become ``wanted``; return (tiles per part, parts)."""
    per_part = triton.cdiv(tiles, max(wanted // programs, 1))
    return per_part, triton.cdiv(tiles, per_part)


@triton.jit
def tiles_along(size, BLOCK: tl.constexpr):
    """Count the tiles along ``size``, in 64 bits: next to 2^31, tl.cdiv of a 32-bit size overflows."""
    return tl.cdiv(tl.cast(size, tl.int64), BLOCK)


def launch(run: Callable[[Tile], Result], tiling: Tiling, like: Tensor, *sizes: int) -> Result:
    """Call ``run(tile)`` on the GPU of ``like``: with the heuristics' tile or, under tuning, the fastest near it.

    Parameters
    ----------
    run
        Launches the kernels with a tile and returns what they fill. Tuning calls it repeatedly.
    tiling
        The choice of the heuristics, and its limits.
    like
        Tells the device and the dtype.
    *sizes
        What the time depends on. One search serves all sizes that the same powers of two cover.
    """
    with on_device(like):
        if not tuning:
            return run(tiling.tile)
        tiles = dict(neighbours(tiling))
        key = (run.__module__, run.__qualname__, like.device, like.dtype, *map(triton.next_power_of_2, sizes))
        # Nothing can be timed while a CUDA graph is being recorded.
        if key not in _fastest and not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
            _fastest[key] = min(tiles, key=lambda shift: milliseconds(run, tiles[shift], like))
        return run(tiles.get(_fastest.get(key, (0, 0)), tiling.tile))


def neighbours(tiling: Tiling) -> Iterator[tuple[tuple[int, int], Tile]]:
    """Yield the tiles that tuning looks at, the heuristics' own first, by their doublings of block and warps."""
    for shift in _NEIGHBOURS:
        size, warps = _doubled(tiling.tile[tiling.vary], shift[0]), _doubled(tiling.tile["num_warps"], shift[1])
        if shift == (0, 0) or (tiling.least <= size <= tiling.most and 1 <= warps <= tiling.most_warps):
            yield shift, {**tiling.tile, tiling.vary: size, "num_warps": warps}


def milliseconds(run: Callable[[Tile], object], tile: Tile, like: Tensor) -> float:
    """Time one tile; infinity where the GPU has too little shared memory or too few registers for it."""
    try:
        if like.is_cuda:
            return triton.testing.do_bench(lambda: run(tile), warmup=5, rep=20, return_mode="median")
        start = time.perf_counter()
        run(tile)
        return 1e3 * (time.perf_counter() - start)
    except OutOfResources:
        return math.inf


def _doubled(value: int, times: int) -> int:
    return value << times if times >= 0 else value >> -times
