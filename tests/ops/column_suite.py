"""The tests that every op passes, written once: an op's test file subclasses ``ColumnSuite`` and names its samples.

A sample is one call, its tensors in float64. The suite casts them to each dtype, runs the op on every backend that this
process can run, and compares with the reference in float64.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdis
from fastdis.ops import _backends

INTERPRETED = _backends.triton_interpreted()
# Interpreted kernels take tensors of the CPU alone.
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() and not INTERPRETED else ["cpu"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Sample:
    """One call of an op. Floating tensors are differentiated; integer ones and ``options`` are passed as they are."""

    name: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    empty: bool = False
    gradcheck: bool = True  # smooth at this point and small
    slow_in_interpreter: bool = False  # there, only its values and gradients are checked
    interpreted: bool = True  # not too slow even for that

    def floating(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors.items() if t.is_floating_point()}

    def to(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        return {k: (t.to(dtype) if t.is_floating_point() else t).to(device) for k, t in self.tensors.items()}


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of an op that returns one tensor or several."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def outputs_and_gradients(op: Callable[..., Any], tensors: dict[str, Tensor], options: dict[str, Any]) -> dict:
    """The outputs and the gradients of all floating tensors, under fixed dense output gradients."""
    leaves = {k: t.detach().requires_grad_() if t.is_floating_point() else t for k, t in tensors.items()}
    outputs = outputs_of(op(**leaves, **options))
    generator = torch.Generator().manual_seed(7)
    differentiable = [o for o in outputs if o.requires_grad]
    grads = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o) for o in differentiable]
    wanted = {k: t for k, t in leaves.items() if t.is_floating_point()}
    gradients = torch.autograd.grad(differentiable, list(wanted.values()), grads)
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"d{k}": g for k, g in zip(wanted, gradients, strict=True)}


def assert_as_good(actual: dict, exact: dict, in_same_dtype: dict, dtype: torch.dtype, roundings: int) -> None:
    """|ours - exact| <= 2 |reference in that dtype - exact|, plus a few roundings of the largest exact value."""
    for name, wanted in exact.items():
        ours = actual[name]
        assert ours.dtype == in_same_dtype[name].dtype, name
        assert ours.shape == wanted.shape, name
        if wanted.numel() == 0:
            continue
        wanted = wanted.cpu()
        ours, peer = ours.double().cpu(), in_same_dtype[name].double().cpu()
        finite = torch.isfinite(wanted)
        assert torch.equal(torch.isfinite(ours), finite), name
        error = (ours - wanted)[finite].abs()
        allowed = 2 * (peer - wanted)[finite & torch.isfinite(peer)].abs()
        # The reference in float64 is exact for the narrower dtypes; for float64 itself it rounds as well.
        floor = (1000 if dtype == torch.float64 else roundings) * torch.finfo(dtype).eps * wanted[finite].abs()
        largest = max((t.max().item() for t in (allowed,) if t.numel()), default=0.0)
        rounding = floor.max().item() if floor.numel() else 0.0
        worst = error.max().item() if error.numel() else 0.0
        assert worst <= largest + rounding, f"{name}: error {worst:.3g}, allowed {largest:.3g} + {rounding:.3g}"


def runnable_backends(name: str, device: str) -> list[str]:
    """The backends that this process can run, the compiled ones first."""
    if INTERPRETED:
        return ["triton"]
    column = _backends.columns()[name]
    return [b for b in reversed(_backends.BACKENDS) if (b, device) in column.choices]


def suite_of(name: str) -> ColumnSuite:
    """The suite of a registered column, found through the column's test file."""
    module = importlib.import_module(f"test_{name}")
    return next(v for v in vars(module).values() if isinstance(v, type) and getattr(v, "name", None) == name)()


class ColumnSuite:
    """Subclass as ``class TestName(ColumnSuite)`` and define ``op``, ``reference``, ``name`` and ``samples()``."""

    name: str
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    roundings = 4

    @staticmethod
    def samples() -> list[Sample]:
        raise NotImplementedError

    @classmethod
    def generate(cls, metafunc: pytest.Metafunc) -> None:
        """Parametrise over samples, dtypes and backends, as the test's arguments ask."""
        names = metafunc.fixturenames
        if "sample" in names:
            samples = cls.samples()
            if INTERPRETED:
                values = "values" in metafunc.function.__name__
                samples = [s for s in samples if s.interpreted and (values or not s.slow_in_interpreter)]
            if "gradcheck" in metafunc.function.__name__:
                samples = [s for s in samples if s.gradcheck and not s.empty]
            elif "empty" not in metafunc.function.__name__ and "values" not in metafunc.function.__name__:
                samples = [s for s in samples if not s.empty]
            metafunc.parametrize("sample", samples, ids=lambda s: s.name)
        if "backend" in names:
            pairs = [(d, b) for d in DEVICES for b in runnable_backends(cls.name, d)]
            if "values" not in metafunc.function.__name__:
                # The reference is torch's own operations and its own autograd.
                pairs = [(d, b) for d, b in pairs if b != "reference" or runnable_backends(cls.name, d) == [b]]
            metafunc.parametrize(("device", "backend"), pairs)
        elif "device" in names:
            metafunc.parametrize("device", DEVICES)
        if "dtype" in names:
            dtypes = [d for d in DTYPES if not (INTERPRETED and d == torch.bfloat16)]
            metafunc.parametrize("dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))

    def call(self, sample: Sample, backend: str) -> Callable[..., Tensor]:
        return lambda **tensors: type(self).op(**tensors, **sample.options, backend=backend)

    def maps(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Three values of a floating tensor for vmap, the first being the tensor itself."""
        return [tensor, tensor.flip(0) * 0.5, tensor * 2]

    # -- numbers -----------------------------------------------------------------------------------------------

    def test_values_and_gradients(self, sample, dtype, backend, device):
        tensors = sample.to(dtype, device)
        exact = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
        reference = type(self).reference
        actual = outputs_and_gradients(self.call(sample, backend), tensors, {})
        wanted = outputs_and_gradients(reference, exact, sample.options)
        peer = outputs_and_gradients(reference, tensors, sample.options)
        assert_as_good(actual, wanted, peer, dtype, self.roundings)

    def test_poisoned_allocation(self, sample, backend, device, poisoned):
        tensors = sample.to(torch.float32, device)
        for name, value in outputs_and_gradients(self.call(sample, backend), tensors, {}).items():
            assert torch.isfinite(value).all(), name

    def test_gradcheck_first_and_second_order(self, sample, backend, device):
        if INTERPRETED:
            pytest.skip("the interpreter is too slow for finite differences")
        tensors = sample.to(torch.float64, device)
        names = list(sample.floating())
        fixed = {k: t for k, t in tensors.items() if k not in names}
        leaves = tuple(tensors[k].requires_grad_() for k in names)

        def function(*values):
            return self.call(sample, backend)(**dict(zip(names, values, strict=True)), **fixed)

        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)

    def test_second_derivative_where_the_incoming_gradient_needs_none(self, sample, backend, device):
        """``once_differentiable`` would drop these in silence."""

        def second(op):
            leaves = {k: t.requires_grad_() for k, t in sample.to(torch.float64, device).items() if k in names}
            others = {k: t for k, t in sample.to(torch.float64, device).items() if k not in names}
            outputs = [o for o in outputs_of(op(**leaves, **others)) if o.requires_grad]
            weights = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64, device=device).reshape(o.shape)
                       for o in outputs]  # fmt: skip
            first = torch.autograd.grad(outputs, list(leaves.values()), weights, create_graph=True)
            total = sum((g.square() * 0.5).sum() for g in first)
            if not total.requires_grad:
                return [torch.zeros_like(t) for t in leaves.values()]
            return torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)

        names = list(sample.floating())
        wanted = second(lambda **t: type(self).reference(**t, **sample.options))
        for ours, exact in zip(second(self.call(sample, backend)), wanted, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-8 * (1 + exact.abs().max().item()))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_nan_and_infinity_propagate_as_in_the_reference(self, sample, backend, device, value):
        for name in sample.floating():
            tensors = sample.to(torch.float32, device)
            tensors[name][tuple(n // 2 for n in tensors[name].shape)] = value
            ours = outputs_of(self.call(sample, backend)(**tensors))
            reference = outputs_of(type(self).reference(**tensors, **sample.options))
            for output, wanted in zip(ours, reference, strict=True):
                assert torch.equal(torch.isfinite(output), torch.isfinite(wanted)), name
                # An infinite scale may meet an infinity of the other sign when two affine maps fold into one.
                assert torch.isnan(output)[torch.isnan(wanted)].all(), name

    # -- layouts -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
    def test_any_strides(self, sample, backend, device, layout):
        tensors = sample.to(torch.float32, device)
        wanted = outputs_and_gradients(self.call(sample, backend), tensors, {})
        strange = {k: relaid(t, layout) for k, t in tensors.items()}
        ours = outputs_and_gradients(self.call(sample, backend), strange, {})
        for name, value in wanted.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5 * (1 + value.abs().max().item()))

    def test_nothing_is_made_on_another_device(self, sample, monkeypatch):
        """A tensor left on the CPU fails on every GPU: the meta device shows it without one."""
        column = _backends.columns()[self.name]
        backend = next(iter(column.kernels), "reference")
        monkeypatch.setitem(column.choices, (backend, "meta"), backend)
        public = getattr(fastdis, self.name)  # a suite's own may seed
        leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in sample.to(torch.float32, "meta").items()}
        with DevicesSeen() as seen:
            outputs = outputs_of(public(**leaves, **sample.options, backend=backend))
            outputs = [o for o in outputs if o.requires_grad]
            wanted = [t for t in leaves.values() if t.requires_grad]
            torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])
        assert seen.types == {"meta"}

    def test_expanded_output_gradient(self, sample, backend, device):
        leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in sample.to(torch.float64, device).items()}
        wanted = [t for t in leaves.values() if t.requires_grad]

        def gradients(op):
            return torch.autograd.grad(sum(o.sum() for o in outputs_of(op(**leaves)) if o.requires_grad), wanted)

        ours = gradients(self.call(sample, backend))
        exact = gradients(lambda **t: type(self).reference(**t, **sample.options))
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * (1 + b.abs().max().item()))

    def test_inputs_are_left_alone(self, sample, backend, device):
        tensors = sample.to(torch.float32, device)
        before = {k: t.clone() for k, t in tensors.items()}
        outputs_and_gradients(self.call(sample, backend), tensors, {})
        for name, value in before.items():
            assert torch.equal(tensors[name], value), name

    # -- torch's machinery -------------------------------------------------------------------------------------

    def recorded_calls(self, sample, backend, device, relay=None, dtype=torch.float32):
        """The registered ops that one forward and backward of the sample call, with their arguments."""
        column = _backends.columns()[self.name]
        kernels, calls = column.kernels[backend], []

        def recorder(op):
            def record(*arguments):
                calls.append((op, arguments))
                return op(*arguments)

            return record

        column.kernels[backend] = _backends.Kernels(recorder(kernels.forward), recorder(kernels.backward))
        try:
            tensors = sample.to(dtype, device)
            if relay is not None:
                tensors = {k: relaid(t, relay) for k, t in tensors.items()}
            outputs_and_gradients(self.call(sample, backend), tensors, {})
        finally:
            column.kernels[backend] = kernels
        assert [op for op, _ in calls] == [kernels.forward, kernels.backward]
        return calls

    @pytest.mark.parametrize("relay", [None, "transposed"])
    def test_opcheck(self, sample, backend, device, relay):
        for op, arguments in self.recorded_calls(sample, backend, device, relay):
            detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
            # A Triton body cannot be traced without a driver, which the dynamic check would try.
            checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
            if not INTERPRETED:
                checks.append("test_aot_dispatch_dynamic")
            torch.library.opcheck(op, detached, test_utils=checks)

    def test_schema_is_the_one_of_the_fakes(self):
        """Triton's schemas are inferred from the fakes' annotations, C++'s are written in csrc/library.cpp."""
        if _backends.extension is None:
            pytest.skip("the compiled extension is not here")
        module = __import__(f"fastdis.ops.{self.name}", fromlist=["_"])
        for direction in ("forward", "backward"):
            written = getattr(torch.ops.fastdis, f"{self.name}_{direction}").default._schema
            inferred = torch.library.infer_schema(getattr(module, f"_{direction}_fake"), mutates_args=())
            assert str(written).partition("(")[2] == inferred.partition("(")[2]

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_compile_fullgraph(self, sample, backend, device, dynamic):
        if INTERPRETED:
            pytest.skip("torch.compile cannot run interpreted Triton kernels")
        torch.compiler.reset()
        tensors = sample.to(torch.float32, device)
        compiled = torch.compile(self.call(sample, backend), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        wanted = outputs_and_gradients(self.call(sample, backend), tensors, {})
        for name, value in outputs_and_gradients(compiled, tensors, {}).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5 * (1 + value.abs().max().item()))

    def test_func_grad_and_vmap(self, sample, backend, device):
        names = list(sample.floating())
        fixed = {k: t for k, t in sample.to(torch.float64, device).items() if k not in names}
        stacks = {k: torch.stack(self.maps(k, t)) for k, t in sample.to(torch.float64, device).items() if k in names}

        def loss(op, *values):
            outputs = outputs_of(op(**dict(zip(names, values, strict=True)), **fixed))
            return sum(o.square().sum() for o in outputs)

        arguments = tuple(range(len(names)))
        ours = torch.func.grad(lambda *v: loss(self.call(sample, backend), *v), argnums=arguments)
        exact = torch.func.grad(lambda *v: loss(lambda **t: type(self).reference(**t, **sample.options), *v),
                                argnums=arguments)  # fmt: skip
        # All tensors mapped, only the first, all but the first, and along another dimension than the first.
        choices = [(0,) * len(names), (0, *[None] * (len(names) - 1)), (None, *[0] * (len(names) - 1)),
                   (-1, *[0] * (len(names) - 1))]  # fmt: skip
        for dims in choices if len(names) > 1 else choices[:1]:
            values = []
            for name, dim in zip(names, dims, strict=True):
                stack = stacks[name]
                values.append(stack[0] if dim is None else stack if dim == 0 else stack.movedim(0, -1))
            with torch.no_grad():
                mapped = torch.func.vmap(ours, in_dims=dims)(*values)
            for i in range(3):
                at = [stacks[n][0 if d is None else i] for n, d in zip(names, dims, strict=True)]
                for a, b in zip(mapped, exact(*at), strict=True):
                    torch.testing.assert_close(a[i], b, rtol=1e-6, atol=1e-8 * (1 + b.abs().max().item()))

    def test_forward_mode_is_refused(self, sample, backend, device):
        tensors = sample.to(torch.float32, device)
        name = next(iter(sample.floating()))
        with forward_ad.dual_level():
            tensors[name] = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
            with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
                self.call(sample, backend)(**tensors)

    def test_autocast(self, sample, backend, device):
        half = {k: t.bfloat16() if i == 0 and t.is_floating_point() else t
                for i, (k, t) in enumerate(sample.to(torch.float32, device).items())}  # fmt: skip
        if INTERPRETED:
            pytest.skip("the interpreter has no bfloat16")
        with torch.autocast(device, dtype=torch.bfloat16):
            outputs = outputs_of(self.call(sample, backend)(**half))
        reference = outputs_of(type(self).reference(**sample.to(torch.float64, device), **sample.options))
        for output, wanted in zip(outputs, reference, strict=True):
            assert (output.double() - wanted).norm() / (wanted.norm() + 1e-6) < 0.05

    # -- refusals ----------------------------------------------------------------------------------------------

    def test_integer_tensors_are_refused_by_name(self, sample, device):
        for name in sample.floating():
            tensors = sample.to(torch.float32, device)
            tensors[name] = tensors[name].long()
            with pytest.raises(TypeError, match=rf"^{name} has dtype torch.int64; allowed are float32"):
                type(self).op(**tensors, **sample.options)

    def test_other_types_than_tensors_are_refused_by_name(self, sample, device):
        for name in sample.tensors:
            tensors = sample.to(torch.float32, device)
            tensors[name] = tensors[name].tolist()
            with pytest.raises(TypeError, match=rf"^{name} is a \w+; a tensor is needed"):
                type(self).op(**tensors, **sample.options)

    def test_two_devices_are_refused_by_name(self, sample, device):
        for name in list(sample.tensors)[1:]:
            tensors = sample.to(torch.float32, device)
            tensors[name] = tensors[name].to("meta")
            with pytest.raises(ValueError, match=rf"{name} is on meta.*all tensors must be on one device"):
                type(self).op(**tensors, **sample.options)

    def test_unknown_backend_is_refused(self, sample, device):
        with pytest.raises(ValueError, match="backend is 'quantum'; allowed are 'auto', 'reference', 'cpu', 'cuda'"):
            type(self).op(**sample.to(torch.float32, device), **sample.options, backend="quantum")

    def test_backends_that_cannot_serve_here_refuse_and_say_why(self, sample, device):
        served = runnable_backends(self.name, device)
        for backend in _backends.BACKENDS:
            if backend in served or (INTERPRETED and backend != "triton"):
                continue
            with pytest.raises(RuntimeError, match=rf"backend '{backend}' cannot serve {self.name} on {device}.*: \w+"):
                type(self).op(**sample.to(torch.float32, device), **sample.options, backend=backend)


def relaid(tensor: Tensor, layout: str) -> Tensor:
    """The same values behind other strides."""
    if layout == "strided":
        spread = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 99, dtype=tensor.dtype, device=tensor.device)
        spread[..., ::2] = tensor
        return spread[..., ::2]
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    padded = torch.full((tensor.numel() + 3,), 99, dtype=tensor.dtype, device=tensor.device)
    padded[3:] = tensor.reshape(-1)
    return padded[3:].view(tensor.shape)


class DevicesSeen(TorchDispatchMode):
    """The types of devices on which operations leave their results."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.types.update(t.device.type for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


def suite_environment(**variables: str) -> dict[str, str]:
    """The environment for a run of the suites in a process of their own."""
    return {**os.environ, **variables}
