"""``fastdis train``: train a model on a dataset."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from fastdis.cli.progress import training_bar
from fastdis.data.formats import load_grid
from fastdis.models import ProtoVAE
from fastdis.training import Trainer


@click.group()
def train() -> None:
    """Train a model."""


@train.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--steps", type=int, help="Steps in all.  [default: 100000, or as before with --resume]")
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images a step.")
@click.option("--lr", type=float, default=1e-4, show_default=True, help="Learning rate of Adam.")
@click.option("--seed", type=int, default=0, show_default=True, help="Names the whole course of training.")
@click.option("--latent-dim", type=int, default=10, show_default=True, help="Number of latents.")
@click.option("--beta", type=float, default=4.0, show_default=True, help="Weight of the divergence.")
@click.option("--proto-weight", type=float, default=1.0, show_default=True, help="Weight of the prototypical loss.")
@click.option("--isometry-weight", type=float, default=0.0, show_default=True, help="Weight of the isometry term.")
@click.option("--shots", type=int, default=5, show_default=True, help="Images that make a prototype.")
@click.option("--queries", type=int, default=5, show_default=True, help="Images whose change is to be named.")
@click.option("--embedding", type=click.Choice(["concat", "difference"]), default="concat", show_default=True)
@click.option("--intervention", type=click.Choice(["prior", "swap"]), default="prior", show_default=True)
@click.option("--embedding-dim", type=int, default=64, show_default=True, help="Dimension of the embedding.")
@click.option("--checkpoint-every", type=int, default=1000, show_default=True, help="Steps between checkpoints.")
@click.option("--device", default="cpu", show_default=True, help="Where to train: cpu, cuda, cuda:1 ...")
@click.option("--overwrite", is_flag=True, help="Allow OUT to hold an earlier run, and replace it.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in OUT, with the settings it was made with.")
@click.pass_context
def protovae(
    context: click.Context,
    data: Path,
    out: Path,
    steps: int | None,
    batch_size: int,
    lr: float,
    seed: int,
    checkpoint_every: int,
    device: str,
    overwrite: bool,
    resume: bool,
    **model_options: float | int | str,
) -> None:
    """Train ProtoVAE on DATA, a dSprites .npz."""
    if resume:
        _refuse_settings(context)
    where = _device(device)
    dataset = load_grid(data)
    with training_bar("training") as bar:
        if resume:
            trainer = Trainer.resume(
                out, dataset, steps=steps, out=out, device=where, checkpoint_every=checkpoint_every, callbacks=[bar]
            )
        else:
            torch.manual_seed(seed)
            channels, side, _ = dataset.image_shape
            model = ProtoVAE(channels=channels, image_size=side, **model_options).to(where)  # type: ignore[arg-type]
            trainer = Trainer(
                model,
                dataset,
                steps=100_000 if steps is None else steps,
                batch_size=batch_size,
                lr=lr,
                seed=seed,
                out=out,
                overwrite=overwrite,
                checkpoint_every=checkpoint_every,
                callbacks=[bar],
            )
        trainer.fit()
    click.echo(f"{out / 'checkpoint.pt'}: {trainer.step} steps done")


def _device(name: str) -> torch.device:
    """Return a device that exists here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{name!r} cannot be used here", param_hint="--device") from error
    return device


def _refuse_settings(context: click.Context) -> None:
    """Refuse options that a resumed run would silently ignore."""
    kept = {"data", "out", "steps", "resume", "device", "checkpoint_every"}
    given = click.core.ParameterSource.COMMANDLINE
    ignored = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in kept and context.get_parameter_source(name) is given
    ]
    if ignored:
        raise click.UsageError(f"--resume takes the settings of the checkpoint; leave out {', '.join(ignored)}")
