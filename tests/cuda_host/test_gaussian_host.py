"""The kernels of reparameterize and gaussian_kl on the CPU against the references in float64."""

from __future__ import annotations

import ctypes
import itertools
import math

import pytest
import torch
from harness import DTYPES, TOLERANCES, Arena, assert_near, call, kernels_of, launched, statistics_dtype

from fastdis import reference
from fastdis.reference.reparameterize import _philox, standard_normal

SOURCE = "host_gaussian.cpp"
FILES = ("gaussian_kl.cu", "reparameterize.cu", "sums.cuh")
REDUCTIONS = ("none", "mean", "sum")


def normal(*size, dtype=torch.float64):
    return torch.randn(size, dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------- reparameterize


def reparameterize(library, mean, logvar, seed, grad, **arena):
    """Return the draw and dlogvar of the kernels."""
    with Arena(library, **arena) as memory:
        mean_, logvar_, seed_, grad_ = (memory.copy(t) for t in (mean, logvar, seed, grad))
        out, dlogvar = (memory.empty(mean.shape, mean.dtype) for _ in range(2))
        sizes = [ctypes.c_int64(mean.numel()), ctypes.c_int64(len(seed))]
        for backward, first, result in ((0, mean_, out), (1, grad_, dlogvar)):
            call(library.reparameterize, backward, DTYPES[mean.dtype], first, logvar_, seed_, result, *sizes)
        return out.clone(), dlogvar.clone()


# Elements and seeds: runs that are multiples of four and that are not, packs on and off 16-byte boundaries.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "seeds"), [(1, 1), (3, 1), (4, 1), (8, 2), (10, 2), (12, 12), (1028, 1), (1030, 1), (2052, 2), (3072, 3)]
)
def test_reparameterize_matches_reference(library, dtype, size, seeds):
    seed = torch.randint(-(2**63), 2**63 - 1, (seeds,))
    mean, logvar, grad = (normal(size, dtype=dtype) for _ in range(3))
    leaf = logvar.double().requires_grad_()
    expected = reference.reparameterize(mean.double(), leaf, seed)
    (dlogvar,) = torch.autograd.grad(expected, leaf, grad.double())
    for options in ({"reversed_order": True}, {"at_end": False}, {"shifted": True}):
        actual = reparameterize(library, mean, logvar, seed, grad, **options)
        for name, ours, exact in zip(("draw", "dlogvar"), actual, (expected.detach(), dlogvar), strict=True):
            assert_near(ours, exact, TOLERANCES[dtype], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_that_of_the_reference_to_the_last_digits(library, dtype):
    seed = torch.tensor([-3, 1 << 40, 7])
    zeros = torch.zeros(3 * 4001, dtype=dtype)
    noise, _ = reparameterize(library, zeros, zeros, seed, zeros)
    exact = standard_normal(noise.shape, seed)
    # Relative to the size of each number: those of small radius, whose uniform number is next to one, count as well.
    assert (noise - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_the_logarithm_of_the_radius_is_right_at_either_end(library):
    library.log_uniform.restype = ctypes.c_float
    for word in (0, 1, 2, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - (1 << 8), (1 << 32) - 2, (1 << 32) - 1):
        exact = math.log1p(-((1 << 32) - word - 0.5) * 2.0**-32) if word else math.log(2.0**-33)
        assert library.log_uniform(ctypes.c_uint32(word)) == pytest.approx(exact, rel=4e-7)


def test_reparameterize_lets_nan_and_inf_through(library):
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0])
    mean, logvar = torch.cartesian_prod(values, values).unbind(1)
    seed, ones = torch.tensor([5]), torch.ones(16)
    draw, dlogvar = reparameterize(library, mean, logvar, seed, ones)
    torch.testing.assert_close(draw, reference.reparameterize(mean, logvar, seed), equal_nan=True)
    assert torch.equal(dlogvar.isnan(), logvar.isnan())


# ------------------------------------------------------------------------------------------------ gaussian_kl


def gaussian_kl(library, mean, logvar, weights, grad, reduction, multiprocessors=4, **arena):
    """Return the divergence and the three gradients of the kernels."""
    with Arena(library, **arena) as memory:
        grad_, mean_, logvar_, weights_ = (memory.copy(t) for t in (grad, mean, logvar, weights))
        out = memory.empty(grad.shape, mean.dtype)
        dmean, dlogvar = (memory.empty(mean.shape, mean.dtype) for _ in range(2))
        dweights = None if weights is None else memory.empty(weights.shape, weights.dtype)
        arrays = (grad_, mean_, logvar_, weights_, out, dmean, dlogvar, dweights, REDUCTIONS.index(reduction))
        sizes = [ctypes.c_int64(size) for size in mean.shape]
        for backward in (0, 1):
            call(library.gaussian_kl, backward, DTYPES[mean.dtype], *arrays, *sizes, multiprocessors)
        return [None if t is None else t.clone() for t in (out, dmean, dlogvar, dweights)]


def check_gaussian_kl(library, shape, dtype, weighted, reduction, **options):
    mean, logvar = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    weights = normal(shape[1], dtype=statistics_dtype(dtype)) if weighted else None
    grad = normal(*(shape[:1] if reduction == "none" else ()), dtype=dtype)
    leaves = [None if t is None else t.double().requires_grad_() for t in (mean, logvar, weights)]
    divergence = reference.gaussian_kl(*leaves[:2], weights=leaves[2], reduction=reduction)
    gradients = torch.autograd.grad(divergence, [t for t in leaves if t is not None], grad.double())
    actual = gaussian_kl(library, mean, logvar, weights, grad, reduction, **options)
    assert (actual[3] is None) == (weights is None)
    names = ("divergence", "dmean", "dlogvar", "dweights")[: 3 + weighted]
    for name, ours, exact in zip(names, actual, (divergence.detach(), *gradients), strict=False):
        assert_near(ours, exact, TOLERANCES[statistics_dtype(dtype) if name == "dweights" else dtype], name)


SHAPES = [(1, 1), (5, 3), (64, 10), (33, 16), (600, 4), (3, 136), (2, 1031), (4, 2064)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_kl_matches_reference(library, dtype, shape):
    for index, (reduction, weighted) in enumerate(itertools.product(REDUCTIONS, (False, True))):
        odd = index % 2 == 1
        for multiprocessors in (1, 200):
            options = {
                "multiprocessors": multiprocessors,
                "at_end": not odd,
                "reversed_order": odd,
                "shifted": index == 5,
            }
            check_gaussian_kl(library, shape, dtype, weighted, reduction, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_gaussian_kl_lets_nan_and_inf_through(library, value):
    for which in (0, 1):
        leaves = [normal(5, 8, dtype=torch.float32) for _ in range(2)]
        leaves[which][2, 3] = value
        exact = [leaf.double().requires_grad_() for leaf in leaves]
        divergence = reference.gaussian_kl(*exact, reduction="none")
        gradients = torch.autograd.grad(divergence.sum(), exact)
        actual = gaussian_kl(library, *leaves, None, torch.ones(5), "none")
        for ours, expected in zip(actual, (divergence.detach(), *gradients), strict=False):
            torch.testing.assert_close(ours.double(), expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_gaussian_kl_near_the_prior_keeps_its_digits(library):
    mean, logvar = torch.zeros(4, 8), normal(4, 8).mul(1e-3).float()
    exact = reference.gaussian_kl(mean.double(), logvar.double(), reduction="none")
    divergence, _, _, _ = gaussian_kl(library, mean, logvar, None, torch.ones(4), "none")
    assert (divergence - exact).abs().max() < 1e-3 * exact.max()


# ------------------------------------------------------------------------------------------------ both of them


def test_no_kernel_is_left_out(library):
    launched(library)
    mean, logvar, weights = normal(5, 4, dtype=torch.float32), normal(5, 4, dtype=torch.float32), torch.ones(4)
    for reduction in ("none", "mean"):
        grad = torch.ones(5) if reduction == "none" else torch.ones(())
        gaussian_kl(library, mean, logvar, weights, grad, reduction)
    reparameterize(library, mean, logvar, torch.tensor([1]), mean)
    assert launched(library) == kernels_of(*FILES)


def test_reparameterize_beyond_32_bits(library):
    runs, length, dtype = 2**18 + 1, 2**13, torch.bfloat16
    with Arena(library, window=1) as memory:
        mean, logvar, out = (memory.empty((runs, length), dtype) for _ in range(3))
        seed = memory.empty((runs,), torch.int64)
        seed[-1] = 1 << 50
        mean[-1], logvar[-1] = normal(length, dtype=dtype), normal(length, dtype=dtype)
        sizes = [ctypes.c_int64(mean.numel()), ctypes.c_int64(runs)]
        call(library.reparameterize, 0, DTYPES[dtype], mean, logvar, seed, out, *sizes)
        exact = reference.reparameterize(mean[-1].double(), logvar[-1].double(), seed[-1:])
        assert_near(out[-1, -1024:], exact[-1024:], TOLERANCES[dtype], "draw")


def test_one_run_of_noise_beyond_32_bits(library):
    size, dtype = 2**31 + 8, torch.bfloat16
    with Arena(library, window=1) as memory:
        logvar, noise, out = (memory.empty((size,), dtype) for _ in range(3))
        seed = memory.copy(torch.tensor([3]))
        sizes = [ctypes.c_int64(size), ctypes.c_int64(1)]
        call(library.reparameterize, 0, DTYPES[dtype], noise, logvar, seed, out, *sizes)
        assert_near(out[-8:], standard_normal_at(size // 4 - 2, seed), TOLERANCES[dtype], "draw")


def standard_normal_at(counter, seed):
    """Return the noise of two counters, from Philox's words."""
    low, zero = torch.arange(counter, counter + 2), torch.zeros(2, dtype=torch.int64)
    words = torch.stack(_philox((low & 0xFFFFFFFF, low >> 32, zero, zero), seed)).double()
    radius = (-2 * torch.log((words[::2] + 0.5) * 2.0**-32)).sqrt()
    angle = 2 * math.pi * words[1::2] * 2.0**-32
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten(0, 1).T.flatten()


def test_gaussian_kl_beyond_32_bits(library):
    batch, latents, dtype = 2**27 + 8, 16, torch.bfloat16
    with Arena(library, window=1) as memory:
        mean, logvar, dmean, dlogvar = (memory.empty((batch, latents), dtype) for _ in range(4))
        grad, out = memory.empty((batch,), dtype), memory.empty((batch,), dtype)
        for tensor in (mean, logvar, grad):
            tensor[-8:] = normal(*tensor[-8:].shape, dtype=dtype)
        sizes = [ctypes.c_int64(batch), ctypes.c_int64(latents)]
        for backward in (0, 1):
            arrays = (grad, mean, logvar, None, out, dmean, dlogvar, None)
            call(library.gaussian_kl, backward, DTYPES[dtype], *arrays, 0, *sizes, 200)
        leaves = [t[-8:].double().requires_grad_() for t in (mean, logvar)]
        exact = reference.gaussian_kl(*leaves, reduction="none")
        gradients = torch.autograd.grad(exact, leaves, grad[-8:].double())
        for name, ours, wanted in zip(
            ("kl", "dmean", "dlogvar"), (out, dmean, dlogvar), (exact, *gradients), strict=True
        ):
            assert_near(ours[-8:], wanted, TOLERANCES[dtype], name)
