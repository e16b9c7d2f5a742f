"""InfoMEC: golden values, neighbours against scikit-learn and by brute force, pruning, wrong input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastdis.metrics import _host_neighbours, _logistic, infomec
from fastdis.metrics._host_neighbours import neighbour_information, neighbour_information_numpy


@pytest.fixture
def small():
    """Three independent factors, and codes that hold them with a little noise."""
    rng = np.random.default_rng(0)
    factors = np.stack([rng.integers(0, size, 800) for size in (2, 3, 5)], axis=1)
    return factors + 0.1 * rng.standard_normal((800, 3)), factors


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("encoder", ["identity5", "linear_mix10", "collapsed10"])
def test_matches_the_authors_values(golden, encoder):
    inputs, expected = golden
    expected = expected[encoder]["infomec"]
    result = infomec(inputs[f"train_{encoder}"], inputs["ys_train"])
    assert len(result.active) == expected["n_active"]
    assert result.infom == pytest.approx(expected["infom"], abs=1e-6)
    assert result.infoe == pytest.approx(expected["infoe"], abs=1e-6)
    if np.isfinite(expected["infoc"]):
        assert result.infoc == pytest.approx(expected["infoc"], abs=1e-6)
    else:
        # There a factor that no active code tells anything of is 0 / 0; here it counts 0.
        found = result.normalized[result.active]
        unknown = found.sum(axis=0) == 0
        assert unknown.any()
        shares = found[:, ~unknown].max(axis=0) / found[:, ~unknown].sum(axis=0)
        assert result.infoc == pytest.approx(2 * (shares - 1 / 2).sum() / 5)
    assert result.score == pytest.approx((result.infom + result.infoe + result.infoc) / 3)


def test_seeds_move_scores_of_codes_with_ties_a_little(golden):
    inputs, _ = golden
    codes, factors = inputs["train_identity5"][:3000], inputs["ys_train"][:3000]
    one, other, large = (infomec(codes, factors, seed=seed) for seed in (0, 1, 2**62 + 1))
    assert one.infom != other.infom
    assert one.infom == pytest.approx(other.infom, abs=0.02)
    assert one.infom == pytest.approx(large.infom, abs=0.02)
    assert infomec(codes, factors, seed=1).to_dict() == other.to_dict()


def test_both_published_sets_of_constants(small):
    codes, factors = small
    codes = np.hstack([codes, codes[:, :1] * 0.2])
    standalone, training = infomec(codes, factors), infomec(codes, factors, constants="training")
    assert standalone.active.tolist() == [0, 1, 2, 3]
    assert training.active.tolist() == [0, 1, 2]
    assert infomec(codes, factors, neighbours=3, prune_fraction=1 / 8).to_dict() == training.to_dict()
    assert infomec(codes, factors, constants="training", neighbours=10, prune_fraction=0.05).to_dict() == (
        standalone.to_dict()
    )


def test_formulas_on_what_was_found(golden):
    inputs, _ = golden
    result = infomec(inputs["train_linear_mix10"][:2000], inputs["ys_train"][:2000])
    share = np.bincount(inputs["ys_train"][:2000, 0]) / 2000
    entropy = -np.sum(share * np.log(share))
    np.testing.assert_allclose(result.normalized[:, 0], result.mutual_information[:, 0] / entropy)
    M = result.normalized[result.active]
    assert result.infom == pytest.approx(((M.max(axis=1) / M.sum(axis=1)).mean() - 1 / 5) / (1 - 1 / 5))
    even = 1 / len(M)
    assert result.infoc == pytest.approx(((M.max(axis=0) / M.sum(axis=0)).mean() - even) / (1 - even))
    assert result.infoe == pytest.approx(result.explained.mean())


def test_loss_without_codes_is_that_of_equal_odds():
    """What logistic regression with balanced classes makes of codes that say nothing, whatever the frequencies."""
    linear = pytest.importorskip("sklearn.linear_model")
    factor = np.random.default_rng(0).choice(4, size=500, p=[0.7, 0.2, 0.06, 0.04])
    model = linear.LogisticRegression(C=np.inf, class_weight="balanced").fit(np.zeros((500, 2)), factor)
    shares = model.predict_proba(np.zeros((500, 2)))
    assert -np.log(shares[np.arange(500), factor]).mean() == pytest.approx(np.log(4), abs=1e-6)
    ours = _logistic.LogisticRegression(balanced=True).fit(np.zeros((500, 2)), factor)
    assert ours.log_loss(np.zeros((500, 2)), factor) == pytest.approx(np.log(4), abs=1e-6)


class TestNeighbours:
    @pytest.mark.parametrize("neighbours", [1, 3, 10])
    def test_scikit_learn(self, neighbours):
        selection = pytest.importorskip("sklearn.feature_selection")
        rng = np.random.default_rng(neighbours)
        classes = rng.integers(0, 7, 1500).astype(np.int32)
        codes = np.stack([classes + rng.standard_normal(1500), rng.standard_normal(1500), rng.random(1500) ** 2])
        theirs = selection.mutual_info_classif(codes.T, classes, n_neighbors=neighbours, random_state=0)
        ours = neighbour_information(codes, classes[None], neighbours)
        np.testing.assert_allclose(ours[:, 0], theirs, atol=1e-10)

    def test_scikit_learn_on_codes_with_ties(self):
        """It draws the same noise from a seed, so that ties are broken alike up to the noise's rounding."""
        selection = pytest.importorskip("sklearn.feature_selection")
        rng = np.random.default_rng(0)
        factors = np.stack([rng.integers(0, 4, 900), rng.integers(0, 9, 900)], axis=1)
        codes = np.stack([factors[:, 0], factors.sum(axis=1), rng.integers(0, 2, 900)], axis=1) / 7
        result = infomec(codes, factors, seed=3)
        for j in range(3):
            for k in range(2):
                theirs = selection.mutual_info_classif(codes[:, [j]], factors[:, k], n_neighbors=10, random_state=3)
                assert result.mutual_information[j, k] == pytest.approx(theirs.item(), abs=2e-4)

    @staticmethod
    def brute_force(code, classes, neighbours):
        """The definition, point by point."""
        psi = np.concatenate([[np.nan], np.cumsum(np.r_[-np.euler_gamma, 1 / np.arange(1, len(code) + 1)])])
        counts = np.bincount(classes)
        kept = np.flatnonzero(counts[classes] > 1)
        if len(kept) == 0:
            return 0.0
        total = 0.0
        for i in kept:
            apart = np.abs(code[kept] - code[i])
            same = np.sort(apart[classes[kept] == classes[i]])
            k = min(neighbours, len(same) - 1)
            closer = (apart < same[k]).sum() if same[k] > 0 else (apart == 0).sum()
            total += psi[k] - psi[len(same)] - psi[closer]
        return max(0.0, psi[len(kept)] + total / len(kept))

    @pytest.mark.parametrize("seed", range(6))
    def test_by_definition(self, seed):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 120))
        classes = rng.integers(0, int(rng.integers(1, n + 1)), (3, n)).astype(np.int32)
        # Whole numbers and their quarters: distances tie, exactly.
        codes = np.stack([rng.integers(0, 9, n) / 4, rng.standard_normal(n), np.zeros(n), classes[0] * 1.0])
        for neighbours in (1, 2, 3, 10, 1000):
            expected = [[self.brute_force(code, column, neighbours) for column in classes] for code in codes]
            np.testing.assert_allclose(neighbour_information_numpy(codes, classes, neighbours), expected, atol=1e-12)
            np.testing.assert_allclose(neighbour_information(codes, classes, neighbours), expected, atol=1e-12)

    def test_compiled_and_numpy_agree(self, golden):
        inputs, _ = golden
        codes = np.ascontiguousarray(inputs["train_linear_mix10"][:4000].T.astype(float))
        classes = np.ascontiguousarray(inputs["ys_train"][:4000].T.astype(np.int32))
        np.testing.assert_allclose(
            neighbour_information(codes, classes, 3), neighbour_information_numpy(codes, classes, 3), atol=1e-12
        )

    def test_points_alone_in_their_class_are_left_out(self):
        classes = np.array([[0, 0, 0, 1, 1, 1, 2]], np.int32)
        code = np.array([[0.0, 1, 3, 10, 11, 13, 5]])
        assert neighbour_information(code, classes, 1) == neighbour_information(code[:, :6], classes[:, :6], 1)
        assert neighbour_information(code, np.arange(7, dtype=np.int32)[None], 1) == 0


def test_threads_change_nothing(small, restore_threads):
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(infomec(*small).to_dict())
    assert results[0] == results[1] == results[2]


def test_without_the_extension(small, monkeypatch):
    compiled = infomec(*small)
    monkeypatch.setattr(_host_neighbours, "extension", None)
    monkeypatch.setattr(_logistic, "extension", None)
    plain = infomec(*small)
    np.testing.assert_allclose(plain.mutual_information, compiled.mutual_information, atol=1e-12)
    assert plain.infoe == pytest.approx(compiled.infoe, abs=1e-6)


def test_order_shift_and_scale_do_not_matter(small):
    codes, factors = small
    score = infomec(codes, factors).to_dict()
    shuffle = np.random.default_rng(0).permutation(len(codes))
    for same in (infomec(codes[shuffle], factors[shuffle]), infomec(codes * 4 - 8e3, factors * 3 - 7)):
        assert same.infom == pytest.approx(score["infom"], abs=1e-4)
        assert same.infoc == pytest.approx(score["infoc"], abs=1e-4)
        assert same.infoe == pytest.approx(score["infoe"], abs=1e-4)


@pytest.mark.parametrize("scale", [1e-300, 1e200, 1e307])
def test_codes_of_any_magnitude(small, scale):
    codes, factors = small
    assert infomec(codes * scale, factors).score == pytest.approx(infomec(codes, factors).score, abs=1e-4)


def test_inactive_codes_count_for_explicitness_only(small):
    codes, factors = small
    whole = infomec(codes, factors)
    narrow = np.hstack([codes, 0.01 * np.random.default_rng(1).standard_normal((800, 1))])
    result = infomec(narrow, factors)
    assert result.active.tolist() == [0, 1, 2]
    assert (result.infom, result.infoc) == (whole.infom, whole.infoc)
    assert result.mutual_information.shape == (4, 3)
    # Only the two wide codes tell of the first factor; scaled down far enough to be inactive, its own still does.
    shrunk = infomec(codes * [1e-3, 1, 1], factors)
    assert shrunk.active.tolist() == [1, 2]
    assert shrunk.explained[0] > 0.9


@pytest.mark.parametrize("value", [0.0, 1e30, -3.7])
def test_constant_code_tells_nothing(small, value):
    codes, factors = small
    result = infomec(np.hstack([codes, np.full((800, 1), value)]), factors)
    assert (result.mutual_information[3] == 0).all()
    assert result.score == pytest.approx(infomec(codes, factors).score, abs=1e-6)


def test_no_code_ever_changes(small):
    result = infomec(np.ones((800, 2)), small[1])
    assert (result.infom, result.infoc, len(result.active)) == (0, 0, 0)
    assert result.infoe == pytest.approx(0, abs=2e-3)
    assert np.isfinite(result.score)


def test_factor_that_no_code_knows_counts_0_in_compactness():
    """Two factors of many single values: neighbours find nothing at all, which elsewhere is 0 / 0."""
    rows = np.arange(300)
    factors = np.stack([rows % 3, rows], axis=1)
    codes = np.stack([rows % 3, rows % 3], axis=1) + 0.01 * np.random.default_rng(0).standard_normal((300, 2))
    result = infomec(codes, factors)
    assert (result.mutual_information[:, 1] == 0).all()
    assert result.infom == pytest.approx(1)
    assert result.infoc == pytest.approx(0, abs=0.05)
    assert np.isfinite(result.score)


def test_one_factor_and_one_code(small):
    codes, factors = small
    one_factor = infomec(codes[:, 1:2], factors[:, 1:2])
    assert (one_factor.infom, one_factor.infoc) == (1, 1)
    several_codes = infomec(codes, factors[:, 2:])
    assert several_codes.infom <= 1
    assert several_codes.infoc > 0.9
    one_code = infomec(codes[:, :1], factors)
    assert one_code.infom > 0.9
    assert 1 / 3 <= one_code.infoc <= 1


def test_explicitness_of_noise_and_of_perfect_codes(small):
    _, factors = small
    assert infomec(factors, factors).infoe > 0.999
    noise = np.random.default_rng(0).standard_normal((800, 2))
    assert infomec(noise, factors).infoe == pytest.approx(0, abs=0.02)


def test_fewer_rows_than_neighbours():
    factors = np.array([[0], [0], [0], [1], [1], [1]])
    result = infomec(np.array([[0.0], [1], [2], [10], [11], [12]]), factors, neighbours=50)
    assert result.mutual_information.item() > 0
    assert np.isfinite(result.score)
    assert np.isfinite(infomec([[0.0], [1.0]], np.array([[0], [1]])).score)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_of_every_precision(small, dtype):
    codes, factors = torch.from_numpy(small[1]).to(dtype), torch.from_numpy(small[1])
    if dtype.is_floating_point:
        codes.requires_grad_()
    assert infomec(codes, factors).score == infomec(small[1], small[1]).score


def test_input_is_left_alone(small):
    codes = np.asfortranarray(small[0].astype(np.float32))
    before = codes.copy()
    infomec(codes[::2], small[1][::2])
    assert np.array_equal(codes, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"constants": "paper"}, ValueError, "constants must be 'standalone' or 'training', got 'paper'"),
        ({"neighbours": 0}, ValueError, "neighbours must be at least 1"),
        ({"neighbours": 1.5}, TypeError, "neighbours must be a whole number, got float"),
        ({"prune_fraction": 1.0}, ValueError, "prune_fraction must be at least 0 and below 1, got 1.0"),
        ({"prune_fraction": float("nan")}, ValueError, "prune_fraction"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
    ],
)
def test_arguments_out_of_range(small, arguments, error, message):
    with pytest.raises(error, match=message):
        infomec(*small, **arguments)


def test_factor_that_never_varies(small):
    codes, factors = small
    factors[:, 1] = 6
    with pytest.raises(ValueError, match="column 1 never varies"):
        infomec(codes, factors)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_codes_that_are_not_finite(small, value):
    codes, factors = small
    codes[17, 2] = value
    with pytest.raises(ValueError, match="column 2"):
        infomec(codes, factors)


def test_result_goes_into_json(small):
    result = infomec(*small)
    read = json.loads(result.to_json())
    assert read["infom"] == result.infom
    assert read["active"] == [0, 1, 2]
    assert read["mutual_information"] == result.mutual_information.tolist()
