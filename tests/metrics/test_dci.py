"""DCI: against the reference implementation and scikit-learn, published vectors, and on input that is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdis.metrics import completeness, dci, disentanglement
from fastdis.metrics._host_boosting import boost, boost_sklearn

ENCODERS = ["identity5", "linear_mix10", "collapsed10"]


def golden_split(inputs, encoder, n=1000):
    return tuple(inputs[name][:n] for name in (f"train_{encoder}", "ys_train", f"test_{encoder}", "ys_test"))


@pytest.fixture(scope="module")
def factors():
    """Ten independent factors of ten values, as in the reference implementation's own tests."""
    return np.random.RandomState(0).randint(1, 11, size=(1000, 10))


@pytest.fixture(scope="module")
def split():
    """A small training and test set: a factor of four values and one of two, four noisy codes."""
    random = np.random.default_rng(0)
    factors = np.stack([random.integers(0, 4, 300), random.integers(0, 2, 300)], axis=1) * 3 - 1
    codes = factors @ random.normal(size=(2, 4)) + random.normal(size=(300, 4))
    return codes[:200], factors[:200], codes[200:], factors[200:]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_matches_the_reference_implementation(golden, encoder):
    inputs, expected = golden
    result = dci(*golden_split(inputs, encoder))
    reference = expected[encoder]["dci_gbt_n1000"]
    for part in ("disentanglement", "completeness", "informativeness_train", "informativeness_test"):
        assert getattr(result, part) == pytest.approx(reference[part], abs=0.01)
    np.testing.assert_allclose(result.importance, reference["importance"], atol=0.03)
    assert result.score == result.disentanglement


@pytest.mark.parametrize("factor", [0, 1])
def test_boosting_is_scikit_learns(golden, factor):
    pytest.importorskip("sklearn")
    inputs, _ = golden
    codes, factors, test_codes, _ = golden_split(inputs, "linear_mix10")
    classes = factors[:, factor].astype(np.int32)
    size = int(classes.max()) + 1
    ours = boost(codes, classes, size, test_codes, bins=0, seed=1, threads=1)
    theirs = boost_sklearn(codes, classes, size, test_codes, bins=0, seed=1)
    np.testing.assert_allclose(ours.importance, theirs.importance, atol=2e-3)
    assert np.mean(ours.predicted == theirs.predicted) > 0.99
    assert np.mean(ours.test_predicted == theirs.test_predicted) > 0.97


@pytest.mark.parametrize("bins", [0, 3, 16, 1000])
@pytest.mark.parametrize("size", [2, 3])
def test_boosting_of_few_values(size, bins):
    """Codes with ties, codes that never vary and rare classes, with and without bins."""
    pytest.importorskip("sklearn")
    random = np.random.default_rng(size)
    codes = np.stack([random.integers(0, 5, 150), random.integers(0, 40, 150) / 8, np.full(150, 0.1)], axis=1)
    classes = ((codes[:, 0] + codes[:, 1] + random.normal(size=150)) > 4).astype(np.int32)
    if size == 3:
        classes[:3] = 2
    codes = codes.astype(np.float32)
    ours = boost(codes, classes, size, codes, bins=bins, seed=0, threads=1)
    theirs = boost_sklearn(codes, classes, size, codes, bins=bins, seed=0)
    np.testing.assert_allclose(ours.importance, theirs.importance, atol=0.02)
    assert ours.importance[2] == 0
    assert np.mean(ours.predicted == theirs.predicted) >= 0.98
    np.testing.assert_array_equal(ours.predicted, ours.test_predicted)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
def test_bins_score_like_exact_splits(golden, encoder):
    inputs, _ = golden
    train, ys, test, test_ys = golden_split(inputs, encoder, 10_000)
    exact = dci(train, ys, test, test_ys)
    binned = dci(train, ys, test, test_ys, estimator="gbt_histogram")
    assert binned.importance.tolist() != exact.importance.tolist()
    assert binned.disentanglement == pytest.approx(exact.disentanglement, abs=0.02)
    assert binned.completeness == pytest.approx(exact.completeness, abs=0.02)


@pytest.mark.slow
def test_exact_boosting_is_scikit_learns_at_full_size(golden):
    pytest.importorskip("sklearn")
    inputs, _ = golden
    codes, factors, test_codes, _ = golden_split(inputs, "linear_mix10", 10_000)
    classes = factors[:, 0].astype(np.int32)
    ours = boost(codes, classes, 3, test_codes, bins=0, seed=0, threads=2)
    theirs = boost_sklearn(codes, classes, 3, test_codes, bins=0, seed=0)
    np.testing.assert_allclose(ours.importance, theirs.importance, atol=1e-3)
    assert np.mean(ours.predicted == theirs.predicted) > 0.998
    assert np.mean(ours.test_predicted == theirs.test_predicted) > 0.998


def test_published_vectors_of_boosting(factors):
    few = factors[:, :10]
    codes = few.astype(float)
    result = dci(codes, few, codes, few)
    assert 0.9 <= result.disentanglement <= 1
    assert 0.9 <= result.completeness <= 1
    assert result.informativeness_train == result.informativeness_test == 1
    twice = np.hstack([codes, codes])
    result = dci(twice, few, twice, few)
    assert 0.9 <= result.disentanglement <= 1
    assert result.completeness == pytest.approx(1 - np.log(2) / np.log(10), abs=0.1)
    shuffled = np.stack([np.random.RandomState(i).permutation(row) for i, row in enumerate(codes)])
    result = dci(shuffled, few, shuffled, few)
    assert 0 <= result.disentanglement <= 0.2
    assert 0 <= result.completeness <= 0.2


@pytest.mark.parametrize(
    ("importance", "D", "C"),
    [
        (np.diag([1.0] * 5), 1, 1),
        (np.diag([1.0, 4.0, 3.0]), 1, 1),
        ([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], 1, 1),
        (np.zeros((10, 10)), 0, 0),
        (np.vstack([np.diag([1.0] * 5)] * 2), 1, 1 - np.log(2) / np.log(10)),
        (np.hstack([np.diag([1.0] * 5)] * 2), 1 - np.log(2) / np.log(10), 1),
        (np.ones((3, 4)), 0, 0),
        ([[3.0], [0.0]], 1, 1),
        ([[2.0, 2.0]], 0, 1),
        ([[5.0]], 1, 1),
        ([[0.0]], 0, 0),
        (np.full((2, 2), 1e308), 0, 0),
    ],
)
def test_published_and_other_matrices(importance, D, C):
    importance = np.array(importance)
    assert disentanglement(importance) == pytest.approx(D, abs=1e-8)
    assert completeness(importance) == pytest.approx(C, abs=1e-8)
    assert completeness(importance) == pytest.approx(disentanglement(importance.T), abs=1e-12)
    assert disentanglement(torch.from_numpy(importance)) == disentanglement(importance)


def test_weights_of_completeness():
    importance = np.array([[3.0, 0.5], [0.0, 0.5]])
    assert completeness(importance) == pytest.approx(0.75, abs=1e-8)
    assert completeness(importance, weighted=False) == pytest.approx(0.5, abs=1e-8)
    assert completeness(np.array([[3.0, 0.0], [0.0, 0.0]]), weighted=False) == pytest.approx(0.5, abs=1e-8)


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        (np.ones(3), ValueError, r"\[d, K\]"),
        (np.ones((0, 3)), ValueError, r"\[d, K\]"),
        (np.array([[1.0, -0.1]]), ValueError, "not negative"),
        (np.array([[1.0, np.nan]]), ValueError, "finite"),
        (np.array([["a"]]), TypeError, "real numbers"),
    ],
)
def test_matrices_that_are_wrong(importance, error, message):
    with pytest.raises(error, match=message):
        disentanglement(importance)
    with pytest.raises(error, match=message):
        completeness(importance)


@pytest.mark.parametrize("estimator", ["gbt", "gbt_histogram", "random_forest", "lasso"])
def test_seeds_and_jobs(split, estimator):
    first = dci(*split, estimator=estimator, seed=3, jobs=1)
    again = dci(*split, estimator=estimator, seed=3, jobs=3)
    assert first.to_json() == again.to_json()
    assert (first.importance >= 0).all()
    assert first.importance.shape == (4, 2)


def test_seed_chooses_between_equal_codes(split):
    codes, factors, test_codes, test_factors = split
    twice, test_twice = np.hstack([codes, codes]), np.hstack([test_codes, test_codes])
    one, other = (dci(twice, factors, test_twice, test_factors, seed=seed) for seed in (0, 1))
    assert one.importance.tolist() != other.importance.tolist()
    alone = dci(*split)
    np.testing.assert_allclose(one.importance[:4] + one.importance[4:], alone.importance, atol=0.02)
    assert (one.importance[:4] > 0).all()
    assert (one.importance[4:] > 0).all()


@pytest.mark.parametrize("estimator", ["random_forest", "lasso"])
def test_regressions_on_perfect_and_useless_codes(split, estimator):
    pytest.importorskip("sklearn")
    _, factors, _, test_factors = split
    perfect = dci(factors * 7.0, factors, test_factors * 7.0, test_factors, estimator=estimator)
    assert perfect.disentanglement == pytest.approx(1, abs=1e-3)
    assert perfect.completeness == pytest.approx(1, abs=1e-3)
    assert perfect.informativeness_test > 0.99
    constant = dci(np.ones((200, 2)), factors, np.ones((100, 2)), test_factors, estimator=estimator)
    assert constant.disentanglement == constant.completeness == 0
    # Worse than a uniform variable's variance: a factor of two values has three times as much.
    assert constant.informativeness_test < 0


@pytest.mark.parametrize("estimator", ["gbt", "gbt_histogram"])
def test_codes_that_never_vary(split, estimator):
    _, factors, _, test_factors = split
    result = dci(np.full((200, 3), 0.1), factors, np.zeros((100, 3)), test_factors, estimator=estimator)
    assert result.importance.tolist() == np.zeros((3, 2)).tolist()
    assert result.disentanglement == result.completeness == 0
    commonest = [np.bincount(column).max() / 200 for column in (factors + 1).T]
    assert result.informativeness_train == pytest.approx(np.mean(commonest))


def test_one_code_one_factor_two_rows():
    codes, factors = np.array([[0.0], [1.0]]), np.array([[4], [-4]])
    result = dci(codes, factors, codes, factors)
    assert result.importance.tolist() == [[1.0]]
    assert (result.disentanglement, result.completeness) == (1, 1)
    assert result.informativeness_train == result.informativeness_test == 1


def test_test_values_that_training_lacks_are_misses(split):
    codes, factors, test_codes, test_factors = split
    known = dci(*split).informativeness_test
    unknown = dci(codes, factors, test_codes, test_factors * 0 + 99).informativeness_test
    assert unknown == 0 < known


def test_only_which_values_are_equal_matters(split):
    codes, factors, test_codes, test_factors = split
    renamed = dci(codes, factors * 100 - 5, test_codes, test_factors * 100 - 5)
    assert renamed.to_json() == dci(*split).to_json()


def test_tensors_and_layouts(split):
    expected = dci(*split).to_json()
    assert dci(*map(torch.from_numpy, split)).to_json() == expected
    strided = [np.repeat(np.asfortranarray(array), 2, axis=0)[::2] for array in split]
    assert dci(*strided).to_json() == expected
    half = [torch.from_numpy(split[0]).half(), split[1], torch.from_numpy(split[2]).to(torch.bfloat16), split[3]]
    assert dci(*half).disentanglement == pytest.approx(dci(*split).disentanglement, abs=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"estimator": "xgboost"}, ValueError, "estimator must be one of 'gbt', 'gbt_histogram'.*, got 'xgboost'"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"jobs": 0}, ValueError, "jobs must be at least 1, got 0"),
        ({"jobs": 1.5}, TypeError, "jobs must be a whole number, got float"),
        ({"codes": np.full((200, 4), np.nan)}, ValueError, "codes must be finite"),
        ({"codes": np.full((200, 4), 1e39)}, ValueError, "codes must lie between"),
        ({"test_codes": np.full((100, 4), -1e39)}, ValueError, "test_codes must lie between"),
        ({"factors": np.ones((200, 2), int)}, ValueError, "factors column 0 never varies"),
        ({"test_factors": np.ones((100, 3), int)}, ValueError, "as many columns, got 2 and 3"),
        ({"test_factors": np.ones((100, 2))}, TypeError, "test_factors must be integers"),
    ],
)
def test_input_that_does_not_fit(split, change, error, message):
    arguments = dict(zip(("codes", "factors", "test_codes", "test_factors"), split, strict=True)) | change
    with pytest.raises(error, match=message):
        dci(**arguments)


def test_lasso_needs_rows_for_its_folds(split):
    pytest.importorskip("sklearn")
    codes, factors, test_codes, test_factors = split
    with pytest.raises(ValueError, match=r"at least 10 rows.*got 9"):
        dci(codes[:9], factors[:9], test_codes, test_factors, estimator="lasso")


def test_extension_refuses_what_would_read_out_of_bounds():
    extension = pytest.importorskip("fastdis._C")
    codes, classes = np.zeros((4, 2), np.float32), np.array([0, 1, 2, 1], np.int32)
    with pytest.raises(IndexError, match="classes must be"):
        extension.boost(codes, classes, 2, codes, 1, 3, 0, 0.1, 0, 1)
    with pytest.raises(IndexError, match="bins must be"):
        extension.boost(codes, classes, 3, codes, 1, 3, 70_000, 0.1, 0, 1)
    with pytest.raises(ValueError, match="test_codes"):
        extension.boost(codes, classes, 3, codes[:, :1], 1, 3, 0, 0.1, 0, 1)
