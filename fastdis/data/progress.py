"""Progress bars for what takes minutes: drawing, re-chunking and encoding whole datasets, training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[..., None]]:
    """Show a bar, on stderr, from the first call of the ``update(done, total, note="")`` it yields to the block's end.

    Raises
    ------
    ImportError
        The library that draws the bar is not installed.
    """
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError as error:
        raise ImportError("a progress bar needs rich: pip install rich, or leave the progress out") from error

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

    def update(done: int, total: int, note: str = "") -> None:
        progress.update(task, completed=done, total=total, note=note)
        # Not before there is something to show, so that an error in the arguments stands alone on stderr.
        progress.start()

    try:
        yield update
    finally:
        if progress.live.is_started:
            progress.stop()
