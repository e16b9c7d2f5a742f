"""The Triton kernels, run by Triton's interpreter in processes of their own: every column suite, and interpreted.py."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from column_suite import INTERPRETED, suite_environment

from fastdis.ops import _backends

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own process"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


VALUES = "test_values_and_gradients and float32"  # of every sample: what make test has time for


def passed_in_the_interpreter(file: str, choice: str) -> list[str]:
    """Run the chosen tests of a file and return the names of those that passed; fails where any fails."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__).with_name(file)), "-k", choice, "-vv", "-x",
         "-p", "no:cacheprovider"],
        cwd=Path(__file__).parents[2], env=suite_environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    return re.findall(r"::(test_\S+) PASSED", result.stdout)


@pytest.mark.parametrize("name", _backends.columns())
def test_values_and_gradients_in_the_interpreter(name):
    passed = passed_in_the_interpreter(f"test_{name}.py", f"triton and {VALUES}")
    assert len(passed) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", _backends.columns())
def test_all_else_of_every_suite_in_the_interpreter(name):
    passed = passed_in_the_interpreter(f"test_{name}.py", f"(triton or refused) and not ({VALUES})")
    values = [test for test in passed if test.startswith("test_values_and_gradients")]
    for dtype in ("float64", "float16"):
        assert len([test for test in values if re.search(rf"\b{dtype}\b", test)]) >= 5, dtype
    assert len(passed) > len(values) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", _backends.columns())
def test_every_tile_that_tuning_may_try(name):
    assert passed_in_the_interpreter("interpreted.py", f"every_tile_is_right and {name}")


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    passed_in_the_interpreter("interpreted.py", "beyond_32_bits")
