"""The kernels of tangent_activation on the CPU against the reference in float64."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from harness import DTYPES, TOLERANCES, Arena, assert_near, call, kernels_of, launched

from fastdis import reference
from fastdis.reference.tangent_activation import ACTIVATIONS

SOURCE = "host_tangent_activation.cpp"
FILES = ("sums.cuh", "tangent_activation.cu")
PARAMETERS = {"leaky_relu": 0.2, "elu": 0.7, "softplus": 1.5}
NAMES = tuple(ACTIVATIONS)
PIECEWISE_LINEAR = ("none", "relu", "leaky_relu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*size, dtype=torch.float64):
    return torch.randn(size, dtype=torch.float64).to(dtype)


def tangent_activation(library, rows, directions, bias, grads, activation, multiprocessors=4, **arena):
    """Return the output, drows, ddirections and dbias of the kernels; without tangents' gradient no ddirections."""
    shared = directions is not None
    tangents = len(directions) if shared else len(rows) - 1
    batch, channels, *size = rows.shape[1:]
    grad_primal, grad_tangents = grads
    with Arena(library, **arena) as memory:
        rows_, directions_, bias_ = memory.copy(rows), memory.copy(directions), memory.copy(bias)
        grad_primal_, grad_tangents_ = memory.copy(grad_primal), memory.copy(grad_tangents)
        out = memory.empty((1 + tangents, *rows.shape[1:]), rows.dtype)
        drows = memory.empty(rows.shape, rows.dtype)
        ddirections, dbias = (None if t is None else memory.empty(t.shape, t.dtype) for t in (directions, bias))
        sizes = [ctypes.c_int64(n) for n in (batch, channels, torch.Size(size).numel(), tangents)]
        rest = [int(shared), NAMES.index(activation), PARAMETERS.get(activation, 0.0), multiprocessors]
        results = (out, drows[0], drows[1:], ddirections, dbias)
        sources = (rows_[0], directions_ if shared else rows_[1:], bias_)
        call(library.tangent_activation, 0, DTYPES[rows.dtype], None, None, *sources, *results, *sizes, *rest)
        if activation in PIECEWISE_LINEAR:  # nothing else may be read
            sources = (memory.copy(out[0]), None, None)
        grads_ = (grad_primal_, grad_tangents_)
        call(library.tangent_activation, 1, DTYPES[rows.dtype], *grads_, *sources, *results, *sizes, *rest)
        if grad_tangents is None:
            ddirections = None
        return [None if t is None else t.clone() for t in (out, drows, ddirections, dbias)]


def check(library, shape, tangents, dtype, activation, *, shared, biased, given=(True, True), **options):
    rows = normal(1 if shared else 1 + tangents, *shape, dtype=dtype)
    directions = normal(tangents, *shape[1:], dtype=dtype) if shared else None
    bias = normal(shape[1], dtype=dtype) if biased else None
    grads = [normal(*shape, dtype=dtype), normal(tangents, *shape, dtype=dtype)]
    leaves = [None if t is None else t.double().requires_grad_() for t in (rows, directions, bias)]
    parameter = PARAMETERS.get(activation, 0.0)
    output = reference.tangent_activation(*leaves, activation=activation, parameter=parameter)
    grad = torch.cat([grads[0].unsqueeze(0) * given[0], grads[1] * given[1]]).double()
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(output, present, grad, materialize_grads=True))
    expected = [output.detach(), *(None if leaf is None else next(gradients) for leaf in leaves)]
    if not given[1]:
        expected[2] = None
    grads = [g if there else None for g, there in zip(grads, given, strict=True)]
    actual = tangent_activation(library, rows, directions, bias, grads, activation, **options)
    for name, ours, exact in zip(("output", "drows", "ddirections", "dbias"), actual, expected, strict=True):
        if exact is None:
            assert ours is None
        else:
            assert_near(ours, exact, TOLERANCES[dtype], f"{name} of {activation} {shape}")


# Shapes [B, C, *] and K: whole packs, a bit more and a bit less; one channel in several packs and the other way round.
CASES = [
    ((1, 1), 1),
    ((3, 5), 2),
    ((2, 8), 0),
    ((3, 3, 5, 5), 1),
    ((2, 16, 2, 3), 5),
    ((70, 16), 3),
    ((9, 4, 33), 4),
    ((2, 3, 344), 6),
]


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_reference(library, activation, dtype):
    options = itertools.cycle(itertools.product((False, True), (False, True)))
    for index, (shape, tangents) in enumerate(CASES):
        for _ in range(3):  # so that the options meet every case in turn
            shared, biased = next(options)
            check(
                library,
                shape,
                tangents,
                dtype,
                activation,
                shared=shared,
                biased=biased,
                multiprocessors=(1, 200)[index % 2],
                at_end=index % 3 != 0,
                reversed_order=index % 2 == 1,
            )


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matches_reference_in_low_precision(library, activation, dtype):
    for shared, biased in itertools.product((False, True), (False, True)):
        for shape, tangents in (((5, 24), 3), ((3, 2, 41), 2)):
            check(library, shape, tangents, dtype, activation, shared=shared, biased=biased, shifted=biased)


@pytest.mark.parametrize("given", [(True, False), (False, True)])
@pytest.mark.parametrize("shared", [False, True])
def test_a_gradient_may_be_missing(library, given, shared):
    for activation in NAMES:
        check(library, (3, 4, 5), 3, torch.float64, activation, shared=shared, biased=True, given=given)


@pytest.mark.parametrize("shared", [False, True])
def test_nan_and_inf_pass_as_in_the_reference(library, shared):
    for activation, which in itertools.product(NAMES, range(2)):
        rows = normal(1 if shared else 3, 2, 8, dtype=torch.float32)
        directions = normal(2, 8, dtype=torch.float32) if shared else None
        target = rows[0, 1] if which == 0 else directions[1] if shared else rows[2, 1]
        target[:4] = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0])
        parameter = PARAMETERS.get(activation, 0.0)
        grads = (torch.ones(2, 8), torch.ones(2, 2, 8))
        leaves = [None if t is None else t.double() for t in (rows, directions)]
        expected = reference.tangent_activation(*leaves, activation=activation, parameter=parameter)
        output, *_ = tangent_activation(library, rows, directions, None, grads, activation)
        torch.testing.assert_close(
            output.double(), expected, equal_nan=True, rtol=1e-5, atol=1e-5, msg=lambda m, a=activation: f"{a}: {m}"
        )


def test_a_batch_in_many_pieces(library):
    for activation, shared in itertools.product(("relu", "silu"), (False, True)):
        check(library, (1100, 3), 2, torch.float64, activation, shared=shared, biased=True, multiprocessors=64)
        check(library, (300, 5, 7), 2, torch.float32, activation, shared=shared, biased=True, multiprocessors=64)


def test_no_kernel_is_left_out(library):
    launched(library)
    check(library, (3, 5), 2, torch.float32, "silu", shared=True, biased=True)
    assert launched(library) == kernels_of(*FILES)


def test_beyond_32_bits(library):
    shape, tail, dtype = (3, 1, 4, 2**28 + 8), 256, torch.bfloat16
    with Arena(library, window=2) as memory:
        rows, grad, out, drows = (memory.empty(shape, dtype) for _ in range(4))
        bias, dbias = memory.copy(normal(4, dtype=dtype)), memory.empty((4,), dtype)
        for tensor in (rows, grad):
            tensor[:, :, -1, -tail:] = normal(3, 1, tail, dtype=dtype)
        sizes = [ctypes.c_int64(n) for n in (1, *shape[2:], 2)]
        rest = [0, NAMES.index("silu"), 0.0, 4]
        arrays = (rows[0], rows[1:], bias, out, drows[0], drows[1:], None, None)
        call(library.tangent_activation, 0, DTYPES[dtype], None, None, *arrays, *sizes, *rest)
        arrays = (grad[0], grad[1:], rows[0], rows[1:], bias, out, drows[0], drows[1:], None, dbias)
        call(library.tangent_activation, 1, DTYPES[dtype], *arrays, *sizes, *rest)
        leaf = rows[:, :, -1:, -tail:].double().requires_grad_()
        exact = reference.tangent_activation(leaf, None, bias[-1:].double(), activation="silu")
        (gradient,) = torch.autograd.grad(exact, leaf, grad[:, :, -1:, -tail:].double())
        assert_near(out[:, :, -1:, -tail:], exact.detach(), TOLERANCES[dtype], "out")
        assert_near(drows[:, :, -1:, -tail:], gradient, TOLERANCES[dtype], "drows")
