"""The claim of the spectral method, on a small scale: what is written, what is not computed again, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastdis.cli import main
from fastdis.cli.spectral_claim import CASES, METHODS

SMALL = ["--seeds", "1", "--steps", "20", "--points", "400"]
TORI = ["--manifold", "flat torus, d=2", "--manifold", "flat torus, d=4"]


def reproduce(out, *options):
    return main(["reproduce", "spectral", "--out", str(out), *SMALL, *options])


def test_there_are_enough_manifolds():
    isometric = [case for case in CASES if case.identifiable]
    assert len(isometric) >= 8
    assert {case.manifold.dimension for case in isometric} >= {2, 8}
    assert len(CASES) > len(isometric)
    assert len({case.name for case in CASES}) == len(CASES)


def test_results_picture_and_table(tmp_path, capsys):
    out = tmp_path / "run"
    assert reproduce(out, *TORI) == 0
    table = capsys.readouterr().out
    assert all(method in table for method in METHODS)
    results = json.loads((out / "results.json").read_text())
    scores = {(run["manifold"], name): found for run in results["runs"] for name, found in run["scores"].items()}
    assert {name for _, name in scores} == set(METHODS)
    assert {name for name, _ in scores} == {"flat torus, d=2", "flat torus, d=4, Gaussian"}
    for found in scores.values():
        assert set(found) == {"mcc", "mcc_spearman", "r2", "local_isometry"}
        assert all(0 <= value <= 1 for value in found.values())
    for method in ("HLLE + ICA", "LTSA + ICA"):
        assert scores["flat torus, d=2", method]["mcc"] > 0.99
        assert scores["flat torus, d=2", method]["local_isometry"] > 0.95
        assert scores["flat torus, d=4, Gaussian", method]["mcc"] < 0.95
    with np.load(out / "codes.npz") as codes:
        shown, latents = codes["flat torus, d=2|HLLE + ICA"], codes["flat torus, d=2|latents"]
        for k in range(2):
            assert np.corrcoef(shown[:, k], latents[:, k])[0, 1] > 0.99
    assert (out / "recovery.png").read_bytes().startswith(b"\x89PNG")

    # Once more: nothing is computed again, and more seeds only add to what is there.
    before = (out / "results.json").read_bytes()
    assert reproduce(out, *TORI) == 0
    assert (out / "results.json").read_bytes() == before
    assert reproduce(out, *TORI, "--spectral-only", "--seeds", "2", "--jobs", "2") == 0
    assert len(json.loads((out / "results.json").read_text())["runs"]) == len(results["runs"]) + 4
    capsys.readouterr()
    # A table of one seed has nothing of the second: all deviations are 0.
    assert reproduce(out, *TORI) == 0
    again = capsys.readouterr().out
    assert "of 1 seeds" in again
    assert again.count("± 0.000") == again.count("±") - 1 == 2 * len(METHODS)


def test_results_of_other_settings_are_not_mixed(tmp_path, capsys):
    assert reproduce(tmp_path, "--manifold", "Swiss", "--spectral-only", "--points", "300") == 0
    before = (tmp_path / "results.json").read_bytes()
    assert reproduce(tmp_path, "--manifold", "Swiss", "--spectral-only", "--steps", "21") == 1
    assert "results of other settings" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == before
    (tmp_path / "results.json").write_text("[]")
    assert reproduce(tmp_path, "--manifold", "Swiss") == 1
    assert "cannot be read as earlier results" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--manifold", "sphere"], ["--seeds", "0"], ["--points", "3"]])
def test_options_that_are_wrong(tmp_path, options, capsys):
    assert reproduce(tmp_path / "run", *options) in (1, 2)
    _, err = capsys.readouterr()
    assert err.startswith("fastdis: ")
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("mine")
    assert reproduce(path) == 1
    assert "is a file" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_without_the_extra(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("fastdis.spectral", "fastdis.cli.spectral_claim"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert reproduce(tmp_path / "run") == 1
    assert "pip install 'fastdis[spectral]'" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_no_process_outlives_a_killed_run(tmp_path):
    command = [sys.executable, "-m", "fastdis.cli", "reproduce", "spectral", "--out", str(tmp_path), "--jobs", "2"]
    run = subprocess.Popen([*command, "--steps", "100000"], stderr=subprocess.DEVNULL)
    workers: set[int] = set()
    try:
        wait_for(lambda: (tmp_path / "results.json").exists())
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        workers = {int(child) for child in children}
        assert len(workers) >= 2
    finally:
        run.kill()
        run.wait()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def wait_for(condition):
    """Wait until it holds; a minute is more than any machine needs."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
