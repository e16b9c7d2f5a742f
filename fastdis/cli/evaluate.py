"""``fastdis evaluate``: what the codes of a trained model tell of the factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fastdis.data import FactorDataset, load
from fastdis.data.atomic import atomic_path
from fastdis.metrics import mig
from fastdis.models import VAE
from fastdis.training import encode_dataset, load_checkpoint


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--batch-size", type=int, default=256, show_default=True, help="Images encoded at once.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the metrics there too.")
def evaluate(run_dir: Path, data: Path, batch_size: int, out: Path | None) -> None:
    """Print, as JSON, the metrics of the model in RUN_DIR on all images of DATA."""
    checkpoint = load_checkpoint(run_dir)
    metrics = {"step": checkpoint.step, **measure(checkpoint.model, load(data), batch_size)}
    text = json.dumps(metrics, indent=2)
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(text + "\n")
    click.echo(text)


def measure(model: VAE, dataset: FactorDataset, batch_size: int = 256) -> dict[str, Any]:
    """Return the metrics of a model on all images of a dataset, over the factors that vary in it."""
    varying = [k for k, size in enumerate(dataset.factor_sizes) if size > 1]
    if not varying:
        raise ValueError("no factor varies in this dataset, so there is nothing to evaluate")
    codes = encode_dataset(model, dataset, batch_size)
    factors = dataset.factors(range(len(dataset)))[:, varying]
    return {
        "images": len(dataset),
        "factors": [dataset.factor_names[k] for k in varying],
        "mig": mig(codes, factors).to_dict(),
    }
