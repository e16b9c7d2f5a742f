"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN_TERMS = ("loss", "reconstruction", "kl", "accuracy")


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar, on stderr, from the first call of the ``update(done, total, note)`` it yields to the block's end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task(label, total=None, note="")

    def update(done: int, total: int, note: str) -> None:
        progress.update(task, completed=done, total=total, note=note)
        # Not before there is something to show, so that an error in the arguments stands alone on stderr.
        progress.start()

    try:
        yield update
    finally:
        if progress.live.is_started:
            progress.stop()


@contextmanager
def drawing_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar for :func:`fastdis.data.make_dsprites`."""
    with progress_bar(label) as update:
        yield lambda done, total: update(done, total, "")


@contextmanager
def training_bar(label: str) -> Iterator[Callable[[int, int, Mapping[str, float]], None]]:
    """Show a bar, with the loss terms, as a callback of :class:`fastdis.training.Trainer`."""
    with progress_bar(label) as update:
        yield lambda step, steps, terms: update(
            step, steps, "  ".join(f"{name} {terms[name]:.3g}" for name in SHOWN_TERMS if name in terms)
        )
