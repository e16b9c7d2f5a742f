"""What a run was made on: device, driver, versions, and the sources by their commit and their digest."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import fastdis

ROOT = Path(__file__).parents[2]
SOURCES = ("csrc", "kernels", "fastdis", "benchmarks", "tests/ops", "setup.py")


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def digest() -> str:
    """SHA-256 of all sources: names the tree where no git is."""
    found = hashlib.sha256()
    for folder in SOURCES:
        path = ROOT / folder
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".sh"):
                found.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def devices() -> list[dict]:
    rows = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        rows.append({
            "name": p.name, "architecture": f"sm_{p.major}{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory, "l2_bytes": p.L2_cache_size,
        })  # fmt: skip
    return rows


def environment() -> dict:
    state = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,utilization.gpu"
    nvcc = output_of("nvcc", "--version") or output_of("/usr/local/cuda/bin/nvcc", "--version")
    return {
        "devices": devices(),
        "nvidia_smi": output_of("nvidia-smi", f"--query-gpu={state}", "--format=csv"),
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "torch_cuda": torch.version.cuda,
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "commit": output_of("git", "rev-parse", "HEAD"),
        "changed": bool(output_of("git", "status", "--porcelain", "--untracked-files=no")),
        "sources_sha256": digest(),
        "fastdis": fastdis.build_info(),
    }


if __name__ == "__main__":
    found = environment()
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
