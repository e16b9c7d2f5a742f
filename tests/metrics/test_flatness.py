"""Flatness: by hand, against plain loops, on grids that are not complete."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from fastdis.metrics import flatness

SIZES = (2, 3, 5)


@pytest.fixture
def grid():
    return np.array(list(itertools.product(*map(range, SIZES))))


def plain(codes, sizes):
    """Width over length of each factor, averaged over every traversal, in loops."""
    table = codes.reshape(*sizes, -1)
    ratios = []
    for k, size in enumerate(sizes):
        widths, lengths = [], []
        for rest in itertools.product(*(range(other) for j, other in enumerate(sizes) if j != k)):
            z = [table[(*rest[:k], value, *rest[k:])] for value in range(size)]
            widths.append(max(np.linalg.norm(a - b) for a, b in itertools.combinations(z, 2)))
            steps = sorted(np.abs(z[i] - z[(i + 1) % size]).sum() for i in range(size))
            lengths.append(sum(steps[:-1]))
        ratios.append(np.mean(widths) / np.mean(lengths))
    return ratios


def test_codes_along_axes_score_1(grid):
    result = flatness(grid, grid)
    assert result.score == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(result.widths, [1, 2, 4])
    np.testing.assert_allclose(result.lengths, [1, 2, 4])
    assert flatness(grid[:, ::-1] * [-3.0, 0.1, 7] + 100, grid).score == pytest.approx(1, abs=1e-12)


def test_diagonals_score_one_over_root_d(grid):
    codes = np.repeat(grid[:, 2:] * 1.0, 4, axis=1)
    result = flatness(codes, grid)
    assert result.flatness[2] == pytest.approx(0.5)


def test_square_path_by_hand():
    """Four corners of a unit square: width sqrt(2), three steps of 1."""
    codes = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    assert flatness(codes, np.arange(4)[:, None]).score == pytest.approx(np.sqrt(2) / 3)


def test_the_largest_step_is_left_out_wherever_it_is():
    """A cyclic factor, cut anywhere, is a straight line."""
    codes = np.array([[2.0], [3.0], [0.0], [1.0]])
    result = flatness(codes, np.arange(4)[:, None])
    assert result.score == pytest.approx(1)
    assert result.lengths.item() == pytest.approx(3)


def test_every_traversal_against_loops(grid):
    codes = np.random.default_rng(0).standard_normal((len(grid), 4))
    result = flatness(codes, grid, repeats=None)
    np.testing.assert_allclose(result.flatness, plain(codes, SIZES), rtol=1e-12)
    assert result.score == pytest.approx(np.mean(plain(codes, SIZES)))


def test_more_traversals_than_are_measured_together():
    sizes = (3, 301)
    factors = np.array(list(itertools.product(*map(range, sizes))))
    codes = np.random.default_rng(0).standard_normal((len(factors), 2))
    assert flatness(codes, factors, repeats=None).flatness[0] == pytest.approx(plain(codes, sizes)[0], rel=1e-12)


def test_drawn_traversals_approach_all(grid):
    codes = np.random.default_rng(0).standard_normal((len(grid), 4))
    every = flatness(codes, grid, repeats=None).score
    assert flatness(codes, grid, repeats=20_000).score == pytest.approx(every, abs=3e-3)
    few = [flatness(codes, grid, repeats=3, seed=seed).score for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_rows_in_any_order_and_values_of_any_numbers(grid):
    codes = np.random.default_rng(0).standard_normal((len(grid), 4))
    expected = flatness(codes, grid).to_dict()
    shuffle = np.random.default_rng(1).permutation(len(grid))
    assert flatness(codes[shuffle], grid[shuffle] * 10 - 7).to_dict() == expected


def test_factors_with_one_value_are_left_out(grid):
    codes = np.random.default_rng(0).standard_normal((len(grid), 4))
    wider = np.insert(grid, [0, 2], [[9, 4]], axis=1)
    result = flatness(codes, wider)
    assert result.factors.tolist() == [1, 2, 4]
    assert result.score == flatness(codes, grid).score


def test_factor_that_moves_nothing_counts_0(grid):
    result = flatness(grid[:, :2], grid)
    assert result.flatness.tolist() == pytest.approx([1, 1, 0])
    assert result.score == pytest.approx(2 / 3)
    assert flatness(np.full((len(grid), 3), 0.1), grid).score == 0


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e200, 4e307])
def test_codes_of_any_magnitude(grid, scale):
    assert flatness(grid * scale, grid).score == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_of_every_precision(grid, dtype):
    codes = torch.from_numpy(grid).to(dtype)
    assert flatness(codes, torch.from_numpy(grid)).score == pytest.approx(1)


def test_input_is_left_alone(grid):
    codes = np.asfortranarray(np.random.default_rng(0).standard_normal((len(grid), 4)))
    before = codes.copy()
    flatness(codes, grid)
    assert np.array_equal(codes, before)


def test_golden_samples_are_no_grid(golden):
    inputs, _ = golden
    with pytest.raises(ValueError, match="3 x 6 x 40 x 32 x 32 values make 737280 combinations, but there are 10000"):
        flatness(inputs["train_identity5"], inputs["ys_train"])


def test_a_combination_twice_and_another_never(grid):
    grid[0] = grid[1]
    with pytest.raises(ValueError, match="twice"):
        flatness(grid, grid)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"repeats": 0}, ValueError, "repeats must be at least 1"),
        ({"repeats": "all"}, TypeError, "repeats must be a whole number, got str"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
    ],
)
def test_arguments_out_of_range(grid, arguments, error, message):
    with pytest.raises(error, match=message):
        flatness(grid, grid, **arguments)


def test_one_row():
    with pytest.raises(ValueError, match="must have a column that varies"):
        flatness(np.zeros((1, 2)), np.zeros((1, 40), int))


def test_codes_that_are_not_finite(grid):
    codes = grid.astype(float)
    codes[3, 1] = np.inf
    with pytest.raises(ValueError, match="column 1"):
        flatness(codes, grid)


def test_result_goes_into_json(grid):
    result = flatness(grid, grid)
    read = json.loads(result.to_json())
    assert read["score"] == result.score
    assert read["factors"] == [0, 1, 2]
