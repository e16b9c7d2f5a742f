"""Times every op on a GPU against eager code, the best library call and torch.compile, after a check of its values.

Contenders take turns within each round, the cache flushed before each. The time of a row is the device's between two
events; small calls get two more, of calls queued one after the other without a wait, and of a replayed graph. A row is
written as soon as it is there, so that a run that is cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import WITHOUT_PRODUCTS, Entry, plan
from column_bench import Case
from torch import Tensor

from fastdis.ops import _backends

Run = Callable[[], Any]
MODES = {"paper": ("default", "max-autotune"), "large": ("max-autotune-no-cudagraphs",), "other": ()}
SMALL_SECONDS = 1e-4  # where launches may take longer than kernels
ROUNDS = (5, 41)
ROUND_SECONDS = {"paper": 0.15, "large": 0.4, "other": 0.15}  # for the rounds of one case and pass


# -- clocks ------------------------------------------------------------------------------------------------------------


class CudaClock:
    """Seconds of the device between two events, every call finding its inputs in memory, not in the cache."""

    rounds = ROUNDS

    def __init__(self) -> None:
        size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(max(size, 2**28), dtype=torch.int8, device="cuda")

    def start(self, run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        events[0].record()
        run()
        events[1].record()
        return events

    def seconds(self, events: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    synchronize = staticmethod(torch.cuda.synchronize)


class HostClock:
    """For the dry run."""

    rounds = (2, 2)

    def start(self, run: Run) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def seconds(self, took: float) -> float:
        return took

    def synchronize(self) -> None: ...


Clock = CudaClock | HostClock


def rates(clock: Clock, device: str) -> dict[str, float]:
    """Bytes per second of a copy, read plus written, and operations per second of matrix products by dtype."""
    elements, side = (2**29, 8192) if device == "cuda" else (2**20, 128)

    def rate(work: float, run: Run) -> float:
        for _ in range(3):
            run()
        return work / median(clock.seconds(clock.start(run)) for _ in range(15))

    def copied() -> float:
        source = torch.empty(elements, device=device).normal_()
        target = torch.empty_like(source)
        return rate(2.0 * source.nbytes, lambda: target.copy_(source))

    def multiplied(dtype: torch.dtype) -> float:
        a, b = (torch.empty(side, side, device=device).normal_().to(dtype) for _ in range(2))
        return rate(2.0 * side**3, lambda: a @ b)

    return {"copy_bytes_per_second": copied()} | {
        f"{name_of(dtype)}_products_per_second": multiplied(dtype) for dtype in (torch.bfloat16, torch.float32)
    }


# -- one case ----------------------------------------------------------------------------------------------------------


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ours_of(entry: Entry, case: Case, device: str) -> dict[str, Callable[..., Any]]:
    column = _backends.columns()[entry.bench.name]
    backends = [b for b in ("triton", "cuda", "cpu") if (b, device) in column.choices]
    return {b: lambda b=b, **t: entry.bench.op(**t, **case.options, backend=b) for b in backends}


def compiled_of(entry: Entry, case: Case, device: str) -> dict[str, Callable[..., Any]]:
    def reference(**tensors: Tensor) -> Any:
        return entry.bench.reference(**tensors, **case.options)

    if device != "cuda":  # the dry run has no time for a C++ compiler
        return {"compile": torch.compile(reference, dynamic=False, backend="eager")}
    return {f"compile {mode}": torch.compile(reference, dynamic=False, mode=mode) for mode in MODES[entry.size]}


def contenders_of(entry: Entry, case: Case, device: str) -> dict[str, Callable[..., Any]]:
    def eager(**tensors: Tensor) -> Any:
        return entry.bench.reference(**tensors, **case.options)

    return {**ours_of(entry, case, device), "eager": eager, **case.peers, **compiled_of(entry, case, device)}


def passes_of(op: Callable[..., Any], tensors: dict[str, Tensor]) -> dict[str, Run]:
    """Forward without autograd, and forward + backward with dense output gradients, the same for every op."""
    leaves = {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    outputs = [o for o in outputs_of(op(**leaves)) if o.requires_grad]
    device = outputs[0].device
    generator = torch.Generator(device).manual_seed(7)
    # In the outputs' own memory layout, as the next layer's gradients would be.
    grads = [torch.empty_like(o).copy_(torch.randn(o.shape, device=device, generator=generator)) for o in outputs]
    del outputs

    def forward() -> Any:
        with torch.no_grad():
            return op(**leaves)

    def forward_backward() -> tuple[Tensor, ...]:
        outputs = [o for o in outputs_of(op(**leaves)) if o.requires_grad]
        return (*outputs, *torch.autograd.grad(outputs, wanted, grads))

    return {"forward": forward, "forward+backward": forward_backward}


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def errors_of(ours: dict[str, Callable[..., Any]], entry: Entry, case: Case) -> tuple[dict[str, float], float]:
    """Relative errors of outputs and gradients against the reference in float64, and the largest allowed.

    In float32 the bound is that of the other benchmarks; in a narrower dtype, twice the reference's own error there.
    """
    tensors = case.checked or case.tensors

    def eager(**tensors: Tensor) -> Any:
        return entry.bench.reference(**tensors, **case.options)

    def exact(**tensors: Tensor) -> Any:
        options = {k: v.double() if isinstance(v, Tensor) else v for k, v in case.options.items()}
        return entry.bench.reference(**tensors, **options)

    def results(op: Callable[..., Any], tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        run = passes_of(op, tensors)["forward+backward"]
        torch.manual_seed(0)  # what draws, draws the same
        return run()

    wanted = results(exact, {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()})

    def error(op: Callable[..., Any]) -> float:
        found = [((a - e).norm() / e.norm()).item() for a, e in zip(results(op, tensors), wanted, strict=True)]
        return max(found) if not any(map(math.isnan, found)) else math.nan

    allowed = 1e-4 if entry.dtype == torch.float32 else 2 * error(eager) + 2 * torch.finfo(entry.dtype).eps
    return {name: error(op) for name, op in ours.items()}, allowed


def measure(runs: dict[str, Run], clock: Clock, seconds: float) -> dict[str, list[float]]:
    """Times by contender, one a round."""
    started = time.perf_counter()
    _round(runs, clock)
    once = time.perf_counter() - started
    rounds = min(clock.rounds[1], max(clock.rounds[0], int(seconds / max(once, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, took in _round(runs, clock).items():
            found[name].append(took)
    return found


def _round(runs: dict[str, Run], clock: Clock) -> dict[str, float]:
    started = {name: clock.start(run) for name, run in runs.items()}
    return {name: clock.seconds(times) for name, times in started.items()}


def host_seconds(run: Run, clock: Clock) -> float:
    """What a call costs where calls follow each other and nobody waits: the host's part, or the device's if longer."""
    repeats = 50 if isinstance(clock, CudaClock) else 1
    found = []
    for _ in range(5):
        clock.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        clock.synchronize()
        found.append((time.perf_counter() - started) / repeats)
    return median(found)


def graph_seconds(run: Run, clock: Clock) -> float:
    """The same from a replayed graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return host_seconds(graph.replay, clock)


def peak_bytes(run: Run) -> int:
    """The most memory that a call takes beyond what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rows_of(entry: Entry, clock: Clock, machine: dict[str, float], device: str) -> list[dict[str, Any]]:
    """The rows of a case, one for each pass: what every contender took, and what failed and why."""
    torch.compiler.reset()
    case = entry.make(device)
    ours, failures = ours_of(entry, case, device), {}
    errors, allowed = errors_of(ours, entry, case)
    for name, error in errors.items():
        if not error <= allowed:
            failures[name] = f"wrong: relative error {error:.3g}, allowed {allowed:.3g}; not timed"
    runs: dict[str, dict[str, Run]] = {"forward": {}, "forward+backward": {}}
    for name, op in contenders_of(entry, case, device).items():
        if name in failures:
            continue
        try:
            for direction, run in passes_of(op, case.tensors).items():
                for _ in range(4):  # compiles, warms up, and lets what records graphs record them
                    run()
                clock.synchronize()
                runs[direction][name] = run
        except Exception as error:  # a peer that cannot run here is a finding, not the end
            failures[name] = first_line(error)
    rows = []
    for direction, contenders in runs.items():
        if not contenders:
            continue
        times = measure(contenders, clock, ROUND_SECONDS[entry.size])
        seconds = {name: median(found) for name, found in times.items()}
        row = {
            "op": entry.bench.name, "case": case.name, "size": entry.size, "dtype": name_of(entry.dtype),
            "direction": direction, "seconds": seconds, "rounds": len(next(iter(times.values()))),
            "over_ours": {
                own: {
                    name: median(theirs / our for theirs, our in zip(found, times[own], strict=True))
                    for name, found in times.items()
                }
                for own in ours
                if own in times
            },
            "floor_seconds": floor_seconds(entry, case, direction, machine),
            "input_bytes": sum(t.nbytes for t in case.tensors.values()),
            "errors": errors, "error_allowed": allowed, "failures": dict(failures),
        }  # fmt: skip
        row["share_of_floor"] = {own: row["floor_seconds"] / seconds[own] for own in row["over_ours"]}
        if device == "cuda":
            row["peak_bytes"] = {name: peak_bytes(run) for name, run in contenders.items()}
        if min(seconds.values()) < SMALL_SECONDS or device == "cpu":
            row["host_seconds"] = {name: host_seconds(run, clock) for name, run in contenders.items()}
            row["graph_seconds"] = {}
            for name, run in contenders.items():
                if device == "cpu" or name == "compile max-autotune":
                    continue  # that one replays graphs of its own
                try:
                    row["graph_seconds"][name] = graph_seconds(run, clock)
                except Exception as error:
                    row["failures"][f"{name}, as a graph"] = first_line(error)
                    torch.cuda.synchronize()
        rows.append(row)
    return rows


def floor_seconds(entry: Entry, case: Case, direction: str, machine: dict[str, float]) -> float:
    moved, operations = case.floor[direction]
    dtype = torch.float32 if entry.bench.name in WITHOUT_PRODUCTS else entry.dtype
    copied, multiplied = machine["copy_bytes_per_second"], machine[f"{name_of(dtype)}_products_per_second"]
    return max(moved / copied, operations / multiplied)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# -- all of them -------------------------------------------------------------------------------------------------------


def prefer(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each op the faster of its two compiled backends, by the geometric mean over all that was timed of both."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if "triton" in row["over_ours"].get("cuda", {}):
            found.setdefault(row["op"], []).append(row["over_ours"]["cuda"]["triton"])
    means = {op: math.exp(sum(map(math.log, ratios)) / len(ratios)) for op, ratios in found.items()}
    return {
        op: {"backend": "cuda" if mean > 1 else "triton", "triton_over_cuda": mean, "rows": len(found[op])}
        for op, mean in means.items()
    }


def benchmark(device: str, seconds: float, out: Path) -> None:
    """Time the whole plan, or what of it fits into the seconds given."""
    deadline = time.monotonic() + seconds
    clock = CudaClock() if device == "cuda" else HostClock()
    entries = plan() if device == "cuda" else [e for e in plan() if e.size == "paper" and "kl" in e.bench.name]
    result: dict[str, Any] = {"rates": rates(clock, device), "rows": [], "failures": [], "not_reached": []}
    print(result["rates"])
    for done, entry in enumerate(entries):
        label = f"{entry.bench.name} {entry.case} {name_of(entry.dtype)}"
        result["not_reached"] = [f"{e.bench.name} {e.case} {name_of(e.dtype)}" for e in entries[done:]]
        if time.monotonic() > deadline:
            break
        started = time.monotonic()
        try:
            result["rows"] += rows_of(entry, clock, result["rates"], device)
        except Exception as error:  # the other cases are still worth their time
            result["failures"].append(f"{label}: {first_line(error)}")
        release(device)
        print(f"{label}: {time.monotonic() - started:.1f} s")
        result["not_reached"].pop(0)
        result["preferred"] = prefer(result["rows"])
        written = out.with_suffix(".partial")
        written.write_text(json.dumps(result))
        written.replace(out)
    else:
        result["not_reached"] = []


def precompile(device: str, share: int, of: int) -> None:
    """Fill the compilers' caches with one share of the plan."""
    for index, entry in enumerate(e for e in plan() if MODES[e.size]):
        if index % of != share:
            continue
        torch.compiler.reset()
        case = entry.make(device)
        for name, op in {**compiled_of(entry, case, device), **ours_of(entry, case, device)}.items():
            try:
                for run in passes_of(op, case.tensors).values():
                    run()
            except Exception as error:  # the benchmark itself will say so where it counts
                print(f"{entry.bench.name} {entry.case} {name}: {first_line(error)}")
        release(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--seconds", type=float, default=120.0, help="no case is begun later")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--precompile", type=int, nargs=2, metavar=("SHARE", "OF"))
    arguments = parser.parse_args()
    if arguments.precompile:
        precompile(arguments.device, *arguments.precompile)
    else:
        benchmark(arguments.device, arguments.seconds, arguments.out)


if __name__ == "__main__":
    main()
