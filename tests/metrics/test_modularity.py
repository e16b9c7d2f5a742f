"""Modularity: against the reference implementation, its published examples, and on input that is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from fastdis.metrics import mig, modularity
from fastdis.metrics.modularity import _modularity


@pytest.mark.parametrize("encoder", ["identity5", "linear_mix10", "collapsed10"])
def test_matches_the_reference_implementation(golden, encoder):
    inputs, expected = golden
    result = modularity(inputs[f"train_{encoder}"], inputs["ys_train"])
    assert result.score == pytest.approx(expected[encoder]["modularity"], abs=1e-6)
    np.testing.assert_allclose(result.mutual_information, expected[encoder]["mi_matrix"], atol=1e-6)
    assert np.array_equal(
        result.mutual_information, mig(inputs[f"train_{encoder}"], inputs["ys_train"]).mutual_information
    )
    assert result.score == pytest.approx(result.code_scores.mean())


def test_published_examples():
    assert _modularity(np.diag([5.0] * 5)).mean() == 1
    assert _modularity(np.array([[1.0, 0], [0, 1], [0, 0]])).mean() == pytest.approx(2 / 3)
    assert _modularity(np.zeros((10, 10))).mean() == 0
    diagonal = np.eye(10)
    assert _modularity(np.vstack([diagonal, diagonal])).mean() == 1  # redundant codes are modular
    two_factors = np.diag(np.ones(5))
    two_factors = np.hstack([two_factors, two_factors])  # each code tells of two of ten factors
    assert _modularity(two_factors).mean() == pytest.approx(1 - 1 / 9)


def test_no_information_is_too_small_to_count():
    assert _modularity(np.array([[1e-200, 1e-200], [1e-200, 0]])).tolist() == [0, 1]


def test_perfect_shuffled_and_empty_codes():
    factors = np.random.RandomState(0).randint(1, 11, size=(20000, 10))
    assert 0.9 <= modularity(factors, factors).score <= 1
    # Each row's codes in an order of its own: every code tells a little of every factor.
    shuffled = np.random.default_rng(1).permuted(factors, axis=1)
    assert 0 <= modularity(shuffled, factors).score <= 0.2
    assert modularity(np.zeros((20000, 3)), factors).score == 0


def test_codes_that_never_change_stay_in_the_mean():
    factors = np.random.default_rng(0).integers(0, 4, (500, 2))
    full = modularity(factors, factors)
    half = modularity(np.hstack([factors, np.ones((500, 2))]), factors)
    assert half.score == pytest.approx(full.score / 2)
    assert half.code_scores[2:].tolist() == [0, 0]


def test_score_ignores_order_offset_scale_and_names(golden):
    inputs, _ = golden
    codes, factors = inputs["test_linear_mix10"].astype(float), inputs["ys_test"]
    score = modularity(codes, factors).score
    rows = np.random.default_rng(0).permutation(len(codes))
    names = np.random.default_rng(1).permutation(40)
    assert modularity(codes[rows][:, ::-1] * 2.0**-300, names[factors[rows]][:, ::-1]).score == pytest.approx(score)
    assert modularity(codes * 3 + 17, factors).score == pytest.approx(score, abs=1e-3)


def test_one_factor():
    factor = np.array([[0], [1], [2]])
    with pytest.raises(ValueError, match="factors must have at least two columns"):
        modularity(factor, factor)


def test_wrong_input():
    factors = np.random.default_rng(0).integers(0, 4, (100, 3))
    with pytest.raises(ValueError, match="column 2 never varies"):
        modularity(factors, factors * [1, 1, 0])
    with pytest.raises(ValueError, match="bins must be at least 1"):
        modularity(factors, factors, bins=-1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        modularity(factors * [1.0, np.nan, 1.0], factors)
    with pytest.raises(TypeError, match="factors must be integers"):
        modularity(factors, factors.astype(float))
