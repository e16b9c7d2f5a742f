"""Every CUDA file, compiled by nvcc for sm_80 and sm_90, with its resource report read; no GPU is needed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch.utils.cpp_extension as cpp_extension

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_cuda_files_compile_without_spills(source, tmp_path):
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    architectures = [f for cc in (80, 90) for f in ("-gencode", f"arch=compute_{cc},code=sm_{cc}")]
    result = subprocess.run(
        [NVCC, "-c", str(source), "-o", str(tmp_path / "out.o"), "-std=c++20", "-O3", "-DUSE_CUDA",
         "-DTORCH_TARGET_VERSION=0x020b000000000000", "--threads", "2", "-Xptxas", "-v", *architectures, *include],
        env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    report = re.findall(
        r"Compiling entry function '(\S+)' for '(sm_\d+)'[\s\S]*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        result.stderr,
    )
    assert {architecture for _, architecture, *_ in report} == {"sm_80", "sm_90"}
    assert not [row for row in report if int(row[2]) or int(row[3])]
