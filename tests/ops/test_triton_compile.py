"""Every Triton kernel, compiled ahead of time for sm_80 and sm_90 as real calls would launch it; no GPU is needed.

The launches of each column's samples are recorded instead of run; their arguments give the signatures and the constants
to compile for. A new column is compiled by being registered: its suite's samples are found through its test file.
"""

import importlib

import pytest
import torch
from column_suite import INTERPRETED, ColumnSuite
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


def suite_of(name: str) -> ColumnSuite:
    module = importlib.import_module(f"test_{name}")
    return next(v for v in vars(module).values() if isinstance(v, type) and getattr(v, "name", None) == name)()


def type_of(value) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def launches_of(name: str, dtype: torch.dtype, monkeypatch) -> dict:
    """Every distinct launch in the forward and backward passes of the samples: what to compile, by a key."""
    from triton.runtime.jit import JITFunction

    found = {}

    def record(kernel, *arguments, grid, warmup=False, **keywords):
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        constexpr = {p.name for p in kernel.params if p.is_constexpr}
        constants = {k: values[k] for k in kernel.arg_names if k in constexpr or values[k] is None}
        signature = {k: "constexpr" if k in constants else type_of(values[k]) for k in kernel.arg_names}
        options = {k: v for k, v in values.items() if k not in kernel.arg_names}
        key = (kernel.__name__, str(signature), str(constants), str(options))
        found[key] = (kernel, signature, constants, options)

    monkeypatch.setattr(JITFunction, "run", record)
    module, suite = importlib.import_module(f"fastdis.kernels.{name}"), suite_of(name)
    for sample in suite.samples():
        if sample.empty:
            continue
        calls = suite.recorded_calls(sample, "cpu", "cpu", dtype=dtype)
        for (_, arguments), run in zip(calls, (module.forward, module.backward), strict=True):
            run(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))
    return found


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", _backends.columns())
def test_triton_kernels_compile(name, dtype, capability, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launches = launches_of(name, dtype, monkeypatch)
    assert launches
    # Of the launches of a kernel with one signature, the one with the largest blocks: the others differ in shapes only.
    chosen = {}
    for (kernel_name, signature, *_), launch in launches.items():
        size = sum(v for v in launch[2].values() if isinstance(v, int))
        if size >= chosen.get((kernel_name, signature), (0,))[0]:
            chosen[kernel_name, signature] = (size, launch)
    for _, (kernel, signature, constants, options) in chosen.values():
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()}),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        assert compiled.asm["cubin"], kernel.__name__
        assert compiled.metadata.shared <= SHARED_MEMORY, kernel.__name__
