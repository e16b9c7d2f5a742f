"""Local isometry: by its formula in loops, on maps whose score is known, and on input that is wrong."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from fastdis.metrics import local_isometry


@pytest.fixture
def codes():
    return np.random.default_rng(0).uniform(size=(300, 3))


def orthonormal_rows(d, D, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(D, d)))[0].T


def pairs_by_loops(codes, points, k):
    """Return [n, k, d]: what the weights multiply, for neighbours from the nearest on."""
    n, d = codes.shape
    table = np.zeros((n, k, d))
    for i in range(n):
        order = sorted((np.linalg.norm(points[i] - points[j]), j) for j in range(n) if j != i)
        for place, (distance, j) in enumerate(order[:k]):
            for c in range(d):
                table[i, place, c] = (codes[i, c] - codes[j, c]) ** 2 / distance**2
    return table


@pytest.mark.parametrize("D", [2, 40])
@pytest.mark.parametrize("k", [1, 4, 29])
def test_is_its_formula(D, k):
    """With a search by tree and by all pairs, against another solver of the same least squares."""
    generator = np.random.default_rng(D + k)
    points = generator.normal(size=(30, D))
    codes = points[:, [0, 1, 0, 1]] * [1, 2, 0, 0] + generator.normal(size=(30, 4)) * 0.3
    table = pairs_by_loops(codes, points, k)
    rows = table.reshape(-1, 4)

    each = local_isometry(codes, points, n_neighbors=k)
    weights = lsq_linear(rows, np.ones(len(rows)), bounds=(0, np.inf), method="bvls", tol=1e-14).x
    np.testing.assert_allclose(each.scales, np.sqrt(weights), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(each.ratios, table @ each.scales**2, rtol=1e-9)
    assert each.score == pytest.approx(1 - np.square(1 - rows @ weights).mean(), abs=1e-9)

    one = local_isometry(codes, points, n_neighbors=k, scales="one")
    sums = rows.sum(axis=1)
    weight = sums.sum() / (sums**2).sum()
    np.testing.assert_allclose(one.scales, np.full(4, np.sqrt(weight)), rtol=1e-9)
    np.testing.assert_allclose(one.ratios, table.sum(axis=2) * weight, rtol=1e-9)
    assert one.score == pytest.approx(1 - np.square(1 - sums * weight).mean(), abs=1e-12)


def test_by_hand():
    """Neighbours 1 apart twice, then 2: squared slopes 1, 1 and 1/4, so w = 2.25 / 2.0625 = 12 / 11."""
    result = local_isometry([[0.0], [1.0], [2.0]], np.array([[0.0], [1.0], [3.0]]), n_neighbors=1)
    np.testing.assert_allclose(result.ratios, [[12 / 11], [12 / 11], [3 / 11]], rtol=1e-12)
    np.testing.assert_allclose(result.scales, [np.sqrt(12 / 11)], rtol=1e-12)
    assert result.score == pytest.approx(1 - (1 + 1 + 64) / 121 / 3, rel=1e-12)


@pytest.mark.parametrize("scales", ["each", "one"])
def test_isometric_codes(codes, scales):
    points = 3 * codes @ orthonormal_rows(3, 20)
    result = local_isometry(codes, points, scales=scales)
    assert result.score == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(result.scales, 3, rtol=1e-9)
    np.testing.assert_allclose(result.ratios, 1, rtol=1e-9)
    assert result.ratios.shape == (300, 10)


def test_unequal_scales(codes):
    points = codes * [0.1, 1, 7] @ orthonormal_rows(3, 20)
    each = local_isometry(codes, points)
    assert each.score == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(each.scales, [0.1, 1, 7], rtol=1e-7)
    assert local_isometry(codes, points, scales="one").score < 0.8


def test_rotated_codes_are_an_isometry_with_one_scale_for_all(codes):
    """It cannot tell codes from their rotation; with unequal scales it can."""
    rotated = codes @ orthonormal_rows(3, 3, seed=1)
    assert local_isometry(rotated, codes, scales="one").score == pytest.approx(1, abs=1e-9)
    assert local_isometry(rotated, codes * [0.2, 1, 5]).score < 0.9


def test_mixed_codes_are_told_by_unequal_scales(codes):
    points = codes * [1, 1, 4] @ orthonormal_rows(3, 9)
    mixed = codes @ np.array([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    assert local_isometry(mixed, points).score < local_isometry(codes, points).score - 0.02


@pytest.mark.parametrize("d", [1, 2, 8])
def test_noise_scores_as_the_docstring_says(d):
    """All distances are alike in many dimensions: the sum of d squared normals then decides."""
    generator = np.random.default_rng(d)
    noise, points = generator.normal(size=(2000, d)), generator.normal(size=(2000, 2000))
    for scales in ("each", "one"):
        assert local_isometry(noise, points, scales=scales).score == pytest.approx(d / (d + 2), abs=0.03)


def test_noise_is_low_on_a_manifold(codes):
    points = codes @ orthonormal_rows(3, 20)
    noise = np.random.default_rng(2).normal(size=codes.shape)
    assert local_isometry(noise, points).score < 0.6


def test_more_bent_maps_score_lower():
    """A strip stretched along its length, by more and more; curled up without stretching, it is isometric."""
    generator = np.random.default_rng(3)
    codes = generator.uniform(size=(3000, 2)) * [1, 0.2]
    scores = []
    for bend in (0.0, 1.0, 2.0, 4.0):
        points = np.stack([np.expm1(bend * codes[:, 0]) / bend if bend else codes[:, 0], codes[:, 1]], axis=1)
        scores.append(local_isometry(codes, points, n_neighbors=5).score)
    assert scores[0] == pytest.approx(1, abs=1e-9)
    assert all(first > second + 0.01 for first, second in itertools.pairwise(scores))
    curled = np.stack([np.cos(codes[:, 0]), np.sin(codes[:, 0]), codes[:, 1]], axis=1)
    assert 1 - 1e-4 < local_isometry(codes, curled, n_neighbors=5).score < 1


def test_score_is_the_mean_ratio(codes):
    for d, scales in itertools.product((1, 3), ("each", "one")):
        noise = np.random.default_rng(4).normal(size=(300, d))
        result = local_isometry(noise, codes, scales=scales)
        assert result.score == pytest.approx(result.ratios.mean(), abs=1e-12)
        assert 0.01 < result.score < 0.9


def test_place_and_scale_of_points(codes):
    points = np.hstack([np.square(codes), np.sin(3 * codes)])
    expected = local_isometry(codes, points)
    moved = local_isometry(codes + np.array([1, -5, 100]), 20 * points @ orthonormal_rows(6, 6) + 1000)
    assert 0.3 < expected.score < 0.999
    assert moved.score == pytest.approx(expected.score, abs=1e-8)
    np.testing.assert_allclose(moved.scales, 20 * expected.scales, rtol=1e-6)


def test_a_large_offset_hides_no_neighbour(codes):
    """In many dimensions, where a search that multiplies out would find noise."""
    points = (np.square(codes) @ orthonormal_rows(3, 50)).round(8)
    expected = local_isometry(codes, points)
    moved = local_isometry(codes, points + 2.0**24)
    assert moved.score == pytest.approx(expected.score, abs=1e-5)
    np.testing.assert_allclose(moved.ratios, expected.ratios, rtol=1e-3)


@pytest.mark.parametrize("scales", ["each", "one"])
@pytest.mark.parametrize("of_codes", [1e-150, 1.0, 1e150])
@pytest.mark.parametrize("of_points", [1e-150, 1.0, 1e150])
def test_any_magnitude(codes, scales, of_codes, of_points):
    points = np.square(codes) @ orthonormal_rows(3, 5)
    expected = local_isometry(codes, points, scales=scales)
    result = local_isometry(codes * of_codes, points * of_points, scales=scales)
    assert result.score == pytest.approx(expected.score, rel=1e-9)
    np.testing.assert_allclose(result.ratios, expected.ratios, rtol=1e-7)
    np.testing.assert_allclose(result.scales * (of_codes / of_points), expected.scales, rtol=1e-7)


def test_each_code_in_units_of_its_own(codes):
    units = np.array([1e-200, 1, 1e200])
    result = local_isometry(codes * units, codes)
    assert result.score == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(result.scales * units, 1, rtol=1e-7)
    # In one unit, only the largest is seen.
    one = local_isometry(codes * units, codes, scales="one")
    assert one.score == pytest.approx(local_isometry(codes[:, 2:], codes).score, rel=1e-9)


def test_largest_and_smallest_doubles(codes):
    signs = 2 * codes - 1
    expected = local_isometry(signs, signs).score
    for scale in (1.7e308, 1e-300):
        assert local_isometry(signs * scale, signs * scale).score == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("scales", ["each", "one"])
def test_codes_that_never_change(codes, scales):
    points = codes @ orthonormal_rows(3, 20)
    extended = np.insert(codes, 1, 1e100, axis=1)
    result = local_isometry(extended, points, scales=scales)
    assert result.score == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(result.scales, [1, 0, 1, 1], rtol=1e-7)
    result = local_isometry(np.full((300, 2), 0.1), points, scales=scales)
    assert result.score == 0
    assert result.scales.tolist() == [0, 0]
    assert not result.ratios.any()


def test_near_twins_far_from_the_rest():
    """Distances that multiplying points out would lose, in many dimensions."""
    generator = np.random.default_rng(7)
    codes = np.repeat(generator.normal(size=(40, 3)), 2, axis=0) + 1e-9 * generator.normal(size=(80, 3))
    result = local_isometry(codes, codes @ orthonormal_rows(3, 60), n_neighbors=1)
    assert result.score == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(result.scales, 1, rtol=1e-5)


@pytest.mark.parametrize("scales", ["each", "one"])
def test_one_pair_much_steeper_than_the_rest(scales):
    """The squares of its squared slope would overflow; fitted to it, nothing is left of the others."""
    points = np.array([[0.0], [1e-130], [1.0], [2.0], [3.0]])
    result = local_isometry(np.arange(5.0).reshape(5, 1), points, n_neighbors=1, scales=scales)
    np.testing.assert_allclose(result.ratios, [[1], [1], [0], [0], [0]], atol=1e-12)
    assert result.score == pytest.approx(2 / 5)
    assert result.scales[0] == pytest.approx(1e-130, rel=1e-9)


def test_codes_that_change_only_between_strangers():
    """Two far groups that a code tells apart, and nothing else."""
    points = np.concatenate([np.eye(12), np.eye(12) + 100])
    assert local_isometry(np.repeat([[0.0], [1.0]], 12, axis=0), points).score == 0


def test_duplicated_codes(codes):
    points = np.square(codes) @ orthonormal_rows(3, 5)
    expected = local_isometry(codes, points)
    result = local_isometry(np.hstack([codes, codes, -2 * codes]), points)
    assert result.score == pytest.approx(expected.score, abs=1e-9)
    np.testing.assert_allclose(result.ratios, expected.ratios, rtol=1e-6)


def test_more_codes_never_score_less(codes):
    generator = np.random.default_rng(5)
    points = np.square(codes) @ orthonormal_rows(3, 5)
    before = local_isometry(codes, points)
    after = local_isometry(np.hstack([codes, generator.normal(size=(300, 40))]), points)
    assert before.score < after.score < 1
    # Noise adds to every distance: most of it is best left out.
    assert (after.scales[3:] == 0).any()


def test_equal_points_are_left_out():
    """Each point comes twice: half of two neighbours are the twin, and the rest is as it would be by itself."""
    generator = np.random.default_rng(6)
    codes = generator.normal(size=(40, 2))
    points = codes * [1, 2] + np.square(codes) * 0.2
    twins = local_isometry(np.repeat(codes, 2, axis=0), np.repeat(points, 2, axis=0), n_neighbors=2)
    alone = local_isometry(codes, points, n_neighbors=1)
    assert np.isnan(twins.ratios).sum(axis=1).tolist() == [1] * 80
    np.testing.assert_allclose(np.nanmax(twins.ratios, axis=1), np.repeat(alone.ratios[:, 0], 2), rtol=1e-7)
    assert twins.score == pytest.approx(alone.score, rel=1e-9)
    assert 0.5 < alone.score < 1
    assert "null" in twins.to_json()


def test_codes_of_equal_points_may_differ():
    """What an encoder makes of noise: the pair has no ratio, whatever its codes."""
    points = np.array([[0.0], [0.0], [1.0], [3.0]])
    result = local_isometry(np.array([[0.0], [50.0], [1.0], [3.0]]), points, n_neighbors=1)
    assert np.isnan(result.ratios[:2, 0]).all()
    # 2's nearest is 0 or 1, which are equally near; 3's nearest is 2, with equal distances.
    slopes = np.array([1.0 if result.ratios[2, 0] < 5 * result.ratios[3, 0] else 49.0**2, 1.0])
    np.testing.assert_allclose(result.ratios[2:, 0], slopes * slopes.sum() / (slopes**2).sum(), rtol=1e-9)


def test_all_neighbours_equal():
    with pytest.raises(ValueError, match="points must not all equal their neighbours"):
        local_isometry(np.arange(20.0).reshape(20, 1), np.repeat(np.eye(10), 2, axis=0), n_neighbors=1)
    with pytest.raises(ValueError, match="points must not all equal their neighbours"):
        local_isometry(np.arange(20.0).reshape(20, 1), np.zeros((20, 3)))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8]
)
def test_tensors_of_any_shape_are_arrays(codes, dtype):
    images = torch.from_numpy(codes @ orthonormal_rows(3, 24) * 40 + 100).reshape(300, 2, 3, 4).to(dtype)
    latents = torch.from_numpy(codes).float().requires_grad_()
    result = local_isometry(latents, images)
    expected = local_isometry(codes.astype(np.float32), images.double().numpy().reshape(300, 24))
    assert result.score == expected.score
    assert np.array_equal(result.scales, expected.scales)
    assert np.array_equal(result.ratios, expected.ratios, equal_nan=True)
    assert result.score > 0.9


def test_inputs_are_left_alone(codes):
    points = codes @ orthonormal_rows(3, 5) + 7
    before = codes.copy(), points.copy()
    local_isometry(codes, points)
    assert np.array_equal(codes, before[0])
    assert np.array_equal(points, before[1])


def test_points_of_many_numbers(codes):
    """The distances of points with so many numbers come in parts; these are too many for one."""
    wide = np.repeat(codes, 10_000, axis=1)
    expected = local_isometry(codes, codes)
    np.testing.assert_allclose(local_isometry(codes, wide).ratios, expected.ratios, rtol=1e-7)


def test_wrong_shapes(codes):
    with pytest.raises(ValueError, match=r"codes must have shape \[n, d\] with at least one code, got \[300\]"):
        local_isometry(codes[:, 0], codes)
    with pytest.raises(
        ValueError, match=r"points must have shape \[n, \.\.\.\] with at least one number each, got \[300\]"
    ):
        local_isometry(codes, codes[:, 0])
    with pytest.raises(ValueError, match=r"points must have shape .* got \[300, 4, 0\]"):
        local_isometry(codes, np.zeros((300, 4, 0)))
    with pytest.raises(ValueError, match="codes and points must have as many rows, got 300 and 299"):
        local_isometry(codes, codes[1:])
    with pytest.raises(ValueError, match="codes must have at least two rows, got 1"):
        local_isometry(codes[:1], codes[:1])


def test_wrong_values(codes):
    with pytest.raises(ValueError, match="codes must be finite, and hold NaN or infinity in column 2"):
        local_isometry(codes * [1, 1, np.nan], codes)
    points = codes.copy()
    points[7, 1] = np.inf
    with pytest.raises(ValueError, match="points must be finite, and hold NaN or infinity in row 7"):
        local_isometry(codes, points)
    with pytest.raises(TypeError, match="points must be real numbers, got complex128"):
        local_isometry(codes, codes * 1j)
    with pytest.raises(TypeError, match="codes must be real numbers, got bool"):
        local_isometry(codes > 0.5, codes)


def test_wrong_options(codes):
    with pytest.raises(ValueError, match="scales must be 'each' or 'one', got 'two'"):
        local_isometry(codes, codes, scales="two")
    for count in (0, -1, 300):
        with pytest.raises(ValueError, match=f"n_neighbors must be at least 1 and at most 299, got {count}"):
            local_isometry(codes, codes, n_neighbors=count)
    with pytest.raises(TypeError, match="n_neighbors must be a whole number, got float"):
        local_isometry(codes, codes, n_neighbors=5.0)
    assert local_isometry(codes, codes, n_neighbors=299).ratios.shape == (300, 299)


@pytest.mark.parametrize("module", ["scipy.optimize", "sklearn.neighbors"])
def test_libraries_are_asked_for(codes, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs scikit-learn and SciPy: pip install 'fastdis\[metrics\]'"):
        local_isometry(codes, codes)
