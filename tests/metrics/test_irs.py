"""The interventional robustness score: against the reference implementation, by hand, and on input that is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastdis.metrics import irs


@pytest.fixture
def factors():
    """Ten independent factors of ten values, as in the reference implementation's own tests."""
    return np.random.RandomState(0).randint(1, 11, size=(3000, 10))


@pytest.mark.parametrize("encoder", ["identity5", "linear_mix10", "collapsed10"])
def test_matches_the_reference_implementation(golden, encoder):
    inputs, expected = golden
    result = irs(inputs[f"train_{encoder}"], inputs["ys_train"])
    assert result.score == pytest.approx(expected[encoder]["irs"], abs=1e-6)
    assert result.num_active_codes == inputs[f"train_{encoder}"].shape[1]


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.99, 1.0])
def test_is_its_formula(golden, quantile):
    inputs, _ = golden
    codes, factors = inputs["test_linear_mix10"].astype(float), inputs["ys_test"]
    largest = np.abs(codes - codes.mean(axis=0)).max(axis=0)
    matrix = np.empty((10, 5))
    for k, factor in enumerate(factors.T):
        edges = np.histogram_bin_edges(factor, 20)
        binned = np.digitize(factor, edges[:-1])
        spread = []
        for value in np.unique(binned):
            segment = codes[binned == value]
            spread.append(np.percentile(np.abs(segment - segment.mean(axis=0)), 100 * quantile, axis=0))
        matrix[:, k] = 1 - np.mean(spread, axis=0) / largest
    result = irs(codes, factors, quantile=quantile)
    np.testing.assert_allclose(result.matrix, matrix, atol=1e-10)
    np.testing.assert_allclose(result.max_deviations, largest)
    assert result.parents.tolist() == matrix.argmax(axis=1).tolist()
    assert result.score == pytest.approx(np.average(matrix.max(axis=1), weights=largest))


def test_perfect_and_empty_codes(factors):
    perfect = irs(factors, factors)
    assert perfect.score == pytest.approx(1)
    assert perfect.parents.tolist() == list(range(10))
    empty = irs(np.zeros((3000, 10)), factors)
    assert empty.score == 0
    assert empty.num_active_codes == 0
    assert empty.parents.tolist() == [-1] * 10


def test_codes_that_never_change_have_no_weight(factors):
    codes = np.hstack([factors[:, :3], np.full((3000, 2), 0.1)])
    result = irs(codes, factors)
    assert result.score == pytest.approx(irs(factors[:, :3], factors).score)
    assert result.num_active_codes == 3
    assert not result.matrix[3:].any()
    assert result.max_deviations[3:].tolist() == [0, 0]


def test_by_hand():
    factor = np.array([[0], [0], [1], [1]])
    # Means 0 and 1 within the values, deviations 1 and 2; the overall mean is 0.5, and the largest distance to it 2.5.
    codes = np.array([[-1.0], [1.0], [-1.0], [3.0]])
    result = irs(codes, factor, quantile=1)
    assert result.matrix.tolist() == [[pytest.approx(1 - 1.5 / 2.5)]]
    assert result.max_deviations.tolist() == [2.5]
    assert result.score == pytest.approx(0.4)


def test_bins_join_values():
    factors = np.arange(40).reshape(40, 1)
    assert irs(factors, factors, bins=None).score == 1  # one row for each value
    halves = irs(factors, factors)
    assert halves.score == pytest.approx(1 - 0.5 / 19.5)  # two values share a bin, and each is 0.5 off
    assert irs(factors, factors, bins=1).score < 0.05
    few = factors % 7
    assert irs(few, few).score == irs(few, few, bins=None).score == 1


def test_large_deviations_weigh_more(factors):
    noise = np.random.default_rng(0).normal(size=3000)
    codes = np.stack([factors[:, 0].astype(float), noise], axis=1)
    assert irs(codes * [100, 1], factors).score > irs(codes, factors).score > irs(codes * [1, 100], factors).score


def test_score_ignores_order_offset_common_scale_and_names(golden):
    inputs, _ = golden
    codes, factors = inputs["test_linear_mix10"].astype(float), inputs["ys_test"]
    score = irs(codes, factors, bins=None).score
    rows = np.random.default_rng(0).permutation(len(codes))
    names = np.random.default_rng(1).permutation(40)
    moved = irs(codes[rows][:, ::-1] * -0.3 + 1e3, names[factors[rows]][:, ::-1], bins=None)
    assert moved.score == pytest.approx(score, abs=1e-10)
    assert irs(codes * 2.0**1018, factors, bins=None).score == pytest.approx(score)
    assert irs(codes * 2.0**-1000, factors, bins=None).score == pytest.approx(score)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors(factors, dtype):
    assert irs(torch.from_numpy(factors).to(dtype), torch.from_numpy(factors)).score == irs(factors, factors).score


def test_one_code_and_one_factor():
    factor = np.array([[0], [1]])
    assert irs(factor, factor).score == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quantile": 1.01}, ValueError, "quantile must be from 0 to 1, got 1.01"),
        ({"quantile": float("nan")}, ValueError, "quantile must be from 0 to 1, got nan"),
        ({"quantile": "all"}, TypeError, "quantile must be a number, got str"),
        ({"quantile": None}, TypeError, "quantile must be a number, got NoneType"),
        ({"bins": 0}, ValueError, "bins must be at least 1"),
        ({"bins": 2.5}, TypeError, "bins must be a whole number"),
    ],
)
def test_wrong_arguments(factors, arguments, error, message):
    with pytest.raises(error, match=message):
        irs(factors, factors, **arguments)


def test_wrong_input(factors):
    with pytest.raises(ValueError, match="column 3 never varies"):
        irs(factors, np.where(np.arange(10) == 3, 0, factors))
    with pytest.raises(ValueError, match="column 2"):
        irs(np.where(np.arange(10) == 2, np.inf, factors), factors)


def test_result_goes_into_json(factors):
    read = json.loads(irs(factors, factors).to_json())
    assert read["num_active_codes"] == 10
    assert len(read["matrix"]) == 10
