"""Explicitness: against the reference implementation and scikit-learn, by hand, and on input that is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdis.metrics import explicitness
from fastdis.metrics.explicitness import _mean_area

pytest.importorskip("scipy")


@pytest.mark.parametrize("encoder", ["identity5", "linear_mix10", "collapsed10"])
def test_matches_the_reference_implementation(golden, encoder):
    inputs, expected = golden
    result = explicitness(inputs[f"train_{encoder}"], inputs["ys_train"], inputs[f"test_{encoder}"], inputs["ys_test"])
    assert result.score == pytest.approx(expected[encoder]["explicitness_test"], abs=1e-6)
    assert result.train == pytest.approx(expected[encoder]["explicitness_train"], abs=1e-6)
    assert result.per_factor.shape == (5,)
    assert result.per_factor.mean() == pytest.approx(result.score)


@pytest.fixture
def split():
    """A training and a test set of 200 rows, with a factor of three values and one of two."""
    random = np.random.default_rng(0)
    factors = np.stack([np.arange(400) % 3, random.integers(0, 2, 400)], axis=1) * 5 - 2
    codes = random.normal(size=(400, 4)) + factors @ random.normal(size=(2, 4)) / 5
    return codes[:200], factors[:200], codes[200:], factors[200:]


def test_areas_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    probabilities = random.integers(0, 20, (300, 4)) / 20  # with many ties
    classes = random.integers(0, 4, 300).astype(np.int32)
    expected = np.mean([metrics.roc_auc_score(classes == c, probabilities[:, c]) for c in range(4)])
    assert _mean_area(probabilities, classes) == pytest.approx(expected, abs=1e-12)


def test_area_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.1, 0.9]])
    # Of four pairs, class 0 wins three.
    assert _mean_area(probabilities, np.array([0, 0, 1, 1])) == pytest.approx(0.75)


def test_chance_and_perfection(split):
    _, factors, _, test_factors = split
    nothing = np.zeros((200, 3))
    result = explicitness(nothing, factors, nothing, test_factors)
    assert result.score == result.train == 0.5
    every_value = np.concatenate([factors == value for value in np.unique(factors)], axis=1).astype(float)
    tests = np.concatenate([test_factors == value for value in np.unique(factors)], axis=1).astype(float)
    assert explicitness(every_value, factors, tests, test_factors).score == 1


@pytest.mark.parametrize("value", [0.1, -1e9, 1e-30])
def test_a_constant_code_changes_nothing(split, value):
    codes, factors, test_codes, test_factors = split
    constant = np.full((200, 1), value)
    with_constant = explicitness(
        np.hstack([codes, constant]), factors, np.hstack([test_codes, constant + 1]), test_factors
    )
    assert with_constant.score == pytest.approx(explicitness(*split).score, abs=1e-4)


def test_scale_and_shift_change_nothing(split):
    codes, factors, test_codes, test_factors = split
    score = explicitness(*split).score
    for scale, shift in ((1e-20, 0), (-64, 8), (1e100, 0)):
        moved = explicitness(codes * scale + shift, factors * 3 + 1, test_codes * scale + shift, test_factors * 3 + 1)
        assert moved.score == pytest.approx(score, abs=1e-4)


def test_values_that_one_set_lacks(split):
    codes, factors, test_codes, test_factors = split
    # Value -2 is gone from the tests of factor 0: its curve is left out.
    kept = test_factors[:, 0] != -2
    fewer = explicitness(codes, factors, test_codes[kept], test_factors[kept])
    assert np.isfinite(fewer.per_factor).all()
    # A value unknown from training is a miss for all others.
    unknown = test_factors.copy()
    unknown[~kept, 0] = 77
    result = explicitness(codes, factors, test_codes, unknown)
    assert np.isfinite(result.per_factor).all()
    assert result.per_factor[1] == pytest.approx(explicitness(*split).per_factor[1])


def test_a_factor_without_any_curve(split):
    codes, factors, test_codes, test_factors = split
    test_factors = test_factors.copy()
    test_factors[:, 1] = test_factors[0, 1]
    with pytest.raises(ValueError, match="test_factors column 1 must have at least two values"):
        explicitness(codes, factors, test_codes, test_factors)
    test_factors[::2, 1] = 1000
    test_factors[1::2, 1] = 1001
    with pytest.raises(ValueError, match="test_factors column 1"):
        explicitness(codes, factors, test_codes, test_factors)


def test_tensors(split):
    tensors = [torch.from_numpy(array) for array in split]
    assert explicitness(*tensors).score == explicitness(*split).score
    tensors[0] = tensors[0].to(torch.bfloat16).requires_grad_()
    assert explicitness(*tensors).score == pytest.approx(explicitness(*split).score, abs=0.02)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, np.full((200, 4), np.nan), ValueError, "codes must be finite"),
        (2, np.full((200, 4), 1e151), ValueError, "test_codes must lie between"),
        (1, np.ones((200, 2), int), ValueError, "factors column 0 never varies"),
        (3, np.ones((200, 2)), TypeError, "test_factors must be integers"),
        (2, np.ones((200, 3)), ValueError, "codes and test_codes must have as many columns, got 4 and 3"),
        (3, np.ones((199, 2), int), ValueError, "200 and 199"),
    ],
)
def test_input_that_does_not_fit(split, position, value, error, message):
    arguments = list(split)
    arguments[position] = value
    with pytest.raises(error, match=message):
        explicitness(*arguments)
