"""Scores that need no factors: against the reference implementation, by hand, and on input that is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from fastdis.metrics import code_mutual_information, gaussian_total_correlation, wasserstein_correlation

SCORES = [gaussian_total_correlation, wasserstein_correlation, code_mutual_information]


@pytest.fixture
def codes():
    generator = np.random.default_rng(0)
    return generator.normal(size=(4000, 5)) @ generator.normal(size=(5, 5)) + generator.normal(size=5)


@pytest.mark.parametrize("encoder", ["identity5", "linear_mix10", "collapsed10"])
def test_matches_the_reference_implementation(golden, encoder):
    inputs, expected = golden
    result = gaussian_total_correlation(inputs[f"train_{encoder}"])
    assert result.score == pytest.approx(expected[encoder]["gauss_tc"], abs=1e-6)


def test_are_their_formulas(codes):
    covariance = np.cov(codes.T)
    variances = np.diag(covariance)
    total = 0.5 * (np.log(variances).sum() - np.linalg.slogdet(covariance)[1])
    assert gaussian_total_correlation(codes).score == pytest.approx(total)
    np.testing.assert_allclose(gaussian_total_correlation(codes).correlation, np.corrcoef(codes.T), atol=1e-12)

    # 2 tr(covariance) - 2 tr sqrt(covariance diag(covariance)), the square root of a matrix that is not symmetric
    root = scipy.linalg.sqrtm(covariance * variances)
    distance = wasserstein_correlation(codes)
    assert distance.score == pytest.approx(2 * variances.sum() - 2 * np.trace(root).real)
    assert distance.normalized == pytest.approx(distance.score / variances.sum())
    np.testing.assert_allclose(distance.covariance, covariance)

    binned = [np.digitize(code, np.histogram_bin_edges(code, 20)[:-1]) for code in codes.T]
    mutual = np.array([[information(a, b) for a in binned] for b in binned])
    result = code_mutual_information(codes)
    np.testing.assert_allclose(result.mutual_information, mutual, atol=1e-10)
    assert result.score == pytest.approx(mutual[~np.eye(5, dtype=bool)].mean())


def information(a, b):
    joint = np.histogram2d(a, b, bins=[np.arange(1, 22), np.arange(1, 22)])[0] / len(a)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nansum(joint * np.log(joint / joint.sum(axis=1, keepdims=True) / joint.sum(axis=0, keepdims=True)))


def test_two_correlated_codes():
    """Total correlation of two Gaussians is -ln(1 - r^2) / 2."""
    a, b = np.random.default_rng(0).normal(size=(2, 500))
    codes = np.stack([a, a + b], axis=1)
    r = np.corrcoef(codes.T)[0, 1]
    assert gaussian_total_correlation(codes).score == pytest.approx(-0.5 * np.log(1 - r * r))


def test_independent_codes():
    codes = np.stack(np.meshgrid(*[np.arange(6)] * 4), axis=-1).reshape(-1, 4)
    assert gaussian_total_correlation(codes).score == pytest.approx(0, abs=1e-14)
    assert wasserstein_correlation(codes).score == pytest.approx(0, abs=1e-12)
    assert code_mutual_information(codes).score == 0


@pytest.mark.parametrize("copy", [lambda code: code, lambda code: -3 * code + 1, lambda code: code * 1e-150])
def test_duplicated_codes(codes, copy):
    doubled = np.hstack([codes, copy(codes[:, :1])])
    result = gaussian_total_correlation(doubled)
    assert result.score == np.inf
    assert result.to_json().startswith('{"score": null')
    assert np.isfinite(wasserstein_correlation(doubled).score)
    assert 0 <= wasserstein_correlation(doubled).normalized <= 2
    assert code_mutual_information(np.hstack([codes, codes])).score > code_mutual_information(codes).score


def test_a_code_that_is_a_sum_of_others(codes):
    assert gaussian_total_correlation(np.hstack([codes, codes.sum(axis=1, keepdims=True)])).score == np.inf


def test_codes_that_never_change_have_no_part(codes):
    more = np.hstack([codes, np.full((4000, 2), 0.1)])
    assert gaussian_total_correlation(more).score == pytest.approx(gaussian_total_correlation(codes).score)
    assert wasserstein_correlation(more).score == pytest.approx(wasserstein_correlation(codes).score)
    # Here they stay in the mean over pairs: 20 of 42 are of codes that change.
    assert code_mutual_information(more).score == pytest.approx(code_mutual_information(codes).score * 20 / 42)


@pytest.mark.parametrize("score", SCORES)
def test_nothing_changes(score):
    result = score(np.full((10, 3), 7.0))
    assert result.score == 0
    assert "NaN" not in result.to_json()


@pytest.mark.parametrize("score", SCORES)
def test_one_code(codes, score):
    assert score(codes[:, :1]).score == pytest.approx(0, abs=1e-12)


def test_offset_and_scale(codes):
    scales = np.array([1e-120, -2.0, 1e120, 3.0, 1e5])
    total = gaussian_total_correlation(codes).score
    assert gaussian_total_correlation(codes * scales).score == pytest.approx(total)
    assert gaussian_total_correlation(codes + 1e6).score == pytest.approx(total, abs=1e-6)
    distance = wasserstein_correlation(codes)
    assert wasserstein_correlation(codes * 3 + 5).score == pytest.approx(9 * distance.score)
    for scale in (1e-150, 1e150):
        assert wasserstein_correlation(codes * scale).normalized == pytest.approx(distance.normalized)
    huge = wasserstein_correlation(codes * 1e300)
    assert huge.score == np.inf
    assert huge.normalized == pytest.approx(distance.normalized)


@pytest.mark.parametrize("score", SCORES)
def test_order_of_rows_and_codes(codes, score):
    rows = np.random.default_rng(0).permutation(4000)
    assert score(codes[rows][:, ::-1]).score == pytest.approx(score(codes).score)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("score", SCORES)
def test_tensors(codes, score, dtype):
    tensor = torch.from_numpy(codes).to(dtype).requires_grad_()
    assert score(tensor).score == pytest.approx(score(codes).score, rel=0.1)
    assert score(tensor[::2].T.contiguous().T).score == score(tensor.detach().double().numpy()[::2]).score


@pytest.mark.parametrize("score", SCORES)
def test_wrong_input(codes, score):
    with pytest.raises(ValueError, match="NaN or infinity in column 0"):
        score(codes * [np.nan, 1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        score(codes[0])
    with pytest.raises(TypeError, match="real numbers"):
        score(codes.astype(complex))


def test_too_few_rows(codes):
    with pytest.raises(ValueError, match="more rows than columns that change, got 5 rows for 5"):
        gaussian_total_correlation(codes[:5])
    assert np.isfinite(gaussian_total_correlation(codes[:6]).score)
    with pytest.raises(ValueError, match="at least two rows"):
        wasserstein_correlation(codes[:1])
    assert code_mutual_information(codes[:1]).score == 0
