"""The commands under one name, and what becomes of their errors."""

from __future__ import annotations

import sys

import click

import fastdis
from fastdis.cli.data import data
from fastdis.cli.demo import demo
from fastdis.cli.doctor import doctor
from fastdis.cli.evaluate import evaluate
from fastdis.cli.reproduce import reproduce
from fastdis.cli.train import train
from fastdis.training import TrainingDivergedError

# What a wrong path, number or file raises. Anything else is a defect of the package and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, TrainingDivergedError)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fastdis.__version__, prog_name="fastdis")
def app() -> None:
    """Train, evaluate and inspect disentangling models."""


for command in (doctor, data, train, evaluate, demo, reproduce):
    app.add_command(command)


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code, every user error being one sentence on stderr."""
    if not arguments:
        arguments = ["--help"]
    try:
        # Commands return nothing; click returns an exit code where --help or --version ended it.
        return app.main(arguments, prog_name="fastdis", standalone_mode=False) or 0
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except click.Abort:
        return _fail("interrupted", 1)
    except BrokenPipeError:
        # The reader, such as `head`, has left; the interpreter must not fail on flushing to it.
        sys.stdout = None
        return 1
    except USER_ERRORS as error:
        return _fail(str(error) or type(error).__name__, 1)


def _fail(message: str, code: int) -> int:
    print("fastdis: " + " ".join(message.split()), file=sys.stderr)
    return code
