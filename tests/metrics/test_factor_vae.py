"""The FactorVAE score: published vectors, votes by hand and against NumPy, pruning, wrong input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastdis.metrics import _host_votes, factor_vae
from fastdis.metrics._host_votes import groups_of, least_varying_codes_numpy

SMALL = {"batch_size": 5, "train_votes": 3000, "test_votes": 2000, "variance_samples": 2500}


@pytest.fixture
def factors():
    """Ten independent factors of ten values, as in the reference implementation's own tests."""
    return np.random.RandomState(0).randint(1, 11, size=(3000, 10))


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_published_vectors(factors):
    assert 0.9 <= factor_vae(factors, factors, **SMALL).score <= 1
    assert 0 <= factor_vae(np.zeros((3000, 10)), factors, **SMALL).score <= 0.2


def test_perfect_codes_vote_on_the_diagonal(factors):
    result = factor_vae(factors, factors, **SMALL)
    assert result.votes.shape == (10, 10)
    assert result.votes.sum() == 3000
    # Five rows agree in some other factor by chance now and then.
    assert np.trace(result.votes) / 3000 == result.train_accuracy > 0.99
    assert result.active.tolist() == list(range(10))
    np.testing.assert_allclose(result.variances, factors.var(axis=0), rtol=0.1)


def test_permuted_and_rescaled_codes_score_the_same(factors):
    order = np.random.default_rng(0).permutation(10)
    result = factor_vae(factors[:, order] * np.arange(1.0, 11) - 40, factors, **SMALL)
    assert result.score == factor_vae(factors, factors, **SMALL).score
    assert (result.votes.argmax(axis=1) == order).all()


def test_score_follows_the_quality_of_the_encoder(golden):
    inputs, _ = golden
    perfect, entangled, collapsed = (
        factor_vae(inputs[f"train_{name}"], inputs["ys_train"], train_votes=3000, test_votes=1500)
        for name in ("identity5", "linear_mix10", "collapsed10")
    )
    assert perfect.score == entangled.score == 1
    assert collapsed.active.tolist() == [0, 1]
    # Two codes name their factors; the votes of the other three fall to either.
    assert collapsed.score == pytest.approx(2 / 5, abs=0.03)
    assert (collapsed.votes[2:] == 0).all()


def test_two_codes_for_each_factor_score_1(factors):
    result = factor_vae(np.hstack([factors, -factors]), factors, **SMALL)
    assert result.score > 0.99
    # Of equals the first.
    assert (result.votes[10:] == 0).all()


def test_variance_is_relative_to_the_codes_own(factors):
    """A code of small scale must not win every vote."""
    codes = factors[:, :2] * np.array([1.0, 1e-6])
    assert factor_vae(codes, factors[:, :2], prune=0, **SMALL).score > 0.99
    # Pruned, it leaves one code for both factors.
    pruned = factor_vae(codes, factors[:, :2], **SMALL)
    assert pruned.active.tolist() == [0]
    assert pruned.score == pytest.approx(0.5, abs=0.05)


def test_pruning_is_by_standard_deviation():
    factors = np.stack([np.arange(400) % 2, np.arange(400) // 200], axis=1)
    codes = factors * [0.0999 / 1.0025, 0.1003 / 1.00]  # standard deviations just below and above 0.05
    result = factor_vae(codes, factors, variance_samples=None, train_votes=50, test_votes=50)
    assert result.active.tolist() == [1]
    np.testing.assert_allclose(result.variances, codes.var(axis=0, ddof=1))


@pytest.mark.parametrize("prune", [0, 0.05])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e17])
def test_constant_codes_never_vote(factors, prune, value):
    codes = np.hstack([np.full((3000, 1), value), factors[:, :3]])
    result = factor_vae(codes, factors[:, :3], prune=prune, **SMALL)
    assert result.active.tolist() == [1, 2, 3]
    assert result.variances[0] == 0
    assert result.score > 0.99


def test_no_active_code_scores_0(factors):
    result = factor_vae(factors * 1e-3, factors, **SMALL)
    assert (result.score, result.train_accuracy, len(result.active)) == (0, 0, 0)
    assert result.votes.shape == (10, 10)
    assert (result.variances > 0).all()
    assert json.loads(result.to_json())["active"] == []


@pytest.mark.skipif(_host_votes.extension is None, reason="nothing was compiled")
@pytest.mark.parametrize(("d", "samples"), [(1, 2), (3, 7), (10, 64), (33, 5)])
def test_compiled_and_numpy_agree(d, samples):
    rng = np.random.default_rng(d)
    factors = np.stack([rng.integers(0, size, 701) for size in (2, 7, 40)], axis=1) * 5
    codes = rng.standard_normal((701, d))
    active = np.arange(0, d, 2)
    arguments = (codes.var(axis=0), active, 2**40 + 3, 400, samples)
    groups = groups_of(factors)
    ours = _host_votes.extension.least_varying_codes(codes, *vars(groups).values(), *arguments, 3)
    twin = least_varying_codes_numpy(codes, groups, *arguments)
    assert np.array_equal(ours[1], twin[1])
    assert np.array_equal(ours[0], twin[0])
    assert set(ours[0]) <= set(active)


def test_rows_of_a_vote_share_one_value(factors):
    """Each factor's own code has variance 0 in its votes, and is found although all others are nearly constant too."""
    codes = factors + np.random.default_rng(0).standard_normal(factors.shape) * 1e-9
    code, factor = _host_votes.least_varying_codes(
        codes, groups_of(factors), codes.var(axis=0), np.arange(10), 0, 3000, 16
    )
    assert (code == factor).all()
    assert np.bincount(factor, minlength=10).min() > 230


def test_all_rows_for_the_variance(golden):
    inputs, _ = golden
    codes, factors = inputs["train_linear_mix10"].astype(float), inputs["ys_train"]
    result = factor_vae(codes, factors, variance_samples=None, train_votes=100, test_votes=100)
    np.testing.assert_allclose(result.variances, codes.var(axis=0, ddof=1))
    drawn = factor_vae(codes, factors, train_votes=100, test_votes=100)
    np.testing.assert_allclose(drawn.variances, result.variances, rtol=0.05)
    assert (drawn.variances != result.variances).all()


def test_seeds_and_threads(golden, restore_threads):
    inputs, _ = golden
    codes, factors = inputs["train_collapsed10"], inputs["ys_train"]
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(factor_vae(codes, factors, seed=3, train_votes=700, test_votes=300).to_dict())
    assert results[0] == results[1] == results[2]
    assert results[0] != factor_vae(codes, factors, seed=4, train_votes=700, test_votes=300).to_dict()


def test_without_the_extension(golden, monkeypatch):
    inputs, _ = golden
    arguments = (inputs["train_collapsed10"], inputs["ys_train"])
    small = {"batch_size": 8, "train_votes": 500, "test_votes": 300}
    compiled = factor_vae(*arguments, **small)
    monkeypatch.setattr(_host_votes, "extension", None)
    assert factor_vae(*arguments, **small).to_dict() == compiled.to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_of_every_precision(factors, dtype):
    small = {"batch_size": 3, "train_votes": 200, "test_votes": 200}
    codes = torch.from_numpy(factors).to(dtype)
    assert factor_vae(codes, torch.from_numpy(factors), **small).score == factor_vae(factors, factors, **small).score


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_codes_of_any_magnitude(factors, scale):
    result = factor_vae(factors * scale, factors, prune=0, **SMALL)
    assert result.score == factor_vae(factors, factors, prune=0, **SMALL).score
    pruned = factor_vae(factors * scale, factors, **SMALL)
    assert len(pruned.active) == (10 if scale > 1 else 0)


def test_input_is_left_alone(factors):
    codes = np.asfortranarray(factors[::2].astype(np.float32))
    before = codes.copy()
    factor_vae(codes, factors[::2], **SMALL)
    assert np.array_equal(codes, before)


def test_values_with_one_row_each():
    """Every vote about the identifier finds all codes constant; the first of them is taken."""
    factors = np.stack([np.arange(50), np.arange(50) % 2], axis=1)
    result = factor_vae(factors, factors, train_votes=200, test_votes=200)
    assert 0 <= result.score <= 1
    assert result.votes[0, 0] == result.votes[:, 0].sum() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2"),
        ({"train_votes": 0}, ValueError, "train_votes must be at least 1"),
        ({"test_votes": 0}, ValueError, "test_votes must be at least 1"),
        ({"test_votes": 1.0}, TypeError, "test_votes must be a whole number, got float"),
        ({"variance_samples": 1}, ValueError, "variance_samples must be at least 2"),
        ({"prune": -0.1}, ValueError, "prune must be"),
        ({"prune": float("nan")}, ValueError, "prune must be"),
        ({"seed": 2**63}, ValueError, "seed must be from 0"),
    ],
)
def test_arguments_out_of_range(factors, arguments, error, message):
    with pytest.raises(error, match=message):
        factor_vae(factors, factors, **arguments)


def test_one_factor_is_refused(factors):
    with pytest.raises(ValueError, match="at least 2 columns"):
        factor_vae(factors, factors[:, :1])


def test_factor_that_never_varies(factors):
    factors[:, 4] = 6
    with pytest.raises(ValueError, match="column 4 never varies"):
        factor_vae(factors, factors)


def test_codes_that_are_not_finite(factors):
    codes = factors.astype(float)
    codes[17, 3] = np.nan
    with pytest.raises(ValueError, match="column 3"):
        factor_vae(codes, factors)
