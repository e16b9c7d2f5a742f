"""``fastdis reproduce``: the claims of papers, with baselines and with what fails."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def reproduce() -> None:
    """Reproduce the claim of a paper, with baselines, and show where it fails."""


@reproduce.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/spectral"), show_default=True, help="Folder."
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Samples and weights: 0, 1 ...")
@click.option("--steps", type=click.IntRange(min=1), default=1500, show_default=True, help="Of every autoencoder.")
@click.option("--points", type=click.IntRange(min=100), help="Of every manifold.  [default: 3000 to 6000]")
@click.option("--manifold", "manifolds", multiple=True, help="Only those whose names begin so; may be repeated.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@click.option("--spectral-only", is_flag=True, help="Leave the autoencoders out.")
def spectral(
    out: Path, seeds: int, steps: int, points: int | None, manifolds: tuple[str, ...], jobs: int, spectral_only: bool
) -> None:
    """Recover the latents of manifolds by Hessian eigenmaps and ICA, and by autoencoders.

    The claim of Horan, Richardson and Weiss (NeurIPS 2021): local isometry and factors that are not Gaussian suffice.
    Ten isometric manifolds of 2 to 8 latents, two that are not, and one of Gaussian latents. Writes results.json,
    codes.npz and recovery.png into OUT. What is there already, of the same settings, is not computed again.
    """
    try:
        from fastdis.cli.spectral_claim import compare
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    compare(out, seeds=seeds, steps=steps, points=points, manifolds=manifolds, spectral_only=spectral_only, jobs=jobs)
    for name in ("results.json", "recovery.png"):
        click.echo(str(out / name))
