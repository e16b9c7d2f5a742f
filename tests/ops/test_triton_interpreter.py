"""Every column suite on the Triton kernels, run by Triton's interpreter in a process of its own."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from column_suite import INTERPRETED, suite_environment

from fastdis.ops import _backends


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own process")
@pytest.mark.parametrize("name", _backends.columns())
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_suite_in_the_interpreter(name):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__).with_name(f"test_{name}.py")), "-k", "triton or refused",
         "-p", "no:cacheprovider", "-x"],
        cwd=Path(__file__).parents[2], env=suite_environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    assert re.search(r"[1-9]\d+ passed", result.stdout), result.stdout[-300:]
