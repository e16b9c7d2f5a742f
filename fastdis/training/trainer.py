"""A training loop that gives the same result from the same seed, stopped and resumed or not."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from fastdis.data import FactorDataset, PointDataset
from fastdis.data.atomic import atomic_path
from fastdis.models import LatentModel
from fastdis.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

Callback = Callable[[int, int, Mapping[str, float]], None]


class TrainingDivergedError(RuntimeError):
    """A term of the loss became NaN or infinite."""


class Trainer:
    """Trains a model on a dataset with Adam.

    Batches, noise and interventions come from one generator on the CPU, so that a seed names one course of training
    on every device. Weights drawn before, when the model was made, are the caller's to seed.

    Parameters
    ----------
    model : LatentModel
        Trained in place, on the device it is on.
    dataset : FactorDataset or PointDataset
        Images or points; a batch is drawn uniformly, with replacement.
    steps : int
        Steps in all.
    batch_size : int, optional
        Images a step.
    lr : float, optional
        Learning rate of Adam.
    seed : int, optional
        Seed of the generator.
    out : path-like, optional
        Folder for ``checkpoint.pt`` and ``history.json``; nothing is written where it is None.
    overwrite : bool, optional
        Whether ``out`` may hold files already. Only those two are replaced.
    checkpoint_every : int, optional
        Steps between checkpoints. One is always written at the end.
    callbacks : sequence of callable, optional
        Each called after every step as ``callback(step, steps, terms)``, with the loss terms as floats.

    Attributes
    ----------
    step : int
        Steps done.
    history : dict of str to list of float
        Every term of the loss at every step done.

    Raises
    ------
    ValueError
        A number lies outside its range, or the images do not fit the model.
    FileExistsError
        ``out`` is a file, or a folder that is not empty, and ``overwrite`` is not set.
    """

    def __init__(
        self,
        model: LatentModel,
        dataset: FactorDataset | PointDataset,
        *,
        steps: int,
        batch_size: int = 64,
        lr: float = 1e-4,
        seed: int = 0,
        out: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        checkpoint_every: int = 1000,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        for name, count in (("steps", steps), ("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be a positive number, got {lr}")
        given, expected = list(dataset.image_shape), list(model.input_shape)
        if given != expected:
            raise ValueError(f"dataset has images of {given}, and the model was made for {expected}")
        self.model = model
        self.dataset = dataset
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.seed = seed
        self.checkpoint_every = checkpoint_every
        self.callbacks = tuple(callbacks)
        self.out = None if out is None else _claim_folder(Path(out), overwrite)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        self.history: dict[str, list[float]] = {}

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        dataset: FactorDataset | PointDataset,
        *,
        steps: int | None = None,
        out: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        checkpoint_every: int = 1000,
        callbacks: Sequence[Callback] = (),
    ) -> Trainer:
        """Return a trainer that goes on from a checkpoint, as if training had never stopped.

        Parameters
        ----------
        path : path-like
            The checkpoint, or the folder of its run.
        dataset : FactorDataset
            The dataset it was trained on.
        steps : int, optional
            Steps in all, those done included; what the checkpoint says by default.
        out : path-like, optional
            Folder for the outputs, whose earlier ones are replaced; none are written where it is None.
        device : str or torch.device, optional
            Where to train.
        checkpoint_every, callbacks
            As for the constructor.

        Raises
        ------
        FileNotFoundError, ValueError
            The checkpoint cannot be read, or was trained on another dataset.
        """
        checkpoint = load_checkpoint(path, map_location=device)
        settings = checkpoint.settings
        if settings["images"] != len(dataset):
            raise ValueError(
                f"dataset has {len(dataset)} images, and the checkpoint was trained on one of {settings['images']}"
            )
        trainer = cls(
            checkpoint.model,
            dataset,
            steps=settings["steps"] if steps is None else steps,
            batch_size=settings["batch_size"],
            lr=settings["lr"],
            seed=settings["seed"],
            out=out,
            overwrite=True,
            checkpoint_every=checkpoint_every,
            callbacks=callbacks,
        )
        trainer.optimizer.load_state_dict(checkpoint.optimizer)
        trainer.generator.set_state(checkpoint.generator)
        trainer.step = checkpoint.step
        trainer.history = checkpoint.history
        return trainer

    def fit(self) -> dict[str, list[float]]:
        """Train until ``steps`` are done.

        Returns
        -------
        dict of str to list of float
            The history: every term of the loss at every step.

        Raises
        ------
        TrainingDivergedError
            A term of the loss became NaN or infinite. The weights are as they were before that step.
        """
        self.model.train()
        while self.step < self.steps:
            terms = self._train_step()
            for name, value in terms.items():
                self.history.setdefault(name, []).append(value)
            if self.step % self.checkpoint_every == 0 and self.step < self.steps:
                self.save()
            for callback in self.callbacks:
                callback(self.step, self.steps, terms)
        self.save()
        return self.history

    def save(self) -> None:
        """Write ``checkpoint.pt`` and ``history.json`` into ``out``; do nothing where there is none."""
        if self.out is None:
            return
        settings = {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "seed": self.seed,
            "images": len(self.dataset),
        }
        checkpoint = Checkpoint(
            self.model, self.optimizer.state_dict(), self.step, self.generator.get_state(), settings, self.history
        )
        save_checkpoint(self.out / "checkpoint.pt", checkpoint)
        with atomic_path(self.out / "history.json") as temporary:
            temporary.write_text(json.dumps(self.history))

    def _train_step(self) -> dict[str, float]:
        rows = torch.randint(len(self.dataset), (self.batch_size,), generator=self.generator)
        x = self.dataset.batch(rows).to(next(self.model.parameters()).device)
        terms = self.model.loss(x, generator=self.generator)
        # One transfer for all terms, before the weights are touched.
        values = dict(zip(terms, torch.stack([term.detach() for term in terms.values()]).tolist(), strict=True))
        for name, value in sorted(values.items(), key=lambda item: item[0] == "loss"):
            if not math.isfinite(value):
                raise TrainingDivergedError(
                    f"the {name} term became {value} at step {self.step + 1}; a smaller lr (now {self.lr:g}) may help"
                )
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        self.optimizer.step()
        self.step += 1
        return values


def _claim_folder(out: Path, overwrite: bool) -> Path:
    """Make the folder, refusing one that holds anything unless told otherwise."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, and a folder was to be made there")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty; name another folder, or allow overwriting")
    out.mkdir(parents=True, exist_ok=True)
    return out
