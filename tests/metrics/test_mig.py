"""The mutual information gap: against the reference implementation, by hand, and on input that is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastdis.metrics import mig


@pytest.fixture
def factors():
    """Ten independent factors of ten values, as in the reference implementation's own tests."""
    return np.random.RandomState(0).randint(1, 11, size=(3000, 10))


@pytest.mark.parametrize("encoder", ["identity5", "linear_mix10", "collapsed10"])
def test_matches_the_reference_implementation(golden, encoder):
    inputs, expected = golden
    result = mig(inputs[f"train_{encoder}"], inputs["ys_train"])
    assert result.score == pytest.approx(expected[encoder]["mig"], abs=1e-6)
    np.testing.assert_allclose(result.mutual_information, expected[encoder]["mi_matrix"], atol=1e-6)
    assert result.mutual_information.shape == (inputs[f"train_{encoder}"].shape[1], 5)


def test_perfect_codes(factors):
    result = mig(factors.astype(float), factors)
    assert 0.9 <= result.score <= 1
    np.testing.assert_allclose(np.diag(result.mutual_information), result.entropy)


def test_empty_and_duplicated_codes(factors):
    assert mig(np.zeros((3000, 10)), factors).score == 0
    assert mig(np.hstack([factors, factors]), factors).score == pytest.approx(0, abs=1e-12)


def test_two_equal_values_share_ln_2():
    factor = np.array([[0], [0], [1], [1]])
    result = mig(factor, factor)
    assert result.mutual_information.item() == pytest.approx(np.log(2))
    assert result.entropy.item() == pytest.approx(np.log(2))


def test_bins_have_equal_width_and_the_last_is_closed():
    """[.1 ... .6] in three bins is [1, 1, 2, 2, 3, 3], which pairs of equal factors see in full."""
    codes = np.arange(0.1, 0.61, 0.1).reshape(6, 1)
    pairs = np.array([0, 0, 1, 1, 2, 2]).reshape(6, 1)
    assert mig(codes, pairs, bins=3).mutual_information.item() == pytest.approx(np.log(3))
    # One outlier stretches the bins until all others share one.
    codes[-1] = 100
    assert mig(codes, pairs, bins=3).mutual_information.item() < np.log(2)


def test_gap_by_hand():
    factor = np.array([0, 0, 1, 1, 2, 2, 3, 3]).reshape(8, 1)
    half = factor // 2
    result = mig(np.hstack([half, factor]), factor)
    assert result.mutual_information[:, 0].tolist() == pytest.approx([np.log(2), np.log(4)])
    assert result.score == pytest.approx(0.5)
    assert result.gaps.tolist() == pytest.approx([0.5])


def test_one_code_leads_by_all_it_tells():
    factor = np.array([0, 1, 0, 1]).reshape(4, 1)
    assert mig(factor, factor).score == pytest.approx(1)


def test_score_ignores_order_shift_and_scale(golden):
    inputs, _ = golden
    codes, factors = inputs["test_linear_mix10"].astype(float), inputs["ys_test"]
    score = mig(codes, factors).score
    shuffle = np.random.default_rng(0).permutation(len(codes))
    assert mig(codes[shuffle][:, ::-1], factors[shuffle]).score == pytest.approx(score, abs=1e-12)
    assert mig(codes * 4 - 8, factors * 3 - 7).score == pytest.approx(score, abs=1e-3)


def test_score_ignores_the_names_of_values_and_the_scale_of_codes(golden):
    inputs, _ = golden
    codes, factors = inputs["test_identity5"].astype(float), inputs["ys_test"]
    names = np.random.default_rng(1).permutation(40) * 10**15 - 7 * 10**15
    assert mig(codes, names[factors]).score == pytest.approx(mig(codes, factors).score, abs=1e-12)
    # Powers of two leave the bins exactly as they are.
    assert mig(codes * 2.0**-600, factors).score == mig(codes, factors).score
    assert mig(codes * 2.0**1018, factors).score == mig(codes, factors).score


def test_fewer_rows_than_bins():
    factor = np.array([0, 1, 2]).reshape(3, 1)
    assert mig(factor, factor, bins=1000).score == pytest.approx(1)


def test_one_bin_tells_nothing(factors):
    assert mig(factors, factors, bins=1).score == 0


def test_score_averages_the_gaps(golden):
    inputs, _ = golden
    result = mig(inputs["test_linear_mix10"], inputs["ys_test"])
    assert result.score == pytest.approx(result.gaps.mean())
    assert (result.gaps >= 0).all()
    assert (result.gaps <= 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_of_every_precision(factors, dtype):
    codes = torch.from_numpy(factors).to(dtype)
    if dtype.is_floating_point:
        codes.requires_grad_()
    assert mig(codes, torch.from_numpy(factors)).score == mig(factors, factors).score


def test_input_is_left_alone(factors):
    codes = np.asfortranarray(factors[::2].astype(np.float32))
    before = codes.copy()
    mig(codes, factors[::2])
    assert np.array_equal(codes, before)


@pytest.mark.parametrize("value", [0.0, 1e30, -3.7])
def test_constant_code_tells_nothing(factors, value):
    codes = np.hstack([factors[:, :1].astype(float), np.full((3000, 1), value)])
    result = mig(codes, factors)
    assert (result.mutual_information[1] == 0).all()
    assert np.isfinite(result.score)


def test_code_that_moves_by_rounding_errors_tells_nothing():
    factor = np.array([0, 1] * 50).reshape(100, 1)
    codes = np.where(factor == 1, np.nextafter(1.0, 2), 1.0)
    assert mig(codes, factor).mutual_information.item() == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_codes_that_are_not_finite(factors, value):
    codes = factors.astype(float)
    codes[17, 3] = value
    with pytest.raises(ValueError, match="column 3"):
        mig(codes, factors)


def test_factor_that_never_varies(factors):
    factors[:, 4] = 6
    with pytest.raises(ValueError, match="column 4 never varies"):
        mig(factors, factors)


@pytest.mark.parametrize(
    ("codes", "factors", "error", "message"),
    [
        (np.zeros((5, 2)), np.zeros((4, 1), int), ValueError, "5 and 4"),
        (np.zeros(5), np.zeros((5, 1), int), ValueError, r"\[n, d\]"),
        (np.zeros((5, 0)), np.zeros((5, 1), int), ValueError, "at least one code"),
        (np.zeros((0, 2)), np.zeros((0, 1), int), ValueError, "at least one row"),
        (np.zeros((5, 2)), np.zeros(5, int), ValueError, r"\[n, K\]"),
        (np.zeros((5, 2)), np.zeros((5, 0), int), ValueError, "at least one factor"),
        (np.zeros((5, 2)), np.zeros((5, 1)), TypeError, "factors must be integers, got float64"),
        (np.zeros((5, 2), complex), np.zeros((5, 1), int), TypeError, "complex"),
        (np.array([["a"]]), np.zeros((1, 1), int), TypeError, "codes must be real"),
    ],
)
def test_input_that_does_not_fit(codes, factors, error, message):
    with pytest.raises(error, match=message):
        mig(codes, factors)


def test_bins_must_be_positive(factors):
    with pytest.raises(ValueError, match="bins must be at least 1 and at most 65536, got 0"):
        mig(factors, factors, bins=0)
    with pytest.raises(ValueError, match="got 65537"):
        mig(factors, factors, bins=65537)
    with pytest.raises(TypeError, match="bins must be a whole number, got float"):
        mig(factors, factors, bins=20.0)


def test_result_goes_into_json_and_cannot_be_changed(factors):
    result = mig(factors, factors)
    read = json.loads(json.dumps(result.to_dict()))
    assert read["score"] == result.score
    assert read["mutual_information"] == result.mutual_information.tolist()
    with pytest.raises(AttributeError):
        result.score = 1.0
