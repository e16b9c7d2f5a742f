"""What every reader does around its format: name the file in an error, find the library it needs, show progress."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdis.data.progress import progress_bar

Progress = Callable[[int, int], None]


def library(name: str) -> Any:
    """Return a module that only some readers need.

    Raises
    ------
    ImportError
        It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name.partition('.')[0]}: pip install 'fastdis[data]'") from error


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into an error that names the file and what it should have been.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        ``path`` is no file.
    ValueError
        The block failed to read it.
    """
    require_file(path, expected)
    try:
        yield
    except (ImportError, MemoryError):
        raise
    # A damaged file can fail anywhere in any parser, with any error.
    except Exception as error:
        raise ValueError(f"{path}: not a readable {expected} ({error or type(error).__name__})") from error


def require_file(path: Path, expected: str) -> None:
    """Check that there is a file.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        ``path`` is no file.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder; expected a {expected}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected a {expected}")


@contextmanager
def reporting(progress: bool | Progress, label: str) -> Iterator[Progress]:
    """Yield what to call as ``report(done, total)``: a bar on stderr for True, nothing for False."""
    if callable(progress):
        yield progress
    elif progress:
        with progress_bar(label) as update:
            yield update
    else:
        yield lambda done, total: None
