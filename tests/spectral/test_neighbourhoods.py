"""The compiled neighbourhood numerics against NumPy, on any number of threads."""

import numpy as np
import pytest

from fastdis.spectral import _host

needs_extension = pytest.mark.skipif(_host.extension is None, reason="nothing was compiled")


@pytest.fixture(params=[1, 2, 5])
def compiled(request):
    """Return the compiled function of a name, on a number of threads."""
    return lambda name, *arguments: getattr(_host.extension, name)(*arguments, request.param)


def sample(n, D, k, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((n, D)).astype(dtype)
    neighbours = np.stack([rng.choice(n, k, replace=False) for _ in range(n)]) if k else np.empty((n, 0), np.int64)
    return points, neighbours


@needs_extension
@pytest.mark.parametrize("kind", ["random", "rising", "falling", "equal", "infinite"])
@pytest.mark.parametrize(("n", "count"), [(1, 1), (5, 5), (63, 2), (64, 64), (1000, 1), (1000, 40), (1000, 999)])
def test_smallest(compiled, n, count, kind):
    values = np.random.default_rng(n).standard_normal((7, n)).astype(np.float32).round(2)  # with equal ones
    if kind in ("rising", "falling"):
        values = np.sort(values, axis=1)[:, :: 1 if kind == "rising" else -1].copy()
    elif kind == "equal":
        values[:] = 3
    elif kind == "infinite":
        values[:, ::2] = np.inf
    rows = np.array([6, 0, 0, 3])
    for found, expected in zip(
        compiled("smallest", values, rows, count), _host.smallest_numpy(values, rows, count), strict=True
    ):
        assert np.array_equal(found, expected)


@needs_extension
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("D", [1, 7, 16, 513, 1500])
def test_squared_distances(compiled, D, dtype):
    points, neighbours = sample(23, D, 5, dtype)
    queries = points[::-1].copy()
    found = compiled("squared_distances", points, queries, neighbours)
    expected = np.square(points[neighbours].astype(float) - queries[:, None].astype(float)).sum(axis=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == np.float32 else 1e-12)
    np.testing.assert_allclose(_host.squared_distances_numpy(points, queries, neighbours), expected, rtol=1e-5)


@needs_extension
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("D", "k"), [(1, 1), (3, 2), (16, 4), (100, 9), (513, 17), (1030, 6)])
def test_local_grams(compiled, D, k, dtype):
    points, neighbours = sample(20, D, k, dtype)
    points += 100  # a common offset costs no digits
    found = compiled("local_grams", points, neighbours)
    tolerance = 2e-5 if dtype == np.float32 else 1e-10
    np.testing.assert_allclose(found, _host.local_grams_numpy(points, neighbours), atol=tolerance * D)
    assert np.array_equal(found, found.transpose(0, 2, 1))
    np.testing.assert_allclose(found.sum(axis=2), 0, atol=1e-9 * D)


@needs_extension
@pytest.mark.parametrize(
    ("n", "m", "D", "k"), [(600, 600, 5, 7), (600, 50, 5, 12), (600, 1, 5, 4), (9000, 9000, 1000, 2)]
)
def test_local_grams_of_any_number_of_neighbourhoods(compiled, n, m, D, k):
    """Some points are nobody's neighbours; those of the last size do not fit at once."""
    rng = np.random.default_rng(n)
    points = rng.standard_normal((n, D)).astype(np.float32)
    neighbours = rng.integers(0, n, (m, k))  # some twice
    found = compiled("local_grams", points, neighbours)
    near = points[neighbours].astype(float)
    near -= near.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found, near @ near.transpose(0, 2, 1), atol=2e-6 * D)


@needs_extension
def test_local_grams_of_small_neighbourhoods_beside_large_ones(compiled):
    rng = np.random.default_rng(0)
    points = rng.standard_normal((200, 40))
    points[:100] *= 1e-4  # most of these have all near neighbours; the others have some of these among theirs
    points = points.astype(np.float32)
    neighbours = np.stack([rng.choice(100 if q < 100 else 200, 8, replace=False) for q in range(200)])
    near = points[neighbours].astype(float)
    near -= near.mean(axis=1, keepdims=True)
    expected = near @ near.transpose(0, 2, 1)
    found = compiled("local_grams", points, neighbours)
    scale = np.abs(expected).max(axis=(1, 2), keepdims=True)
    assert np.abs((found - expected) / scale).max() < 1e-6


@needs_extension
@pytest.mark.parametrize(("k", "d"), [(2, 1), (5, 4), (6, 2), (40, 2), (60, 8), (30, 29)])
def test_leading_vectors(compiled, k, d):
    rng = np.random.default_rng(1)
    factors = rng.standard_normal((12, k, k)) * np.geomspace(1, 1e-4, k)
    grams = factors @ factors.transpose(0, 2, 1)
    vectors, values, settled = compiled("leading_vectors", grams, d)
    expected, expected_values = _host.leading_vectors_numpy(grams, d)
    assert settled.mean() > 0.5
    np.testing.assert_allclose(
        values[settled][:, :d], expected_values[settled][:, :d], rtol=0, atol=1e-13 * expected_values.max()
    )
    # What any stable solver may turn a subspace by is rounding over the gap.
    apart = np.linalg.norm(vectors @ vectors.transpose(0, 2, 1) - expected @ expected.transpose(0, 2, 1), axis=(1, 2))
    gap = expected_values[:, d - 1] - expected_values[:, d]
    allowed = 1e-10 + 64 * np.finfo(float).eps * expected_values[:, 0] / gap
    assert (apart <= allowed)[settled].all(), (apart / allowed)[settled].max()


@needs_extension
@pytest.mark.parametrize("grams", [np.zeros((3, 5, 5)), np.ones((2, 6, 6)), np.broadcast_to(np.eye(7), (2, 7, 7))])
def test_what_does_not_settle_is_left_to_numpy(grams):
    vectors, values = _host.leading_vectors(np.ascontiguousarray(grams), 2)
    np.testing.assert_allclose(vectors.transpose(0, 2, 1) @ vectors, np.broadcast_to(np.eye(2), (len(grams), 2, 2)),
                               atol=1e-12)  # fmt: skip
    np.testing.assert_allclose(values, np.linalg.eigvalsh(grams)[:, ::-1][:, :3], atol=1e-12)


@needs_extension
@pytest.mark.parametrize(("k", "d"), [(4, 1), (15, 2), (60, 8)])
def test_hessian_bases(compiled, k, d):
    vectors = np.linalg.qr(np.random.default_rng(2).standard_normal((9, k, d)))[0]
    vectors -= vectors.mean(axis=1, keepdims=True)
    bases, full = compiled("hessian_bases", vectors)
    expected, expected_full = _host.hessian_bases_numpy(vectors)
    assert full.all()
    assert expected_full.all()
    np.testing.assert_allclose(bases @ bases.transpose(0, 2, 1), expected @ expected.transpose(0, 2, 1), atol=1e-9)
    np.testing.assert_allclose(bases.sum(axis=1), 0, atol=1e-10)
    np.testing.assert_allclose(vectors.transpose(0, 2, 1) @ bases, 0, atol=1e-10)


@pytest.mark.parametrize("function", [_host.hessian_bases, _host.hessian_bases_numpy])
def test_points_on_a_conic_have_no_hessian(function):
    angle = np.arange(12) * 2 * np.pi / 12
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)[None] / 6**0.5
    assert not function(circle)[1].any()


@needs_extension
@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize(("n", "k", "r"), [(5, 2, 1), (200, 7, 3), (300, 20, 3)])
def test_alignment(compiled, n, k, r, complement):
    _, neighbours = sample(n, 1, k)
    bases = np.linalg.qr(np.random.default_rng(3).standard_normal((n, k, r)))[0]
    starts, columns, values = compiled("alignment", neighbours, bases, n, complement)
    matrix = np.zeros((n, n))
    for row, basis in zip(neighbours, bases, strict=True):
        matrix[np.ix_(row, row)] += np.eye(k) - basis @ basis.T if complement else basis @ basis.T
    found = np.zeros((n, n))
    for row in range(n):
        at = columns[starts[row] : starts[row + 1]]
        assert (np.diff(at) > 0).all()
        found[row, at] = values[starts[row] : starts[row + 1]]
    np.testing.assert_allclose(found, matrix, atol=1e-12)
    twin = _host.alignment_numpy(neighbours, bases, n, complement=complement)
    assert np.array_equal(twin[0], starts)
    assert np.array_equal(twin[1], columns)
    np.testing.assert_allclose(twin[2], values, atol=1e-12)


@needs_extension
def test_shapes_and_indices_that_do_not_fit_are_refused():
    points, neighbours = sample(6, 3, 2)
    bases = np.zeros((6, 2, 1))
    for call in (
        lambda: _host.squared_distances(points, points[:, 1:].copy(), neighbours),
        lambda: _host.squared_distances(points, points[1:], neighbours),
        lambda: _host.leading_vectors(np.zeros((2, 3, 3)), 3),
        lambda: _host.leading_vectors(np.zeros((2, 3, 4)), 1),
        lambda: _host.alignment(neighbours, bases[1:], 6, complement=True),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - any message: nobody but a developer sees it
            call()
    for bad in (-1, 6):
        wrong = neighbours.copy()
        wrong[3, 1] = bad
        for call in (
            lambda wrong=wrong: _host.squared_distances(points, points, wrong),
            lambda wrong=wrong: _host.local_grams(points, wrong),
            lambda wrong=wrong: _host.alignment(wrong, bases, 6, complement=False),
        ):
            with pytest.raises(IndexError, match="below n"):
                call()
