import warnings

import numpy as np
import pytest
import torch
from sklearn.manifold import LocallyLinearEmbedding
from sklearn.utils.estimator_checks import check_estimator

from fastdis.spectral import HessianEigenmap, _host, _null_space


def angle(a, b):
    """Sine of the largest angle between the spans of columns."""
    a, b = np.linalg.qr(a - a.mean(axis=0))[0], np.linalg.qr(b - b.mean(axis=0))[0]
    return np.linalg.norm(a - b @ (b.T @ a), 2)


@pytest.mark.parametrize("mode", ["hlle", "ltsa"])
def test_it_is_an_estimator_of_scikit_learn(mode):
    check_estimator(HessianEigenmap(mode=mode))


@pytest.mark.parametrize(("n", "d", "k", "D"), [(700, 2, 12, 30), (700, 2, 25, 400), (900, 3, 20, 12)])
def test_ltsa_is_what_scikit_learn_calls_hessian(torus_patch, n, d, k, D):
    _, X = torus_patch(n, d, D, seed=n)
    theirs = LocallyLinearEmbedding(
        n_neighbors=k, n_components=d, method="hessian", eigen_solver="dense"
    ).fit_transform(X)  # fmt: skip
    assert angle(HessianEigenmap(d, n_neighbors=k, mode="ltsa").fit_transform(X), theirs) < 1e-6


@pytest.mark.parametrize("mode", ["hlle", "ltsa"])
@pytest.mark.parametrize(("n", "d", "D"), [(200, 1, 5), (900, 2, 40), (1500, 3, 300)])
def test_coordinates_are_affine_in_true_ones(torus_patch, mode, n, d, D):
    z, X = torus_patch(n, d, D)
    eigenmap = HessianEigenmap(d, mode=mode)
    found = eigenmap.fit_transform(X)
    assert eigenmap.score(X, z) > 0.999
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(np.cov(found.T, bias=True), np.eye(d), atol=1e-9)
    assert eigenmap.eigenvalues_[d] > 20 * eigenmap.eigenvalues_[d - 1]
    assert eigenmap.eigenvalues_.shape == (d + 1,)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_points_may_be_read_only(torus_patch, dtype):
    _, X = torus_patch(500, 2, 300)
    expected = HessianEigenmap(2).fit_transform(X.astype(dtype))
    X = X.astype(dtype)
    X.setflags(write=False)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # or the first of all tests alone would hear of it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            eigenmap = HessianEigenmap(2).fit(X)
            placed = eigenmap.transform(X)
    finally:
        torch.set_warn_always(before)
    assert np.array_equal(eigenmap.embedding_, expected)
    np.testing.assert_allclose(placed, expected)


def test_a_constant_column_changes_nothing(torus_patch):
    _, X = torus_patch(300, 2, 12)
    plain = HessianEigenmap(2).fit_transform(X)
    assert angle(HessianEigenmap(2).fit_transform(np.c_[X, np.full(len(X), 7.0)]), plain) < 1e-9


def test_hlle_by_hand(torus_patch):
    """M from the definition, point by point, and all its eigenvectors."""
    _, X = torus_patch(120, 2, 6)
    k = 14
    M = np.zeros((120, 120))
    for i in range(120):
        near = np.argsort(np.square(X - X[i]).sum(axis=1), kind="stable")[1 : k + 1]
        u = np.linalg.svd(X[near] - X[near].mean(axis=0), full_matrices=False)[0][:, :2]
        design = np.column_stack([np.ones(k), u, u[:, 0] ** 2, u[:, 0] * u[:, 1], u[:, 1] ** 2])
        H = np.linalg.qr(design)[0][:, 3:]
        M[np.ix_(near, near)] += H @ H.T
    values, vectors = np.linalg.eigh(M)
    eigenmap = HessianEigenmap(2, n_neighbors=k).fit(X)
    assert angle(eigenmap.embedding_, vectors[:, 1:3]) < 1e-6
    np.testing.assert_allclose(eigenmap.eigenvalues_[:2], values[1:3], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(eigenmap.eigenvalues_[2], values[3], rtol=0.1)


def test_sparse_and_dense_factors_agree(patch, monkeypatch):
    dense = HessianEigenmap().fit(patch[1])
    monkeypatch.setattr(_null_space, "DENSE_POINTS", 10)
    sparse = HessianEigenmap().fit(patch[1])
    np.testing.assert_allclose(sparse.embedding_, dense.embedding_, atol=1e-6)
    np.testing.assert_allclose(sparse.eigenvalues_, dense.eigenvalues_, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("mode", ["hlle", "ltsa"])
def test_without_the_extension(patch, monkeypatch, mode):
    compiled = HessianEigenmap(mode=mode).fit(patch[1]).embedding_
    monkeypatch.setattr(_host, "extension", None)
    np.testing.assert_allclose(HessianEigenmap(mode=mode).fit(patch[1]).embedding_, compiled, atol=1e-6)


def test_other_points_are_placed_among_the_fitted(patch):
    z, X = patch
    inner = np.flatnonzero((np.abs(z) < 0.9).all(axis=1))[::9]
    rest = np.setdiff1d(np.arange(len(X)), inner)
    eigenmap = HessianEigenmap().fit(X[rest])
    assert np.array_equal(eigenmap.transform(X[rest][:50]), eigenmap.embedding_[:50])
    affine = np.linalg.lstsq(np.c_[z[rest], np.ones(len(rest))], eigenmap.embedding_, rcond=None)[0]
    expected = np.c_[z[inner], np.ones(len(inner))] @ affine
    np.testing.assert_allclose(eigenmap.transform(X[inner]), expected, atol=0.02)


def test_a_point_far_from_all_or_near_equal_ones_is_placed_somewhere(patch):
    _, X = patch
    eigenmap = HessianEigenmap().fit(np.r_[X, np.repeat(X[:1], 7, axis=0)])
    placed = eigenmap.transform(np.stack([X[0] + 1e-9, X[0] + 100]))
    assert np.isfinite(placed).all()
    np.testing.assert_allclose(placed[0], eigenmap.embedding_[0], atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_tensors(patch, dtype):
    given = torch.from_numpy(patch[1][:300]).to(dtype)
    found = HessianEigenmap().fit_transform(given)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == dtype
    if dtype == torch.float64:
        assert np.array_equal(found.numpy(), HessianEigenmap().fit_transform(given.numpy()))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float64, 1e-250), (np.float64, 1e250), (np.float32, 1e-30), (np.float32, 1e30)]
)
def test_points_of_any_magnitude(patch, dtype, scale):
    X = patch[1][:300].astype(dtype)
    usual, scaled = HessianEigenmap().fit(X), HessianEigenmap().fit(X * dtype(scale))
    assert angle(usual.embedding_, scaled.embedding_) < (1e-3 if dtype == np.float32 else 1e-6)
    np.testing.assert_allclose(scaled.transform(X[:9] * dtype(scale)), scaled.embedding_[:9])
    assert np.isfinite(scaled.transform((X[:9] + dtype(0.01)) * dtype(scale))).all()


def test_single_precision_is_enough(patch):
    z, X = patch
    exact, rounded = (HessianEigenmap().fit(X.astype(dtype) + 5) for dtype in (np.float64, np.float32))
    assert angle(exact.embedding_, rounded.embedding_) < 1e-3
    assert rounded.score(X.astype(np.float32) + 5, z) > 0.999


def test_a_few_equal_points_do_no_harm(patch):
    z, X = patch
    twice = np.r_[X, X[:5]]
    eigenmap = HessianEigenmap().fit(twice)
    assert eigenmap.score(twice, np.r_[z, z[:5]]) > 0.999
    np.testing.assert_allclose(eigenmap.embedding_[:5], eigenmap.embedding_[-5:], atol=1e-2)


def test_as_many_neighbours_as_connect_all_by_default():
    with pytest.warns(UserWarning, match="n_neighbors=15 falls into 2 parts of 60, 30 points: 30 were taken"):
        eigenmap = HessianEigenmap().fit(two_squares(90, 3))
    assert eigenmap.n_neighbors_ == 30


def two_squares(n, apart):
    rng = np.random.default_rng(0)
    return rng.uniform(0, 1, (n, 2)) + np.where(np.arange(n) < n // 3, 0, apart)[:, None]


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"n_neighbors": 15}, two_squares(150, 50), "n_neighbors=15 falls into 2 parts of 100, 50 points"),
        ({"n_components": 3}, two_squares(90, 0), "at most the number of features, 2, got 3"),
        ({"n_neighbors": 5}, np.eye(40), "from 6 for n_components=2 and mode='hlle', got 5"),
        ({"n_neighbors": 3, "mode": "ltsa"}, np.eye(40), "from 4 for n_components=2 and mode='ltsa', got 3"),
        ({"n_neighbors": 40}, np.eye(40), "more rows than n_neighbors=40, got n_samples = 40"),
        ({"n_components": 0}, np.eye(40), "n_components must be a whole number from 1, got 0"),
        ({"mode": "lle"}, np.eye(40), "mode must be 'hlle' or 'ltsa', got 'lle'"),
        ({}, np.repeat(two_squares(30, 0), 12, axis=0), "half of the 15 neighbours of row 0 equal it, such as row 1"),
        ({}, np.c_[np.arange(40.0), np.arange(40.0)], "of row 0 span fewer than n_components=2 directions"),
        ({}, np.full((40, 3), np.inf), "infinity"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(options, data, message):
    with pytest.raises(ValueError, match=message):
        HessianEigenmap(**options).fit(data)


def test_approximate_neighbours(patch):
    z, X = patch
    assert HessianEigenmap(neighbors_algorithm="approximate").fit(X).score(X, z) > 0.999
    with pytest.raises(ValueError, match="neighbors_algorithm must be 'exact' or 'approximate', got 'kd_tree'"):
        HessianEigenmap(neighbors_algorithm="kd_tree").fit(X)
