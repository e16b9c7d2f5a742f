"""R^2 of a linear regression: against scikit-learn, by hand, under linear maps, and on input that is wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

import fastdis.metrics
from fastdis.metrics import evaluate, mcc, r2


@pytest.fixture
def data():
    """Codes that tell three real factors in part: a linear map, something bent, and noise."""
    generator = np.random.default_rng(0)
    factors = generator.normal(size=(500, 3)) * [1, 1e3, 1e-3] + [0, 5, 7]
    codes = generator.normal(size=(500, 4))
    codes[:, 0] += factors[:, 0]
    codes[:, 1] += np.exp(factors[:, 1] / 1e3)
    return codes, factors


def test_is_linear_regression(data):
    codes, factors = data
    fitted = LinearRegression().fit(codes, factors).predict(codes)
    result = r2(codes, factors)
    np.testing.assert_allclose(result.explained, r2_score(factors, fitted, multioutput="raw_values"), rtol=1e-10)
    assert result.score == pytest.approx(result.explained.mean(), rel=1e-14)
    # Neither of the two that are told is told in full, and the third is not told at all.
    assert 0.3 < result.explained[0] < 0.7
    assert 0.3 < result.explained[1] < 0.8
    assert result.explained[2] < 0.05


def test_by_hand():
    """Of (0, 0, 1, 3) about its mean 1, with sum of squares 6, the line z - 0.5 leaves 1."""
    result = r2([[0], [1], [2], [3]], np.array([[0, 3], [0, 2], [1, 1], [3, 0]]))
    np.testing.assert_allclose(result.explained, [5 / 6, 1], rtol=1e-14)


def test_is_squared_correlation_for_one_code(data):
    codes, factors = data
    assert r2(codes[:, :1], factors[:, :1]).score == pytest.approx(mcc(codes[:, :1], factors[:, :1]).score ** 2)


def test_linear_maps_and_offsets_change_nothing(data):
    codes, factors = data
    generator = np.random.default_rng(1)
    expected = r2(codes, factors).explained
    for _ in range(5):
        mixed = codes @ generator.normal(size=(4, 4)) * 10.0 ** generator.integers(-9, 9, 4)
        mixed = mixed + np.abs(mixed).max(axis=0) * generator.normal(size=4)
        np.testing.assert_allclose(r2(mixed, factors).explained, expected, rtol=1e-9)
    # A map that loses a direction is not invertible.
    assert r2(codes[:, 1:], factors).score < expected.mean() - 0.1


def test_factors_up_to_a_linear_map_are_found_where_mcc_does_not(data):
    _, factors = data
    factors = (factors - factors.mean(axis=0)) / factors.std(axis=0)
    mixed = factors @ np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]])
    assert r2(mixed, factors).score == pytest.approx(1, abs=1e-14)
    assert r2(mixed, factors).score <= 1
    assert mcc(mixed, factors).score < 0.9


def test_noise_explains_d_of_n_less_one():
    """Expected of each in-sample direction, and so for the mean over many factors."""
    generator = np.random.default_rng(2)
    score = r2(generator.normal(size=(101, 20)), generator.normal(size=(101, 400))).score
    assert score == pytest.approx(0.2, abs=0.01)


def test_as_many_codes_as_rows_explain_anything():
    generator = np.random.default_rng(3)
    factors = generator.normal(size=(20, 2))
    for d in (19, 20, 50):
        assert r2(generator.normal(size=(20, d)), factors).score == pytest.approx(1, abs=1e-12)
    assert r2(generator.normal(size=(20, 18)), factors).score < 1 - 1e-6


def test_constant_and_duplicated_codes(data):
    codes, factors = data
    expected = r2(codes, factors).explained
    for more in (np.full((500, 1), 0.1), np.full((500, 2), 1e300), codes, -3 * codes[:, [1]], codes @ np.ones((4, 1))):
        for extended in (np.hstack([codes, more]), np.hstack([more, codes])):
            np.testing.assert_allclose(r2(extended, factors).explained, expected, rtol=1e-9)
    assert r2(np.full((500, 3), 0.1), factors).explained.tolist() == [0, 0, 0]


def test_any_magnitude(data):
    codes, factors = data
    expected = r2(codes, factors).explained
    scales = np.array([1e-200, 1e200, 1e-150, 1e150])
    np.testing.assert_allclose(r2(codes * scales, factors).explained, expected, rtol=1e-9)
    np.testing.assert_allclose(r2(codes, factors * [1e-200, 1e200, 1e200]).explained, expected, rtol=1e-9)
    # Half of the code's digits are its offset.
    np.testing.assert_allclose(r2(codes + 2.0**26, factors).explained, expected, rtol=1e-6)
    assert r2(np.arange(50.0).reshape(50, 1) + 2.0**52, np.arange(50).reshape(50, 1)).score == pytest.approx(1)


def test_unrelated_factor_is_not_below_0():
    """Exactly orthogonal, so that only rounding decides on the sign."""
    for rows, columns in itertools.product((2, 7), range(3, 40)):
        grid = np.array(list(itertools.product(range(rows), range(columns))))
        assert 0 <= r2(grid[:, :1], grid[:, 1:]).score < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_arrays(data, dtype):
    codes, factors = (torch.from_numpy(array).to(dtype) for array in (data[0], data[1] - [0, 5, 7]))
    result = r2(codes.requires_grad_(), factors)
    expected = r2(codes.detach().double().numpy(), factors.double().numpy())
    assert np.array_equal(result.explained, expected.explained)


def test_in_evaluate():
    generator = np.random.default_rng(4)
    factors = generator.integers(0, 5, (300, 3))
    codes = factors @ generator.normal(size=(3, 3)) + generator.normal(size=(300, 3))
    assert evaluate(codes, factors, metrics=["r2"]).scores == {"r2": r2(codes, factors).score}
    assert isinstance(evaluate(codes, factors, metrics=["r2"]).r2, fastdis.metrics.R2Result)


def test_wrong_input(data):
    codes, factors = data
    with pytest.raises(ValueError, match="column 1 never varies"):
        r2(codes, factors * [1, 0, 1])
    with pytest.raises(ValueError, match="codes must be finite, and hold NaN or infinity in column 2"):
        r2(codes * [1, 1, np.inf, 1], factors)
    with pytest.raises(ValueError, match="factors must be finite, and hold NaN or infinity in column 0"):
        r2(codes, factors * [np.nan, 1, 1])
    with pytest.raises(ValueError, match="codes and factors must have as many rows, got 500 and 499"):
        r2(codes, factors[1:])
    with pytest.raises(ValueError, match=r"codes must have shape \[n, d\] with at least one code, got \[500\]"):
        r2(codes[:, 0], factors)
    with pytest.raises(TypeError, match="codes must be real numbers, got complex128"):
        r2(codes * 1j, factors)
