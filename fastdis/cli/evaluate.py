"""``fastdis evaluate``: what the codes of a trained model tell of the factors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from fastdis.data import FactorDataset
from fastdis.data.atomic import atomic_path
from fastdis.data.formats import load_grid
from fastdis.metrics import evaluate_model
from fastdis.models import LatentModel
from fastdis.training import load_checkpoint


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--metrics", help="Names, with commas between: mig,dci,factor_vae ...  [default: all that can be computed]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Names all that is drawn at random.")
@click.option("--batch-size", type=int, default=128, show_default=True, help="Images encoded at once.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the metrics there too.")
def evaluate(run_dir: Path, data: Path, metrics: str | None, seed: int, batch_size: int, out: Path | None) -> None:
    """Print, as JSON, the metrics of the model in RUN_DIR on all images of DATA."""
    checkpoint = load_checkpoint(run_dir)
    names = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    try:
        dataset = load_grid(data)
        found = measure(checkpoint.model, dataset, metrics=names, seed=seed, batch_size=batch_size, progress=True)
    except ImportError as error:
        # What to install for this format, or for a metric asked for.
        raise click.ClickException(str(error)) from error
    text = json.dumps({"step": checkpoint.step, **found}, indent=2)
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(text + "\n")
    click.echo(text)


def measure(
    model: LatentModel,
    dataset: FactorDataset,
    *,
    metrics: Iterable[str] | None = None,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
) -> dict[str, Any]:
    """Return the metrics of a model on all images of a dataset, each under its name, over the factors that vary."""
    evaluation = evaluate_model(model, dataset, metrics=metrics, seed=seed, batch_size=batch_size, progress=progress)
    # By way of JSON, which has no word for NaN and infinity.
    plain = json.loads(evaluation.to_json())
    return {
        "images": len(dataset),
        "factors": plain["settings"].pop("factors"),
        **plain["results"],
        "skipped": plain["skipped"],
        "settings": plain["settings"],
    }
