"""Machine header, the rates behind every floor, and the table that a run ends with."""

import os
import platform
import time
from functools import partial
from statistics import median

import pytest
import torch

import fastdis
from fastdis.ops import _products

THREADS = 2


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="only the smallest case of each op, for a short table")


def pytest_generate_tests(metafunc):
    generate = getattr(metafunc.cls, "generate", None)
    if generate is not None:
        generate(metafunc)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        items[:] = [i for i in items if i.callspec.params["case"].quick]


def pytest_configure():
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))


def best_rate(work, run, repeats=9):
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return work / median(seconds)


@pytest.fixture(scope="session")
def quick(request):
    """Whether the short table is wanted, from few rounds."""
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def machine_rates():
    """This machine's copy rate, read plus written, and its float32 matrix-product rate, by the faster library."""
    source = torch.randn(2**25)
    target = torch.empty_like(source)
    a = torch.randn(1024, 1024)
    by_faster = partial(_products.matmul, a, a)
    return {
        "copy_bytes_per_second": best_rate(2 * source.nbytes, lambda: target.copy_(source)),
        "gemm_flops_per_second": max(best_rate(2 * 1024**3, lambda: a @ a), best_rate(2 * 1024**3, by_faster)),
    }


@pytest.fixture(autouse=True)
def _rates_in_the_results(benchmark, machine_rates):
    benchmark.extra_info.update(machine_rates)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastdis"] = fastdis.build_info()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["load"] = os.getloadavg() if hasattr(os, "getloadavg") else None
    for key in ("node", "release", "python_build"):
        machine_info.pop(key, None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep medians and ratios, not every round."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        row["params"]["case"] = row["extra_info"]["case"]


def pytest_benchmark_group_stats(config, benchmarks, group_by):
    """Replace pytest-benchmark's table by ours, which shows the peers of the same run beside each time."""
    return []


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [b.extra_info for b in session.benchmarks if "seconds" in b.extra_info] if session else []
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table

    rates = rows[0]
    threads = torch.get_num_threads()
    table = Table(title=f"{platform.processor() or platform.machine()}, {threads} threads, torch {torch.__version__}, "
                  f"copy {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s, "
                  f"float32 product {rates['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    for heading in ("op", "case", "pass", "backend", "ms", "floor ms", "eager", "library", "compile", "clone", "beside",
                    "memory", "target"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("op", "case", "pass", "backend") else "right")
    for row in rows:
        ratios = row["ratios"]
        beside = row.get("yardsticks", ())
        library = [v for k, v in ratios.items() if k not in ("eager", "compile", "clone", *beside)]
        cells = (ratios.get("eager"), min(library) if library else None, ratios.get("compile"), ratios.get("clone"))
        memory = row["peak_extra_over_inputs"]
        table.add_row(
            row["op"], row["case"], row["direction"], row["backend"], f"{1e3 * row['seconds']['ours']:.3f}",
            f"{1e3 * row['floor_seconds']:.3f}", *("" if c is None else f"{c:.2f}x" for c in cells),
            ", ".join(f"{name} {ratios[name]:.2f}x" for name in beside),
            "" if memory is None else f"{memory:.1f}x", verdict(row),
        )  # fmt: skip
    console = Console(width=max(140, terminalreporter._tw.fullwidth))
    console.print()
    console.print(table)
    console.print(
        "Columns with x: that peer's time over ours, higher is better, below 1 is a loss. clone: a copy of the input "
        "by torch. beside: no peer, but a read of the largest input, torch's read and copies of all that we read and "
        "write, our kernels in an autograd function that does nothing else, or ours with the products by MKL. memory: "
        "the most held beyond the inputs, over the inputs."
    )


def verdict(row):
    """Each target of the row, and whether it was reached."""
    words = []
    for name, wanted in row["targets"].items():
        found = row["ratios"][row["fastest"] if name == "fastest" else name]
        words.append(f"{name} {found:.2f}/{wanted:.2f} {'ok' if found >= wanted else 'MISSED'}")
    return ", ".join(words)
