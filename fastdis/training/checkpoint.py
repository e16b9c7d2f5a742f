"""Checkpoints: all that is needed to go on as if training had never stopped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdis.data.atomic import atomic_path
from fastdis.models import LatentModel, build_model

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model in training, as it was after some step.

    Attributes
    ----------
    model : LatentModel
        The model, with its weights.
    optimizer : dict
        State of the optimizer.
    step : int
        Steps done.
    generator : Tensor of uint8
        State of the random generator on the CPU.
    settings : dict
        What the trainer was told: ``steps``, ``batch_size``, ``lr``, ``seed``, and ``images``, how many the dataset
        has.
    history : dict of str to list of float
        Every term of the loss at every step done.
    """

    model: LatentModel
    optimizer: dict[str, Any]
    step: int
    generator: Tensor
    settings: dict[str, Any]
    history: dict[str, list[float]]


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint; a file already there is replaced only by a whole one.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    content = {
        "format": FORMAT,
        "model": type(checkpoint.model).__name__,
        "config": checkpoint.model.config(),
        "weights": checkpoint.model.state_dict(),
        "optimizer": checkpoint.optimizer,
        "step": checkpoint.step,
        "generator": checkpoint.generator,
        "settings": checkpoint.settings,
        "history": checkpoint.history,
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint and rebuild its model.

    Parameters
    ----------
    path : path-like
        The file, or the folder of a run, in which it is called ``checkpoint.pt``.
    map_location : str or torch.device, optional
        Where the model goes.

    Returns
    -------
    Checkpoint
        The model and the state of its training. Only tensors, numbers, strings and containers are unpickled.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is damaged, or is not a checkpoint of this package.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where the damage is
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a fastdis checkpoint of format {FORMAT}")
    try:
        model = build_model(content["model"], content["config"]).to(map_location)
        model.load_state_dict(content["weights"])
        return Checkpoint(
            model=model,
            optimizer=content["optimizer"],
            step=content["step"],
            generator=content["generator"].cpu(),
            settings=content["settings"],
            history=content["history"],
        )
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: a checkpoint that contradicts itself ({error})") from error
