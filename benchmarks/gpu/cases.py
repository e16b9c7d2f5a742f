"""The cases that benchmarks/gpu.sh times: those of benchmarks/ops, and larger ones that fill a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from column_bench import Case, ColumnBench

from fastdis.ops import _backends

# By the name of a benchmark: inputs of half a gigabyte in float32, several times the cache of a large GPU.
LARGE: dict[str, Callable[[ModuleType], list[Case]]] = {
    "BenchStyleModulation": lambda m: [
        m.case("instance [32,256,128,128]", (32, 256, 128, 128), groups=256, targets={}),
        m.case("32 groups silu [32,256,128,128]", (32, 256, 128, 128), groups=32, activation="silu", targets={}),
        m.case("instance last [32,256,128,128]", (32, 256, 128, 128), groups=256, channels_last=True, targets={}),
    ],
    "BenchPrototypeDistances": lambda m: [m.case("E32 Q2048 N64 D128", 32, 2048, 64, 128, targets={})],
    "BenchPrototypicalLoss": lambda m: [m.case("E32 Q2048 N64 D128", 32, 2048, 64, 128, targets={})],
    "BenchSumGradientFields": lambda m: [m.case("[512,20,3,64,64]", 512, 20, 3, 64, 64, targets={})],
    "BenchDdimStep": lambda m: [m.case("[512,20,3,64,64]", 512, 20, 3, 64, 64, targets={})],
    "BenchDisDiffTerms": lambda m: [m.case("[512,20,3,64,64]", 512, 20, 3, 64, 64, targets={})],
    "BenchJacobianGram": lambda m: [m.case("[512,16,12288]", 512, 16, 12288, targets={})],
    "BenchIsometryPenalty": lambda m: [m.case(512, 16, 12288, "isometry", 0.0)],
    "BenchTangentActivation": lambda m: [m.case("silu [1+8,64,64,64,64]", "silu", 9, 64, 64, 64, 64, targets={})],
    "BenchTotalCorrelation": lambda m: [
        m.case(8192, 10, targets={}),
        m.case(4096, 64, targets={}, without=("eager",)),  # in float64 that one fills the memory, so few are checked
    ],
    "BenchReparameterize": lambda m: [m.posterior((2**20, 128), {})],
    "BenchGaussianKl": lambda m: [m.case(2**20, 128, targets={})],
}
SIZES = ("paper", "large", "other")
# Their operations are powers and sums in float32, whatever the dtype: no matrix unit does them.
WITHOUT_PRODUCTS = ("total_correlation",)


@dataclass(frozen=True)
class Entry:
    """One case in one dtype, its tensors made when it is asked for."""

    bench: type[ColumnBench]
    size: str
    index: int
    case: str
    dtype: torch.dtype

    def make(self, device: str) -> Case:
        return in_dtype(_cases(self.bench, self.size, device)[self.index], self.dtype)


def benches() -> Iterator[type[ColumnBench]]:
    """Every benchmark of a registered column."""
    for name in _backends.columns():
        module = importlib.import_module(f"bench_{name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, ColumnBench) and value.__module__ == module.__name__:
                yield value


def plan() -> list[Entry]:
    """What to time, the most telling first."""
    dtypes = {"paper": (torch.float32,), "large": (torch.float32, torch.bfloat16), "other": (torch.float32,)}
    return [
        Entry(bench, size, index, case.name, dtype)
        for size in SIZES
        for bench in benches()
        for index, case in enumerate(_cases(bench, size, "meta"))
        for dtype in dtypes[size]
    ]


def _cases(bench: type[ColumnBench], size: str, device: str) -> list[Case]:
    with torch.device(device):
        if size == "large":
            return LARGE.get(bench.__name__, lambda _: [])(importlib.import_module(bench.__module__))
        return [case for case in bench.cases() if case.quick == (size == "paper")]


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The case in another dtype than its float32; the bytes of its floor shrink with the elements."""
    share = dtype.itemsize / torch.float32.itemsize
    return replace(
        case,
        tensors=_cast(case.tensors, dtype),
        options=_cast(case.options, dtype),
        floor={direction: (moved * share, operations) for direction, (moved, operations) in case.floor.items()},
        checked=None if case.checked is None else _cast(case.checked, dtype),
    )


def _cast(values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in values.items()}
