"""The kernels of jacobian_gram and isometry_penalty on the CPU against the references in float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from harness import DTYPES, TOLERANCES, Arena, assert_near, call, kernels_of, launched, statistics_dtype

from fastdis import reference
from fastdis.reference.isometry_penalty import KINDS

SOURCE = "host_gram.cpp"
FILES = ("common.cuh", "gram.cuh", "isometry_penalty.cu")

# Batch, rows, depth, multiprocessors, of which MANY make the plan cut the depth. Rows on both sides of 4, 8, 12, 16,
# where the kernel that holds them all changes, and of the 32 or 64 of a tile; depths on both sides of a slab of 64, of
# the 128 packs of 2, 4 or 8 that a block takes at once, and of the 4 of these that are the least of a split.
MANY = 200
SHAPES = [
    (1, 1, 1, 4),
    (2, 2, 3, 4),
    (3, 4, 64, 4),
    (2, 5, 520, 4),
    (2, 8, 4104, MANY),
    (2, 9, 260, 4),
    (1, 12, 4104, MANY),
    (2, 13, 72, 4),
    (1, 16, 516, 4),
    (2, 17, 63, 4),
    (1, 20, 65, 4),
    (1, 31, 516, 4),
    (2, 33, 584, MANY),
    (1, 64, 128, 4),
    (1, 65, 136, 4),
    (1, 3, 1031, MANY),
    (2, 0, 8, 4),
    (0, 3, 8, 4),
    (2, 3, 0, 4),
]
LOW_PRECISION = [(2, 3, 1040, 4), (1, 11, 8200, MANY), (1, 16, 1032, 4), (1, 40, 200, 4), (2, 7, 33, 4), (1, 70, 72, 4)]
CASES = [
    *((dtype, shape) for shape in SHAPES for dtype in (torch.float32, torch.float64)),
    *((dtype, shape) for shape in LOW_PRECISION for dtype in (torch.float16, torch.bfloat16)),
]
ARENAS = [
    {"at_end": True, "transposed": False},
    {"at_end": False, "transposed": True, "reversed_order": True},
    {"shifted": True, "transposed": False},
]


def make_jacobian(shape, dtype):
    return (torch.randn(shape, dtype=torch.float64) * max(shape[-1], 1) ** -0.5).to(dtype)


def stored(memory, jacobian, transposed):
    """Return a guarded copy in the layout, and an empty tensor for its gradient."""
    laid_out = jacobian.transpose(0, 1) if transposed else jacobian
    return memory.copy(laid_out.contiguous()), memory.empty(laid_out.shape, jacobian.dtype)


def loaded(tensor, transposed):
    return (tensor.transpose(0, 1) if transposed else tensor).clone()


def sizes(shape, transposed):
    return [*(ctypes.c_int64(value) for value in shape), int(transposed)]


def gram(library, jacobian, grad, multiprocessors, transposed=False, **arena):
    """Return G, dJ and the number of pieces of the depth."""
    splits = ctypes.c_int64(0)
    statistics = statistics_dtype(jacobian.dtype)
    with Arena(library, **arena) as memory:
        jacobian_, out = stored(memory, jacobian, transposed)
        grad_, result = memory.copy(grad), memory.empty(grad.shape, statistics)
        common = sizes(jacobian.shape, transposed)
        call(
            library.jacobian_gram_forward,
            *(DTYPES[jacobian.dtype], jacobian_, result, *common, multiprocessors, ctypes.byref(splits)),
        )
        call(library.jacobian_gram_backward, DTYPES[jacobian.dtype], grad_, jacobian_, out, *common)
        return result.clone(), loaded(out, transposed), splits.value


def penalty(library, jacobian, kind, grad, multiprocessors, transposed=False, **arena):
    """Return the loss, G and dJ."""
    batch, rows, _ = jacobian.shape
    statistics = statistics_dtype(jacobian.dtype)
    with Arena(library, **arena) as memory:
        jacobian_, out = stored(memory, jacobian, transposed)
        grad_ = memory.copy(torch.tensor(grad, dtype=statistics))
        loss, result = memory.empty((), statistics), memory.empty((batch, rows, rows), statistics)
        call(
            library.isometry_penalty,
            *(DTYPES[jacobian.dtype], KINDS.index(kind), grad_, jacobian_, loss, result, out),
            *(*sizes(jacobian.shape, transposed), multiprocessors),
        )
        return loss.clone(), result.clone(), loaded(out, transposed)


@pytest.mark.parametrize(("dtype", "case"), CASES)
def test_jacobian_gram_matches_reference(library, dtype, case):
    *shape, multiprocessors = case
    jacobian = make_jacobian(shape, dtype)
    statistics = statistics_dtype(dtype)
    grad = torch.randn(shape[0], shape[1], shape[1], dtype=torch.float64).to(statistics)
    leaf = jacobian.double().requires_grad_()
    exact = reference.jacobian_gram(leaf)
    dj = torch.autograd.grad(exact, leaf, grad.double())[0]
    for arena in ARENAS:
        ours, ours_dj, splits = gram(library, jacobian, grad, multiprocessors, **arena)
        assert_near(ours, exact.detach(), TOLERANCES[statistics], f"gram {arena}")
        assert torch.equal(ours, ours.mT)
        assert_near(ours_dj, dj, TOLERANCES[dtype], f"dJ {arena}")
        assert splits > 1 or multiprocessors != MANY


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "case"), CASES[::3])
def test_isometry_penalty_matches_reference(library, dtype, case, kind):
    *shape, multiprocessors = case
    jacobian = make_jacobian(shape, dtype)
    statistics = statistics_dtype(dtype)
    leaf = jacobian.double().requires_grad_()
    exact = reference.isometry_penalty(leaf, kind)
    dj = torch.autograd.grad(exact, leaf)[0] * 0.7
    for arena in ARENAS[:2]:
        loss, ours, ours_dj = penalty(library, jacobian, kind, 0.7, multiprocessors, **arena)
        assert_near(loss, exact.detach(), TOLERANCES[statistics], f"{kind} {arena}")
        assert_near(ours, reference.jacobian_gram(jacobian.double()), TOLERANCES[statistics], f"gram {arena}")
        assert_near(ours_dj, dj, TOLERANCES[dtype], f"dJ of {kind} {arena}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 7, 70])
def test_isometry_penalty_of_many_samples(library, kind, batch):
    jacobian = make_jacobian((batch, 3, 8), torch.float32)
    leaf = jacobian.double().requires_grad_()
    exact = reference.isometry_penalty(leaf, kind)
    dj = torch.autograd.grad(exact, leaf)[0]
    loss, _, ours_dj = penalty(library, jacobian, kind, 1.0, 4, reversed_order=True)
    assert_near(loss, exact.detach(), 4e-6, kind)
    assert_near(ours_dj * batch, dj * batch, 4e-6, kind)


@pytest.mark.parametrize("kind", ["isometry", "scaled_isometry", "conformal", "orthogonality"])
def test_nearly_isometric_jacobians_keep_their_digits(library, kind):
    rows = torch.linalg.qr(torch.randn(2, 64, 5, dtype=torch.float64))[0].mT
    jacobian = (rows + 1e-3 * torch.randn(2, 5, 64)).float()
    exact = reference.isometry_penalty(jacobian.double(), kind)
    loss, _, _ = penalty(library, jacobian, kind, 1.0, 4)
    assert exact < 1e-3
    assert (loss - exact).abs() < 1e-3 * exact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_nan_and_inf_go_where_they_go_in_the_reference(library, kind, value, rows):
    jacobian = make_jacobian((3, rows, 40), torch.float32)
    jacobian[1, 0, 7] = value
    expected = reference.jacobian_gram(jacobian)
    loss, ours, _ = penalty(library, jacobian, kind, 1.0, 4)
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, reference.isometry_penalty(jacobian, kind), equal_nan=True)


def test_no_kernel_is_left_out(library):
    launched(library)
    for rows in (5, 20):
        penalty(library, make_jacobian((1, rows, 4104), torch.float32), KINDS[0], 1.0, MANY)
    assert launched(library) == kernels_of(*FILES)


@pytest.mark.parametrize("rows", [3, 20])
def test_beyond_32_bits(library, rows):
    batch, depth, dtype, splits = 2**21 // rows + 8, 1024, torch.bfloat16, ctypes.c_int64(0)
    with Arena(library, window=2) as memory:
        jacobian, out = (memory.empty((batch, rows, depth), dtype) for _ in range(2))
        grad, ours = (memory.empty((batch, rows, rows), torch.float32) for _ in range(2))
        jacobian[-1] = make_jacobian((rows, depth), dtype)
        grad[-1] = torch.randn(rows, rows)
        common = (DTYPES[dtype], *sizes(jacobian.shape, False))
        call(library.jacobian_gram_forward, common[0], jacobian, ours, *common[1:], MANY, ctypes.byref(splits))
        call(library.jacobian_gram_backward, common[0], grad, jacobian, out, *common[1:])
        own, own_grad = jacobian[-1].double(), grad[-1].double()
        assert_near(ours[-1], own @ own.mT, TOLERANCES[torch.float32], "gram")
        # The last two blocks work on the end of the depth.
        assert_near(out[-1, :, -8:], ((own_grad + own_grad.mT) @ own)[:, -8:], TOLERANCES[dtype], "dJ")
