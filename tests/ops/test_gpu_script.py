"""benchmarks/gpu.sh, run dry: every stage that can do without a GPU, and what the report makes of one that fails."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastdis.ops import _backends

ROOT = Path(__file__).parents[2]


@pytest.fixture
def report():
    spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "benchmarks/gpu/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.skipif(_backends.extension is None, reason="the compiled extension is not here")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="the script relies on PYTHONSAFEPATH")
def test_the_script_run_dry(tmp_path):
    result = subprocess.run(
        ["bash", "benchmarks/gpu.sh", str(tmp_path / "results")], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable, "FASTDIS_GPU_DRY_RUN": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "results/gpu.json").read_text())
    assert found["problems"] == []
    assert {row["stage"]: row["exit"] for row in found["stages"]} == {
        "environment": 0, "memcheck": 0, "suite": 0, "benchmarks": 0,
    }  # fmt: skip
    assert found["suite"]["passed"] > 0
    assert set(found["environment"]["fastdis"]["ops"]) == set(_backends.columns())
    assert {line.split(":")[0] for line in found["sanitizer"]["memcheck"][:-1]} == set(_backends.columns())
    rows = found["benchmarks"]["rows"]
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}
    for row in rows:
        assert {"cpu", "eager", "library", "compile"} <= set(row["seconds"])
        assert row["errors"]["cpu"] <= row["error_allowed"]
        assert row["failures"] == {}
    assert "\ngaussian_kl" in result.stdout.partition("\nop ")[2]
    assert len(list((tmp_path / "results").iterdir())) <= 8


def left_behind(work, *, build=0, failed=False, summary="ERROR SUMMARY: 0 errors", wrong=None):
    """What the stages of a run on a GPU leave behind."""
    stages = ("build", "environment", "suite", "large", "memcheck", "racecheck", "precompile", "benchmarks")
    lines = [{"stage": s, "exit": build if s == "build" else 0, "seconds": 1, "allowed": 9} for s in stages]
    (work / "stages.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (work / "environment.json").write_text(json.dumps({"devices": [{"name": "A GPU"}]}))
    trouble = '<failure message="bad"/>' if failed else ""
    for name, module, middle in (("suite", "tests.ops.test_kl.TestKl", "small-cuda-"), ("large", "test_on_gpu", "kl-")):
        cases = "".join(
            f'<testcase classname="{module}" name="test_it[{middle}{b}]">{trouble * (b == "cuda")}</testcase>'
            for b in ("triton", "cuda")
        )
        (work / f"{name}.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    for tool in ("memcheck", "racecheck"):
        (work / f"{tool}.log").write_text(f"kl: 3 samples\n3 calls, forward and backward\n========= {summary}\n")
    row = {
        "op": "kl", "case": "[9]", "size": "large", "dtype": "float32", "direction": "forward+backward",
        "seconds": {"triton": 2e-3, "cuda": 1e-3, "eager": 9e-3, "compile default": 3e-3, "library": 4e-3},
        "over_ours": {"triton": {}, "cuda": {}}, "share_of_floor": {"triton": 0.4, "cuda": 0.8},
        "failures": wrong or {},
    }  # fmt: skip
    (work / "benchmarks.json").write_text(json.dumps({"rows": [row], "not_reached": [], "failures": []}))


def problems(report, work, stages="build suite large sanitizer benchmarks"):
    found = report.gather(work, stages.split(), "cuda")
    return found, report.problems_of(found, stages.split())


def test_a_run_without_a_fault_has_no_problem(report, tmp_path):
    left_behind(tmp_path)
    found, none = problems(report, tmp_path)
    assert none == []
    assert found["suite"]["backends"] == {"triton": {"passed": 1}, "cuda": {"passed": 1}}
    lines = report.table(found)
    assert lines[1].split() == ["kl", "[9]", "f32", "f+b", "2.000", "1.000", "3.000", "4.000", "9.000", "80%", "-"]


@pytest.mark.parametrize(("fault", "message"), [
    ({"build": 124}, "build: ran out of time"),
    ({"failed": True}, "suite: no test of backend cuda passed"),
    ({"summary": "Device not supported"}, "memcheck: its log holds no summary"),
    ({"wrong": {"cuda": "wrong: relative error 1"}}, "kl [9] float32 cuda: wrong"),
])  # fmt: skip
def test_no_fault_is_passed_over(report, tmp_path, fault, message):
    left_behind(tmp_path, **fault)
    assert any(message in problem for problem in problems(report, tmp_path)[1])


@pytest.mark.parametrize("missing", ["suite.xml", "benchmarks.json", "racecheck.log"])
def test_a_stage_that_left_nothing_behind_is_a_problem(report, tmp_path, missing):
    left_behind(tmp_path)
    (tmp_path / missing).unlink()
    assert problems(report, tmp_path)[1]


def test_a_case_that_was_not_reached_is_a_problem(report, tmp_path):
    left_behind(tmp_path)
    written = json.loads((tmp_path / "benchmarks.json").read_text()) | {"not_reached": ["ddim_step [1] float32"]}
    (tmp_path / "benchmarks.json").write_text(json.dumps(written))
    assert problems(report, tmp_path)[1] == ["benchmarks: out of time before ddim_step [1] float32"]
