"""The two ways in above the single metrics: which rows a metric gets, what is recorded, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import numpy as np
import pytest
import torch

import fastdis.metrics
from fastdis import metrics
from fastdis.data import FactorDataset
from fastdis.metrics import evaluate, evaluate_model, mig, modularity, sap
from fastdis.metrics.result import Result

# The function has taken the module's name in the package.
MODULE = sys.modules["fastdis.metrics.evaluate"]
QUICK = ["mig", "modularity", "irs", "sap", "factor_vae"]


@pytest.fixture
def sample():
    """600 rows: three factors, and four codes that mix them with noise."""
    generator = np.random.default_rng(0)
    factors = generator.integers([2, 3, 5], size=(600, 3))
    codes = factors @ generator.normal(size=(3, 4)) + generator.normal(size=(600, 4)) * 0.3
    return codes, factors


@pytest.fixture
def grid():
    """A grid of 2 x 1 x 3 x 5 images of 4 x 4 whose first pixels tell the factors."""
    images = np.zeros((30, 4, 4), np.uint8)
    dataset = FactorDataset(images, (2, 1, 3, 5), ("shape", "colour", "scale", "x"))
    images[:, 0] = dataset.factors(range(30)) * 40
    return dataset


def pixels(images):
    return images[:, 0, 0, [0, 2, 3]]


@pytest.fixture
def spies(monkeypatch):
    """Three metrics that only note what they were given, by the kind of rows they take."""
    given = {}

    def spy_whole(codes, factors, *, seed=0):
        given["whole"] = codes, factors
        given["seed"] = seed
        return Result(0.0)

    def spy_sample(codes, factors):
        given["sample"] = codes, factors
        return Result(0.0)

    def spy_codes(codes):
        given["codes"] = codes
        return Result(0.0)

    def spy_split(codes, factors, test_codes, test_factors):
        given["split"] = codes, factors, test_codes, test_factors
        return Result(0.0)

    monkeypatch.setattr(MODULE, "WHOLE", (spy_whole,))
    monkeypatch.setattr(MODULE, "SAMPLE", (spy_sample, spy_codes))
    monkeypatch.setattr(MODULE, "SPLIT", (spy_split,))
    monkeypatch.setattr(MODULE, "METRICS", {f.__name__: f for f in (spy_whole, spy_sample, spy_codes, spy_split)})
    return given


def numbered(n):
    """Codes whose first column is the row's number, and factors that tell the same."""
    return np.stack([np.arange(n), np.zeros(n)], axis=1), np.arange(n).reshape(n, 1)


def test_every_metric_has_a_name_of_the_package():
    for name, function in MODULE.METRICS.items():
        assert getattr(fastdis.metrics, name) is function
        assert name in fastdis.metrics.__all__


def test_golden_codes(golden):
    inputs, expected = golden
    arguments = [inputs[name] for name in ("train_linear_mix10", "ys_train", "test_linear_mix10", "ys_test")]
    names = ["mig", "modularity", "irs", "sap", "explicitness", "gaussian_total_correlation", "infomec"]
    found = evaluate(*arguments[:2], metrics=names, test_codes=arguments[2], test_factors=arguments[3])
    values = expected["linear_mix10"]
    assert found.mig.score == pytest.approx(values["mig"], abs=1e-6)
    assert found.modularity.score == pytest.approx(values["modularity"], abs=1e-6)
    assert found.irs.score == pytest.approx(values["irs"], abs=1e-6)
    assert found.sap.score == pytest.approx(values["sap_discrete"], abs=1e-6)
    assert found.explicitness.score == pytest.approx(values["explicitness_test"], abs=1e-3)
    assert found.gaussian_total_correlation.score == pytest.approx(values["gauss_tc"], abs=1e-6)
    assert found.infomec.infom == pytest.approx(values["infomec"]["infom"], abs=1e-3)


def test_everything_at_once(sample):
    found = evaluate(*sample)
    # A sample is no complete grid; nothing else is missing.
    assert list(found.skipped) == ["flatness"]
    assert "complete grid" in found.skipped["flatness"]
    assert set(found.scores) == set(MODULE.METRICS) - {"flatness"}
    assert all(np.isfinite(score) for score in found.scores.values())
    assert found.settings["options"]["dci"]["estimator"] == "gbt_histogram"
    exact = evaluate(*sample, metrics=["dci"], options={"dci": {"estimator": "gbt", "seed": 1}})
    assert exact.settings["options"]["dci"]["estimator"] == "gbt"
    assert exact.settings["options"]["dci"]["seed"] == 1


def test_sizes_of_the_study(spies):
    codes, factors = numbered(20_000)
    found = evaluate(codes, factors)
    assert [len(part) for part in spies["split"]] == [10_000, 10_000, 5_000, 5_000]
    assert len(spies["sample"][0]) == len(spies["codes"]) == 10_000
    assert len(spies["whole"][0]) == 20_000
    assert {name: found.settings[name] for name in ("n", "d", "K", "samples", "train", "test")} == {
        "n": 20_000,
        "d": 2,
        "K": 1,
        "samples": 10_000,
        "train": 10_000,
        "test": 5_000,
    }


@pytest.mark.parametrize(
    ("n", "train", "test"), [(15_000, 10_000, 5_000), (14_999, 9_999, 5_000), (30, 20, 10), (2, 1, 1)]
)
def test_fewer_rows_are_shared_out_in_proportion(spies, n, train, test):
    evaluate(*numbered(n))
    assert [len(part) for part in spies["split"]] == [train, train, test, test]


def test_rows_stay_together_and_come_once(spies):
    evaluate(*numbered(1000), samples=300, train=500, test=200)
    assert len(spies["split"][0]) == 500
    assert len(spies["split"][2]) == 200
    for codes, factors in (spies["sample"], spies["split"][:2], spies["split"][2:]):
        assert np.array_equal(codes[:, 0], factors[:, 0])
        assert len(np.unique(factors)) == len(factors)
        # Drawn from everywhere, in no order.
        assert factors.max() > 900
        assert (np.diff(factors[:, 0]) < 0).any()
    assert not np.intersect1d(spies["split"][1], spies["split"][3]).size


def test_rows_as_the_study_draws_them(spies):
    codes, factors = numbered(100)
    evaluate(codes, factors, replace=True)
    assert [len(part) for part in spies["split"]] == [10_000, 10_000, 5_000, 5_000]
    assert np.intersect1d(spies["split"][1], spies["split"][3]).size == 100
    assert len(spies["sample"][0]) == 10_000
    evaluate(codes, factors, replace=True, test_codes=codes[:50], test_factors=factors[:50])
    assert len(spies["split"][0]) == 10_000
    assert len(spies["split"][2]) == 5_000
    assert spies["split"][3].max() == 49


def test_all_rows_in_order_where_they_suffice(spies):
    codes, factors = numbered(100)
    evaluate(codes, factors)
    assert np.array_equal(spies["sample"][1], factors)
    codes, factors = numbered(12_000)
    evaluate(codes, factors, samples=None, test_codes=codes[:7], test_factors=factors[:7])
    assert np.array_equal(spies["sample"][1], factors)
    assert len(spies["split"][0]) == 10_000
    assert np.array_equal(spies["split"][3], factors[:7])


def test_rows_of_a_metric_do_not_depend_on_the_others_or_their_sizes(spies):
    evaluate(*numbered(1000), samples=300, train=200, test=100)
    first = dict(spies)
    evaluate(*numbered(1000), metrics=["spy_split"], train=200, test=100)
    assert np.array_equal(spies["split"][1], first["split"][1])
    evaluate(*numbered(1000), metrics=["spy_sample"], samples=300, train=100, test=300)
    assert np.array_equal(spies["sample"][1], first["sample"][1])
    evaluate(*numbered(1000), samples=300, train=200, test=100, seed=1)
    assert not np.array_equal(spies["sample"][1], first["sample"][1])
    assert not np.array_equal(spies["split"][1], first["split"][1])


def test_seed_reaches_the_metrics(spies):
    found = evaluate(*numbered(10), seed=7)
    assert spies["seed"] == 7
    assert found.settings["seed"] == 7
    assert found.settings["options"]["spy_whole"] == {"seed": 7}
    evaluate(*numbered(10), seed=7, options={"spy_whole": {"seed": 3}})
    assert spies["seed"] == 3


def test_same_seed_same_results(sample):
    first, second, other = (evaluate(*sample, metrics=QUICK, samples=300, seed=seed) for seed in (4, 4, 5))
    assert first.to_json() == second.to_json()
    assert first.scores != other.scores


def test_same_as_the_metrics_themselves(sample):
    codes, factors = sample
    found = evaluate(
        codes,
        factors,
        metrics=["sap", "mig"],
        test_codes=codes[:50],
        test_factors=factors[:50],
        options={"mig": {"bins": 7}},
    )
    assert list(found.results) == ["sap", "mig"]
    assert found.sap.to_dict() == sap(codes, factors, codes[:50], factors[:50]).to_dict()
    assert found.mig.to_dict() == mig(codes, factors, bins=7).to_dict()
    assert found.settings["options"] == {"sap": {"continuous": False}, "mig": {"bins": 7}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors(sample, dtype):
    codes, factors = (torch.from_numpy(array) for array in sample)
    codes = codes.to(dtype).requires_grad_()
    found = evaluate(codes[::2], factors[::2], metrics=["mig", "modularity"])
    assert found.mig.score == mig(codes[::2], factors[::2]).score
    assert found.modularity.score == modularity(codes[::2], factors[::2]).score


def test_named_metrics_raise_and_others_are_skipped(sample):
    codes, factors = sample
    with pytest.raises(ValueError, match="complete grid"):
        evaluate(codes, factors, metrics=["mig", "flatness"])
    with pytest.raises(ValueError, match=r"bins must be at least 1.*, got 0"):
        evaluate(codes, factors, options={"mig": {"bins": 0}})
    found = evaluate(codes, factors, seed=1)
    assert "flatness" in found.skipped
    assert "flatness" not in found.settings["options"]
    assert "mig" in found.results


def test_missing_library(sample, monkeypatch):
    def needs_more(codes, factors):
        raise ImportError("needs_more needs nothing.at.all: pip install 'fastdis[metrics]'")

    monkeypatch.setattr(MODULE, "METRICS", {"needs_more": needs_more, "mig": mig})
    found = evaluate(*sample)
    assert list(found.results) == ["mig"]
    assert "fastdis[metrics]" in found.skipped["needs_more"]
    with pytest.raises(ImportError, match=r"fastdis\[metrics\]"):
        evaluate(*sample, metrics=["needs_more"])
    monkeypatch.setattr(MODULE, "METRICS", {"needs_more": needs_more})
    with pytest.raises(ValueError, match="no metric can be computed: needs_more: needs_more needs"):
        evaluate(*sample)


def test_codes_that_tell_nothing_and_one_factor(sample):
    one = evaluate(np.zeros((600, 2)), sample[1][:, 1:2])
    assert all(np.isfinite(score) for score in one.scores.values())
    assert one.mig.score == 0


def nan(codes):
    codes = codes.copy()
    codes[3, 1] = np.nan
    return codes


@pytest.mark.parametrize(
    ("change", "keywords", "error", "message"),
    [
        (None, {"metrics": ["mig", "migg"]}, ValueError, "metrics names 'migg', and the metrics are .*factor_vae.*mig"),
        (None, {"metrics": "mig"}, TypeError, r"write \['mig'\]"),
        (None, {"metrics": []}, ValueError, "metrics must name at least one of"),
        (None, {"metrics": ["mig"], "options": {"migg": {}}}, ValueError, "options names 'migg'"),
        (None, {"metrics": ["mig"], "options": {"sap": {}}}, ValueError, "'sap', which metrics does not name"),
        (None, {"options": {"mig": {"bin": 3}}}, TypeError, "mig has no option 'bin', it has bins"),
        (None, {"options": {"sap": {"codes": 3}}}, TypeError, "sap has no option 'codes', it has continuous"),
        (None, {"seed": -1}, ValueError, "seed"),
        (None, {"seed": 0.5}, TypeError, "seed"),
        (None, {"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        (None, {"train": 0}, ValueError, "train must be at least 1, got 0"),
        (None, {"test": -5}, ValueError, "test must be at least 1, got -5"),
        (None, {"test_codes": np.zeros((2, 4))}, ValueError, "test_codes must come with test_factors"),
        (None, {"test_factors": np.zeros((2, 3), int)}, ValueError, "test_factors must come with test_codes"),
        (None, {"test_codes": np.zeros((2, 4)), "test_factors": np.zeros((3, 3), int)}, ValueError, "2 and 3"),
        (None, {"test_codes": np.zeros((2, 3)), "test_factors": np.zeros((2, 3), int)}, ValueError, "got 4 and 3"),
        (None, {"test_codes": np.zeros((2, 4)), "test_factors": np.zeros((2, 1), int)}, ValueError, "got 3 and 1"),
        (lambda c, f: (nan(c), f), {}, ValueError, "column 1"),
        (lambda c, f: (c, f * [1, 0, 1]), {}, ValueError, "column 1 never varies"),
        (lambda c, f: (c, f * 1.0), {}, TypeError, "integers"),
        (lambda c, f: (c[1:], f), {}, ValueError, "599 and 600"),
        (lambda c, f: (c[:0], f[:0]), {}, ValueError, "at least one row"),
        (lambda c, f: (c[:1], f[:1]), {}, ValueError, "never varies"),
    ],
)
def test_mistakes(sample, change, keywords, error, message):
    codes, factors = change(*sample) if change else sample
    with pytest.raises(error, match=message):
        evaluate(codes, factors, **keywords)


def test_result_as_attributes_text_and_json(sample):
    found = evaluate(*sample, metrics=["mig", "infomec"])
    assert found.scores == {"mig": found.mig.score, "infomec": found.infomec.score}
    with pytest.raises(AttributeError, match="no metric 'sap' was evaluated; there are mig, infomec"):
        found.sap  # noqa: B018
    with pytest.raises(AttributeError):
        found.settings = {}
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert twin.mig.score == found.mig.score
    read = json.loads(found.to_json())
    assert read == found.to_dict()
    assert read["scores"] == found.scores
    assert read["results"]["mig"]["mutual_information"] == found.mig.mutual_information.tolist()
    assert read["settings"]["options"]["mig"] == {"bins": 20}
    first, second = str(found).splitlines()
    assert first.split() == ["mig", f"{found.mig.score:.4f}"]
    assert f"infom {found.infomec.infom:.4f}" in second
    assert repr(found) == f"Evaluation(mig={found.mig.score:.4f}, infomec={found.infomec.score:.4f})"


def test_numbers_that_json_has_no_word_for(sample, monkeypatch):
    def odd(codes, factors, *, limit=float("inf")):
        return Result(float("nan"))

    monkeypatch.setattr(MODULE, "METRICS", {"odd": odd, "mig": mig})
    found = evaluate(*sample)
    assert json.loads(found.to_json())["scores"]["odd"] is None
    assert json.loads(found.to_json())["settings"]["options"]["odd"]["limit"] is None
    assert "nan" in str(found)


def test_model_is_a_gather_on_its_codes(grid):
    seen = []
    found = evaluate_model(lambda images: seen.append(len(images)) or pixels(images), grid, batch_size=8, seed=3)
    assert sum(seen) == 30
    codes, factors = metrics.encode(pixels, grid), grid.factors(range(30))[:, [0, 2, 3]]
    direct = evaluate(codes, factors, seed=3)
    assert found.scores == direct.scores
    assert found.results["flatness"].score == direct.flatness.score
    assert found.settings["factors"] == ["shape", "scale", "x"]
    assert found.settings["left_out"] == ["colour"]
    assert found.settings["n"] == 30
    assert found.mig.score == pytest.approx(1)


def test_model_progress(grid, capsys):
    evaluate_model(pixels, grid, metrics=["mig"])
    assert capsys.readouterr() == ("", "")
    evaluate_model(pixels, grid, metrics=["mig", "mcc"], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "30/30" in err
    assert "2/2" in err


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"metrics": ["migg"]}, ValueError, "migg"),
        ({"options": {"mig": {"bin": 3}}}, TypeError, "no option 'bin'"),
        ({"seed": -1}, ValueError, "seed"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"samples": 0}, ValueError, "samples"),
    ],
)
def test_model_mistakes_come_before_the_work(grid, keywords, error, message):
    def never(images):
        raise AssertionError("encoded in vain")

    with pytest.raises(error, match=message):
        evaluate_model(never, grid, **keywords)


def test_names_may_come_from_a_generator(grid):
    assert list(evaluate_model(pixels, grid, metrics=(name for name in ("mig", "mcc"))).results) == ["mig", "mcc"]


def test_dataset_in_which_nothing_varies():
    still = FactorDataset(np.zeros((1, 4, 4), np.uint8), (1, 1))
    with pytest.raises(ValueError, match="no factor varies"):
        evaluate_model(pixels, still)
