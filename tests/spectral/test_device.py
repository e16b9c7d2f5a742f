"""Numerics by torch against NumPy's, and the estimators when points stay where they lie: on a GPU if there is one."""

import pickle
import re

import numpy as np
import pytest
import torch

from fastdis.spectral import HessianEigenmap, SpectralDisentangler, _device, _host, _neighbours, _null_space
from fastdis.spectral import hessian_eigenmap as estimators
from fastdis.spectral._neighbours import NeighbourSearch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def put(request, monkeypatch):
    """Return what puts an array on a device, whose tensors the estimators leave there: on the CPU it is made to."""
    monkeypatch.setattr(estimators, "on_device", lambda values: isinstance(values, torch.Tensor))
    return lambda values: torch.from_numpy(values).to(request.param)


def array(tensor):
    assert isinstance(tensor, torch.Tensor)
    return tensor.cpu().numpy()


def projectors(bases):
    return bases @ bases.transpose(0, 2, 1)


def sample(n, D, k, dtype):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, D)).astype(dtype), np.stack([rng.choice(n, k, replace=False) for _ in range(n)])


@pytest.mark.parametrize("kind", ["random", "equal", "infinite"])
@pytest.mark.parametrize(("n", "count"), [(1, 1), (5, 5), (63, 2), (64, 64), (1000, 1), (1000, 40), (1000, 999)])
def test_smallest(put, n, count, kind):
    values = np.random.default_rng(n).standard_normal((7, n)).astype(np.float32).round(2)  # with equal ones
    if kind == "equal":
        values[:] = 3
    elif kind == "infinite":
        values[:, ::2] = np.inf
    rows = np.array([6, 0, 0, 3])
    columns, found = map(array, _device.smallest(put(values), rows, count))
    expected, expected_found = _host.smallest_numpy(values, rows, count)
    assert (np.diff(np.sort(columns, axis=1)) > 0).all()
    assert np.array_equal(values[rows[:, None], columns], np.take_along_axis(values[rows], expected, axis=1))
    assert np.array_equal(found, expected_found)


@pytest.mark.parametrize("block_bytes", [1, 2**12, 2**28])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("D", [1, 7, 513, 2500])
def test_squared_distances(put, monkeypatch, D, dtype, block_bytes):
    monkeypatch.setattr(_device, "BLOCK_BYTES", block_bytes)
    points, candidates = sample(23, D, 5, dtype)
    queries = points[::-1].copy()
    found = array(_device.squared_distances(put(points), put(queries), candidates))
    assert found.dtype == np.float64
    expected = _host.squared_distances_numpy(points, queries, candidates)
    np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("block_bytes", [1, 2**12, 2**28])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("D", "k"), [(1, 1), (3, 2), (16, 4), (100, 9), (513, 17), (4100, 6)])
def test_local_grams(put, monkeypatch, D, k, dtype, block_bytes):
    monkeypatch.setattr(_device, "BLOCK_BYTES", block_bytes)
    points, neighbours = sample(20, D, k, dtype)
    points += 100  # a common offset costs no digits
    found = array(_device.local_grams(put(points), neighbours))
    tolerance = 2e-5 if dtype == np.float32 else 1e-10
    np.testing.assert_allclose(found, _host.local_grams_numpy(points, neighbours), atol=tolerance * D)
    assert np.array_equal(found, found.transpose(0, 2, 1))
    np.testing.assert_allclose(found.sum(axis=2), 0, atol=1e-9 * D)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_have_all_digits_whatever_networks_get(put, precision):
    points, neighbours = sample(60, 600, 6, np.float32)
    expected = _host.local_grams_numpy(points, neighbours)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cuda", enabled=torch.cuda.is_available()):
            found = array(_device.local_grams(put(points), neighbours))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_allclose(found, expected, atol=2e-5 * 600)


@pytest.mark.parametrize("matrices", [5, 2**13])
@pytest.mark.parametrize(("k", "d"), [(2, 1), (5, 4), (6, 2), (40, 2), (60, 8), (30, 29)])
def test_leading_vectors(put, monkeypatch, k, d, matrices):
    monkeypatch.setattr(_device, "MATRICES", matrices)
    factors = np.random.default_rng(1).standard_normal((12, k, k)) * np.geomspace(1, 1e-4, k)
    grams = projectors(factors)
    vectors, values = map(array, _device.leading_vectors(put(grams), d))
    expected, expected_values = _host.leading_vectors_numpy(grams, d)
    assert vectors.shape == expected.shape
    assert values.shape == expected_values.shape
    np.testing.assert_allclose(values[:, :d], expected_values[:, :d], rtol=0, atol=1e-13 * expected_values.max())
    # What any stable solver may turn a subspace by is rounding over the gap.
    apart = np.linalg.norm(projectors(vectors) - projectors(expected), axis=(1, 2))
    gap = expected_values[:, d - 1] - expected_values[:, d]
    allowed = 1e-10 + 64 * np.finfo(float).eps * expected_values[:, 0] / gap
    assert (apart <= allowed).all(), (apart / allowed).max()


@pytest.mark.parametrize("rank", [3, 4])
def test_leading_vectors_of_what_has_few(put, monkeypatch, rank):
    """Points in few dimensions leave the iteration more vectors than directions: it converges all the same."""
    grams = projectors(np.random.default_rng(1).standard_normal((12, 20, rank)))
    expected = projectors(_host.leading_vectors_numpy(grams, 2)[0])
    monkeypatch.setattr(_device, "MOST_ROUNDS", 300)
    library = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrices: library(matrices) if matrices.shape[1] < 20 else None)
    vectors, values = map(array, _device.leading_vectors(put(grams), 2))
    np.testing.assert_allclose(projectors(vectors), expected, atol=1e-9)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(grams)[:, ::-1][:, :3], rtol=1e-9)


@pytest.mark.parametrize("grams", [np.zeros((3, 5, 5)), np.ones((2, 6, 6)), np.broadcast_to(np.eye(7), (2, 7, 7))])
def test_what_does_not_settle_is_left_to_the_library(put, grams):
    vectors, values = map(array, _device.leading_vectors(put(grams.copy()), 2))
    np.testing.assert_allclose(
        vectors.transpose(0, 2, 1) @ vectors, np.broadcast_to(np.eye(2), (len(grams), 2, 2)), atol=1e-12
    )
    np.testing.assert_allclose(values, np.linalg.eigvalsh(grams)[:, ::-1][:, :3], atol=1e-12)


@pytest.mark.parametrize(("k", "d"), [(4, 1), (15, 2), (60, 8)])
def test_hessian_bases(put, k, d):
    vectors = np.linalg.qr(np.random.default_rng(2).standard_normal((9, k, d)))[0]
    vectors -= vectors.mean(axis=1, keepdims=True)
    bases, full = map(array, _device.hessian_bases(put(vectors)))
    expected, _ = _host.hessian_bases_numpy(vectors)
    assert full.all()
    np.testing.assert_allclose(projectors(bases), projectors(expected), atol=1e-9)
    np.testing.assert_allclose(bases.sum(axis=1), 0, atol=1e-10)
    np.testing.assert_allclose(vectors.transpose(0, 2, 1) @ bases, 0, atol=1e-10)


def test_points_on_a_conic_have_no_hessian(put):
    angle = np.arange(12) * 2 * np.pi / 12
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)[None] / 6**0.5
    assert not _device.hessian_bases(put(circle))[1].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "D", "k"), [(2, 1, 1), (40, 3, 39), (400, 20, 10), (300, 270, 25)])
def test_neighbours(put, monkeypatch, n, D, k, dtype):
    monkeypatch.setattr(_neighbours, "BLOCK_BYTES", 4 * n * 37)  # several blocks
    points, _ = sample(n, D, 1, dtype)
    found, squares = NeighbourSearch(put(points)).nearest(k)
    expected, expected_squares = NeighbourSearch(points).nearest(k)
    np.testing.assert_allclose(squares, expected_squares, rtol=2e-6)
    # Which of two is nearer is open where that is a matter of rounding.
    assert (found == expected).mean() > (0.999 if dtype == np.float32 else 1 - 1e-9)
    queries = points[: n // 2] + points.dtype.type(0.01)
    found, _ = NeighbourSearch(put(points)).nearest(1, put(queries))
    assert (found == NeighbourSearch(points).nearest(1, queries)[0]).mean() > 0.99


@pytest.mark.parametrize("k", [2, 15])
def test_neighbours_of_equal_points(put, k):
    points = np.repeat(np.arange(3.0), 100)[:, None] * np.ones(4)
    found, squares = NeighbourSearch(put(points)).nearest(k)
    assert (squares == 0).all()
    assert (np.abs(points[found] - points[:, None]) == 0).all()


@pytest.mark.parametrize("mode", ["hlle", "ltsa"])
@pytest.mark.parametrize(("n", "d", "D"), [(200, 1, 5), (900, 2, 40), (700, 3, 300)])
def test_the_embedding_is_that_of_the_host(put, torus_patch, mode, n, d, D):
    _, X = torus_patch(n, d, D)
    expected = HessianEigenmap(d, mode=mode).fit(X[:-20])
    eigenmap = HessianEigenmap(d, mode=mode)
    given = put(X[:-20])
    found = eigenmap.fit_transform(given)
    assert found.device == given.device
    assert found.dtype == torch.float64
    assert eigenmap.n_features_in_ == max(D, 2 * d)
    assert isinstance(eigenmap.embedding_, np.ndarray)
    np.testing.assert_array_equal(array(found), eigenmap.embedding_)
    np.testing.assert_allclose(eigenmap.embedding_, expected.embedding_, atol=1e-6)
    np.testing.assert_allclose(eigenmap.eigenvalues_, expected.eigenvalues_, rtol=1e-4, atol=1e-10)
    for points in (X[:50], X[-20:]):
        placed = expected.transform(points)
        np.testing.assert_allclose(array(eigenmap.transform(put(points))), placed, atol=1e-6)
        # Points are placed among those fitted wherever either lie.
        np.testing.assert_allclose(eigenmap.transform(points), placed, atol=1e-6)
        np.testing.assert_allclose(array(expected.transform(put(points))), placed, atol=1e-6)
    copied = pickle.loads(pickle.dumps(eigenmap))
    np.testing.assert_array_equal(copied.transform(X[-20:]), eigenmap.transform(X[-20:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_other_dtypes(put, patch, dtype):
    given = put(np.ascontiguousarray(patch[1][:300] * 1e4)).to(dtype)
    eigenmap = HessianEigenmap()
    found = eigenmap.fit_transform(given)
    assert found.dtype == (torch.float32 if dtype == torch.int32 else dtype)
    expected = HessianEigenmap().fit(array(given.float()))
    np.testing.assert_allclose(np.abs(eigenmap.embedding_), np.abs(expected.embedding_), atol=0.01)
    assert eigenmap.transform(given[:9]).dtype == found.dtype


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float64, 1e-250), (np.float64, 1e250), (np.float32, 1e-30), (np.float32, 1e30)]
)
def test_points_of_any_magnitude(put, patch, dtype, scale):
    X = patch[1][:300].astype(dtype)
    usual, scaled = HessianEigenmap().fit(put(X)), HessianEigenmap().fit(put(X * dtype(scale)))
    np.testing.assert_allclose(scaled.embedding_, usual.embedding_, atol=5e-3 if dtype == np.float32 else 1e-5)
    np.testing.assert_allclose(scaled.transform(X[:9] * dtype(scale)), scaled.embedding_[:9])


def refused(estimator, data):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - sentences are compared
        estimator.fit(data)
    return sentence(caught)


def sentence(caught):
    """Return what was said, without numbers of the array, of which scikit-learn shows some."""
    return re.sub(r"(array=|\n)\[.*\]", "", str(caught.value), flags=re.DOTALL)


def circle(n):
    angles = np.arange(n) * 2 * np.pi / n
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


FAR = np.random.default_rng(0).uniform(0, 1, (150, 2)) + np.where(np.arange(150) < 50, 0, 50)[:, None]
HOLE = np.where(np.arange(120).reshape(40, 3) == 100, np.nan, 1.0)


@pytest.mark.parametrize(
    ("options", "data"),
    [
        ({}, HOLE),
        ({}, np.where(np.isnan(HOLE), -np.inf, HOLE)),
        ({}, np.where(np.isnan(HOLE), np.inf, HOLE).astype(np.float32)),
        ({}, np.full((40, 3), np.nan)),
        ({}, np.ones((1, 3))),
        ({}, np.ones((0, 3))),
        ({}, np.ones((40, 0))),
        ({}, np.ones(40)),
        ({}, np.ones((40, 3, 2))),
        ({}, np.ones((40, 3), np.complex128)),
        ({"n_components": 4}, np.ones((40, 3))),
        ({"n_neighbors": 40}, np.eye(40)),
        ({"n_neighbors": 15}, FAR),
        ({}, np.repeat(FAR[:30], 12, axis=0)),
        ({}, np.c_[np.arange(40.0), np.arange(40.0)]),
        ({"n_neighbors": 11}, circle(12)),
    ],
)
def test_what_cannot_be_done_is_refused_as_on_the_host(put, options, data):
    expected = refused(HessianEigenmap(**options), data)
    assert refused(HessianEigenmap(**options), put(data)) == expected


def test_other_points_that_do_not_fit_are_refused_as_on_the_host(put, patch):
    X = patch[1][:300]
    on_host, on_device = HessianEigenmap().fit(X), HessianEigenmap().fit(put(X))
    for bad in (X[:9, :-1], X[:0], np.where(X[7, 3] == X, np.nan, X), X[0]):
        with pytest.raises(ValueError) as expected:  # noqa: PT011 - sentences are compared
            on_host.transform(bad)
        with pytest.raises(ValueError) as found:  # noqa: PT011
            on_device.transform(put(bad.copy()))
        assert sentence(found) == sentence(expected)


def test_a_device_without_the_memory_leaves_the_factor_to_the_host(put, patch, monkeypatch):
    expected = HessianEigenmap().fit(put(patch[1][:300]))

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(_null_space, "cholesky_solver", full)
    found = HessianEigenmap().fit(put(patch[1][:300])).embedding_
    np.testing.assert_allclose(found, expected.embedding_, atol=1e-6)
    monkeypatch.setattr(_null_space, "DEVICE_POINTS", 10)
    np.testing.assert_array_equal(HessianEigenmap().fit(put(patch[1][:300])).embedding_, found)


def test_approximate_neighbours_are_found_on_the_host(put, patch):
    eigenmap = HessianEigenmap(neighbors_algorithm="approximate").fit(put(patch[1]))
    assert eigenmap._search.numerics is _host
    assert eigenmap.score(put(patch[1]), patch[0]) > 0.999


def test_the_spectral_method_leaves_points_where_they_lie(put, torus_patch):
    z, X = torus_patch(400, 2, 20)
    given = put(X)
    disentangler = SpectralDisentangler()
    found = disentangler.fit_transform(given)
    assert disentangler.eigenmap_._search.numerics is _device
    assert found.device == given.device
    # Which of many starts ends farthest from Gaussian is a matter of rounding, and all end near each other.
    np.testing.assert_allclose(array(found), SpectralDisentangler().fit_transform(X), atol=1e-3)
    assert disentangler.score(given, put(z)) > 0.98


@needs_gpu
def test_nothing_need_be_forced_on_a_gpu(patch):
    given = torch.from_numpy(patch[1]).cuda()
    eigenmap = HessianEigenmap().fit(given)
    assert eigenmap._search.points.is_cuda
    np.testing.assert_array_equal(HessianEigenmap().fit(given).embedding_, eigenmap.embedding_)
