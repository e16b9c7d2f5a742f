"""The compiled histograms and segment statistics against NumPy, on any number of threads."""

from __future__ import annotations

import numpy as np
import pytest

from fastdis import metrics
from fastdis.metrics import _host
from fastdis.metrics._histogram import equal_width_bins, equal_width_edges

needs_extension = pytest.mark.skipif(_host.extension is None, reason="nothing was compiled")


@pytest.fixture(params=[1, 2, 5])
def compiled(request):
    """Return the compiled function of a name, on a number of threads."""
    return lambda name, *arguments: getattr(_host.extension, name)(*arguments, request.param)


def sample(seed, n=3001, d=4, sizes=(3, 1, 40, 7)):
    generator = np.random.default_rng(seed)
    codes = generator.normal(size=(d, n)) * generator.exponential(size=(d, 1)) + generator.normal(size=(d, 1))
    classes = np.stack([generator.integers(0, size, n) for size in sizes]).astype(np.int32)
    return codes, classes, np.array(sizes, np.int32)


@needs_extension
@pytest.mark.parametrize("bins", [1, 2, 20, 999])
def test_discretize(compiled, bins):
    codes, _, _ = sample(0)
    codes[1] = np.round(codes[1] * 4)  # many on an edge
    codes[2] = 7.5
    edges = equal_width_edges(codes, bins)
    assert np.array_equal(compiled("discretize", codes, edges), _host.discretize_numpy(codes, edges))


@needs_extension
def test_discretize_follows_the_edges_not_a_formula(compiled):
    codes = np.random.default_rng(0).normal(size=(1, 5000))
    edges = np.sort(np.random.default_rng(1).normal(size=(1, 31)), axis=1)
    codes[0, :31] = edges
    assert np.array_equal(compiled("discretize", codes, edges), _host.discretize_numpy(codes, edges))


@pytest.mark.parametrize("bins", [1, 3, 10, 20, 64, 1000])
def test_bins_are_those_of_numpy(bins):
    """Bit by bit as np.histogram's edges cut, whatever the range."""
    generator = np.random.default_rng(bins)
    for scale in (1.0, 1e-12, 1e200, 3e-300):
        for codes in (generator.normal(size=4000), generator.integers(0, 30, 4000), generator.uniform(5, 6, 4000) ** 9):
            column = codes.astype(float) * scale
            edges = np.histogram_bin_edges(column, bins)
            expected = np.digitize(column, edges[:-1]) - 1
            assert np.array_equal(equal_width_bins(column[:, None], bins)[0], expected)


def test_a_narrow_column_leaves_the_bins_of_others_alone():
    codes = np.random.default_rng(0).normal(size=(500, 1)) * 0.1
    narrow = np.where(codes > 0, 5e-324, 0.0)
    together = equal_width_bins(np.hstack([codes, narrow, np.ones_like(codes)]), 20)
    assert np.array_equal(together[0], equal_width_bins(codes, 20)[0])
    assert not together[1:].any()


@needs_extension
def test_joint_histogram(compiled):
    _, classes, sizes = sample(1)
    rows = sample(2)[1]
    counts = compiled("joint_histogram", rows, 40, classes, sizes)
    assert np.array_equal(counts, _host.joint_histogram_numpy(rows, 40, classes, sizes))
    assert counts.shape == (4, 51, 40)
    assert (counts[:, :3].sum(axis=(1, 2)) == 3001).all()


@needs_extension
@pytest.mark.parametrize("value", [-1, 3])
def test_classes_out_of_range_are_refused(value):
    codes, classes, sizes = sample(1)
    bad = classes.copy()
    bad[0, 17] = value
    with pytest.raises(IndexError, match="class"):
        _host.joint_histogram(classes, 40, bad, sizes)
    with pytest.raises(IndexError, match="class"):
        _host.joint_histogram(bad, 3, classes, sizes)
    with pytest.raises(IndexError, match="class"):
        _host.gaussian_histogram(codes, codes**2, equal_width_edges(codes, 5), bad, sizes)
    with pytest.raises(IndexError, match="class"):
        _host.segment_spread(codes, bad, sizes, 0.5)
    with pytest.raises(IndexError, match="class"):
        _host.group_rows(bad, sizes)


@needs_extension
def test_shapes_that_do_not_fit_are_refused():
    codes, classes, sizes = sample(1)
    edges = equal_width_edges(codes, 5)
    for call in (
        lambda: _host.discretize(codes, edges[1:]),
        lambda: _host.discretize(codes, edges[:, :1]),
        lambda: _host.joint_histogram(classes, 40, classes[:, 1:], sizes),
        lambda: _host.joint_histogram(classes, 40, classes, sizes[1:]),
        lambda: _host.joint_histogram(classes, 0, classes, sizes),
        lambda: _host.gaussian_histogram(codes, codes[1:], edges, classes, sizes),
        lambda: _host.gaussian_histogram(codes, codes, edges[:3], classes, sizes),
        lambda: _host.segment_spread(codes[:, 1:], classes, sizes, 0.5),
        lambda: _host.segment_spread(codes, classes, sizes, float("nan")),
        lambda: _host.group_rows(classes, sizes[1:]),
        lambda: _host.dense_classes(classes[0].astype(np.int64)),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - any message: nobody but a developer sees it
            call()


@needs_extension
def test_gaussian_histogram(compiled):
    codes, classes, sizes = sample(3, n=501)
    spread = np.random.default_rng(0).exponential(size=codes.shape)
    spread[:, ::7] = 0
    spread[:, 1::7] = 1e-12
    spread[:, 2::7] = 1e6
    spread[:, 3::7] = np.inf
    edges = np.tile(np.linspace(-2, 2, 31), (4, 1))
    codes[0, :31] = edges[0]
    edges[3, 1:] = np.inf
    mass = compiled("gaussian_histogram", codes, spread, edges, classes, sizes)
    np.testing.assert_allclose(mass, _host.gaussian_histogram_numpy(codes, spread, edges, classes, sizes), atol=1e-11)
    np.testing.assert_allclose(mass[:, :3].sum(axis=(1, 2)), 501)


def test_points_are_gaussians_without_spread():
    codes, classes, sizes = sample(4)
    codes[0] = np.round(codes[0])
    edges = np.tile(np.linspace(-2, 2, 9), (4, 1))
    counts = _host.joint_histogram(_host.discretize(codes, edges), 8, classes, sizes)
    assert np.array_equal(_host.gaussian_histogram(codes, np.zeros_like(codes), edges, classes, sizes), counts)


@needs_extension
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("n", [1, 2, 47, 3001, 20011])
def test_segment_spread(compiled, n, quantile):
    codes, classes, sizes = sample(5, n=n)
    codes[1] = np.round(codes[1])  # ties
    codes[2] = -3.25
    codes[3] += 1e9
    spread = compiled("segment_spread", codes, classes, sizes, quantile)
    expected = _host.segment_spread_numpy(codes, classes, sizes, quantile)
    np.testing.assert_allclose(spread, expected, rtol=1e-9, atol=1e-12)
    assert not spread[2].any()


@needs_extension
def test_nothing_at_all():
    codes, classes, sizes = sample(0, n=0)
    assert _host.joint_histogram(classes, 40, classes, sizes).sum() == 0
    assert not _host.segment_spread(codes, classes, sizes, 0.5).any()
    assert _host.discretize(codes, np.tile(np.linspace(0, 1, 6), (4, 1))).shape == (4, 0)
    assert _host.joint_histogram(classes[:0], 40, classes, sizes).shape == (0, 51, 40)


@needs_extension
@pytest.mark.parametrize("n", [500, 40_000])
def test_numbers_of_values(compiled, n):
    generator = np.random.default_rng(0)
    factors = np.stack(
        [
            generator.integers(-3, 4, n),
            generator.integers(0, 9, n) * 10**17 - 4 * 10**17,
            generator.permutation(n),
            generator.choice([np.iinfo(np.int64).min, 0, np.iinfo(np.int64).max], n),
        ],
        axis=1,
    )
    for classes, sizes, values in (compiled("dense_classes", factors), _host.dense_classes_numpy(factors)):
        for k in range(4):
            expected, inverse = np.unique(factors[:, k], return_inverse=True)
            assert np.array_equal(values[k], expected)
            assert np.array_equal(classes[k], inverse)
        assert sizes.tolist() == [7, 9, n, 3]
        assert (classes.dtype, sizes.dtype) == (np.int32, np.int32)


@needs_extension
@pytest.mark.parametrize("n", [0, 1, 3001, 40_000])
def test_group_rows(compiled, n):
    _, classes, sizes = sample(2, n=n)
    rows, starts = compiled("group_rows", classes, sizes)
    expected_rows, expected_starts = _host.group_rows_numpy(classes, sizes)
    assert np.array_equal(rows, expected_rows)
    assert np.array_equal(starts, expected_starts)
    assert (rows.dtype, starts.dtype) == (np.uint32, np.int64)


@needs_extension
def test_metrics_without_the_extension(monkeypatch, golden):
    inputs, _ = golden
    codes, factors = inputs["test_linear_mix10"][:2000], inputs["ys_test"][:2000]
    scores = {
        "mig": lambda: metrics.mig(codes, factors),
        "rmig": lambda: metrics.rmig(codes, factors, logvar=np.full(codes.shape, -3.0)),
        "jemmig": lambda: metrics.jemmig(codes, factors),
        "irs": lambda: metrics.irs(codes, factors),
        "modularity": lambda: metrics.modularity(codes, factors),
        "code_mutual_information": lambda: metrics.code_mutual_information(codes),
    }
    compiled = {name: score().score for name, score in scores.items()}
    monkeypatch.setattr(_host, "extension", None)
    for name, score in scores.items():
        assert score().score == pytest.approx(compiled[name], abs=1e-10), name
