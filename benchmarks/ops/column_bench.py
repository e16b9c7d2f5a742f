"""The benchmark that every op gets, written once: an op's file names its cases, ``ColumnBench`` measures them.

Each case is run forward, and forward + backward with a dense output gradient. Correctness comes first: ours is compared
with the reference in float64 before anything is timed. Then ours and its peers take turns within each round, so that a
noisy moment hits all of them; a ratio is the median over rounds of the peer's time by ours. The peers are eager code as
people write it, the best library call, and torch.compile of the reference. Losses are printed like wins.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdis.ops import _backends

ROUND_SECONDS = 2e-3  # a shorter call is repeated within a round until it takes this long
BUDGET_SECONDS = {"quick": 1.5, "full": 2.0}  # for the rounds of one case and pass
ROUNDS = (9, 101)  # fewest and most
SLOW_SECONDS, SLOW_ROUNDS = 0.5, 3  # a call that takes this long is warm enough, and timed this often


@dataclass(frozen=True)
class Case:
    """One size of an op.

    ``targets`` are what the ratio to the fastest peer (``"fastest"``) or to a named peer has to reach, by pass.
    ``floor`` gives, by pass, the bytes that must move and the floating-point operations that must be done.
    ``yardsticks`` are timed beside the peers without being one, by pass: plain calls forward, and functions to
    differentiate forward + backward. ``without`` names peers among ``"eager"`` and ``"compile"`` that do not fit this
    machine's memory; correctness is then checked on other tensors, ``checked``. ``sets`` is the number of copies of the
    tensors that every contender has and takes in turn: with more of them than a cache holds they come from memory.
    """

    name: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    peers: dict[str, Callable[..., Tensor]]
    floor: dict[str, tuple[float, float]]
    targets: dict[str, dict[str, float]] = field(default_factory=dict)
    quick: bool = False  # part of the short table
    yardsticks: dict[str, dict[str, Callable[..., Any]]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    checked: dict[str, Tensor] | None = None
    sets: int = 1


@dataclass
class Contender:
    """Something to time: a call, how often a round repeats it, and its times."""

    run: Callable[[], Any]
    repeats: int = 1
    slow: bool = False
    seconds: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        self.run()  # which may compile
        started = time.perf_counter()
        self.run()
        took = time.perf_counter() - started
        if took > SLOW_SECONDS:
            self.slow = True
            return
        self.run()
        started = time.perf_counter()
        self.run()
        self.repeats = max(1, round(ROUND_SECONDS / (time.perf_counter() - started)))

    def time(self) -> None:
        if not self.slow:
            for _ in range(self.repeats):
                self.run()  # or it would pay for the caches and the heap that the contender before it left
        started = time.perf_counter()
        for _ in range(self.repeats):
            self.run()
        self.seconds.append((time.perf_counter() - started) / self.repeats)


def differentiable(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs of an op, one tensor or several, that gradients come through."""
    return [o for o in ((result,) if isinstance(result, Tensor) else result) if o.requires_grad]


def passes_of(op: Callable[..., Tensor], case: Case) -> dict[str, Callable[[], Any]]:
    """The forward pass without autograd, and forward + backward with a dense gradient."""
    leaves = {k: t.clone().requires_grad_(t.is_floating_point()) for k, t in case.tensors.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    outputs = differentiable(op(**leaves))
    generator = torch.Generator().manual_seed(7)
    # In the outputs' own memory layout, as the next layer's gradients would be.
    grads = [torch.empty_like(o).copy_(torch.randn(o.shape, dtype=torch.float64, generator=generator)) for o in outputs]
    del outputs

    def forward() -> Any:
        with torch.no_grad():
            return op(**leaves)

    def forward_backward() -> tuple[Tensor, ...]:
        outputs = differentiable(op(**leaves))
        return (*outputs, *torch.autograd.grad(outputs, wanted, grads))

    return {"forward": forward, "forward+backward": forward_backward}


def in_turn(runs: Iterable[Callable[[], Any]]) -> Callable[[], Any]:
    """A call of the next of these, the first after the last."""
    turns = cycle(runs)
    return lambda: next(turns)()


def peak_extra_bytes(run: Callable[[], Any]) -> int | None:
    """The most memory that the process holds during ``run`` beyond what it held before, where Linux tells."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    try:
        # Freed memory that the allocator kept would be taken again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")
    except (OSError, AttributeError):
        return None
    before = kilobytes("VmRSS:")
    run()
    return max(0, kilobytes("VmHWM:") - before) * 1024


def one_round(contenders: dict[str, Contender]) -> float:
    """Time every contender once; the seconds that took."""
    started = time.perf_counter()
    for contender in contenders.values():
        contender.time()
    return time.perf_counter() - started


def race(
    benchmark: Any, contenders: dict[str, Contender], peers: Iterable[str], quick: bool, floor: tuple[float, float],
    machine_rates: dict[str, float], input_bytes: int, **row: Any,
) -> None:  # fmt: skip
    """Time the contenders in turns, and leave the medians, the ratios to ours and the row's own columns behind."""
    for contender in contenders.values():
        contender.warm_up()
    round_seconds = one_round(contenders)
    rounds = min(ROUNDS[1], max(ROUNDS[0], int(BUDGET_SECONDS["quick" if quick else "full"] / round_seconds)))
    rounds = SLOW_ROUNDS if any(c.slow for c in contenders.values()) else rounds
    for contender in contenders.values():
        contender.seconds.clear()
    ours, others = contenders["ours"], {k: c for k, c in contenders.items() if k != "ours"}
    benchmark.group = row["op"]
    benchmark.pedantic(ours.time, setup=lambda: one_round(others) and None, rounds=rounds, iterations=1)
    times = {name: median(c.seconds) for name, c in contenders.items()}
    ratios = {k: median(t / o for t, o in zip(c.seconds, ours.seconds, strict=True)) for k, c in others.items()}
    bytes_moved, operations = floor
    rates = machine_rates["copy_bytes_per_second"], machine_rates["gemm_flops_per_second"]
    extra = peak_extra_bytes(ours.run)
    benchmark.extra_info.update(
        row, seconds=times, ratios=ratios, fastest=min(peers, key=times.__getitem__),
        floor_seconds=max(bytes_moved / rates[0], operations / rates[1]),
        peak_extra_bytes=extra, peak_extra_over_inputs=None if extra is None else extra / input_bytes,
    )  # fmt: skip


class ColumnBench:
    """Subclass as ``class BenchName(ColumnBench)`` and define ``name``, ``op``, ``reference`` and ``cases()``."""

    name: str
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]

    @staticmethod
    def cases() -> list[Case]:
        raise NotImplementedError

    @classmethod
    def generate(cls, metafunc: pytest.Metafunc) -> None:
        # The same numbers in every run: one draw in ten has a pre-activation within rounding of a kink, where a
        # gradient in float32 may take another slope than the one in float64 that it is held to.
        torch.manual_seed(0)
        column = _backends.columns()[cls.name]
        backends = [b for b in _backends.BACKENDS if (b, "cpu") in column.choices and b != "reference"]
        metafunc.parametrize("case", cls.cases(), ids=lambda c: c.name)
        metafunc.parametrize("direction", ["forward", "forward+backward"])
        metafunc.parametrize("backend", backends)

    def test_speed(self, benchmark, case: Case, direction: str, backend: str, machine_rates, quick: bool):
        cls = type(self)

        def ours(**tensors: Tensor) -> Tensor:
            return cls.op(**tensors, **case.options, backend=backend)

        def reference(**tensors: Tensor) -> Tensor:
            return cls.reference(**tensors, **case.options)

        error = self.check(ours, reference, case)
        torch.compiler.reset()
        peers = {"eager": reference, **case.peers, "compile": torch.compile(reference, dynamic=False)}
        peers = {k: p for k, p in peers.items() if k not in case.without}

        def contender(function: Callable[..., Any]) -> Contender:
            return Contender(in_turn([passes_of(function, case)[direction] for _ in range(case.sets)]))

        def plain(function: Callable[..., Any]) -> Contender:
            copies = [{k: t.clone() for k, t in case.tensors.items()} for _ in range(case.sets)]
            return Contender(in_turn([partial(function, **tensors) for tensors in copies]))

        contenders = {name: contender(function) for name, function in ({"ours": ours} | peers).items()}
        for name, yardstick in case.yardsticks.get(direction, {}).items():
            contenders[name] = (plain if direction == "forward" else contender)(yardstick)
        if direction == "forward":
            contenders["clone"] = Contender(next(iter(case.tensors.values())).clone)
        inputs = sum(t.nbytes for t in case.tensors.values())
        race(
            benchmark, contenders, peers, quick, case.floor[direction], machine_rates, inputs,
            op=cls.name, case=case.name, direction=direction, backend=backend, error=error,
            targets=case.targets.get(direction, {}), yardsticks=list(case.yardsticks.get(direction, {})),
        )  # fmt: skip

    @staticmethod
    def check(ours: Callable[..., Tensor], reference: Callable[..., Tensor], case: Case) -> float:
        """The largest relative error of the output and the gradients against the reference in float64."""
        case = replace(case, tensors=case.checked or case.tensors)
        doubled = {k: t.double() if t.is_floating_point() else t for k, t in case.tensors.items()}
        actual = passes_of(ours, case)["forward+backward"]()
        exact = passes_of(reference, replace(case, tensors=doubled))["forward+backward"]()
        worst = max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, exact, strict=True))
        assert worst < 1e-4, f"{case.name}: relative error {worst}; nothing is timed"
        return worst
