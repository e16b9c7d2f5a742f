"""The kernels of total_correlation on the CPU against the reference in float64."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from harness import DTYPES, TOLERANCES, Arena, assert_near, call, kernels_of, launched, statistics_dtype

from fastdis import reference
from fastdis.reference.total_correlation import ESTIMATORS, log_importance_weights

SOURCE = "host_total_correlation.cpp"
FILES = ("sums.cuh", "total_correlation.cu")
DATASET = 1000


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def total_correlation(library, z, mean, logvar, grad, estimator, multiprocessors=4, **arena):
    """Return the three terms, the two log-sum-exps and the three gradients of the kernels."""
    statistics = statistics_dtype(z.dtype)
    with Arena(library, **arena) as memory:
        inputs = [memory.copy(t) for t in (z, mean, logvar, grad)]
        terms = [memory.empty(z.shape[:1], statistics) for _ in range(3)]
        log_sums = memory.empty(z.shape[:2], statistics), memory.empty(z.shape, statistics)
        gradients = [memory.empty(z.shape, z.dtype) for _ in range(3)]
        sizes = [ctypes.c_int64(size) for size in (*z.shape, DATASET)]
        for backward in (0, 1):
            call(
                library.total_correlation,
                *(backward, DTYPES[z.dtype], *inputs, *terms, *log_sums, *gradients, *sizes),
                *(ESTIMATORS.index(estimator), multiprocessors),
            )
        return [t.clone() for t in (*terms, *log_sums, *gradients)]


def expected_results(z, mean, logvar, grad, estimator, dtype):
    """All that the kernels return, by the reference in ``dtype``."""
    leaves = [t.to(dtype).requires_grad_() for t in (z, mean, logvar)]
    terms = reference.total_correlation(*leaves, dataset_size=DATASET, estimator=estimator)
    gradients = torch.autograd.grad(terms, leaves, list(grad.to(terms[0].dtype)))
    z, mean, logvar = (t.detach().to(terms[0].dtype) for t in leaves)
    pairs = -0.5 * ((z.unsqueeze(2) - mean.unsqueeze(1)).square() / logvar.exp().unsqueeze(1) + logvar.unsqueeze(1))
    pairs = pairs - 0.5 * math.log(2 * math.pi)
    log_weights = log_importance_weights(z.shape[1], DATASET, estimator).to(z)
    log_joint = torch.logsumexp(pairs.sum(-1) + log_weights, -1)
    log_marginals = torch.logsumexp(pairs + log_weights.unsqueeze(-1), -2)
    return [*(t.detach() for t in terms), log_joint, log_marginals, *gradients]


NAMES = ("mi", "tc", "dwkl", "log_joint", "log_marginals", "dz", "dmean", "dlogvar")


def check(library, shape, dtype, estimator, **options):
    mean, logvar = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64) - 1
    z = mean + torch.exp(0.5 * logvar) * torch.randn(shape, dtype=torch.float64)
    z, mean, logvar = (t.to(dtype) for t in (z, mean, logvar))
    grad = torch.randn(3, shape[0], dtype=torch.float64).to(statistics_dtype(dtype))
    actual = total_correlation(library, z, mean, logvar, grad, estimator, **options)
    exact = expected_results(z, mean, logvar, grad, estimator, torch.float64)
    in_dtype = expected_results(z, mean, logvar, grad, estimator, dtype)
    for name, ours, theirs, expected in zip(NAMES, actual, in_dtype, exact, strict=True):
        assert ours.shape == expected.shape
        scale = expected.abs().max()
        # The means are so few that the reference may hit one by chance: their scale is that of what they average.
        if name in NAMES[:3]:
            scale = torch.maximum(scale, exact[3].abs().max() / 4)
        # In float64 the reference is no more exact than the kernels.
        slack = 256 if dtype == torch.float64 else 4
        bound = 2 * (theirs - expected).abs().max() + slack * torch.finfo(ours.dtype).eps * scale
        error = (ours - expected).abs().max()
        assert error <= bound, f"{name} of {shape}, {dtype}: {error:.2e} > {bound:.2e}"


# Tiles of 32 or 64 owners and of 32, 64 or 256 others, slabs of 32 or 64 latents: on both sides of each.
SHAPES = [
    (1, 2, 1),
    (1, 5, 3),
    (2, 33, 4),
    (1, 64, 10),
    (3, 65, 5),
    (1, 31, 67),
    (2, 40, 130),
    (1, 260, 2),
    (1, 321, 6),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(library, shape, dtype, estimator):
    # Many multiprocessors cut the others into pieces.
    even = (SHAPES.index(shape) + ESTIMATORS.index(estimator)) % 2 == 0
    options = {"multiprocessors": 64 if even else 1, "at_end": even, "reversed_order": not even}
    check(library, shape, dtype, estimator, **options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 37, 11), (2, 66, 3)])
def test_matches_reference_in_low_precision(library, shape, dtype, estimator):
    check(library, shape, dtype, estimator, shifted=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_sample_and_no_latents(library, dtype):
    check(library, (2, 1, 3), dtype, "mws")
    z = torch.zeros(1, 7, 0, dtype=dtype)
    terms = total_correlation(library, z, z, z, torch.ones(3, 1, dtype=dtype), "mws")
    log_joint = torch.full((1, 7), -math.log(DATASET), dtype=torch.float64)
    assert_near(terms[3], log_joint, 1e-6, "log_joint")
    for ours, exact in zip(terms[:3], (-log_joint, log_joint, 0 * log_joint), strict=True):
        assert_near(ours, exact[:, 0], 1e-6, "term")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_far_away_points_neither_overflow_nor_underflow(library, estimator):
    shape = (1, 70, 6)
    mean, logvar = torch.randn(shape, dtype=torch.float64) * 1e3, torch.full(shape, -6.0, dtype=torch.float64)
    z = mean + 200 * torch.randn(shape, dtype=torch.float64)
    grad = torch.ones(3, 1, dtype=torch.float64)
    exact = expected_results(z, mean, logvar, grad, estimator, torch.float64)
    for name, ours, expected in zip(
        NAMES, total_correlation(library, z, mean, logvar, grad, estimator), exact, strict=True
    ):
        assert_near(ours, expected, 1e-7, name)
    inputs = [t.float() for t in (z, mean, logvar, grad)]
    assert all(t.isfinite().all() for t in total_correlation(library, *inputs, estimator))


@pytest.mark.parametrize("which", range(3))
def test_nan_reaches_what_it_reaches_in_the_reference(library, which):
    inputs = [torch.randn(1, 70, 6) for _ in range(3)]
    inputs[which][0, 66, 3] = float("nan")
    grad = torch.ones(3, 1)
    exact = expected_results(*inputs, grad, "mss", torch.float64)
    actual = total_correlation(library, *inputs, grad, "mss")
    for name, ours, expected in zip(NAMES[:5], actual, exact, strict=False):
        assert torch.equal(ours.isnan(), expected.isnan()), name


def test_an_infinitely_far_row_has_log_densities_of_minus_infinity(library):
    z, mean, logvar = (torch.randn(1, 40, 5) for _ in range(3))
    z[0, 7, 2] = float("inf")
    exact = expected_results(z, mean, logvar, torch.ones(3, 1), "mws", torch.float64)
    actual = total_correlation(library, z, mean, logvar, torch.ones(3, 1), "mws")
    for name, ours, expected in zip(NAMES[3:5], actual[3:5], exact[3:5], strict=True):
        assert_near(ours, expected, 1e-5, name)


def test_no_kernel_is_left_out(library):
    launched(library)
    check(library, (1, 5, 3), torch.float32, "mws")
    assert launched(library) == kernels_of(*FILES)


def test_beyond_32_bits(library):
    shape, dtype = (2**22 + 1, 64, 8), torch.bfloat16
    own = torch.randn(3, 1, *shape[1:], dtype=torch.float64).to(dtype)
    with Arena(library, window=8) as memory:
        inputs, gradients = ([memory.empty(shape, dtype) for _ in range(3)] for _ in range(2))
        for tensor, values in zip(inputs, own, strict=True):
            tensor[-1:] = values
        grad, terms = memory.empty((3, shape[0]), torch.float32), memory.empty((3, shape[0]), torch.float32)
        grad[:, -1] = torch.randn(3)
        log_sums = memory.empty(shape[:2], torch.float32), memory.empty(shape, torch.float32)
        rest = (*(ctypes.c_int64(size) for size in (*shape, DATASET)), ESTIMATORS.index("mss"), 4)
        for backward in (0, 1):
            arrays = (*inputs, grad, *terms, *log_sums, *gradients)
            call(library.total_correlation, backward, DTYPES[dtype], *arrays, *rest)
        ours = [*(term[-1:] for term in terms), *(t[-1:] for t in (*log_sums, *gradients))]
        exact = expected_results(*own, grad[:, -1:], "mss", torch.float64)
        # The other two terms of the last episode are in the middle of what the last kernel writes.
        for name, result, wanted in list(zip(NAMES, ours, exact, strict=True))[2:]:
            assert_near(
                result, wanted, TOLERANCES[dtype if name.startswith("d") and name != "dwkl" else torch.float32], name
            )
