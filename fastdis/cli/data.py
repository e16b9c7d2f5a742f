"""``fastdis data``: make datasets."""

from __future__ import annotations

from pathlib import Path

import click

from fastdis.data import load_dsprites, make_dsprites
from fastdis.data.progress import progress_bar


@click.group()
def data() -> None:
    """Make datasets."""


@data.group()
def make() -> None:
    """Draw a dataset from scratch."""


@make.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--size", type=click.Choice(["64", "32"]), default="64", show_default=True, help="Pixels a side.")
@click.option("--shapes", type=int, default=3, show_default=True, help="How many shapes, of 3.")
@click.option("--scales", type=int, default=6, show_default=True, help="How many scales, of 6.")
@click.option("--orientations", type=int, default=40, show_default=True, help="How many orientations, of 40.")
@click.option("--x", type=int, default=32, show_default=True, help="How many horizontal positions, of 32.")
@click.option("--y", type=int, default=32, show_default=True, help="How many vertical positions, of 32.")
@click.option("--compress/--no-compress", default=True, help="Pack the images; unpacked ones are memory-mapped.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
def dsprites(
    path: Path, size: str, shapes: int, scales: int, orientations: int, x: int, y: int, compress: bool, overwrite: bool
) -> None:
    """Draw dSprites, or a sub-grid with fewer values of a factor, into PATH, an .npz like the published one."""
    if path.suffix != ".npz":
        raise click.UsageError(f"PATH must end in .npz, got {path}")
    if path.exists() and not overwrite:
        raise click.UsageError(f"{path} is there already; name another file, or give --overwrite")
    counts = {"shapes": shapes, "scales": scales, "orientations": orientations, "x": x, "y": y}
    with progress_bar("drawing") as bar:
        make_dsprites(path, size=int(size), compress=compress, progress=bar, **counts)
    click.echo(f"{path}: {load_dsprites(path)}")
