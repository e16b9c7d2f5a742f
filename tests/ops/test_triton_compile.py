"""Every Triton kernel, compiled ahead of time for sm_80 and sm_90 as real calls would launch it; no GPU is needed.

The launches of each column's samples are recorded instead of run; their arguments give the signatures and the constants
to compile for. A new column is compiled by being registered: its suite's samples are found through its test file.
"""

import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from column_suite import DTYPES, INTERPRETED, suite_of
from torch import Tensor

from fastdis.ops import _backends

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled"),
    pytest.mark.skipif(_backends.extension is None, reason="calls are recorded on the compiled CPU kernels"),
]

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16",
            torch.int64: "*i64", torch.int32: "*i32"}  # fmt: skip
SHARED_MEMORY = 99 * 1024  # what a block may have on sm_86 and sm_89, the least of the architectures since sm_80
REGISTERS = 64 * 1024  # of a multiprocessor, in all of them
WARP = 32
# Bytes that a thread may spill: none, but for these kernels. In them the assembler puts a register or two aside before
# a loop and takes them back behind it, which brings the others down to the next step of occupancy: 56, 64, 72 or 128.
SPILL_BUDGET = {
    ("_center_kernel", torch.float64): 4,
    ("_combine_kernel", torch.float64): 4,
    ("_distances_kernel", torch.float64): 4,
    ("prototypical_loss._gradient_kernel", torch.float64): 8,
    ("prototypical_loss._gradient_kernel", torch.float16): 4,
    ("prototypical_loss._gradient_kernel", torch.bfloat16): 4,
    ("tangent_activation._forward_kernel", torch.float64): 4,
}


def type_of(value) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def specialised(kernel, values: dict) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes, as the launcher derives them from the arguments.

    Ones are constants. Pointers, allocated by torch, and multiples of 16 allow for wide accesses.
    """
    constexpr = {p.name for p in kernel.params if p.is_constexpr}
    constants, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in constexpr or value is None or (type(value) is int and value == 1):
            constants[name] = value
        elif isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    signature = {name: "constexpr" if name in constants else type_of(values[name]) for name in kernel.arg_names}
    return signature, constants, attributes


def launches_of(name: str, dtype: torch.dtype, monkeypatch, interpreted: bool = False) -> dict:
    """Every distinct launch in the forward and backward passes of the samples: what to compile, by a key.

    Of all samples, or of those alone that the interpreter runs too.
    """
    from triton.runtime.jit import JITFunction

    found = {}

    def record(kernel, *arguments, grid, warmup=False, **keywords):
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        signature, constants, attributes = specialised(kernel, values)
        options = {k: v for k, v in values.items() if k not in kernel.arg_names}
        key = (kernel.__name__, str(signature), str(constants), str(options), str(attributes))
        found[key] = (kernel, signature, constants, attributes, options)

    monkeypatch.setattr(JITFunction, "run", record)
    module, suite = importlib.import_module(f"fastdis.kernels.{name}"), suite_of(name)
    for sample in suite.samples():
        if sample.empty or (interpreted and not sample.interpreted):
            continue
        calls = suite.recorded_calls(sample, "cpu", "cpu", dtype=dtype)
        for (_, arguments), run in zip(calls, (module.forward, module.backward), strict=True):
            run(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))
    return found


def largest(launches: dict) -> Iterator[tuple]:
    """Of the launches of a kernel with one signature, the one with the largest blocks: the others differ in shapes."""
    chosen = {}
    for (kernel_name, *_), launch in launches.items():
        _, signature, constants, _, _ = launch
        key = (
            kernel_name,
            *(("constant",) if v == "constexpr" and not k.isupper() else v for k, v in signature.items()),
        )
        size = sum(v for k, v in constants.items() if k.startswith("BLOCK"))
        if size >= chosen.get(key, (0,))[0]:
            chosen[key] = (size, launch)
    return (launch for _, launch in chosen.values())


def compiled(launch: tuple, capability: int):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, attributes, options = launch
    constexprs = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(kernel, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it spills."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage.stdout)[1]) for word in ("REG", "STACK"))
    if stack == 0:
        return registers, 0
    # A stack is also what a subroutine of a 64-bit division takes; the assembler tells which.
    ptx = folder / "kernel.ptx"
    ptx.write_text(kernel.asm["ptx"])
    architecture = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
    report = subprocess.run([tool("ptxas"), "-v", f"--gpu-name={architecture}", str(ptx), "-o", str(cubin)],
                            capture_output=True, text=True, check=True)  # fmt: skip
    return registers, sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", report.stderr))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", _backends.columns())
def test_triton_kernels_compile_within_their_budgets(name, dtype, capability, monkeypatch, tmp_path):
    launches = launches_of(name, dtype, monkeypatch)
    assert launches
    for launch in largest(launches):
        kernel = compiled(launch, capability)
        what = f"{launch[0].__name__} {launch[2]}"
        registers, spilled = resources(kernel, tmp_path)
        assert kernel.metadata.shared <= SHARED_MEMORY, what
        assert registers * WARP * kernel.metadata.num_warps <= REGISTERS, what
        own = launch[0].__name__
        budget = SPILL_BUDGET.get((own, dtype), SPILL_BUDGET.get((f"{name}.{own}", dtype), 0))
        assert spilled <= budget, f"{spilled} bytes: {what}"


@pytest.mark.slow
@pytest.mark.parametrize("name", _backends.columns())
def test_every_tile_that_tuning_may_try_compiles(name, monkeypatch):
    from fastdis.kernels import launch

    monkeypatch.setattr(launch, "tuning", True)
    monkeypatch.setattr(launch, "_fastest", {})
    for tiled in launches_of(name, torch.float32, monkeypatch, interpreted=True).values():
        assert compiled(tiled, 90).metadata.shared <= SHARED_MEMORY, f"{tiled[0].__name__} {tiled[2]}"


def test_the_interpreter_meets_every_kernel(monkeypatch):
    from triton.runtime.jit import JITFunction

    import fastdis.kernels

    launched = set()
    for name in _backends.columns():
        for kernel, *_ in launches_of(name, torch.float32, monkeypatch, interpreted=True).values():
            launched.add((kernel.fn.__module__, kernel.fn.__name__))
    kernels = set()
    for path in Path(fastdis.kernels.__file__).parent.glob("*.py"):
        module = importlib.import_module(
            f"fastdis.kernels.{path.stem}" if path.stem != "__init__" else "fastdis.kernels"
        )
        functions = [f.fn for f in vars(module).values() if isinstance(f, JITFunction)]
        # Functions with other names are called by kernels.
        kernels |= {(f.__module__, f.__name__) for f in functions if f.__name__.endswith("_kernel")}
    assert len(kernels) > 25
    assert launched == kernels
