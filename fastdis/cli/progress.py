"""Progress bars of the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from fastdis.data.progress import progress_bar

SHOWN_TERMS = ("loss", "reconstruction", "kl", "accuracy")


@contextmanager
def training_bar(label: str) -> Iterator[Callable[[int, int, Mapping[str, float]], None]]:
    """Show a bar, with the loss terms, as a callback of :class:`fastdis.training.Trainer`."""
    with progress_bar(label) as update:
        yield lambda step, steps, terms: update(
            step, steps, "  ".join(f"{name} {terms[name]:.3g}" for name in SHOWN_TERMS if name in terms)
        )
