"""Mean correlation coefficient: against NumPy and SciPy, by hand, and on input that is wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from fastdis.metrics import mcc


@pytest.fixture
def factors():
    return np.random.default_rng(0).integers(0, 9, (800, 4))


@pytest.mark.parametrize("correlation", ["pearson", "spearman"])
@pytest.mark.parametrize("d", [2, 4, 6])
def test_is_its_formula(factors, correlation, d):
    """The best of all ways to match, one by one."""
    generator = np.random.default_rng(d)
    codes = factors @ generator.normal(size=(4, d)) + generator.normal(size=(800, d))
    codes[:, 0] = np.exp(codes[:, 0])
    correlate = {"pearson": scipy.stats.pearsonr, "spearman": scipy.stats.spearmanr}[correlation]
    table = np.array([[correlate(code, factor)[0] for factor in factors.T] for code in codes.T])
    padded = np.vstack([np.abs(table), np.zeros((4, 4))])
    best = max(
        sum(padded[code, k] for k, code in enumerate(way))
        for way in itertools.permutations(range(d + max(0, 4 - d)), 4)
    )
    result = mcc(codes, factors, correlation=correlation)
    np.testing.assert_allclose(result.correlation, table, atol=1e-12)
    assert result.score == pytest.approx(best / 4)
    assert result.matched.mean() == pytest.approx(result.score)
    for k, code in enumerate(result.assignment):
        assert result.matched[k] == (abs(result.correlation[code, k]) if code >= 0 else 0)
    used = result.assignment[result.assignment >= 0]
    assert len(set(used)) == len(used) == min(d, 4)


def test_perfect_codes_in_any_order_sign_scale_and_place(factors):
    codes = factors[:, [2, 0, 3, 1]] * [-1.0, 1e-200, 1e200, 3.0] + [1e3, 0, 0, -7]
    result = mcc(codes, factors)
    assert result.score == pytest.approx(1, abs=1e-12)
    assert result.assignment.tolist() == [1, 3, 0, 2]
    assert result.correlation[0, 2] == pytest.approx(-1)


def test_monotonic_codes(factors):
    codes = np.exp(3.0 * factors)
    assert mcc(codes, factors).score < 0.8
    assert mcc(codes, factors, correlation="spearman").score == pytest.approx(1)


def test_matching_is_not_greedy():
    """The best pair first would leave the other factor with nothing."""
    a, b, c = np.array(list(itertools.product([0, 1], repeat=3))).T
    factors = np.stack([a, b], axis=1)
    codes = np.stack([10 * a + 9 * b, 10 * a + 5 * c], axis=1)
    table = np.abs(mcc(codes, factors).correlation)
    assert mcc(codes, factors).score == pytest.approx(max(table[0, 0] + table[1, 1], table[0, 1] + table[1, 0]) / 2)


def test_more_and_fewer_codes(factors):
    noise = np.random.default_rng(1).normal(size=(800, 3))
    assert mcc(np.hstack([noise, factors]), factors).score == pytest.approx(1)
    fewer = mcc(factors[:, 1:3], factors)
    assert fewer.score == pytest.approx(0.5)
    assert fewer.assignment.tolist() == [-1, 0, 1, -1]


@pytest.mark.parametrize("correlation", ["pearson", "spearman"])
def test_codes_that_never_change(factors, correlation):
    result = mcc(np.full((800, 4), 0.1), factors, correlation=correlation)
    assert result.score == 0
    assert not result.correlation.any()


def test_large_offset_and_last_digits():
    factor = np.arange(50).reshape(50, 1)
    assert mcc(factor + 2.0**52, factor).score == pytest.approx(1)
    assert mcc(1 + factor * 2.0**-52, factor).score == pytest.approx(1)
    assert mcc(factor * 1e-307, factor).score == pytest.approx(1)
    assert mcc(np.where(factor % 2, 1.7e308, -1.7e308), factor % 2).score == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_tensors(factors, dtype):
    assert mcc(torch.from_numpy(factors).to(dtype), torch.from_numpy(factors)).score == pytest.approx(1)


def test_wrong_input(factors):
    with pytest.raises(ValueError, match="correlation must be 'pearson' or 'spearman', got 'kendall'"):
        mcc(factors, factors, correlation="kendall")
    with pytest.raises(ValueError, match="column 0 never varies"):
        mcc(factors, factors * [0, 1, 1, 1])
    with pytest.raises(ValueError, match="NaN or infinity in column 1"):
        mcc(factors * [1, np.nan, 1, 1], factors)


def test_scipy_is_asked_for(factors, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdis\[metrics\]'"):
        mcc(factors, factors)
