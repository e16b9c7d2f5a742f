import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import check_estimator

from fastdis.spectral import SpectralDisentangler


def test_it_is_an_estimator_of_scikit_learn():
    check_estimator(SpectralDisentangler())


@pytest.mark.parametrize("mode", ["hlle", "ltsa"])
@pytest.mark.parametrize("seed", range(3))
def test_factors_of_an_isometric_manifold_are_recovered(torus_patch, mode, seed):
    z, X = torus_patch(1000, 2, 50, seed=seed)
    disentangler = SpectralDisentangler(mode=mode)
    found = disentangler.fit_transform(X)
    assert disentangler.score(X, z) > 0.99
    assert np.array_equal(found, disentangler.embedding_)
    np.testing.assert_allclose(np.cov(found.T, bias=True), np.eye(2), atol=1e-9)


def test_more_factors(torus_patch):
    z, X = torus_patch(2500, 4, 60, reach=0.8)
    assert SpectralDisentangler(4).fit(X).score(X, z) > 0.99


def test_tensors(torus_patch):
    z, X = torus_patch(400, 2, 20)
    given = torch.from_numpy(X).float()
    found = SpectralDisentangler().fit_transform(given)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float32
    assert SpectralDisentangler().fit(given).score(given, torch.from_numpy(z)) > 0.98
