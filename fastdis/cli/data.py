"""``fastdis data``: make datasets, and look into files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from fastdis.data import CelebA, load, load_dsprites, make_dsprites, make_shapes3d
from fastdis.data.progress import progress_bar

SIZE = click.option("--size", type=click.Choice(["64", "32"]), default="64", show_default=True, help="Pixels a side.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace a file that is there.")


@click.group()
def data() -> None:
    """Make datasets, and look into files."""


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
def info(path: Path) -> None:
    """Tell what dataset PATH holds, and what its factors are. Packed images are read too, as a check of the file."""
    with _missing_library_is_an_error():
        dataset = load(path)
    click.echo(f"{path}: {dataset}")
    if isinstance(dataset, CelebA) or dataset.factor_values is None:
        return
    for name, values in zip(dataset.factor_names, dataset.factor_values, strict=True):
        span = f"{values[0]:.4g}" if len(values) == 1 else f"{values[0]:.4g} to {values[-1]:.4g}, {len(values)} values"
        click.echo(f"  {name}: {span}")


@data.group()
def make() -> None:
    """Draw a dataset from scratch."""


@make.command()
@click.argument("path", type=click.Path(path_type=Path))
@SIZE
@click.option("--shapes", type=int, default=3, show_default=True, help="How many shapes, of 3.")
@click.option("--scales", type=int, default=6, show_default=True, help="How many scales, of 6.")
@click.option("--orientations", type=int, default=40, show_default=True, help="How many orientations, of 40.")
@click.option("--x", type=int, default=32, show_default=True, help="How many horizontal positions, of 32.")
@click.option("--y", type=int, default=32, show_default=True, help="How many vertical positions, of 32.")
@click.option("--compress/--no-compress", default=True, help="Pack the images; unpacked ones are memory-mapped.")
@OVERWRITE
def dsprites(
    path: Path, size: str, shapes: int, scales: int, orientations: int, x: int, y: int, compress: bool, overwrite: bool
) -> None:
    """Draw dSprites, or a sub-grid with fewer values of a factor, into PATH, an .npz like the published one."""
    _check_path(path, ".npz", overwrite)
    counts = {"shapes": shapes, "scales": scales, "orientations": orientations, "x": x, "y": y}
    with progress_bar("drawing") as bar:
        make_dsprites(path, size=int(size), compress=compress, progress=bar, **counts)
    click.echo(f"{path}: {load_dsprites(path)}")


@make.command()
@click.argument("path", type=click.Path(path_type=Path))
@SIZE
@click.option("--floor-hues", type=int, default=10, show_default=True, help="How many hues of the floor, of 10.")
@click.option("--wall-hues", type=int, default=10, show_default=True, help="How many hues of the wall, of 10.")
@click.option("--object-hues", type=int, default=10, show_default=True, help="How many hues of the object, of 10.")
@click.option("--scales", type=int, default=8, show_default=True, help="How many scales, of 8.")
@click.option("--shapes", type=int, default=4, show_default=True, help="How many shapes, of 4.")
@click.option("--orientations", type=int, default=15, show_default=True, help="How many orientations, of 15.")
@click.option("--compress/--no-compress", default=False, help="Pack the images; unpacked ones are memory-mapped.")
@OVERWRITE
def shapes3d(path: Path, size: str, compress: bool, overwrite: bool, **counts: int) -> None:
    """Draw coloured 3D shapes, or a sub-grid with fewer values of a factor, into PATH, an .h5 like 3D Shapes."""
    _check_path(path, ".h5", overwrite)
    with _missing_library_is_an_error(), progress_bar("drawing") as bar:
        make_shapes3d(path, size=int(size), compress=compress, progress=bar, **counts)
    click.echo(f"{path}: {math.prod(counts.values())} images of {[3, int(size), int(size)]}")


def _check_path(path: Path, suffix: str, overwrite: bool) -> None:
    if path.suffix != suffix:
        raise click.UsageError(f"PATH must end in {suffix}, got {path}")
    if path.exists() and not overwrite:
        raise click.UsageError(f"{path} is there already; name another file, or give --overwrite")


@contextmanager
def _missing_library_is_an_error() -> Iterator[None]:
    """Show what to install as one sentence, where a format needs a library that is not there."""
    try:
        yield
    except ImportError as error:
        raise click.ClickException(str(error)) from error
