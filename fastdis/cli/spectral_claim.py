"""The claim of Horan, Richardson and Weiss (2021): which methods recover the latents of which manifolds."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import fastdis
from fastdis.cli.figures import draw_recovery
from fastdis.data import (
    Manifold,
    PointDataset,
    flat_torus,
    fourier_isometry,
    growing_shapes,
    moving_colours,
    moving_shapes,
    swiss_roll,
    turning_shapes,
)
from fastdis.data.atomic import atomic_path
from fastdis.data.progress import progress_bar
from fastdis.metrics import local_isometry, mcc, r2
from fastdis.models import Autoencoder, GaussianVAE, LatentModel
from fastdis.spectral import FastICA, SpectralDisentangler
from fastdis.training import Trainer

Item = tuple[str, int, str]  # manifold, seed, and what makes codes
SHOWN = 200  # points of each panel of the picture


@dataclass(frozen=True)
class Case:
    """A manifold to be recovered from n points."""

    manifold: Manifold
    n: int
    distribution: str = "uniform"

    @property
    def name(self) -> str:
        """For tables; one of its own."""
        return self.manifold.name + (", Gaussian" if self.distribution == "gaussian" else "")

    @property
    def identifiable(self) -> bool:
        """Whether the theorem says that the latents can be recovered."""
        return bool(self.manifold.isometric) and self.distribution == "uniform"


# The paper's sizes: 3,000 points of two latents, 6,000 of eight.
CASES = (
    Case(flat_torus(2), 3000),
    Case(swiss_roll(), 3000),
    Case(fourier_isometry(2), 3000),
    Case(moving_shapes(1), 3000),
    Case(moving_colours(), 3000),
    Case(flat_torus(3), 3000),
    Case(fourier_isometry(4, ambient=100), 4000),
    Case(moving_shapes(2), 4000),
    Case(flat_torus(6), 5000),
    Case(flat_torus(8), 6000),
    Case(turning_shapes(), 3000),
    Case(growing_shapes(), 3000),
    Case(flat_torus(4), 4000, "gaussian"),
)
SPECTRAL = {"HLLE + ICA": "hlle", "LTSA + ICA": "ltsa"}
AUTOENCODERS: dict[str, Callable[[int, int], LatentModel]] = {
    "AE": lambda d, D: Autoencoder(d, (D,)),
    "VAE": lambda d, D: GaussianVAE(d, (D,)),
    "beta-VAE": lambda d, D: GaussianVAE(d, (D,), beta=4.0),
    "IRMAE": lambda d, D: Autoencoder(d, (D,), linear_layers=2),
    "isometric AE": lambda d, D: Autoencoder(d, (D,), isometry="scaled_isometry", isometry_weight=0.1),
}
WITH_ICA = ("AE", "isometric AE")
METHODS = (*SPECTRAL, *(name + end for name in AUTOENCODERS for end in ("", " + ICA") if not end or name in WITH_ICA))
BATCH_SIZE = 100
LR = 1e-3
SCORES = ("mcc", "mcc_spearman", "r2", "local_isometry")


def compare(
    out: Path,
    *,
    seeds: int,
    steps: int,
    points: int | None = None,
    manifolds: Sequence[str] = (),
    spectral_only: bool = False,
    jobs: int = 1,
) -> Results:
    """Let every method recover every manifold, from every seed, and keep what comes out.

    Parameters
    ----------
    out : Path
        Folder for ``results.json``, ``codes.npz`` and ``recovery.png``; what is there already is not computed again.
    seeds : int
        How many samples, with weights of their own.
    steps : int
        Of every autoencoder.
    points : int, optional
        Of every manifold; by default as many as each asks for.
    manifolds : sequence of str, optional
        Beginnings of the names of those wanted; all where there are none.
    spectral_only : bool, optional
        Leave the autoencoders out.
    jobs : int, optional
        Processes that share the work, and the threads.

    Returns
    -------
    Results
        Of this run and of those before it.

    Raises
    ------
    ValueError
        No manifold has such a name, or the folder holds results of other settings.
    """
    cases = [case for case in CASES if not manifolds or case.name.startswith(tuple(manifolds))]
    if not cases:
        names = "; ".join(case.name for case in CASES)
        raise ValueError(f"no manifold begins with {' or '.join(manifolds)}; there are {names}")
    sources = [*SPECTRAL] if spectral_only else [*SPECTRAL, *AUTOENCODERS]
    settings = {"version": fastdis.__version__, "steps": steps, "points": points, "batch_size": BATCH_SIZE, "lr": LR}
    results = Results(out, settings)
    work = [(case.name, seed, source) for seed in range(seeds) for case in cases for source in sources]
    missing = [item for item in work if not results.has(*item)]
    with progress_bar("recovering ") as bar:
        bar(len(work) - len(missing), len(work), "")
        for item, found in _run_all(missing, jobs, steps, points):
            results.add(*item, found)
            bar(len(work) - len(missing) + results.added, len(work), f"{item[0]}, seed {item[1]}: {item[2]}")
    methods = [method for method in METHODS if method.removesuffix(" + ICA") in sources or method in sources]
    shown = results.shown
    draw_recovery(
        out / "recovery.png",
        {case.name: {method: shown[f"{case.name}|{method}"] for method in methods} for case in cases},
        {case.name: shown[f"{case.name}|latents"] for case in cases},
    )
    _report(results, cases, methods, seeds)
    return results


class Results:
    """What was found so far, in a folder: scores as JSON, and the codes that the picture shows.

    Parameters
    ----------
    out : Path
        The folder; what it holds of the same settings is read.
    settings : dict
        What the results depend on.

    Attributes
    ----------
    runs : list of dict
        The scores of everything that was run, in any order.
    shown : dict of str to ndarray
        Codes, matched with the latents, and latents, of seed 0.
    added : int
        How many runs were not there before.

    Raises
    ------
    ValueError
        The folder holds results of other settings, or something else under that name.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"{out} is a file, and a folder was to be made there")
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.codes_path = out / "results.json", out / "codes.npz"
        self.settings = settings
        self.added = 0
        self.runs: list[dict[str, Any]] = []
        self.shown: dict[str, np.ndarray] = {}
        if self.path.exists():
            try:
                found = json.loads(self.path.read_text())
                before, self.runs = found["settings"], found["runs"]
                with np.load(self.codes_path) as codes:
                    self.shown = dict(codes)
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise ValueError(f"{self.path} and codes.npz cannot be read as earlier results: {error}") from error
            if before != settings:
                raise ValueError(f"{self.path} holds results of other settings, {before}; name another folder")

    def has(self, case: str, seed: int, source: str) -> bool:
        """Whether that was computed."""
        return any(run["manifold"] == case and run["seed"] == seed and run["source"] == source for run in self.runs)

    def add(self, case: str, seed: int, source: str, found: dict[str, Any]) -> None:
        """Keep what was found, on disk too."""
        shown = found.pop("shown")
        self.added += 1
        self.runs.append({"manifold": case, "seed": seed, "source": source, **found})
        if seed == 0:
            self.shown.update({f"{case}|{name}": values for name, values in shown.items()})
        # The codes first: results that are there have theirs.
        with atomic_path(self.codes_path) as temporary, temporary.open("wb") as file:
            np.savez(file, **self.shown)  # type: ignore[arg-type]
        with atomic_path(self.path) as temporary:
            temporary.write_text(json.dumps({"settings": self.settings, "runs": self.runs}, indent=1) + "\n")

    def scores(self, case: str, method: str, score: str, seeds: int) -> np.ndarray:
        """Return a score of a method on a manifold, one of each seed below a number."""
        runs = (run for run in self.runs if run["manifold"] == case and run["seed"] < seeds)
        return np.array([run["scores"][method][score] for run in runs if method in run["scores"]])


def _run_all(work: Sequence[Item], jobs: int, steps: int, points: int | None) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Give what comes out of every item, as it is done."""
    if jobs == 1:
        for item in work:
            yield item, _run(*item, steps, points)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    # Threads that were started here would be missing in a forked process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_begin_worker, initargs=(threads,)) as pool:
        running = {pool.submit(_run, *item, steps, points): item for item in work}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker(threads: int) -> None:
    """Set up a process that works for this one, and ends with it however it ends."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(name: str, seed: int, source: str, steps: int, points: int | None) -> dict[str, Any]:
    """Return the scores of what a source makes of a manifold, by itself and with ICA, and what of it is shown."""
    case = next(case for case in CASES if case.name == name)
    manifold = case.manifold
    X, latents = manifold.sample(
        points or case.n,
        distribution=case.distribution,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(seed),
    )
    started = time.perf_counter()
    if source in SPECTRAL:
        disentangler = SpectralDisentangler(manifold.dimension, mode=SPECTRAL[source], random_state=seed)  # type: ignore[arg-type]
        codes = {source: disentangler.fit_transform(X.numpy())}
    else:
        made = _train(AUTOENCODERS[source], manifold.dimension, X, latents, steps, seed)
        codes = {source: made}
        if source in WITH_ICA:
            codes[f"{source} + ICA"] = FastICA(random_state=seed).fit_transform(made)
    seconds = time.perf_counter() - started
    truth = latents.numpy()
    shown = {"latents": truth[:SHOWN], **{name: _matched(found, truth)[:SHOWN] for name, found in codes.items()}}
    return {
        "scores": {name: _scores(found, truth, X) for name, found in codes.items()},
        "seconds": seconds,
        "distortion": manifold.distortion(),
        "shown": shown,
    }


def _train(
    make: Callable[[int, int], LatentModel], d: int, X: torch.Tensor, latents: torch.Tensor, steps: int, seed: int
) -> np.ndarray:
    """Return the codes of a model trained on points, which it gets with mean 0 and mean square 1."""
    X = X - X.mean(dim=0)
    dataset = PointDataset(X / X.square().mean().sqrt(), latents)
    torch.manual_seed(seed)
    model = make(d, X.shape[1])
    Trainer(model, dataset, steps=steps, batch_size=BATCH_SIZE, lr=LR, seed=seed).fit()
    model.eval()
    with torch.no_grad():
        return model(dataset.points).numpy().astype(np.float64)


def _scores(codes: np.ndarray, latents: np.ndarray, X: torch.Tensor) -> dict[str, float]:
    return {
        "mcc": mcc(codes, latents).score,
        "mcc_spearman": mcc(codes, latents, correlation="spearman").score,
        "r2": r2(codes, latents).score,
        "local_isometry": local_isometry(codes, X).score,
    }


def _matched(codes: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Return codes in the order, and with the signs, of the latents that they match; 0 for one that never changes."""
    result = mcc(codes, latents)
    signs = np.sign(result.correlation[result.assignment, np.arange(latents.shape[1])])
    spread = codes.std(axis=0)
    return ((codes - codes.mean(axis=0)) / np.where(spread > 0, spread, 1))[:, result.assignment] * signs


def _report(results: Results, cases: list[Case], methods: list[str], seeds: int) -> None:
    table = Table(title=f"mean correlation coefficient, mean ± standard deviation of {seeds} seeds (lowest)")
    for heading in ("manifold", "distortion", *methods):
        table.add_column(heading, justify="left" if heading == "manifold" else "right")
    for wanted in (True, False):
        group = [case for case in cases if case.identifiable is wanted]
        for case in group:
            found = [results.scores(case.name, method, "mcc", seeds) for method in methods]
            distortion = next(run["distortion"] for run in results.runs if run["manifold"] == case.name)
            cells = [f"{x.mean():.3f} ± {x.std():.3f} ({x.min():.3f})" for x in found]
            table.add_row(case.name, f"{distortion:.2f}", *cells)
        for score in SCORES if group and wanted else ():
            scores = [[results.scores(case.name, method, score, seeds).mean() for case in group] for method in methods]
            means = np.mean(scores, axis=1)
            table.add_row(f"mean {score}, isometric", "", *(f"{mean:.3f}" for mean in means), style="bold")
        table.add_section()
    Console(width=max(Console().width, 60 + 24 * len(methods))).print(table)
