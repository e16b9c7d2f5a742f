"""RMIG, JEMMIG, MIG-sup and DCIMIG: by hand, against their formulas, and on input that is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastdis.metrics import dcimig, jemmig, mig, mig_sup, rmig

METRICS = [rmig, jemmig, mig_sup, dcimig]
ENCODERS = ["identity5", "linear_mix10", "collapsed10"]


@pytest.fixture
def factors():
    """Five independent factors of ten values."""
    return np.random.RandomState(0).randint(0, 10, size=(4000, 5))


def entropy(*columns):
    """Return the joint entropy of columns of integers, in nats, the slow way."""
    _, counts = np.unique(sum(column * 1000**i for i, column in enumerate(columns)), return_counts=True)
    share = counts / counts.sum()
    return -np.sum(share * np.log(share))


def slow_information(codes, factors, bins):
    """Return mutual information [d, K] and the binned codes [d, n] by NumPy's own histogram functions."""
    binned = [np.digitize(code, np.histogram_bin_edges(code, bins)[:-1]) for code in codes.T.astype(float)]
    mutual = [[entropy(b) + entropy(v) - entropy(b, v) for v in factors.T] for b in binned]
    return np.array(mutual), binned


@pytest.mark.parametrize("metric", [jemmig, mig_sup, dcimig])
def test_perfect_codes(factors, metric):
    assert metric(factors, factors).score == pytest.approx(1, abs=0.02)
    assert metric(factors, factors, bins=4).score < 0.9


def test_perfect_codes_on_the_grid(factors):
    assert rmig(factors - 4.5, factors, bins=10, limits=(-5, 5)).score == pytest.approx(1, abs=0.02)
    assert rmig(factors + 100.0, factors).score == 0


@pytest.mark.parametrize("metric", METRICS)
def test_empty_codes(factors, metric):
    result = metric(np.full((4000, 3), 0.5), factors)
    assert (result.mutual_information == 0).all()
    if metric is jemmig:
        np.testing.assert_allclose(result.factor_scores, 1 - result.entropy / (result.entropy + np.log(10)))
    else:
        assert result.score == 0


@pytest.mark.parametrize("encoder", ENCODERS)
def test_jemmig_is_its_formula(golden, encoder):
    inputs, _ = golden
    codes, factors = inputs[f"test_{encoder}"], inputs["ys_test"]
    mutual, binned = slow_information(codes, factors, 10)
    scores = []
    for k, factor in enumerate(factors.T):
        second, first = np.argsort(mutual[:, k])[-2:]
        value = entropy(factor, binned[first]) - mutual[first, k] + mutual[second, k]
        scores.append(1 - value / (entropy(factor) + np.log(10)))
    result = jemmig(codes, factors)
    np.testing.assert_allclose(result.factor_scores, scores, atol=1e-10)
    assert result.score == pytest.approx(np.mean(scores))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_mig_sup_is_its_formula(golden, encoder):
    inputs, _ = golden
    codes, factors = inputs[f"test_{encoder}"], inputs["ys_test"]
    mutual, _ = slow_information(codes, factors, 10)
    shares = np.sort(mutual / [entropy(factor) for factor in factors.T], axis=1)
    assert mig_sup(codes, factors).score == pytest.approx(np.mean(shares[:, -1] - shares[:, -2]), abs=1e-10)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_dcimig_is_its_formula(golden, encoder):
    inputs, _ = golden
    codes, factors = inputs[f"test_{encoder}"], inputs["ys_test"]
    mutual, _ = slow_information(codes, factors, 10)
    best = dict.fromkeys(range(5), 0.0)
    for row in mutual:
        ranked = np.sort(row)
        best[row.argmax()] = max(best[row.argmax()], ranked[-1] - ranked[-2])
    expected = sum(best.values()) / sum(entropy(factor) for factor in factors.T)
    assert dcimig(codes, factors).score == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_rmig_on_own_ranges_is_mig(golden, encoder):
    inputs, _ = golden
    codes, factors = inputs[f"test_{encoder}"], inputs["ys_test"]
    ours, theirs = rmig(codes, factors, bins=20, limits=None), mig(codes, factors)
    assert ours.score == theirs.score
    assert np.array_equal(ours.mutual_information, theirs.mutual_information)


def test_rmig_is_what_samples_of_the_posterior_tell(factors):
    """The closed form against 1000 draws from every posterior."""
    generator = np.random.default_rng(0)
    mean = np.hstack([factors[:1000, :2] / 3 - 1.5, generator.normal(size=(1000, 1))])
    logvar = generator.normal(-2, 1, size=mean.shape)
    exact = rmig(mean, factors[:1000], logvar=logvar, bins=20)
    draws = np.concatenate([mean + np.exp(logvar / 2) * generator.normal(size=mean.shape) for _ in range(1000)])
    drawn = rmig(draws, np.tile(factors[:1000], (1000, 1)), bins=20)
    np.testing.assert_allclose(exact.mutual_information, drawn.mutual_information, atol=4e-3)
    assert exact.score < rmig(mean, factors[:1000], bins=20).score


def test_rmig_of_posteriors_of_any_width(factors):
    mean = factors / 3 - 1.5
    assert rmig(mean, factors, logvar=np.full(mean.shape, -2000)).score == rmig(mean, factors).score
    assert rmig(mean, factors, logvar=np.full(mean.shape, 2000)).score == pytest.approx(0, abs=1e-12)
    assert (
        rmig(mean, factors, logvar=np.full(mean.shape, -2000), limits=None).score
        == rmig(mean, factors, limits=None).score
    )


def test_two_factors_in_one_code_and_one_factor_in_two():
    first, second = (grid.ravel() for grid in np.meshgrid(np.arange(3), np.arange(3)))
    factors = np.stack([first, second], axis=1)
    both = (3 * first + second).reshape(-1, 1)
    assert mig_sup(both, factors, bins=9).score == pytest.approx(0, abs=1e-12)
    assert dcimig(both, factors, bins=9).score == pytest.approx(0, abs=1e-12)
    assert mig(both, factors, bins=9).score == pytest.approx(1)  # what MIG cannot see
    # H(v, z) - I = ln 9 - ln 3, of at most ln 3 + ln 9
    assert jemmig(both, factors, bins=9).score == pytest.approx(2 / 3)

    twice = np.stack([first, first, second], axis=1)
    assert mig_sup(twice, factors).score == pytest.approx(1)
    assert dcimig(twice, factors).score == pytest.approx(1)
    assert mig(twice, factors).score == pytest.approx(0.5)


@pytest.mark.parametrize("metric", METRICS)
def test_one_code_and_one_factor(metric):
    factor = np.array([[0], [1], [0], [1]])
    assert metric(factor, factor, bins=2).score == pytest.approx(1 if metric is not rmig else 0)
    assert np.isfinite(metric(np.array([[0.0], [1], [2], [-3]]), factor, bins=50).score)


@pytest.mark.parametrize("metric", METRICS)
def test_scores_ignore_order_of_rows_codes_and_values(golden, metric):
    inputs, _ = golden
    codes, factors = inputs["test_linear_mix10"], inputs["ys_test"]
    score = metric(codes, factors).score
    generator = np.random.default_rng(0)
    rows, names = generator.permutation(len(codes)), generator.permutation(40)
    assert metric(codes[rows][:, ::-1], names[factors[rows]][:, ::-1]).score == pytest.approx(score, abs=1e-12)
    assert 0 <= score <= 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors(factors, metric, dtype):
    codes = torch.from_numpy(factors).to(dtype).requires_grad_()
    assert metric(codes, torch.from_numpy(factors)).score == metric(factors, factors).score


@pytest.mark.parametrize("metric", METRICS)
def test_wrong_input(factors, metric):
    with pytest.raises(ValueError, match="bins must be at least 1"):
        metric(factors, factors, bins=0)
    with pytest.raises(ValueError, match="column 1 never varies"):
        metric(factors, factors * [1, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="NaN or infinity in column 0"):
        metric(np.full((4000, 1), np.nan), factors)
    with pytest.raises(ValueError, match="3999 and 4000"):
        metric(factors[1:], factors)


def test_wrong_arguments_of_rmig(factors):
    with pytest.raises(ValueError, match=r"logvar must have the shape of codes, got \[4000, 4\]"):
        rmig(factors, factors, logvar=np.zeros((4000, 4)))
    with pytest.raises(ValueError, match="logvar must be finite"):
        rmig(factors, factors, logvar=np.full(factors.shape, np.inf))
    with pytest.raises(TypeError, match="limits must be a pair of numbers or None, got 4"):
        rmig(factors, factors, limits=4)
    for limits in [(1, 1), (1, -1), (0, np.inf), (np.nan, 1), (1, 1 + 1e-15)]:
        with pytest.raises(ValueError, match="limits must be two finite numbers"):
            rmig(factors, factors, limits=limits)


@pytest.mark.parametrize("metric", METRICS)
def test_results_go_into_json(factors, metric):
    result = metric(factors, factors)
    assert json.loads(result.to_json())["score"] == result.score
