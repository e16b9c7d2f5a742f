"""The generators: images a second, drawn and written to a file, beside a copy and a plain write of their bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from fastdis.data import dsprites, make_dsprites, make_shapes3d, shapes3d
from fastdis.data.selection import select

BLOCK_BYTES = 2**26
ROUNDS = {True: 1, False: 3}  # for more than a gigabyte, and less


@dataclass(frozen=True)
class Case:
    """One generator on one grid: the images alone, or a whole file."""

    generator: str
    grid: dict[str, int]  # how many values of each factor that is not drawn in full
    images: int
    size: int  # pixels a side
    options: dict[str, bool | int] | None  # of the file; None where only images are drawn
    target: int | None = None
    quick: bool = False

    @property
    def total_bytes(self) -> int:
        return self.images * self.size**2 * (1 if self.generator == "dsprites" else 3)

    @property
    def what(self) -> str:
        if self.options is None:
            return f"{self.size} x {self.size}, drawn"
        return f"{self.size} x {self.size}, {'compressed' if self.options['compress'] else 'uncompressed'} file"

    def __str__(self) -> str:
        return f"{self.generator}, {self.images} of {self.what}"


SPRITES = {"shapes": 3, "scales": 2, "orientations": 4}
ROOMS = {"floor_hues": 10, "wall_hues": 5, "object_hues": 2}
CASES = [
    Case("dsprites", SPRITES, 24_576, 64, None, quick=True),
    Case("dsprites", SPRITES, 24_576, 64, {"compress": False}),
    Case("dsprites", SPRITES, 24_576, 64, {"compress": True}),
    Case("shapes3d", ROOMS, 48_000, 64, None, quick=True),
    Case("shapes3d", ROOMS, 48_000, 64, {"compress": False}, target=20_000),
    Case("shapes3d", ROOMS, 48_000, 64, {"compress": True}),
    Case("shapes3d", ROOMS, 48_000, 32, {"compress": False}),
    Case("shapes3d", {}, 480_000, 64, None),
    Case("shapes3d", {}, 480_000, 64, {"compress": False}, target=20_000),
]


class BenchGenerators:
    @staticmethod
    def generate(metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("case", CASES, ids=str)

    def test_speed(self, benchmark, case: Case, machine_rates, tmp_path: Path):
        path = tmp_path / ("images.npz" if case.generator == "dsprites" else "images.h5")
        total = case.total_bytes
        run = drawing(case) if case.options is None else writing(case, path)
        writes: list[float] = []
        if case.options is not None:
            benchmark.pedantic(run, setup=lambda: writes.append(plain_write(path, total)), rounds=ROUNDS[total > 1e9])
        else:
            benchmark.pedantic(run, rounds=ROUNDS[total > 1e9])
        path.unlink(missing_ok=True)  # or pytest would keep gigabytes
        seconds = benchmark.stats.stats.median
        floor = 2 * total / machine_rates["copy_bytes_per_second"]
        benchmark.extra_info.update(
            case=str(case), generator=case.generator, what=case.what, images=case.images, target=case.target,
            seconds_in_all=seconds, images_per_second=case.images / seconds,
            floor_images_per_second=case.images / floor,
            write_images_per_second=case.images / median(writes) if writes else None,
        )  # fmt: skip


def drawing(case: Case) -> Callable[[], None]:
    def run() -> None:
        assert sum(len(images) for images in blocks(case)) == case.images

    return run


def blocks(case: Case) -> Iterator[np.ndarray]:
    """The images as the writer gets them."""
    if case.generator == "dsprites":
        names = ("shapes", "scales", "orientations", "x", "y")
        sizes = zip(names, dsprites.FULL_SIZES.values(), strict=True)
        chosen = [select(case.grid.get(name), name, full) for name, full in sizes]
        return dsprites._draw(dsprites._possible_values(chosen), case.size)
    values = [full[select(case.grid.get(f"{n}s"), n, len(full))] for n, full in shapes3d.VALUES.items()]
    return shapes3d._draw(values, case.size)


def writing(case: Case, path: Path) -> Callable[[], None]:
    make = make_dsprites if case.generator == "dsprites" else make_shapes3d

    def run() -> None:
        make(path, size=case.size, **case.grid, **case.options)

    return run


def plain_write(path: Path, total: int) -> float:
    """Seconds to write so many bytes, a block at a time, where the file will be; which is then removed."""
    block = np.full(min(BLOCK_BYTES, total), 7, np.uint8)
    started = time.perf_counter()
    with path.open("wb") as file:
        for start in range(0, total, len(block)):
            file.write(block[: total - start].data)
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds
