import pickle
import sys

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from fastdis.spectral import _neighbours
from fastdis.spectral._neighbours import ApproximateSearch, NeighbourSearch


def points_of(kind, n, D, dtype):
    rng = np.random.default_rng(n + D)
    if kind == "noise":
        points = rng.standard_normal((n, D))
    elif kind == "curve":  # all in few directions, very near to each other
        t = np.sort(rng.uniform(0, 6, (n, 1)))
        points = np.sin(t * rng.uniform(0.5, 2, (1, D)) + rng.uniform(0, 6, (1, D)))
    else:  # far from the origin
        points = rng.standard_normal((n, D)) + 1000
    return points.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["noise", "curve", "offset"])
@pytest.mark.parametrize(("n", "D", "k"), [(2, 1, 1), (40, 3, 39), (400, 20, 10), (700, 600, 25)])
def test_neighbours_are_exact(monkeypatch, kind, n, D, k, dtype):
    monkeypatch.setattr(_neighbours, "BLOCK_BYTES", 4 * n * 37)  # several blocks
    points = points_of(kind, n, D, dtype)
    found, squares = NeighbourSearch(points).nearest(k)
    exact = points.astype(np.float64)
    truth = cdist(exact, exact, "sqeuclidean")
    np.fill_diagonal(truth, np.inf)
    assert (np.diff(np.sort(found, axis=1)) > 0).all()
    # Which of two is nearer is open where that is a matter of rounding.
    tolerance = 2e-6 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(squares, np.take_along_axis(truth, found, axis=1), rtol=tolerance)
    np.testing.assert_allclose(squares, np.sort(truth, axis=1)[:, :k], rtol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["noise", "curve", "offset"])
@pytest.mark.parametrize(("n", "D", "k"), [(2, 1, 1), (40, 3, 39), (40, 3, 38), (400, 20, 10), (700, 600, 25)])
def test_a_graph_has_the_nearest(monkeypatch, kind, n, D, k, dtype):
    monkeypatch.setattr(_neighbours, "BLOCK_BYTES", 4 * max(n, D) * 37)
    points = points_of(kind, n, D, dtype)
    found, crowded = NeighbourSearch(points).graph(k)
    exact = points.astype(np.float64)
    truth = cdist(exact, exact, "sqeuclidean")
    np.fill_diagonal(truth, np.inf)
    assert (np.diff(found, axis=1) > 0).all()
    squares = np.sort(np.take_along_axis(truth, found, axis=1), axis=1)
    np.testing.assert_allclose(squares, np.sort(truth, axis=1)[:, :k], rtol=2e-6 if dtype == np.float32 else 1e-13)
    if kind == "noise" and n > 2:
        assert not crowded.any()


def test_a_graph_of_points_in_few_directions_compares_few_of_them(monkeypatch):
    rng = np.random.default_rng(0)
    points = rng.standard_normal((600, 3)) @ rng.standard_normal((3, 500))
    search, compared = NeighbourSearch(points), []
    plain = _neighbours._host.squared_distances
    monkeypatch.setattr(
        _neighbours._host, "squared_distances", lambda *given: compared.extend(given[1]) or plain(*given)
    )
    found, _ = search.graph(12)
    assert len(compared) < 300
    assert np.array_equal(found, np.sort(search.nearest(12)[0], axis=1))


@pytest.mark.parametrize("D", [3, 300])
def test_a_graph_says_where_points_are_crowded(D):
    points = points_of("noise", 400, D, np.float64)
    points[10:30] = points[10]
    _, crowded = NeighbourSearch(points).graph(12)
    assert crowded[10:30].all()
    assert not crowded[np.r_[0:10, 30:400]].any()
    assert np.array_equal(ApproximateSearch(points).graph(12)[1], crowded)


def test_queries_are_placed_among_the_points():
    points = points_of("noise", 300, 9, np.float64)
    queries = points_of("noise", 50, 9, np.float64)
    found, squares = NeighbourSearch(points).nearest(6, queries)
    distances, indices = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(points).kneighbors(queries)
    assert np.array_equal(found, indices)
    np.testing.assert_allclose(np.sqrt(squares), distances)
    assert NeighbourSearch(points).nearest(1, points)[0][:, 0].tolist() == list(range(300))


def test_of_equally_near_points_the_first_come_first():
    points = np.array([[0.0, 0], [1, 0], [0, 1], [-1, 0], [0, -1], [3, 3]])
    found, _ = NeighbourSearch(points).nearest(3)
    assert found[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("D", [5, 400])
def test_approximate_neighbours_are_almost_all_exact(D):
    points = points_of("curve", 3000, D, np.float32)
    exact, _ = NeighbourSearch(points).nearest(12)
    found, squares = ApproximateSearch(points).nearest(12)
    assert (found != np.arange(3000)[:, None]).all()
    assert (found == exact).mean() > 0.99
    assert (np.diff(squares, axis=1) >= 0).all()
    np.testing.assert_allclose(squares, np.square(points[found].astype(float) - points[:, None]).sum(axis=2), rtol=2e-6)
    search = pickle.loads(pickle.dumps(ApproximateSearch(points)))
    assert search.nearest(1, points[:50])[0][:, 0].tolist() == list(range(50))


def test_what_an_approximate_search_does_not_find_is_said():
    points = points_of("noise", 5, 3, np.float64)
    assert ApproximateSearch(points).nearest(4)[0].shape == (5, 4)
    search = ApproximateSearch(points)
    search._index.reset()
    with pytest.raises(ValueError, match=r"fewer than n_neighbors=4 neighbours of row 0 .* 4 other rows; .*'exact'"):
        search.nearest(4)


def test_approximate_neighbours_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"fastdis\[neighbors\]"):
        ApproximateSearch(points_of("noise", 5, 3, np.float64))
