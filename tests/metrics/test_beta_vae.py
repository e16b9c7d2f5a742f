"""The BetaVAE score: published vectors, the rows it draws, its classifier against scikit-learn, wrong input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastdis.metrics import _host_votes, _logistic, beta_vae
from fastdis.metrics._host_votes import groups_of, paired_differences, paired_differences_numpy, philox

SMALL = {"batch_size": 5, "train": 2000, "test": 2000}


@pytest.fixture
def factors():
    """Ten independent factors of ten values, as in the reference implementation's own tests."""
    return np.random.RandomState(0).randint(1, 11, size=(3000, 10))


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_published_vector_of_perfect_codes(factors):
    assert 0.9 <= beta_vae(factors, factors, **SMALL).score <= 1


def test_codes_that_say_nothing_score_chance(factors):
    result = beta_vae(np.zeros((3000, 4)), factors, **SMALL)
    assert result.score == pytest.approx(0.1, abs=0.03)
    noise = np.random.default_rng(0).standard_normal((3000, 4))
    assert beta_vae(noise, factors, **SMALL).score < 0.2


def test_score_follows_the_quality_of_the_encoder(golden):
    inputs, _ = golden
    perfect, entangled, collapsed = (
        beta_vae(inputs[f"train_{name}"], inputs["ys_train"], train=3000, test=1500)
        for name in ("identity5", "linear_mix10", "collapsed10")
    )
    assert perfect.score == 1
    assert entangled.score > 0.99
    # The two live codes tell two factors of five for sure, and of the others one in three.
    assert collapsed.score == pytest.approx(2 / 5 + 3 / 5 / 3, abs=0.03)


def test_confusion_counts_the_test_votes(golden):
    inputs, _ = golden
    result = beta_vae(inputs["train_collapsed10"], inputs["ys_train"], batch_size=8, train=500, test=700)
    assert result.confusion.shape == (5, 5)
    assert result.confusion.sum() == 700
    assert result.score == pytest.approx(np.trace(result.confusion) / 700)


def test_classifier_is_scikit_learns(golden):
    linear = pytest.importorskip("sklearn.linear_model")
    inputs, _ = golden
    codes, factors = inputs["train_collapsed10"].astype(float), inputs["ys_train"]
    result = beta_vae(codes, factors, seed=4, batch_size=8, train=2000, test=1000)
    x, y = paired_differences(codes, groups_of(factors), 4, 3000, 8)
    theirs = linear.LogisticRegression(max_iter=100).fit(x[:2000], y[:2000])
    assert result.score == pytest.approx(theirs.score(x[2000:], y[2000:]), abs=2e-3)
    assert result.train_accuracy == pytest.approx(theirs.score(x[:2000], y[:2000]), abs=2e-3)


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key, counter, words):
    """The test vectors that Philox is published with."""
    vote = np.array([counter[2] + (counter[3] << 32)], np.uint64)
    ours = philox(key[0] + (key[1] << 32), vote, counter[0], counter[1])
    assert tuple(int(word[0]) for word in ours) == words
    if _host_votes.extension is not None:
        assert tuple(_host_votes.extension.philox4x32(*counter, key[0] + (key[1] << 32))) == words


def test_numbers_below_a_limit_have_no_bias():
    """With 3 * 2**30 as the limit every fourth word is rejected; without rejection a third of the range comes twice."""
    votes = np.arange(40_000, dtype=np.uint64)
    limit = 3 * 2**30
    drawn = _host_votes.below(np.full(votes.shape, limit), 9, votes, 0, 0)
    assert drawn.min() >= 0
    assert drawn.max() < limit
    counts = np.bincount(drawn * 3 // limit, minlength=3)
    assert np.square(counts - len(votes) / 3).sum() / (len(votes) / 3) < 14  # chi squared of 2, p = 0.001
    # Where a word lies within its share matters too.
    assert np.bincount(drawn % 2).tolist() == pytest.approx([20_000] * 2, abs=400)


@pytest.mark.skipif(_host_votes.extension is None, reason="nothing was compiled")
@pytest.mark.parametrize("d", [1, 3, 10, 65])
def test_compiled_and_numpy_draw_the_same_rows(d):
    rng = np.random.default_rng(d)
    factors = np.stack([rng.integers(0, size, 501) for size in (2, 7, 200)], axis=1) - 3
    codes = rng.standard_normal((501, d))
    for pairs in (1, 5):
        ours = _host_votes.extension.paired_differences(
            codes, *vars(groups_of(factors)).values(), 2**63 - 1, 300, pairs, 3
        )
        twin = paired_differences_numpy(codes, groups_of(factors), 2**63 - 1, 300, pairs)
        assert np.array_equal(ours[1], twin[1])
        assert np.array_equal(ours[0], twin[0])


@pytest.mark.skipif(_host_votes.extension is None, reason="nothing was compiled")
def test_compiled_and_numpy_draw_again_alike():
    """With a million rows some words in ten thousand fall into the incomplete share, or so near that one must look."""
    rows = 1_000_003
    factors = np.stack([np.arange(rows) % 2, np.arange(rows) // 3 % 2], axis=1)
    codes, groups = np.arange(rows, dtype=float)[:, None], groups_of(factors)
    ours, twin = (
        draw(codes, *groups_given, 5, 4000, 9, *threads)
        for draw, groups_given, threads in (
            (_host_votes.extension.paired_differences, vars(groups).values(), (2,)),
            (paired_differences_numpy, (groups,), ()),
        )
    )
    assert np.array_equal(ours[0], twin[0])
    again = [
        _host_votes.below(np.full(4000, rows // 2), 5, np.arange(4000, dtype=np.uint64), 1 + pair, word)
        != _host_votes.philox(5, np.arange(4000, dtype=np.uint64), 1 + pair, 0)[word] * (rows // 2) >> 32
        for pair in range(9)
        for word in (1, 2)
    ]
    assert np.sum(again) > 2


def test_pairs_agree_in_the_factor_drawn_and_in_nothing_else(factors):
    """A pair of one vote: the difference of the factors themselves tells which rows were drawn."""
    apart, factor = paired_differences(factors.astype(float), groups_of(factors), 0, 4000, 1)
    assert (apart[np.arange(4000), factor] == 0).all()
    assert np.bincount(factor, minlength=10).min() > 320
    others = np.delete(apart, 0, axis=1)[factor == 0]
    assert (others == 0).mean() == pytest.approx(0.1, abs=0.02)


def test_values_of_a_factor_are_drawn_alike_however_frequent():
    rows = 1000
    factor = np.r_[np.zeros(rows - 10, int), np.ones(10, int)]
    factors = np.stack([factor, factor], axis=1)
    codes = np.stack([factor * 1e6 + np.arange(rows), np.arange(rows) % 3], axis=1).astype(float)
    apart, _ = paired_differences(codes, groups_of(factors), 0, 2000, 1)
    # Rows of the rare value lie at most 9 apart, of the other nearly always more.
    assert (apart[:, 0] < 10).mean() == pytest.approx(0.51, abs=0.04)


def test_seeds(golden):
    inputs, _ = golden
    codes, factors = inputs["train_collapsed10"], inputs["ys_train"]
    small = {"batch_size": 4, "train": 300, "test": 300}
    assert beta_vae(codes, factors, seed=5, **small).to_dict() == beta_vae(codes, factors, seed=5, **small).to_dict()
    assert beta_vae(codes, factors, seed=5, **small).to_dict() != beta_vae(codes, factors, seed=6, **small).to_dict()
    # The training votes do not depend on how many test votes follow.
    assert (
        beta_vae(codes, factors, **small).train_accuracy
        == beta_vae(codes, factors, **{**small, "test": 10}).train_accuracy
    )


def test_threads_change_nothing(golden, restore_threads):
    inputs, _ = golden
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(beta_vae(inputs["train_linear_mix10"], inputs["ys_train"], train=900, test=600).to_dict())
    assert results[0] == results[1] == results[2]


def test_without_the_extension(golden, monkeypatch):
    inputs, _ = golden
    codes, factors = inputs["train_collapsed10"], inputs["ys_train"]
    compiled = beta_vae(codes, factors, batch_size=4, train=500, test=500)
    monkeypatch.setattr(_host_votes, "extension", None)
    monkeypatch.setattr(_logistic, "extension", None)
    plain = beta_vae(codes, factors, batch_size=4, train=500, test=500)
    assert plain.score == pytest.approx(compiled.score, abs=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_of_every_precision(factors, dtype):
    small = {"batch_size": 3, "train": 200, "test": 200}
    codes = torch.from_numpy(factors).to(dtype)
    if dtype.is_floating_point:
        codes.requires_grad_()
    assert beta_vae(codes, torch.from_numpy(factors), **small).score == beta_vae(factors, factors, **small).score


def test_input_is_left_alone_and_may_be_strided(factors):
    codes = np.asfortranarray(factors[::2].astype(np.float32))
    before = codes.copy()
    small = {"batch_size": 3, "train": 200, "test": 200}
    strided = beta_vae(codes, factors[::2], **small).score
    assert np.array_equal(codes, before)
    assert strided == beta_vae(np.ascontiguousarray(codes), factors[::2].copy(), **small).score


@pytest.mark.parametrize("scale", [1e-200, 1e30, 1e120, 1e300])
def test_codes_of_any_magnitude_give_a_number(factors, scale):
    result = beta_vae(factors * scale, factors, batch_size=5, train=500, test=500)
    assert 0 <= result.score <= 1
    if scale > 1:
        assert result.score > 0.9


def test_smallest_of_everything():
    factors = np.array([[0, 0], [1, 1]])
    assert 0 <= beta_vae(factors, factors, batch_size=1, train=1, test=1).score <= 1
    # A classifier that has seen one factor only names that one.
    assert beta_vae(factors, factors, batch_size=1, train=1, test=100).confusion.any(axis=0).sum() == 1


def test_many_values(factors):
    """Identifiers as a factor: more values than 16 bits number."""
    n = 70_000
    identifiers = np.arange(n) * 10**12
    factors = np.stack([identifiers, np.arange(n) % 2], axis=1)
    codes = np.stack([np.arange(n) / n, np.arange(n) % 2], axis=1)
    assert beta_vae(codes, factors, batch_size=4, train=100, test=100).score > 0.9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"train": 0}, ValueError, "train must be at least 1"),
        ({"test": 0}, ValueError, "test must be at least 1"),
        ({"train": 2.5}, TypeError, "train must be a whole number, got float"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"seed": "a"}, TypeError, "seed must be a whole number"),
    ],
)
def test_arguments_out_of_range(factors, arguments, error, message):
    with pytest.raises(error, match=message):
        beta_vae(factors, factors, **arguments)


def test_one_factor_is_refused(factors):
    with pytest.raises(ValueError, match="at least 2 columns"):
        beta_vae(factors, factors[:, :1])


def test_factor_that_never_varies(factors):
    factors[:, 4] = 6
    with pytest.raises(ValueError, match="column 4 never varies"):
        beta_vae(factors, factors)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_codes_that_are_not_finite(factors, value):
    codes = factors.astype(float)
    codes[17, 3] = value
    with pytest.raises(ValueError, match="column 3"):
        beta_vae(codes, factors)


def test_rows_that_do_not_fit(factors):
    with pytest.raises(ValueError, match="2999 and 3000"):
        beta_vae(factors[1:], factors)


def test_result_goes_into_json(factors):
    result = beta_vae(factors, factors, batch_size=2, train=100, test=100)
    read = json.loads(result.to_json())
    assert read["score"] == result.score
    assert read["confusion"] == result.confusion.tolist()


class TestLogisticRegression:
    @pytest.fixture
    def data(self):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((1203, 6)) * [1, 2, 0.1, 1, 1, 5]
        y = (x @ rng.standard_normal((6, 5)) + rng.gumbel(size=(1203, 5)) * 2).argmax(axis=1) * 3 - 4
        return x, y

    @pytest.mark.parametrize("classes", [2, 5])
    @pytest.mark.parametrize("penalty", [0.0, 1.0, 50.0])
    @pytest.mark.parametrize("balanced", [False, True])
    def test_coefficients_are_scikit_learns(self, data, classes, penalty, balanced):
        linear = pytest.importorskip("sklearn.linear_model")
        x, y = data
        x, y = x[y <= 3 * classes - 7], y[y <= 3 * classes - 7]
        ours = _logistic.LogisticRegression(penalty=penalty, balanced=balanced, iterations=1000).fit(x, y)
        theirs = linear.LogisticRegression(
            C=1 / penalty if penalty else np.inf, class_weight="balanced" if balanced else None, max_iter=1000
        ).fit(x, y)
        assert ours.labels.tolist() == theirs.classes_.tolist()
        shares = theirs.predict_proba(x)
        expected = -np.log(shares[np.arange(len(x)), np.searchsorted(theirs.classes_, y)]).mean()
        assert ours.log_loss(x, y) == pytest.approx(expected, abs=2e-5)
        assert (ours.predict(x) == theirs.predict(x)).mean() > 0.995

    @pytest.mark.parametrize(
        ("n", "features", "classes"), [(1, 1, 1), (31, 8, 3), (33, 9, 8), (1000, 3, 41), (5000, 17, 2)]
    )
    def test_compiled_loss_and_gradient_are_numpys(self, n, features, classes):
        if _logistic.extension is None:
            pytest.skip("nothing was compiled")
        rng = np.random.default_rng(n)
        x = rng.standard_normal((n, features))
        y, w = rng.integers(0, classes, n).astype(np.int32), rng.random(n)
        W = rng.standard_normal((classes, features)) * 30
        value, gradient = _logistic.multinomial_loss_numpy(x, y, w, W)
        loss = _logistic.multinomial_loss(x, y, w, classes)
        results = [loss(W, threads) for threads in (1, 2, 3)]
        assert results[0][0] == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(results[0][1], gradient, atol=1e-11 * n)
        for other in results[1:]:
            assert other[0] == results[0][0]
            assert np.array_equal(other[1], results[0][1])

    def test_gradient_is_the_losss(self):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((50, 4))
        y, w, W = rng.integers(0, 3, 50).astype(np.int32), rng.random(50), rng.standard_normal((3, 4))
        loss = _logistic.multinomial_loss(x, y, w, 3)
        _, gradient = loss(W, 1)
        for at in np.ndindex(3, 4):
            step = np.zeros((3, 4))
            step[at] = 1e-6
            up, down = (loss(W + sign * step, 1)[0] for sign in (1, -1))
            assert gradient[at] == pytest.approx((up - down) / 2e-6, abs=1e-6)

    def test_separable_classes_end(self):
        x = np.arange(40.0)[:, None]
        model = _logistic.LogisticRegression().fit(x, (x[:, 0] > 20).astype(int))
        assert np.isfinite(model.coefficients).all()
        assert (model.predict(x) == (x[:, 0] > 20)).all()
