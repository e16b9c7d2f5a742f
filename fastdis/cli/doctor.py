"""``fastdis doctor``: what was built, and what runs where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

import fastdis


@click.command()
def doctor() -> None:
    """Show what was built, and which implementation serves each op on each device, and why."""
    information: Mapping[str, Any] = fastdis.build_info()
    # Wide enough that reasons are not cut off where the output is not a terminal.
    console = Console() if Console().is_terminal else Console(width=160)
    tree = Tree(Text("fastdis", style="bold"))
    for key, value in information.items():
        if key != "ops":
            _grow(tree, str(key), value)
    console.print(tree)
    if isinstance(information.get("ops"), Mapping):
        console.print(_ops_table(information["ops"]))


def _grow(tree: Tree, key: str, value: Any) -> None:
    """Hang a value of any depth on a tree."""
    if isinstance(value, Mapping):
        branch = tree.add(Text(key, style="bold"))
        for name, part in value.items():
            _grow(branch, str(name), part)
    else:
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        tree.add(Text.assemble((key, "bold"), ": ", text or "none"))


def _ops_table(ops: Mapping[str, Any]) -> Table:
    table = Table("op", "device", "implementation", "why")
    for op, devices in ops.items():
        if not isinstance(devices, Mapping):
            table.add_row(op, "", Text(str(devices)), "")
            continue
        for device, choice in devices.items():
            chosen = choice if isinstance(choice, Mapping) else {"backend": choice}
            table.add_row(op, device, Text(str(chosen.get("backend", ""))), Text(str(chosen.get("reason", ""))))
    return table
