"""Which backend serves an op: one table, made when the op's column registers, that chooses, reports and refuses."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

BACKENDS = ("reference", "cpu", "cuda", "triton")
DEVICES = ("cpu", "cuda")

REMEDY = (
    "reinstall fastdis where a C++ compiler is, with `pip install --no-build-isolation .`, and see `fastdis doctor`"
)


def _load_extension() -> tuple[Any, str | None]:
    """Import ``fastdis._C``, which registers the compiled ops; return it, and why it is absent if it is."""
    try:
        return importlib.import_module("fastdis._C"), None
    except ModuleNotFoundError:
        return None, "fastdis was installed without its compiled extension"
    except ImportError as error:
        return None, f"the compiled extension does not load ({error})"


extension, extension_error = _load_extension()
if extension_error is not None:
    warnings.warn(f"fastdis runs its plain PyTorch reference: {extension_error}; {REMEDY}.", stacklevel=2)


@dataclass(frozen=True)
class Kernels:
    """The two registered ops of a column on one backend."""

    forward: Any
    backward: Any


@dataclass
class Column:
    """An op: its kernels by backend, and for each device type the backend that serves or the reason that none can.

    ``choices[backend, device_type]`` is the name of the backend to use. A pair that is absent cannot be served;
    ``reasons[backend, device_type]`` then says why.
    """

    name: str
    auto: dict[str, tuple[str, ...]]
    kernels: dict[str, Kernels] = field(default_factory=dict)
    choices: dict[tuple[str, str], str] = field(default_factory=dict)
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)

    def choose(self, backend: str, tensor: torch.Tensor) -> str:
        """Name the backend that serves ``backend`` on tensors beside this one.

        Raises
        ------
        ValueError
            If ``backend`` is not a known name.
        RuntimeError
            If the backend asked for by name cannot serve here; never another one in its stead.
        """
        device_type = "cpu" if tensor.is_cpu else tensor.device.type  # the former is cheaper to ask
        chosen = self.choices.get((backend, device_type))
        if chosen is not None:
            return chosen
        if backend == "auto":
            return "reference"
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; allowed are 'auto', {', '.join(map(repr, BACKENDS))}")
        reason = self.reasons.get((backend, device_type), f"it does not run on {device_type} tensors")
        raise RuntimeError(f"backend {backend!r} cannot serve {self.name} on {device_type} tensors here: {reason}")

    def report(self) -> dict[str, dict[str, str]]:
        """For each device type: the backend that ``"auto"`` takes, and why the ones before it were passed over."""
        rows = {}
        for device in DEVICES:
            chosen = self.choices["auto", device]
            passed = self.auto[device][: self.auto[device].index(chosen)]
            why = "; ".join(f"{backend}: {self.reasons[backend, device]}" for backend in passed)
            rows[device] = {"backend": chosen, "reason": why or "first choice"}
        return rows


_columns: dict[str, Column] = {}
_triton_library: torch.library.Library | None = None


def columns() -> dict[str, Column]:
    """Every registered column, by name."""
    return dict(_columns)


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors, as ``TRITON_INTERPRET=1`` asks."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _reason(name: str, backend: str, device: str) -> str | None:
    """Why ``backend`` cannot serve op ``name`` on ``device``, or None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if importlib.util.find_spec(f"fastdis.kernels.{name}") is None:
            return "it has no Triton kernel"
        if device == "cpu" and not triton_interpreted():
            return "Triton runs on GPUs (on CPU tensors only in its interpreter, with TRITON_INTERPRET=1)"
        if device == "cuda" and torch.version.cuda is None:
            return "this torch is built without CUDA"
        return None
    if backend != device:
        return f"the {backend} kernels take {backend} tensors"
    if extension is None:
        return f"{extension_error}; {REMEDY}"
    key = {"cpu": "CPU", "cuda": "CUDA"}[backend]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdis::{name}_forward", key):
        return f"the compiled extension has no {key} kernels (a CPU-only build)" if backend == "cuda" else "not built"
    return None


def _define_triton(name: str, fakes: dict[str, Callable[..., Any]]) -> None:
    """Define ``fastdis_triton::<op>``; the kernels' module is imported at the first call, not before."""
    global _triton_library
    if _triton_library is None:
        _triton_library = torch.library.Library("fastdis_triton", "DEF")

    def lazily(direction: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            return getattr(importlib.import_module(f"fastdis.kernels.{name}"), direction)(*arguments)

        return run

    for direction, fake in fakes.items():
        op = f"{name}_{direction}"
        _triton_library.define(op + torch.library.infer_schema(fake, mutates_args=()))
        _triton_library.impl(op, lazily(direction), "CPU" if triton_interpreted() else "CUDA")


def register(
    name: str,
    *,
    forward_fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    forward_vmap: Callable[..., Any],
    backward_vmap: Callable[..., Any],
    auto_on_cuda: tuple[str, ...] = ("triton", "cuda", "reference"),
) -> Column:
    """Register an op's column.

    Parameters
    ----------
    name
        The op's stem. Its kernels are the registered ops ``<name>_forward`` and ``<name>_backward``.
    forward_fake, backward_fake
        Fake kernels, which allocate what the kernels allocate. Their annotations give the schema of the Triton
        twin, so they must agree with ``csrc/library.cpp``.
    forward_vmap, backward_vmap
        Batching rules, ``rule(op)(info, in_dims, *arguments)``.
    auto_on_cuda
        The order in which ``backend="auto"`` tries backends on CUDA tensors.
    """
    column = Column(name, auto={"cpu": ("cpu", "reference"), "cuda": auto_on_cuda})
    for device in DEVICES:
        for backend in BACKENDS:
            reason = _reason(name, backend, device)
            if reason is None:
                column.choices[backend, device] = backend
            else:
                column.reasons[backend, device] = reason
        column.choices["auto", device] = next(b for b in column.auto[device] if (b, device) in column.choices)

    served = set(column.choices.values())
    namespaces: list[tuple[str, tuple[str, ...]]] = []
    if extension is not None:
        namespaces.append(("fastdis", tuple(b for b in ("cpu", "cuda") if b in served)))
    if "triton" in served:
        _define_triton(name, {"forward": forward_fake, "backward": backward_fake})
        namespaces.append(("fastdis_triton", ("triton",)))
    for namespace, backends in namespaces:
        ops = getattr(torch.ops, namespace)
        kernels = Kernels(getattr(ops, f"{name}_forward").default, getattr(ops, f"{name}_backward").default)
        for op, fake, rule in (
            (kernels.forward, forward_fake, forward_vmap(kernels.forward)),
            (kernels.backward, backward_fake, backward_vmap(kernels.backward)),
        ):
            torch.library.register_fake(op.name(), fake)
            torch.library.register_vmap(op.name(), rule)
        column.kernels.update(dict.fromkeys(backends, kernels))
    _columns[name] = column
    return column
