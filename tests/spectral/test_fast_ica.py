import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import check_estimator

from fastdis.metrics import mcc
from fastdis.spectral import FastICA
from fastdis.spectral.fast_ica import CONTRASTS


def mixed(n, d, seed=0, D=None):
    rng = np.random.default_rng(seed)
    sources = np.column_stack([rng.uniform(-1, 1, n) if i % 2 else rng.laplace(size=n) for i in range(d)])
    return sources, sources @ rng.standard_normal((d, D or d)) + 3


def test_it_is_an_estimator_of_scikit_learn():
    check_estimator(FastICA())


@pytest.mark.parametrize("contrast", ["logcosh", "exp", "cube"])
@pytest.mark.parametrize(("d", "D"), [(2, 2), (3, 7), (6, 6)])
def test_sources_are_recovered(contrast, d, D):
    sources, data = mixed(5000, d, D=D)
    ica = FastICA(d, contrast=contrast).fit(data)
    found = ica.transform(data)
    assert mcc(found, sources).score > 0.99
    np.testing.assert_allclose(np.cov(found.T, bias=True), np.eye(d), atol=1e-9)
    assert (np.mean(found**3, axis=0) > -1e-9).all()
    np.testing.assert_allclose(ica.inverse_transform(found), data, atol=1e-9)
    assert ica.converged_.any()
    assert ica.score(data) == pytest.approx(ica.contrasts_.max())


@pytest.mark.parametrize("contrast", list(CONTRASTS))
def test_contrasts(contrast):
    """The mean under a normal distribution, and derivatives."""
    G, of_gaussian, slopes = CONTRASTS[contrast]
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    assert weights @ G(nodes) / weights.sum() == pytest.approx(of_gaussian, abs=1e-8)
    y, step = np.linspace(-4, 4, 41), 1e-5
    first, second = slopes(y)
    np.testing.assert_allclose(first, (G(y + step) - G(y - step)) / (2 * step), atol=1e-7)
    np.testing.assert_allclose(second, (slopes(y + step)[0] - slopes(y - step)[0]) / (2 * step), atol=1e-7)


def test_the_farthest_from_gaussian_wins():
    """Here one start in several ends at a spurious point, although it converged."""
    rng = np.random.default_rng(0)
    sources = rng.uniform(-1, 1, (200, 6))
    data = sources @ rng.standard_normal((6, 6))
    ica = FastICA(restarts=24).fit(data)
    assert ica.converged_.all()
    assert ica.contrasts_.min() < 0.9 * ica.contrasts_.max()
    assert ica.score(data) == pytest.approx(ica.contrasts_.max(), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_data_of_any_magnitude(scale):
    _, data = mixed(300, 3)
    usual = FastICA().fit(data).transform(data)
    np.testing.assert_allclose(FastICA().fit(data * scale).transform(data * scale), usual, atol=1e-8)


def test_seeds():
    _, data = mixed(1000, 4)
    first, second = (FastICA(random_state=7).fit(data).components_ for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors(dtype):
    _, data = mixed(500, 3)
    given = torch.from_numpy(data).to(dtype)
    found = FastICA().fit(given).transform(given)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == dtype
    expected = FastICA().fit(given.double().numpy()).transform(given.double().numpy())
    np.testing.assert_allclose(
        found.double().numpy(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"n_components": 3}, np.random.default_rng(0).standard_normal((50, 2)), "1 to .* in which X varies, 2, got 3"),
        ({"n_components": 2}, np.c_[np.arange(9.0), np.ones(9)], r"varies, 1 \(column 1 never changes\), got 2"),
        ({}, np.ones((9, 2)), "X varies, 0"),
        ({"contrast": "tanh"}, np.eye(3), "contrast must be one of logcosh, exp, cube, got 'tanh'"),
        ({"restarts": 0}, np.eye(3), "restarts must be a whole number from 1, got 0"),
        ({"max_iter": 1.5}, np.eye(3), "max_iter must be a whole number from 1, got 1.5"),
        ({"tol": -1}, np.eye(3), "tol must be positive, got -1"),
        ({}, np.array([[0.0, np.nan], [1, 2]]), "NaN"),
    ],
)
def test_what_cannot_be_done_is_refused(options, data, message):
    with pytest.raises(ValueError, match=message):
        FastICA(**options).fit(data)
