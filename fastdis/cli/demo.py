"""``fastdis demo``: from nothing to a disentangling model, in a few minutes on a laptop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastdis.cli.evaluate import measure
from fastdis.cli.figures import draw_losses, draw_traversal, traversal_grid
from fastdis.cli.progress import training_bar
from fastdis.data import load_dsprites, make_dsprites
from fastdis.data.atomic import atomic_path
from fastdis.data.progress import progress_bar
from fastdis.models import ProtoVAE
from fastdis.training import Trainer

# An ellipse that moves and grows, without turning. The ranges differ, so that each factor explains another share of the
# images: latents then wake up one after the other, each along a factor, where equal shares leave their rotation open.
GRID = {"shapes": [1], "scales": 6, "orientations": [0], "x": range(12, 20), "y": range(8, 24)}
MODEL = {"latent_dim": 6, "beta": 4.0, "shots": 3, "queries": 3, "proto_weight": 1.0}
BATCH_SIZE = 64
LR = 1e-3
VALUES = tuple(np.linspace(-2, 2, 9).tolist())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Folder.")
@click.option("--steps", type=click.IntRange(min=1), default=1500, show_default=True, help="Training steps.")
@click.option("--seed", type=int, default=0, show_default=True, help="Names the whole course of training.")
def demo(out: Path, steps: int, seed: int) -> None:
    """Draw sprites, train ProtoVAE on them, measure it and show what each latent does.

    A few minutes on two cores. Writes into OUT, replacing what an earlier demo wrote there and nothing else.
    """
    if out.exists() and not out.is_dir():
        raise click.BadParameter(f"{out} is a file, and a folder was to be made there", param_hint="--out")
    sprites = out / "sprites.npz"
    with progress_bar("drawing ") as bar:
        make_dsprites(sprites, size=32, progress=bar, **GRID)  # type: ignore[arg-type]
    dataset = load_dsprites(sprites)

    torch.manual_seed(seed)
    model = ProtoVAE(channels=1, image_size=32, **MODEL)  # type: ignore[arg-type]
    untrained = measure(model, dataset, metrics=["mig"])
    with training_bar("training") as callback:
        trainer = Trainer(
            model,
            dataset,
            steps=steps,
            batch_size=BATCH_SIZE,
            lr=LR,
            seed=seed,
            out=out,
            overwrite=True,
            callbacks=[callback],
        )
        history = trainer.fit()
    trained = measure(model, dataset, metrics=["mig"])

    with atomic_path(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps({"step": steps, "trained": trained, "untrained": untrained}, indent=2) + "\n")
    draw_losses(out / "losses.png", history)
    # The middle of every factor, from where there is room to go both ways.
    middle = dataset.index([size // 2 for size in dataset.factor_sizes])
    draw_traversal(
        out / "traversal.png",
        traversal_grid(model, dataset.batch(middle.reshape(1)), VALUES),
        VALUES,
        _latent_labels(trained),
        f"ProtoVAE after {steps} steps: one latent changed at a time (MIG {trained['mig']['score']:.2f})",
    )
    _report(untrained, trained)
    for name in ("metrics.json", "traversal.png", "losses.png", "checkpoint.pt", "history.json", "sprites.npz"):
        click.echo(str(out / name))


def _latent_labels(metrics: dict[str, Any]) -> list[str]:
    """Return, for each latent, its number and the factor it tells most of, with the share of it that it tells."""
    share = np.array(metrics["mig"]["mutual_information"]) / np.array(metrics["mig"]["entropy"])
    return [f"z{n}: {metrics['factors'][row.argmax()]} {row.max():.0%}" for n, row in enumerate(share)]


def _report(untrained: dict[str, Any], trained: dict[str, Any]) -> None:
    table = Table("mutual information gap", "untrained", "trained")
    rows = [("all factors", untrained["mig"]["score"], trained["mig"]["score"])]
    rows += zip(trained["factors"], untrained["mig"]["gaps"], trained["mig"]["gaps"], strict=True)
    for name, before, after in rows:
        table.add_row(name, f"{before:.3f}", f"{after:.3f}")
    Console().print(table)
