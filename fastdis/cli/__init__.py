"""The ``fastdis`` command. Needs the ``cli`` extra: click, rich and matplotlib."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``fastdis`` command.

    Parameters
    ----------
    arguments : sequence of str, optional
        What would stand after ``fastdis`` on the command line; the process's own by default.

    Returns
    -------
    int
        Exit code: 0 done, 1 failed, 2 asked for something that does not exist. Every error is one sentence on stderr.
    """
    try:
        import click  # noqa: F401
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        print(f"fastdis: the command line needs {error.name}; run pip install fastdis[cli]", file=sys.stderr)
        return 1
    from fastdis.cli.app import run

    return run(sys.argv[1:] if arguments is None else list(arguments))
