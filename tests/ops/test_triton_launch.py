"""Which tiles the Triton kernels are launched with: the heuristics' at once, or the fastest near it where asked for.

Launches are recorded instead of run. That every tile gives right results is tested in interpreted.py.
"""

import math

import pytest
import torch
from column_suite import INTERPRETED

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not launched")


@pytest.fixture
def launches(monkeypatch):
    """The block and the warps of every launch."""
    from triton.runtime.jit import JITFunction

    found = []
    monkeypatch.setattr(
        JITFunction, "run", lambda kernel, *_, BLOCK_M, num_warps, **__: found.append((BLOCK_M, num_warps))
    )
    return found


@pytest.fixture
def launch(monkeypatch):
    from fastdis.kernels import launch

    monkeypatch.setattr(launch, "_fastest", {})
    return launch


def call(samples: int, size: int) -> None:
    from fastdis.kernels import sum_gradient_fields

    noise, fields = torch.zeros(samples, size), torch.zeros(samples, 2, size)
    sum_gradient_fields.forward(noise, fields, torch.ones(samples), None)


def test_nothing_is_searched_unless_asked_for(launch, launches, monkeypatch):
    monkeypatch.setattr(launch, "milliseconds", lambda *_: pytest.fail("a step was held up by a search"))
    assert not launch.tuning
    call(4, 1000)
    assert launches == [(256, 1)]


def test_a_search_times_a_few_tiles_once_for_each_bucket_of_shapes(launch, launches, monkeypatch):
    monkeypatch.setattr(launch, "tuning", True)
    times = {(512, 2): 2.0, (128, 1): 1.0}
    monkeypatch.setattr(
        launch, "milliseconds", lambda run, tile, _: run(tile) or times.get((tile["BLOCK_M"], tile["num_warps"]), 9.0)
    )
    call(4, 1000)
    assert launches[0] == (256, 1)
    assert len(set(launches)) == len(launches) - 1 <= 7
    assert launches[-1] == (128, 1)
    launches.clear()
    call(3, 900)  # the same powers of two
    assert launches == [(128, 1)]
    launches.clear()
    call(4, 3000)
    assert len(launches) > 1
    assert launches[-1] == (128, 1)


def test_the_search_itself_runs_every_tile(launch, launches, monkeypatch):
    monkeypatch.setattr(launch, "tuning", True)
    call(4, 1000)
    assert len(set(launches)) == len(launches) - 1 > 3


def test_a_tile_that_the_gpu_cannot_hold_loses(launch):
    from triton.runtime.errors import OutOfResources

    def run(tile):
        raise OutOfResources(1, 0, "shared memory")

    assert launch.milliseconds(run, {}, torch.zeros(1)) == math.inf


def test_neighbours_keep_to_their_limits(launch):
    tiling = launch.Tiling({"BLOCK": 64, "num_warps": 8}, "BLOCK", 64, 128, most_warps=8)
    tiles = [tile for _, tile in launch.neighbours(tiling)]
    assert tiles[0] is not tiling.tile
    assert tiles == [{"BLOCK": 64, "num_warps": 8}, {"BLOCK": 128, "num_warps": 8}, {"BLOCK": 64, "num_warps": 4}]


@pytest.mark.parametrize(
    ("tiles", "programs", "wanted"), [(1, 1, 256), (1000, 1, 256), (1000, 300, 256), (7, 100, 256)]
)
def test_parts_cover_every_tile_and_none_is_empty(launch, tiles, programs, wanted):
    per_part, parts = launch.split(tiles, programs, wanted)
    assert (parts - 1) * per_part < tiles <= parts * per_part
    assert parts * programs <= max(2 * wanted, programs)
