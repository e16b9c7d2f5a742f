"""Every metric against the field's reference implementation, on the same codes, paired in one run.

The codes are ten noisy mixtures of dSprites' factors, 10,000 to learn from and 5,000 to test on: those that the tests
compare with stored values. For the scores that sample from a whole dataset, codes of the same kind are made for all
737,280 combinations of factors, and the reference is given codes where it would encode images. Scores are compared
before anything is timed. Then ours and the reference take turns; the ratio is the median over these rounds.

    pytest benchmarks/metrics [--full] [--benchmark-json=FILE]
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from column_bench import Contender
from reference_library import LookedUpData, ReferenceLibrary

from fastdis import metrics
from fastdis.data import load, make_dsprites
from fastdis.models import VAE

GOLDEN = Path(__file__).parents[2] / "tests" / "metrics" / "golden" / "metrics_inputs.npz"
SIZES = (3, 6, 40, 32, 32)
SAMPLED = 10_000  # rows drawn from all combinations
BUDGET_SECONDS = 15.0  # for the rounds of one case
ROUNDS = (3, 15)  # fewest and most
LONG_SECONDS = 60.0  # a reference that takes this long runs once, for its score and its time
LONG_REFERENCES: dict[tuple[str, tuple[int, int]], tuple[float, float]] = {}  # their scores and times
MOST_SECONDS = 180.0  # for all metrics of a model on full dSprites, encoding included


@dataclass(frozen=True)
class Inputs:
    """Codes and factors, as ours and as the reference take them."""

    codes: np.ndarray
    factors: np.ndarray
    test_codes: np.ndarray
    test_factors: np.ndarray
    grid_codes: np.ndarray
    grid_factors: np.ndarray
    drawn_codes: np.ndarray
    drawn_factors: np.ndarray

    @property
    def split(self) -> tuple[np.ndarray, ...]:
        return self.codes, self.factors, self.test_codes, self.test_factors

    @property
    def split_columns(self) -> tuple[np.ndarray, ...]:
        """One column a row or image, as the reference wants it."""
        return tuple(array.T for array in self.split)


@dataclass(frozen=True)
class Case:
    """A metric: how ours and the reference compute it, both returning the score, and what is to be reached.

    ``tolerance`` is how far the scores may lie apart: what the reference's random draws and its optimisers' stopping
    rules leave open, and rounding where there are none.
    """

    name: str
    on: str
    ours: Callable[[Inputs], float]
    reference: Callable[[ReferenceLibrary, Inputs], float]
    tolerance: float
    target: float | None = None
    rows: tuple[int, int] = (10_000, 5_000)
    full: bool = False
    quick: bool = False


@cache
def inputs(train: int, test: int) -> Inputs:
    with np.load(GOLDEN) as file:
        arrays = [file[name] for name in ("train_linear_mix10", "ys_train", "test_linear_mix10", "ys_test")]
    rows = [array[:n] for array, n in zip(arrays, (train, train, test, test), strict=True)]
    codes, factors = grid()
    drawn = np.random.default_rng(1).permutation(len(codes))[:SAMPLED]
    return Inputs(*rows, codes, factors, codes[drawn], factors[drawn])


@cache
def grid() -> tuple[np.ndarray, np.ndarray]:
    """Codes and factors of every combination of factors; noisy enough that no score is perfect."""
    generator = np.random.default_rng(0)
    factors = np.stack(np.unravel_index(np.arange(np.prod(SIZES)), SIZES), axis=1)
    scaled = (factors - factors.mean(axis=0)) / factors.std(axis=0)
    mixing = np.concatenate([np.eye(5), np.zeros((5, 5))], axis=1) + 0.3 * generator.normal(size=(5, 10))
    codes = scaled @ mixing + 1.5 * generator.normal(size=(len(factors), 10))
    return codes.astype(np.float32), factors


@cache
def reference_library() -> ReferenceLibrary:
    return ReferenceLibrary()


def modularity(library: ReferenceLibrary, given: Inputs) -> float:
    information = library.utils.discrete_mutual_info(library.utils.make_discretizer(given.codes.T), given.factors.T)
    return library.modularity_explicitness.modularity(information)


def irs(library: ReferenceLibrary, given: Inputs) -> float:
    binned = library.utils.make_discretizer(given.factors.T).T
    return library.irs.scalable_disentanglement_score(binned, given.codes)["avg_score"]


def explicitness(library: ReferenceLibrary, given: Inputs) -> float:
    train, mean, deviation = library.utils.normalize_data(given.codes.T)
    test, _, _ = library.utils.normalize_data(given.test_codes.T, mean, deviation)
    one = library.modularity_explicitness.explicitness_per_factor
    scores = [one(train, v, test, w) for v, w in zip(given.factors.T, given.test_factors.T, strict=True)]
    return float(np.mean([score for _, score in scores]))


def infomec(library: ReferenceLibrary, given: Inputs) -> float:
    """The published recipe, which is no part of the library: its scikit-learn calls, with its constants."""
    from sklearn.feature_selection import mutual_info_classif
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import StandardScaler

    def loss(codes: np.ndarray, factor: np.ndarray) -> float:
        model = LogisticRegression(C=np.inf, class_weight="balanced", max_iter=100).fit(codes, factor)
        return log_loss(factor, model.predict_proba(codes))

    spread = np.ptp(given.codes, axis=0)
    codes, factors = given.codes[:, spread > spread.max() / 20], given.factors.T
    shares = np.stack(
        [
            mutual_info_classif(codes, v, discrete_features=False, n_neighbors=10, random_state=0) / entropy(v)
            for v in factors
        ],
        axis=1,
    )
    d, K = shares.shape
    infom = ((shares.max(axis=1) / shares.sum(axis=1)).mean() - 1 / K) / (1 - 1 / K)
    infoc = ((shares.max(axis=0) / shares.sum(axis=0)).mean() - 1 / d) / (1 - 1 / d)
    scaled = StandardScaler().fit_transform(codes)
    baseline = [loss(np.zeros_like(scaled), v) for v in factors]
    infoe = np.mean([(b - loss(scaled, v)) / b for b, v in zip(baseline, factors, strict=True)])
    return float(np.mean([infom, infoc, infoe]))


def entropy(values: np.ndarray) -> float:
    share = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(share * np.log(share)).sum())


def infomec_of_ours(given: Inputs) -> float:
    found = metrics.infomec(given.codes, given.factors)
    return float(np.mean([found.infom, found.infoc, found.infoe]))


def sap(continuous: bool) -> dict[str, Callable[..., float]]:
    def reference(library: ReferenceLibrary, given: Inputs) -> float:
        return library.sap_score._compute_sap(*given.split_columns, continuous)["SAP_score"]

    return {"ours": lambda given: metrics.sap(*given.split, continuous=continuous).score, "reference": reference}


def dci(estimator: str) -> dict[str, Callable[..., float]]:
    def reference(library: ReferenceLibrary, given: Inputs) -> float:
        return library.dci._compute_dci(*given.split_columns)["disentanglement"]

    def ours(given: Inputs) -> float:
        return metrics.dci(*given.split, estimator=estimator).disentanglement

    return {"ours": ours, "reference": reference}


def on_rows(metric: Callable[..., Any], whole: bool, given: Inputs) -> float:
    """A score from the codes of all combinations of factors, or of some."""
    rows = (given.grid_codes, given.grid_factors) if whole else (given.drawn_codes, given.drawn_factors)
    return metric(*rows).score


def on_grid(module: str, function: str, **sizes: int) -> Callable[[ReferenceLibrary, Inputs], float]:
    """A score that samples as it goes."""

    def reference(library: ReferenceLibrary, given: Inputs) -> float:
        compute = getattr(getattr(library, module), function)
        given_codes = LookedUpData(given.grid_codes, SIZES), LookedUpData.representation
        return compute(*given_codes, np.random.RandomState(0), None, batch_size=64, **sizes)["eval_accuracy"]

    return reference


SAMPLE, SPLIT, GRID = "10,000", "10,000 + 5,000", "grid of 737,280"
CASES = [
    Case(
        "mig", SAMPLE, lambda given: metrics.mig(given.codes, given.factors).score,
        lambda library, given: library.mig._compute_mig(given.codes.T, given.factors.T)["discrete_mig"],
        1e-6, 50, quick=True,
    ),
    Case(
        "modularity", SAMPLE, lambda given: metrics.modularity(given.codes, given.factors).score, modularity, 1e-6, 50,
    ),
    Case("sap", SPLIT, **sap(continuous=False), tolerance=1e-6, target=50),
    Case("sap continuous", SPLIT, **sap(continuous=True), tolerance=1e-6),
    Case("irs", SAMPLE, lambda given: metrics.irs(given.codes, given.factors).score, irs, 1e-6, 10),
    Case("infomec", SAMPLE, infomec_of_ours, infomec, 1e-3, 20),
    Case("explicitness", SPLIT, lambda given: metrics.explicitness(*given.split).score, explicitness, 1e-3),
    *(
        Case(
            name, on, partial(on_rows, getattr(metrics, name), whole), on_grid(name, function, **sizes), tolerance,
            None if whole else 50,
        )
        for name, function, sizes in (
            ("beta_vae", "compute_beta_vae_sklearn", {"num_train": 10_000, "num_eval": 5_000}),
            ("factor_vae", "compute_factor_vae",
             {"num_train": 10_000, "num_eval": 5_000, "num_variance_estimate": 10_000}),
        )
        # The reference draws from the grid in both cases, so a sample only comes near its score.
        for on, whole, tolerance in ((GRID, True, 0.03), (SAMPLE, False, 0.06))
    ),
    *(
        Case(
            f"dci {estimator}", f"{n:,} + {n // 2:,}", **dci(estimator), tolerance=0.02, target=target,
            rows=(n, n // 2), full=n == 10_000,
        )
        for n in (1_000, 10_000)
        for estimator, target in (("gbt", 2), ("gbt_histogram", 30))
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.on}")
def test_against_the_reference(benchmark, case: Case, request):
    if case.full and not request.config.getoption("--full", False):
        pytest.skip("takes many minutes; ask for it by --full")
    library, given = reference_library(), inputs(*case.rows)
    score = case.ours(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of interfaces of scikit-learn that the reference still uses
        key = case.name.split()[0], case.rows
        if key in LONG_REFERENCES:
            reference_score, took = LONG_REFERENCES[key]
        else:
            started = time.perf_counter()
            reference_score = case.reference(library, given)
            took = time.perf_counter() - started
        assert abs(score - reference_score) <= case.tolerance, f"{score} is not {reference_score}; nothing is timed"

        ours = Contender(lambda: case.ours(given))
        reference = Contender(lambda: case.reference(library, given), slow=True)  # it has just been run
        ours.warm_up()
        long = took > LONG_SECONDS
        if long:
            LONG_REFERENCES[key] = reference_score, took
            reference.seconds.append(took)
        rounds = 1 if long else min(ROUNDS[1], max(ROUNDS[0], int(BUDGET_SECONDS / took)))
        benchmark.group = "metrics"
        benchmark.pedantic(ours.time, setup=None if long else reference.time, rounds=rounds, iterations=1)
    record(
        benchmark, case.name, case.on, score, median(ours.seconds), reference_seconds=median(reference.seconds),
        ratio=median(r / o for r, o in zip(reference.seconds, ours.seconds, strict=True)),
        reference_score=reference_score, target=case.target, rounds=rounds,
    )  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """All metrics of a model on all images."""

    name: str = "every metric of a model"
    quick: bool = False


@pytest.mark.parametrize("case", [Whole()], ids=lambda case: case.name)
def test_model_on_full_dsprites(benchmark, case: Whole, request, tmp_path):
    if not request.config.getoption("--full", False):
        pytest.skip("draws all of dSprites and encodes it; ask for it by --full")
    dataset = load(make_dsprites(tmp_path / "dsprites.npz"))
    torch.manual_seed(0)
    model = VAE(latent_dim=10)
    found = []
    benchmark.group = "metrics"
    benchmark.pedantic(lambda: found.append(metrics.evaluate_model(model, dataset)), rounds=1, iterations=1)
    assert not found[0].skipped
    record(
        benchmark, case.name, "dSprites of 737,280", None, benchmark.stats.stats.median, most_seconds=MOST_SECONDS,
        scores=found[0].scores, settings=found[0].settings,
    )  # fmt: skip


def record(benchmark: Any, case: str, on: str, score: float | None, seconds: float, **columns: Any) -> None:
    """Leave a row of the table behind."""
    benchmark.extra_info.update(case=case, on=on, score=score, ours_seconds=seconds, **columns)
