"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    Parameters
    ----------
    path : path-like
        The file to write. Missing parent folders are made; a file already there is replaced.

    Yields
    ------
    Path
        Where the block writes. It is removed, and ``path`` left as it was, when the block raises.

    Raises
    ------
    OSError
        The folder cannot be made or written; ``IsADirectoryError`` where ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and a file was to be written there")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same folder, so that the replacement is a rename within one file system, which is atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
