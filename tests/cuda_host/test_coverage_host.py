"""Which files the tests of this folder cover."""

from pathlib import Path

from harness import CUDA, HERE


def test_every_file_with_kernels_is_named_by_a_test_that_runs_them_all():
    with_kernels = {path.name for path in CUDA.iterdir() if "__global__" in path.read_text()}
    named = set()
    for path in Path(HERE).glob("test_*_host.py"):
        for line in path.read_text().splitlines():
            if line.startswith("FILES = "):
                named |= set(eval(line.removeprefix("FILES = ")))
    assert named == with_kernels
