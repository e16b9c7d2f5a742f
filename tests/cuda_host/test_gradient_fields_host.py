"""The kernels of sum_gradient_fields, ddim_step and disdiff_terms on the CPU against the references in float64."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from harness import DTYPES, TOLERANCES, Arena, assert_near, call, kernels_of, launched, statistics_dtype

from fastdis import reference

SOURCE = "host_gradient_fields.cpp"
FILES = ("ddim_step.cu", "disdiff_terms.cu", "gradient_fields.cuh", "sum_gradient_fields.cu")

# Batch, factors, length, multiprocessors: few of the latter make large blocks, many make small ones. A warp takes 32
# packs of 2, 4 or 8 elements, or of 1 where the length is no multiple of that; a block at most 8 warps; the products 4
# times that.
SHAPES = [
    (1, 1, 1, 4),
    (2, 3, 7, 200),
    (3, 5, 64, 4),
    (2, 6, 22, 4),
    (2, 4, 257, 1),
    (1, 9, 1032, 1),
    (2, 2, 2056, 1),
    (1, 2, 8200, 1),
    (1, 8, 1031, 4),
    (2, 0, 24, 4),
    (0, 3, 16, 4),
    (2, 3, 0, 4),
]
LOW_PRECISION = [(2, 5, 264, 1), (3, 3, 37, 4), (2, 5, 20, 4), (1, 2, 4104, 1)]
ARENAS = [{"at_end": True}, {"at_end": False, "reversed_order": True}, {"shifted": True}]
CASES = [
    *itertools.product((torch.float32, torch.float64), SHAPES),
    *itertools.product((torch.float16, torch.bfloat16), LOW_PRECISION),
]


def long(*values):
    return [ctypes.c_int64(value) for value in values]


def normal(shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def schedule(batch, dtype):
    """Return alpha_bar, alpha_bar_prev and sigma; the last sample's sigma is too large, so that its root is cut."""
    a, previous, sigma = (torch.rand(batch, dtype=torch.float64) * 0.5 + low for low in (0.1, 0.4, 0.0))
    sigma[-1:] = 1.5
    return [t.to(statistics_dtype(dtype)) for t in (a, previous, sigma)]


def weights_of(kind, batch, factors, dtype):
    if kind == "none":
        return None, 0
    shape = (factors,) if kind == "shared" else (batch, factors)
    return normal(shape, statistics_dtype(dtype)), 0 if kind == "shared" else factors


def leaves_of(*tensors):
    return [None if t is None else t.double().requires_grad_() for t in tensors]


def gradients_of(outputs, leaves, grads):
    """Return the gradients of the leaves that are there, in float64; a gradient that is None counts as zero."""
    grads = [torch.zeros_like(out) if g is None else g.double() for out, g in zip(outputs, grads, strict=True)]
    return torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf is not None], grads)


def check(names, actual, expected, dtype):
    for name, ours, exact in zip(names, actual, expected, strict=True):
        assert_near(ours, exact.detach(), TOLERANCES[ours.dtype], f"{name} in {dtype}")


# --------------------------------------------------------------------------------------- sum_gradient_fields


def sum_gradient_fields(library, noise, fields, coefficient, weights, stride, grad, multiprocessors, **arena):
    """Return the sum and, for every combination of what may be asked for, dfields and products."""
    batch, factors, length = fields.shape
    statistics = statistics_dtype(noise.dtype)
    dtype, sizes = DTYPES[noise.dtype], long(stride, batch, factors, length)
    results = []
    with Arena(library, **arena) as memory:
        noise_, fields_, grad_, coefficient_, weights_ = map(memory.copy, (noise, fields, grad, coefficient, weights))
        out = memory.empty(noise.shape, noise.dtype)
        call(
            library.sum_gradient_fields_forward,
            *(dtype, noise_, fields_, coefficient_, weights_, out, *sizes, multiprocessors),
        )
        for for_fields, for_products in ((True, True), (True, False), (False, True)):
            stored = 1 if weights is None else factors
            dfields = memory.empty((batch, stored, length), noise.dtype) if for_fields else None
            products = memory.empty((batch, factors), statistics) if for_products else None
            read = fields_ if for_products else None
            call(
                library.sum_gradient_fields_backward,
                *(dtype, grad_, read, coefficient_, weights_, dfields, products, *sizes, multiprocessors),
            )
            results.append([None if t is None else t.clone() for t in (dfields, products)])
        return out.clone(), results


@pytest.mark.parametrize("weights_kind", ["none", "shared", "own"])
@pytest.mark.parametrize(("dtype", "case"), CASES)
def test_sum_gradient_fields_matches_reference(library, dtype, case, weights_kind):
    batch, factors, length, multiprocessors = case
    noise, grad = normal((batch, length), dtype), normal((batch, length), dtype)
    fields = normal((batch, factors, length), dtype)
    coefficient = normal((batch,), statistics_dtype(dtype))
    weights, stride = weights_of(weights_kind, batch, factors, dtype)
    leaves = leaves_of(noise, fields, coefficient, weights)
    exact = reference.sum_gradient_fields(*leaves[:3], weights=leaves[3])
    dfields = gradients_of([exact], leaves[1:2], [grad])[0]
    if weights is None:  # every field's gradient is the same; there is one even of no fields
        dfields = (coefficient.double().reshape(-1, 1) * grad.double()).unsqueeze(1)
    products = (grad.double().unsqueeze(1) * fields.double()).sum(-1)
    for arena in ARENAS:
        out, results = sum_gradient_fields(
            library, noise, fields, coefficient, weights, stride, grad, multiprocessors, **arena
        )
        check(["out"], [out], [exact], dtype)
        for ours_fields, ours_products in results:
            if ours_fields is not None:
                check(["dfields"], [ours_fields], [dfields], dtype)
            if ours_products is not None:
                check(["products"], [ours_products], [products], dtype)


# ------------------------------------------------------------------------------------------------- ddim_step


@pytest.mark.parametrize("weights_kind", ["none", "shared", "own"])
@pytest.mark.parametrize("with_eta", [False, True])
@pytest.mark.parametrize(("dtype", "case"), CASES)
def test_ddim_step_matches_reference(library, dtype, case, with_eta, weights_kind):
    batch, factors, length, multiprocessors = case
    x, noise, eta = (normal((batch, length), dtype) for _ in range(3))
    fields = normal((batch, factors, length), dtype)
    a, previous, sigma = schedule(batch, dtype)
    weights, stride = weights_of(weights_kind, batch, factors, dtype)
    exact = reference.ddim_step(
        *(t.double() for t in (x, noise, fields, a, previous)),
        weights=None if weights is None else weights.double(),
        sigma=sigma.double(),
        eta_noise=eta.double() if with_eta else None,
    )
    for arena in ARENAS:
        with Arena(library, **arena) as memory:
            given = map(memory.copy, (x, noise, fields, eta if with_eta else None, a, previous, sigma, weights))
            outputs = [memory.empty(x.shape, dtype) for _ in range(2)]
            sizes = long(stride, batch, factors, length)
            call(library.ddim_step_forward, DTYPES[dtype], *given, *outputs, *sizes, multiprocessors)
            check(["x_prev", "x0"], outputs, exact, dtype)


@pytest.mark.parametrize("missing", [None, 0, 1])
@pytest.mark.parametrize(("dtype", "case"), CASES)
def test_ddim_step_gradients_match_autograd(library, dtype, case, missing):
    batch, _, length, multiprocessors = case
    x, noise, total, eta, *grads = (normal((batch, length), dtype) for _ in range(6))
    if missing is not None:
        grads[missing] = None
    a, previous, sigma = schedule(batch, dtype)
    leaves = leaves_of(x, noise, total, eta)
    outputs = reference.ddim_step(
        leaves[0], leaves[1], leaves[2].unsqueeze(1), a.double(), previous.double(), sigma=sigma.double(),
        eta_noise=leaves[3],
    )  # fmt: skip
    exact = gradients_of(outputs, leaves, grads)
    names = ("dx", "dnoise", "dtotal", "deta_noise")
    for wanted, arena in zip(
        ((1, 1, 1, 1), (1, 0, 0, 1), (0, 1, 1, 0), (0, 0, 1, 0)), [*ARENAS, ARENAS[0]], strict=True
    ):
        with Arena(library, **arena) as memory:
            given = map(memory.copy, (*grads, a, previous, sigma))
            ours = [memory.empty(x.shape, dtype) if want else None for want in wanted]
            call(library.ddim_step_backward, DTYPES[dtype], *given, *ours, *long(batch, length), multiprocessors)
            for name, want, mine, expected in zip(names, wanted, ours, exact, strict=True):
                if want:
                    check([name], [mine], [expected], dtype)


# --------------------------------------------------------------------------------------------- disdiff_terms


def terms(library, x, noise, fields, selected, a, previous, multiprocessors, **arena):
    with Arena(library, **arena) as memory:
        given = map(memory.copy, (x, noise, fields, selected, a, previous))
        outputs = [memory.empty(x.shape, x.dtype) for _ in range(3)]
        outputs.append(memory.empty((len(x),), statistics_dtype(x.dtype)))
        call(library.disdiff_terms_forward, DTYPES[x.dtype], *given, *outputs, *long(*fields.shape), multiprocessors)
        return [output.clone() for output in outputs]


@pytest.mark.parametrize(("dtype", "case"), [case for case in CASES if case[1][1] > 0])
def test_disdiff_terms_match_reference(library, dtype, case):
    batch, factors, length, multiprocessors = case
    x, noise = normal((batch, length), dtype), normal((batch, length), dtype)
    fields = normal((batch, factors, length), dtype)
    selected = torch.randint(factors, (batch,))
    selected[-1:] = factors - 1
    a, previous, _ = schedule(batch, dtype)
    exact = reference.disdiff_terms(*(t.double() if t.is_floating_point() else t
                                      for t in (x, noise, fields, selected, a, previous)))  # fmt: skip
    for arena in ARENAS:
        ours = terms(library, x, noise, fields, selected, a, previous, multiprocessors, **arena)
        check(["shifted", "x0", "x0_selected", "weight"], ours, exact, dtype)


@pytest.mark.parametrize("given", [g for g in itertools.product((True, False), repeat=3) if any(g)])
@pytest.mark.parametrize(("dtype", "case"), [case for case in CASES if case[1][1] > 0][::2])
def test_disdiff_gradients_match_autograd(library, dtype, case, given):
    batch, factors, length, multiprocessors = case
    x, noise, *grads = (normal((batch, length), dtype) for _ in range(5))
    grads = [grad if there else None for grad, there in zip(grads, given, strict=True)]
    fields = normal((batch, factors, length), dtype)
    selected = torch.randint(factors, (batch,))
    a, previous, _ = schedule(batch, dtype)
    leaves = leaves_of(x, noise, fields)
    outputs = reference.disdiff_terms(*leaves, selected, a.double(), previous.double())[:3]
    exact = gradients_of(outputs, leaves, grads)
    stored = factors if given[2] else 1
    shapes = (x.shape, x.shape, (batch, stored, length))
    for wanted, arena in zip(((1, 1, 1), (1, 0, 0), (0, 1, 1)), ARENAS, strict=True):
        with Arena(library, **arena) as memory:
            arrays = map(memory.copy, (*grads, selected, a, previous))
            ours = [memory.empty(shape, dtype) if want else None for shape, want in zip(shapes, wanted, strict=True)]
            sizes = long(batch, factors, length)
            call(library.disdiff_terms_backward, DTYPES[dtype], *arrays, *ours, *sizes, multiprocessors)
            for name, mine, expected in zip(("dx", "dnoise", "dfields"), ours, exact, strict=True):
                if mine is not None:
                    check([name], [mine.expand_as(expected)], [expected], dtype)


@pytest.mark.parametrize("bad", [-1, 3, 1 << 40])
@pytest.mark.parametrize("length", [64, 37])
def test_a_field_out_of_range_gives_nan_for_its_sample_only(library, bad, length):
    x, noise = normal((3, length), torch.float32), normal((3, length), torch.float32)
    fields = normal((3, 3, length), torch.float32)
    a, previous, _ = schedule(3, torch.float32)
    selected = torch.tensor([1, 0, 2])
    exact = list(reference.disdiff_terms(x.double(), noise.double(), fields.double(), selected, a, previous))
    for output in exact[2:]:
        output[1] = float("nan")
    selected[1] = bad
    for arena in ARENAS:
        ours = terms(library, x, noise, fields, selected, a, previous, 4, **arena)
        check(["shifted", "x0", "x0_selected", "weight"], ours, exact, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_go_where_they_go_in_the_reference(library, value):
    x, noise = normal((2, 40), torch.float32), normal((2, 40), torch.float32)
    fields = normal((2, 5, 40), torch.float32)
    fields[0, 1, 3], noise[1, 7], x[0, 30] = value, value, -value
    a, previous, _ = schedule(2, torch.float32)
    selected = torch.tensor([1, 4])
    expected = reference.disdiff_terms(x, noise, fields, selected, a, previous)
    for ours, exact in zip(terms(library, x, noise, fields, selected, a, previous, 4), expected, strict=True):
        torch.testing.assert_close(ours, exact, equal_nan=True, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ all of them


def test_no_kernel_is_left_out(library):
    launched(library)
    case = (2, 3, 40, 4)
    test_sum_gradient_fields_matches_reference(library, torch.float32, case, "own")
    test_ddim_step_matches_reference(library, torch.float32, case, True, "own")
    test_ddim_step_gradients_match_autograd(library, torch.float32, case, None)
    test_disdiff_terms_match_reference(library, torch.float32, case)
    test_disdiff_gradients_match_autograd(library, torch.float32, case, (True, True, True))
    assert launched(library) == kernels_of(*FILES)


LARGE = (3, 2, 2**30 + 8)  # batch, factors, length
TAIL = 2048 + 8  # elements of the last two blocks, of each of the two tensors that backward reads


def ends(memory, *shapes):
    """Return zeros in bfloat16, with normal numbers in the last elements of the last sample."""
    tensors = [memory.empty(shape, torch.bfloat16) for shape in shapes]
    for tensor in tensors:
        tensor[-1, ..., -TAIL:] = normal((*tensor.shape[1:-1], TAIL), torch.bfloat16)
    return tensors


def end(tensor):
    return tensor[-1:, ..., -TAIL:].double()


def test_sum_gradient_fields_beyond_32_bits(library):
    batch, _, length = LARGE
    with Arena(library, window=2) as memory:
        noise, fields, out, dfields = ends(memory, (batch, length), LARGE, (batch, length), LARGE)
        coefficient, weights = memory.copy(normal(batch, torch.float32)), memory.copy(normal(LARGE[:2], torch.float32))
        products = memory.empty(LARGE[:2], torch.float32)
        sizes = (*long(LARGE[1], *LARGE), 100)
        arrays = (DTYPES[noise.dtype], noise, fields, coefficient, weights)
        call(library.sum_gradient_fields_forward, *arrays, out, *sizes)
        leaves = leaves_of(end(noise), end(fields), coefficient[-1:], weights[-1:])
        exact = reference.sum_gradient_fields(*leaves[:3], weights=leaves[3])
        # With noise in the place of the gradient.
        call(library.sum_gradient_fields_backward, *arrays, dfields, products, *sizes)
        gradients = torch.autograd.grad(exact, leaves[1:], leaves[0].detach())
        check(("out", "dfields"), (end(out).bfloat16(), end(dfields).bfloat16()), (exact, gradients[0]), "bfloat16")
        assert_near(products[-1:] * coefficient[-1], gradients[2], 4e-6, "products")


def test_ddim_step_beyond_32_bits(library):
    batch, _, length = LARGE
    row = (batch, length)
    with Arena(library, window=2) as memory:
        x, noise, eta, fields, *outputs = ends(memory, row, row, row, LARGE, row, row)
        numbers = [memory.copy(t) for t in schedule(batch, torch.float32)]
        sizes = long(0, *LARGE)
        call(library.ddim_step_forward, DTYPES[x.dtype], x, noise, fields, eta, *numbers, None, *outputs, *sizes, 100)
        last = [t[-1:].double() for t in numbers]
        leaves = leaves_of(end(x), end(noise), end(fields), end(eta))
        exact = reference.ddim_step(*leaves[:3], *last[:2], sigma=last[2], eta_noise=leaves[3])
        check(("x_prev", "x0"), [end(t).bfloat16() for t in outputs], exact, "bfloat16")
        # With x and noise in the places of the gradients; fields' is that of their sum.
        gradients = torch.autograd.grad(exact, leaves, [leaves[0].detach(), leaves[1].detach()])
        ours = [*outputs, memory.empty(row, x.dtype), eta]
        call(library.ddim_step_backward, DTYPES[x.dtype], x, noise, *numbers, *ours, *long(batch, length), 100)
        expected = (gradients[0], gradients[1], gradients[2][:, 0], gradients[3])
        check(("dx", "dnoise", "dtotal", "deta"), [end(t).bfloat16() for t in ours], expected, "bfloat16")


def test_disdiff_terms_beyond_32_bits(library):
    batch, _, length = LARGE
    row = (batch, length)
    with Arena(library, window=2) as memory:
        x, noise, fields, *outputs = ends(memory, row, row, LARGE, row, row, row)
        numbers = [memory.copy(t) for t in schedule(batch, torch.float32)[:2]]
        selected, weight = memory.copy(torch.ones(batch, dtype=torch.int64)), memory.empty((batch,), torch.float32)
        arrays = (DTYPES[x.dtype], x, noise, fields, selected, *numbers, *outputs, weight)
        call(library.disdiff_terms_forward, *arrays, *long(*LARGE), 100)
        leaves, last = leaves_of(end(x), end(noise), end(fields)), [t[-1:].double() for t in numbers]
        exact = reference.disdiff_terms(*leaves, selected[-1:], *last)
        check(("shifted", "x0", "x0_selected"), [end(t).bfloat16() for t in outputs], exact[:3], "bfloat16")
        assert_near(weight[-1:], exact[3] * (TAIL / length), 4e-6, "weight")
        gradients = torch.autograd.grad(exact[:3], leaves, [*(leaf.detach() for leaf in leaves[:2]), end(outputs[2])])
        dx, dnoise = outputs[:2]
        arrays = (DTYPES[x.dtype], x, noise, outputs[2], selected, *numbers, dx, dnoise, fields)
        call(library.disdiff_terms_backward, *arrays, *long(*LARGE), 100)
        check(("dx", "dnoise", "dfields"), [end(t).bfloat16() for t in (dx, dnoise, fields)], gradients, "bfloat16")
