"""Every metric at once, of codes or of an encoder and its dataset."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdis.data import FactorDataset
from fastdis.data.progress import progress_bar
from fastdis.metrics._inputs import as_codes, as_factors, as_seed
from fastdis.metrics.beta_vae import beta_vae
from fastdis.metrics.dci import dci
from fastdis.metrics.dcimig import dcimig
from fastdis.metrics.encoding import Encoder
from fastdis.metrics.encoding import encode as encode_dataset
from fastdis.metrics.explicitness import explicitness
from fastdis.metrics.factor_vae import factor_vae
from fastdis.metrics.flatness import flatness
from fastdis.metrics.infomec import infomec
from fastdis.metrics.irs import irs
from fastdis.metrics.jemmig import jemmig
from fastdis.metrics.mcc import mcc
from fastdis.metrics.mig import mig
from fastdis.metrics.mig_sup import mig_sup
from fastdis.metrics.modularity import modularity
from fastdis.metrics.r2 import r2
from fastdis.metrics.result import Result, _finite, _plain
from fastdis.metrics.rmig import rmig
from fastdis.metrics.sap import sap
from fastdis.metrics.unsupervised import code_mutual_information, gaussian_total_correlation, wasserstein_correlation

Array = np.ndarray | Tensor
Options = Mapping[str, Mapping[str, Any]]

# By what they are given: all rows, a sample of them, or a training and a test set.
WHOLE = (beta_vae, factor_vae, flatness)
SAMPLE = (
    mig,
    rmig,
    jemmig,
    mig_sup,
    dcimig,
    modularity,
    irs,
    infomec,
    mcc,
    r2,
    gaussian_total_correlation,
    wasserstein_correlation,
    code_mutual_information,
)
SPLIT = (sap, explicitness, dci)
METRICS: dict[str, Callable[..., Result]] = {function.__name__: function for function in (*WHOLE, *SAMPLE, *SPLIT)}
# What is set here otherwise than in the metric itself.
DEFAULTS: Options = {"dci": {"estimator": "gbt_histogram"}}


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What :func:`evaluate` found. Each result is also an attribute: ``evaluation.mig.score``.

    Attributes
    ----------
    results : dict of str to Result
        By the metric's name.
    skipped : dict of str to str
        Why a metric that was not asked for by name could not be computed.
    settings : dict
        Everything the results depend on beside the codes: the seed, how many rows of what were used, and the options of
        every metric, defaults included.
    """

    results: dict[str, Result]
    skipped: dict[str, str]
    settings: dict[str, Any]

    @property
    def scores(self) -> dict[str, float]:
        """The score of every metric."""
        return {name: result.score for name, result in self.results.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return ``scores``, ``results``, ``skipped`` and ``settings`` as plain numbers, strings, lists and dicts."""
        return _plain(
            {"scores": self.scores, "results": self.results, "skipped": self.skipped, "settings": self.settings}
        )

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the same as JSON text; numbers that JSON has no word for (NaN, infinity) become null."""
        return json.dumps(_finite(self.to_dict()), indent=indent, allow_nan=False)

    def __getattr__(self, name: str) -> Any:
        # Through __dict__: a copy that is being made has no results yet, and would look for them here for ever.
        results = self.__dict__.get("results", {})
        if name in results:
            return results[name]
        raise AttributeError(f"no metric {name!r} was evaluated; there are {', '.join(results)}")

    def __repr__(self) -> str:
        return f"Evaluation({', '.join(f'{name}={score:.4f}' for name, score in self.scores.items())})"

    def __str__(self) -> str:
        """Return a table: the name of each metric, its score, and its parts that are single numbers."""
        width = max(map(len, (*self.results, *self.skipped)))
        lines = []
        for name, result in self.results.items():
            parts = [(field.name, getattr(result, field.name)) for field in dataclasses.fields(result)]
            shown = "  ".join(f"{part} {x:.4f}" for part, x in parts if isinstance(x, float) and part != "score")
            lines.append(f"{name:<{width}}  {result.score:>8.4f}  {shown}".rstrip())
        lines += [f"{name:<{width}}  {'skipped':>8}  {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def evaluate(
    codes: Array,
    factors: Array,
    *,
    metrics: Iterable[str] | None = None,
    test_codes: Array | None = None,
    test_factors: Array | None = None,
    seed: int = 0,
    samples: int | None = 10_000,
    train: int = 10_000,
    test: int = 5_000,
    replace: bool = False,
    options: Options | None = None,
    progress: bool = False,
) -> Evaluation:
    """Compute many metrics of the same codes.

    Each metric is given the rows that it takes in the study that most results are compared with [1]_:

    - ``beta_vae``, ``factor_vae`` and ``flatness`` all of them;
    - ``sap``, ``explicitness`` and ``dci`` a training set of 10,000 and a test set of 5,000;
    - the others a sample of 10,000.

    Which rows a metric gets depends on the seed, and not on which other metrics are computed.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n images, usually the posterior means.
    factors : integer, [n, K]
        The factors the images were made from.
    metrics : iterable of str, optional
        Names of metrics: the functions of :mod:`fastdis.metrics`. By default all that can be computed: those that
        refuse these codes, or that need a library which is not installed, are left out, and ``skipped`` says why.
        Those named here, or given options, raise instead.
    test_codes, test_factors : [m, d] and [m, K], optional
        A test set of its own. By default the test set is split off from ``codes``, at random.
    seed : int, optional
        Names all that is random: the rows, and what the metrics draw themselves. The same seed gives the same results.
    samples : int or None, optional
        How many rows metrics of a sample get; None gives them all. Where there are no more, they get all, in order.
    train, test : int, optional
        How many rows the training and the test set have. Where there are fewer, what there is is shared out in this
        proportion.
    replace : bool, optional
        Draw rows as the study does: independently, so that a row may come twice, and be in the training and the test
        set. Of 737,280 images that makes no difference; of few it makes test sets easy. By default a row comes once.
    options : mapping of str to mapping, optional
        Further arguments by metric, such as ``{"mig": {"bins": 10}, "dci": {"estimator": "gbt"}}``. DCI is
        computed with its fast estimator, ``"gbt_histogram"``, where these do not say otherwise.
    progress : bool, optional
        Show a progress bar on stderr.

    Returns
    -------
    Evaluation
        Results, by name and as attributes; what was skipped; and the settings in full.

    Raises
    ------
    TypeError
        Codes are not real numbers, or factors not integers; or an option does not exist.
    ValueError
        Shapes do not fit, a code is NaN or infinite, a factor never varies, a name is not a metric's, a size is not
        positive, or a metric asked for refuses the data.
    ImportError
        A metric asked for needs a library that is not installed.

    References
    ----------
    .. [1] F. Locatello et al. Challenging Common Assumptions in the Unsupervised Learning of Disentangled
       Representations. ICML 2019.

    Examples
    --------
    >>> import numpy as np
    >>> factors = np.random.default_rng(0).integers(4, size=(1000, 3))
    >>> evaluation = evaluate(factors.astype(float), factors, metrics=["mig", "modularity"])
    >>> evaluation.mig.mutual_information.shape
    (3, 3)
    >>> sorted(evaluation.scores)
    ['mig', 'modularity']
    """
    plan = _plan(metrics, options, seed)
    sampling = _Sampling(as_seed(seed), samples, train, test, replace)
    codes_ = as_codes(codes)
    factors_ = as_factors(factors, len(codes_))
    rows = _Rows(codes_, factors_, test_codes, test_factors, sampling)

    results: dict[str, Result] = {}
    skipped: dict[str, str] = {}
    with progress_bar("measuring") if progress else nullcontext() as update:
        for done, (name, (arguments, required)) in enumerate(plan.items()):
            if update is not None:
                update(done, len(plan), name)
            try:
                results[name] = METRICS[name](*rows.of(METRICS[name]), **arguments)
            except (ImportError, ValueError) as error:
                if required:
                    raise
                skipped[name] = str(error)
        if update is not None:
            update(len(plan), len(plan))
    if not results:
        raise ValueError("no metric can be computed: " + "; ".join(f"{k}: {why}" for k, why in skipped.items()))
    settings = {
        "seed": sampling.seed,
        **rows.sizes(),
        "replace": replace,
        "options": {name: arguments for name, (arguments, _) in plan.items() if name in results},
    }
    return Evaluation(results, skipped, settings)


def evaluate_model(
    encode: Encoder,
    dataset: FactorDataset,
    *,
    metrics: Iterable[str] | None = None,
    seed: int = 0,
    samples: int | None = 10_000,
    train: int = 10_000,
    test: int = 5_000,
    replace: bool = False,
    options: Options | None = None,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = False,
    distributed: bool = True,
) -> Evaluation:
    """Encode a dataset once, and compute many metrics of its codes.

    Parameters
    ----------
    encode : callable
        Takes images, float32 [b, C, H, W], and returns their codes, [b, d]: a module, or any function.
    dataset : FactorDataset
        Images on a complete grid of factors. Factors that take one value are left out.
    metrics, seed, samples, train, test, replace, options
        As for :func:`evaluate`.
    batch_size, device, autocast, distributed
        As for :func:`encode`. With ``torch.distributed``, every process gets the whole evaluation.
    progress : bool, optional
        Show progress bars on stderr.

    Returns
    -------
    Evaluation
        As of :func:`evaluate`. ``settings["factors"]`` names the columns of the factors, and
        ``settings["left_out"]`` the factors that never vary in the dataset.

    Raises
    ------
    TypeError, ValueError, ImportError, RuntimeError
        As :func:`encode` and :func:`evaluate`; also where no factor varies. What can be checked before the images are
        encoded is.

    Notes
    -----
    The time goes into encoding each image once, and into DCI and explicitness; all of full dSprites, 737,280 images of
    a small convolutional encoder, takes minutes on two cores.
    """
    # Mistakes that show without the codes are not found only after minutes of encoding.
    _plan(metrics := None if metrics is None else list(metrics), options, seed)
    _Sampling(as_seed(seed), samples, train, test, replace)
    varying = [k for k, size in enumerate(dataset.factor_sizes) if size > 1]
    if not varying:
        raise ValueError("no factor varies in this dataset, so there is nothing to evaluate")
    codes = encode_dataset(
        encode,
        dataset,
        batch_size=batch_size,
        device=device,
        autocast=autocast,
        progress=progress,
        distributed=distributed,
    )
    evaluation = evaluate(
        codes,
        dataset.factors(np.arange(len(dataset)))[:, varying],
        metrics=metrics,
        seed=seed,
        samples=samples,
        train=train,
        test=test,
        replace=replace,
        options=options,
        progress=progress,
    )
    names = dataset.factor_names
    settings = {
        **evaluation.settings,
        "factors": [names[k] for k in varying],
        "left_out": [name for k, name in enumerate(names) if k not in varying],
    }
    return dataclasses.replace(evaluation, settings=settings)


@dataclass(frozen=True)
class _Sampling:
    """How rows are drawn."""

    seed: int
    samples: int | None
    train: int
    test: int
    replace: bool

    def __post_init__(self) -> None:
        for name in ("samples", "train", "test"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")

    def generator(self, which: int) -> np.random.Generator:
        """Return one of several independent generators: no draw depends on how many others were made."""
        return np.random.default_rng([self.seed, which])

    def take(
        self, both: tuple[np.ndarray, np.ndarray], size: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ``size`` random rows of codes and factors; all of them, in order, where there are no more."""
        n = len(both[0])
        if not self.replace and n <= size:
            return both
        rows = generator.integers(n, size=size) if self.replace else generator.permutation(n)[:size]
        return both[0][rows], both[1][rows]


class _Rows:
    """The rows that each kind of metric is given."""

    def __init__(
        self,
        codes: np.ndarray,
        factors: np.ndarray,
        test_codes: Array | None,
        test_factors: Array | None,
        sampling: _Sampling,
    ) -> None:
        self.whole = codes, factors
        self.sample = self.whole
        if sampling.samples is not None:
            self.sample = sampling.take(self.whole, sampling.samples, sampling.generator(0))
        if (test_codes is None) != (test_factors is None):
            given, missing = ("test_factors", "test_codes") if test_codes is None else ("test_codes", "test_factors")
            raise ValueError(f"{given} must come with {missing}, which is missing")
        generator, train, test = sampling.generator(1), sampling.train, sampling.test
        self.split: tuple[np.ndarray, ...]
        if test_codes is not None and test_factors is not None:
            held_out = _test_set(test_codes, test_factors, self.whole)
            learnt = sampling.take(self.whole, train, generator)
            self.split = (*learnt, *sampling.take(held_out, test, generator))
        else:
            n = len(codes)
            drawn = generator.integers(n, size=train + test) if sampling.replace else generator.permutation(n)
            rows = drawn[: train + test]
            share = round(len(rows) * train / (train + test))
            self.split = tuple(array[part] for part in (rows[:share], rows[share:]) for array in self.whole)

    def of(self, metric: Callable[..., Result]) -> tuple[np.ndarray, ...]:
        """Return what a metric is called with."""
        if metric in SPLIT:
            return self.split
        both = self.whole if metric in WHOLE else self.sample
        return both if "factors" in inspect.signature(metric).parameters else both[:1]

    def sizes(self) -> dict[str, int]:
        """Return how many rows, codes and factors there are, and the rows of every part."""
        (n, d), K = self.whole[0].shape, self.whole[1].shape[1]
        return {
            "n": n,
            "d": d,
            "K": K,
            "samples": len(self.sample[0]),
            "train": len(self.split[0]),
            "test": len(self.split[2]),
        }


def _test_set(codes: Array, factors: Array, like: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return a test set, if it fits its training set."""
    codes_ = as_codes(codes, "test_codes")
    factors_ = as_factors(factors, len(codes_), name="test_factors", codes_name="test_codes", varying=False)
    for name, one, other in (("codes", like[0], codes_), ("factors", like[1], factors_)):
        if one.shape[1] != other.shape[1]:
            raise ValueError(
                f"{name} and test_{name} must have as many columns, got {one.shape[1]} and {other.shape[1]}"
            )
    return codes_, factors_


def _plan(metrics: Iterable[str] | None, options: Options | None, seed: int) -> dict[str, tuple[dict[str, Any], bool]]:
    """Return, by metric, its keyword arguments in full, and whether it was asked for by name."""
    if isinstance(metrics, str):
        raise TypeError(f"metrics must be a list of names, got the text {metrics!r}; write [{metrics!r}]")
    options = options or {}
    names = list(METRICS) if metrics is None else list(dict.fromkeys(metrics))
    for argument, given in (("metrics", names), ("options", options)):
        unknown = [name for name in given if name not in METRICS]
        if unknown:
            raise ValueError(f"{argument} names {unknown[0]!r}, and the metrics are {', '.join(METRICS)}")
    if not names:
        raise ValueError(f"metrics must name at least one of {', '.join(METRICS)}")
    for name in options:
        if name not in names:
            raise ValueError(f"options are given for {name!r}, which metrics does not name")
    return {
        name: (_arguments(name, options.get(name, {}), seed), metrics is not None or name in options) for name in names
    }


def _arguments(name: str, given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return every keyword argument of a metric: those given, or else what this module or the metric sets."""
    parameters = inspect.signature(METRICS[name]).parameters.values()
    arguments = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option in given:
        if option not in arguments:
            raise TypeError(f"{name} has no option {option!r}, it has {', '.join(arguments) or 'none'}")
    if "seed" in arguments:
        arguments["seed"] = as_seed(seed)
    return {**arguments, **DEFAULTS.get(name, {}), **given}
