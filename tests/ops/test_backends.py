"""The registry, the package's report, and the column rule: know an op's name and you know its files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastdis
from fastdis.ops import _backends

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", _backends.columns())
def test_every_column_is_whole(name):
    for path in (
        f"csrc/cpu/{name}.cpp",
        f"csrc/cuda/{name}.cu",
        f"kernels/{name}.py",
        f"fastdis/ops/{name}.py",
        f"fastdis/reference/{name}.py",
        f"tests/ops/test_{name}.py",
        f"benchmarks/ops/bench_{name}.py",
    ):
        assert (ROOT / path).is_file(), path
    assert hasattr(fastdis, name)
    schemas = (ROOT / "csrc/library.cpp").read_text()
    for direction in ("forward", "backward"):
        assert f'"{name}_{direction}(' in schemas
        for source in (f"csrc/cpu/{name}.cpp", f"csrc/cuda/{name}.cu"):
            assert f'm.impl("{name}_{direction}"' in (ROOT / source).read_text(), source


def test_every_test_file_of_a_column_has_a_suite():
    for name in _backends.columns():
        source = (ROOT / f"tests/ops/test_{name}.py").read_text()
        assert re.search(rf'\(ColumnSuite\):\n    name = "{name}"', source), name


def test_no_two_columns_know_of_each_other_in_the_registry():
    source = Path(_backends.__file__).read_text()
    assert not [name for name in _backends.columns() if name in source]


def test_build_info_names_a_backend_and_a_reason_for_every_op():
    info = fastdis.build_info()
    assert set(info["ops"]) == set(_backends.columns())
    for devices in info["ops"].values():
        assert set(devices) == {"cpu", "cuda"}
        for row in devices.values():
            assert row["backend"] in _backends.BACKENDS
            assert row["reason"]
    assert info["versions"]["fastdis"] == fastdis.__version__


def run(code, **variables):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


def test_the_instruction_set_in_use_can_be_lowered_and_an_unknown_one_is_refused():
    if _backends.extension is None:
        pytest.skip("the compiled extension is not here")
    code = "import fastdis; print(fastdis.build_info()['extension']['isa_in_use'])"
    assert run(code, FASTDIS_ISA="baseline").stdout.strip() == "baseline"
    refused = run(code, FASTDIS_ISA="avx9000")
    assert refused.returncode != 0
    assert "FASTDIS_ISA is 'avx9000'; this build on this machine can run baseline" in refused.stderr


def test_without_the_extension_the_reference_runs_and_one_warning_names_the_remedy():
    code = """
import sys, warnings
sys.modules["fastdis._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastdis, torch
messages = [str(w.message) for w in caught if "fastdis" in str(w.message)]
assert len(messages) == 1, messages
assert "reinstall fastdis where a C++ compiler is" in messages[0], messages
x = torch.randn(2, 4, 3, 3, requires_grad=True)
fastdis.style_modulation(x, torch.ones(2, 4), torch.zeros(2, 4), groups=2).sum().backward()
try:
    fastdis.style_modulation(x, torch.ones(2, 4), torch.zeros(2, 4), backend="cpu")
except RuntimeError as error:
    assert "without its compiled extension" in str(error), error
else:
    raise AssertionError("backend='cpu' gave way in silence")
assert fastdis.build_info()["ops"]["style_modulation"]["cpu"]["backend"] == "reference"
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_importing_fastdis_imports_neither_triton_nor_the_extras():
    extras = ("triton", "click", "rich", "matplotlib", "sklearn")
    code = f"import sys, fastdis; print([m for m in {extras} if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"


@pytest.mark.parametrize("isa", ["baseline", "x86-64-v3"])
def test_columns_on_older_instruction_sets(isa):
    """Every variant of the CPU kernels that this machine can run, not only the one it would choose."""
    if _backends.extension is None:
        pytest.skip("the compiled extension is not here")
    info = _backends.extension.build_info()
    levels = info["isa_compiled"]
    if isa not in levels or levels.index(isa) >= levels.index(info["isa_highest_here"]):
        pytest.skip(f"{isa} is not a lower level of this build on this machine")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/ops", "tests/metrics", "tests/spectral/test_neighbourhoods.py",
         "-p", "no:cacheprovider", "-k", "(test_values_and_gradients and -cpu-float) or too_large_for_a_cache or "
         "compiled_and_numpy or segment_spread or test_neighbourhoods"],
        cwd=ROOT, env={**os.environ, "FASTDIS_ISA": isa}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(r"[1-9]\d+ passed", result.stdout), result.stdout[-300:]
