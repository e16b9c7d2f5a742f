"""Every CUDA file, compiled by nvcc for sm_80 and sm_90, with its resources and its code read; no GPU is needed."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.utils.cpp_extension as cpp_extension

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90")
REGISTERS = 64 * 1024  # of a multiprocessor; a thread's are handed out by eights


class Design(NamedTuple):
    """What a kernel is built for: threads of a block, and blocks that a multiprocessor has registers for.

    Two blocks of 256 threads, each with 64 bytes on their way, are 32 KiB in flight: what hides the latency of the
    memory of an A100 or H100. ``wide`` names the accesses to global memory that are of 16 bytes: (l)oads, (s)tores.
    """

    threads: int = 256
    blocks: int = 2
    wide: str = ""


DESIGNS = {
    "sum_splits": Design(),
    "gradient_fields::sum_parts": Design(),
    "sum_gradient_fields::sum_fields": Design(wide="ls"),
    "sum_gradient_fields::gradients": Design(wide="ls"),
    "ddim_step::step": Design(wide="ls"),
    "ddim_step::gradients": Design(wide="ls"),
    "disdiff_terms::terms": Design(wide="ls"),
    "disdiff_terms::gradients": Design(wide="ls"),
    "gram::multiply_in_registers": Design(128, 2, "l"),
    "gram::multiply_in_tiles": Design(256, 2, "l"),
    "gram::pull_back_in_registers": Design(128, 2, "ls"),
    "gram::pull_back_in_tiles": Design(128, 4, "ls"),
    "isometry_penalty::sample_terms": Design(),
    "isometry_penalty::combine_terms": Design(blocks=1),
    "isometry_penalty::combine_slopes": Design(blocks=1),
    "prototypes::centre_prototypes": Design(),
    "prototypes::pull": Design(wide="ls"),
    "prototype_distances::distances": Design(wide="l"),
    "prototypical_loss::losses": Design(wide="l"),
    "prototypical_loss::reduce_losses": Design(blocks=1),
    "style_modulation::forward_resident": Design(512, 2, "ls"),
    "style_modulation::backward_resident": Design(512, 2, "ls"),
    "style_modulation::piece_moments": Design(wide="l"),
    "style_modulation::merge_moments": Design(),
    "style_modulation::apply": Design(wide="ls"),
    "style_modulation::piece_sums": Design(wide="ls"),
    "style_modulation::merge_sums": Design(),
    "style_modulation::input_gradient": Design(wide="ls"),
    "style_modulation::parameter_gradients": Design(),
    "sums::merge": Design(),
    "tangent_activation::forward_kernel": Design(wide="ls"),
    "tangent_activation::backward_kernel": Design(wide="ls"),
    "tangent_activation::direction_sums": Design(wide="l"),
    "gaussian_kl::per_sample": Design(wide="l"),
    "gaussian_kl::block_sums": Design(wide="l"),
    "gaussian_kl::gradients": Design(wide="ls"),
    "reparameterize::draw": Design(wide="ls"),
    "total_correlation::prepare": Design(wide="s"),
    "total_correlation::log_sums": Design(256, 1, "l"),
    "total_correlation::term_sums": Design(),
    "total_correlation::sweep": Design(512, 1, "ls"),
    "total_correlation::finish": Design(),
}
# On sm_80 two blocks that compute scores would spill.
ONE_BLOCK_ON_SM_80 = re.compile(r"prototypes::pull<.*SoftmaxWeights")
# Kernels that move single elements, where packs do not fit; and those whose packs have four elements in any dtype.
SINGLE_ELEMENTS = re.compile(r"::\w+<[^<,]+, 1[,>]")
FOUR_ELEMENTS_TO_LOAD = re.compile(r"reparameterize::draw|multiply_in_registers<\w+, 16>")
FOUR_ELEMENTS_TO_STORE = re.compile(r"reparameterize::draw|gram::pull_back_in_tiles")


def compiled(source: Path, folder: Path) -> str:
    """Compile for every architecture, to out.o in the folder; return the assembler's report."""
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    targets = [f for a in ARCHITECTURES for f in ("-gencode", f"arch={a.replace('sm', 'compute')},code={a}")]
    result = subprocess.run(
        [NVCC, "-c", str(source), "-o", str(folder / "out.o"), "-std=c++20", "-O3", "-DUSE_CUDA",
         "-DTORCH_TARGET_VERSION=0x020b000000000000", "--threads", "2", "-Xptxas", "-v", *targets, *include],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def demangled(names: list[str]) -> list[str]:
    """C++ names without their return type and namespace."""
    words = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [name.removeprefix("void ").replace("fastdis::", "") for name in words.splitlines()]


def kernel_of(name: str) -> str:
    return re.match(r"[\w:]+", name)[0]


def accesses(code: Path) -> list[tuple[str, Counter]]:
    """Each kernel's name and how often each kind of access to global memory stands in its code, on any architecture."""
    tool = shutil.which("cuobjdump", path=str(Path(NVCC).resolve().parent))
    if tool is None and importlib.util.find_spec("triton") is not None:
        triton = Path(importlib.util.find_spec("triton").origin).parent
        tool = shutil.which("cuobjdump", path=str(triton / "backends" / "nvidia" / "bin"))
    if tool is None:
        return []
    listing = subprocess.run([tool, "-sass", str(code)], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : ", listing)[1:]
    names = demangled([function.split("\n", 1)[0].strip() for function in functions])
    return [(name, Counter(re.findall(r"\b(?:LDG|STG)\.E(?:\.\w+)*?(?:\.(?:64|128))?\b", function)))
            for name, function in zip(names, functions, strict=True)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_cuda_files_compile_within_their_budgets(source, tmp_path):
    report = re.findall(
        r"Compiling entry function '(\S+)' for '(sm_\d+)'[\s\S]*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r"[\s\S]*?Used (\d+) registers",
        compiled(source, tmp_path),
    )
    assert {architecture for _, architecture, *_ in report} == set(ARCHITECTURES)
    for name, row in zip(demangled([row[0] for row in report]), report, strict=True):
        _, architecture, stored, loaded, registers = row
        assert (stored, loaded) == ("0", "0"), f"{name} spills on {architecture}"
        design = DESIGNS[kernel_of(name)]
        blocks = 1 if architecture == "sm_80" and ONE_BLOCK_ON_SM_80.search(name) else design.blocks
        taken = -(-int(registers) // 8) * 8 * design.threads * blocks
        assert taken <= REGISTERS, f"{registers} registers: no {blocks} blocks of {name} on {architecture}"
    for name, counts in accesses(tmp_path / "out.o"):
        wide = "" if SINGLE_ELEMENTS.search(name) else DESIGNS[kernel_of(name)].wide
        for letter, access, narrow in (("l", "LDG", FOUR_ELEMENTS_TO_LOAD), ("s", "STG", FOUR_ELEMENTS_TO_STORE)):
            halves = narrow.search(name) and re.search("half|bfloat16", name)
            width = "64" if halves else "128"
            found = sum(n for what, n in counts.items() if what.startswith(access) and what.endswith(width))
            assert letter not in wide or found > 0, f"{name} has no {width}-bit {access}: {dict(counts)}"


def test_every_kernel_has_a_design():
    kernels = set()
    for path in (ROOT / "csrc/cuda").iterdir():
        namespace = re.search(r"^namespace fastdis(?:::)?([\w:]*) \{$", path.read_text(), re.MULTILINE)[1]
        found = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", path.read_text())
        kernels |= {f"{namespace}::{name}".removeprefix("::") for name in found}
    assert kernels == set(DESIGNS)
