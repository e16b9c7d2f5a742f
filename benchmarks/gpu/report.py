"""Puts what the stages of benchmarks/gpu.sh left behind into one JSON file and a table; fails if any of them failed."""

from __future__ import annotations

import argparse
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

SHOWN_FAILURES = 200  # of tests, in the JSON file
ALL_STAGES = {
    "build": ["build"], "suite": ["suite"], "large": ["large"], "sanitizer": ["memcheck", "racecheck"],
    "benchmarks": ["precompile", "benchmarks"],
}  # fmt: skip
NOT_DRY = ("build", "large", "racecheck", "precompile")
EXITS = {124: "ran out of time", 127: "not installed", 137: "killed"}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def tests_of(path: Path) -> dict[str, Any]:
    """Counts, by backend too, and the failures, of a JUnit file."""
    if not path.exists():
        return {}
    counts: Counter[str] = Counter()
    backends: dict[str, Counter[str]] = {}
    failures, reasons = [], Counter()
    for case in ElementTree.parse(path).iter("testcase"):
        troubles = [child for child in case if child.tag in ("failure", "error")]
        skips = [child for child in case if child.tag == "skipped"]
        outcome = "failed" if troubles else "skipped" if skips else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        counts[outcome] += 1
        if backend := backend_of(name):
            backends.setdefault(backend, Counter())[outcome] += 1
        failures += [{"test": name, "message": (t.get("message") or "")[:600]} for t in troubles]
        reasons.update(s.get("message") or "" for s in skips)
    return {
        **counts, "backends": backends, "failures": failures[:SHOWN_FAILURES], "failures_in_all": len(failures),
        "skipped_because": dict(reasons.most_common(20)),
    }  # fmt: skip


def backend_of(test: str) -> str | None:
    """The backend among a test's parameters, which comes after the device; tests/ops/test_on_gpu.py names no device."""
    found = [p for p in test.rpartition("[")[2].rstrip("]").split("-") if p in ("reference", "triton", "cuda", "cpu")]
    return found[-1] if len(found) > ("test_on_gpu" not in test) else None


def last_lines(path: Path, pattern: str) -> list[str]:
    """The lines of a log that match, the last ones."""
    if not path.exists():
        return []
    return [line.strip() for line in path.read_text(errors="replace").splitlines() if re.search(pattern, line)][-20:]


def gather(work: Path, wanted: list[str], device: str) -> dict[str, Any]:
    lines = (work / "stages.jsonl").read_text().splitlines()
    return {
        "environment": read_json(work / "environment.json"),
        "dry_run": device == "cpu",
        "stages": [json.loads(line) for line in lines],
        "left_out": [stage for name, stages in ALL_STAGES.items() if name not in wanted for stage in stages],
        "suite": tests_of(work / "suite.xml"),
        "large": tests_of(work / "large.xml"),
        "sanitizer": {
            tool: last_lines(work / f"{tool}.log", r"SUMMARY|samples|calls|not supported|not installed|Error:")
            for tool in ("memcheck", "racecheck")
        },
        "benchmarks": read_json(work / "benchmarks.json"),
    }


def problems_of(found: dict[str, Any], wanted: list[str]) -> list[str]:
    """Everything that failed, was left out by the clock, or did not run though it was asked for."""
    problems = []
    for row in found["stages"]:
        if row["exit"] != 0:
            why = EXITS.get(row["exit"], f"exit code {row['exit']}")
            problems.append(f"{row['stage']}: {why}, after {row['seconds']} of {row['allowed']} s")
    ran = {row["stage"] for row in found["stages"]}
    for name in wanted:
        for stage in ALL_STAGES[name]:
            if stage not in ran and not (found["dry_run"] and stage in NOT_DRY):
                problems.append(f"{stage}: did not run")
    for name in ("suite", "large"):
        tests = found[name]
        if not tests and name in wanted and not (found["dry_run"] and name in NOT_DRY):
            problems.append(f"{name}: it left no report")
        problems += [f"{name}: {f['test']}" for f in tests.get("failures", [])[:10]]
        if tests and not found["dry_run"]:
            silent = [b for b in ("triton", "cuda") if not tests["backends"].get(b, {}).get("passed")]
            problems += [f"{name}: no test of backend {backend} passed" for backend in silent]
    if "sanitizer" in wanted and not found["dry_run"]:
        for tool, lines in found["sanitizer"].items():
            if not any("SUMMARY" in line for line in lines) or not any("calls" in line for line in lines):
                problems.append(f"{tool}: its log holds no summary of a whole run")
    benchmarks = found["benchmarks"]
    if "benchmarks" in wanted and not benchmarks.get("rows"):
        problems.append("benchmarks: no row")
    problems += [f"benchmarks: {failure}" for failure in benchmarks.get("failures", [])]
    for row in benchmarks.get("rows", []):
        for name in ("triton", "cuda", "cpu"):
            for failed, why in row["failures"].items():
                if failed.split(",")[0] == name:
                    problems.append(f"benchmarks: {row['op']} {row['case']} {row['dtype']} {failed}: {why}")
    if benchmarks.get("not_reached"):
        problems.append(f"benchmarks: out of time before {', '.join(benchmarks['not_reached'])}")
    return list(dict.fromkeys(problems))


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3f}"


def table(found: dict[str, Any]) -> list[str]:
    rows = [r for r in found["benchmarks"].get("rows", []) if r["size"] != "other"]
    # Of the small ones only the pass that training runs: the table is to be short, all is in the JSON file.
    rows = [r for r in rows if r["direction"] == "forward+backward" or r["size"] == "large"]
    heading = ("op", "case", "dtype", "pass", "triton", "cuda", "compile", "library", "eager", "floor", "MB")
    cells = [heading]
    for row in rows:
        seconds = row["seconds"]
        compiled = min((t for name, t in seconds.items() if name.startswith("compile")), default=None)
        ours = [seconds[b] for b in ("triton", "cuda", "cpu") if b in seconds]
        others = [t for n, t in seconds.items() if n not in row["over_ours"] and n != "eager" and "compile" not in n]
        share, peaks = max(row["share_of_floor"].values(), default=None), row.get("peak_bytes", {})
        peak = min((peaks[b] for b in row["over_ours"] if b in peaks), default=None)
        cells.append((
            row["op"], row["case"], row["dtype"].replace("float", "f"), "f" if row["direction"] == "forward" else "f+b",
            milliseconds(seconds.get("triton", ours[0] if found["dry_run"] and ours else None)),
            milliseconds(seconds.get("cuda")), milliseconds(compiled), milliseconds(min(others, default=None)),
            milliseconds(seconds.get("eager")), "-" if share is None else f"{100 * share:.0f}%",
            "-" if peak is None else f"{peak / 1e6:.0f}",
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(heading))]
    aligned = [
        " ".join(c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    rates = found["benchmarks"].get("rates", {})
    return [
        *aligned,
        "Milliseconds, medians. floor: the floor's time over the best of ours. MB: the most held beyond the inputs.",
        ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()),
    ]


def summary(found: dict[str, Any], problems: list[str]) -> list[str]:
    names = [d["name"] for d in found["environment"].get("devices", [])] or ["no GPU"]
    lines = [f"{', '.join(names)}{' (dry run)' if found['dry_run'] else ''}"]
    for name in ("suite", "large"):
        if found[name]:
            counts = {k: found[name].get(k, 0) for k in ("passed", "failed", "skipped")}
            lines.append(f"{name}: {counts}")
    if found["left_out"]:
        lines.append(f"left out, as asked: {', '.join(found['left_out'])}")
    preferred = found["benchmarks"].get("preferred", {})
    if preferred:
        choice = (f"{op} {row['backend']} ({row['triton_over_cuda']:.2f})" for op, row in preferred.items())
        lines.append(f"faster, and Triton's time over CUDA's: {', '.join(choice)}")
    shown = [f"PROBLEM {problem[:300]}" for problem in problems[:25]]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more, in gpu.json")
    return [*lines, *shown]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--stages", required=True)
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()
    wanted = [name for name in arguments.stages.split() if name in ALL_STAGES]
    found = gather(arguments.work, wanted, arguments.device)
    found["problems"] = problems_of(found, wanted)
    (arguments.results / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [*table(found), *summary(found, found["problems"])]
    (arguments.results / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
