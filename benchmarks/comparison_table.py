"""The table that a comparison with a reference implementation ends with."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_comparison(terminalreporter: Any, config: Any, title: str, subject: str) -> None:
    """Print the rows that the benchmarks of a run left behind, if any."""
    session = getattr(config, "_benchmarksession", None)
    rows = [b.extra_info for b in session.benchmarks if "ours_seconds" in b.extra_info] if session else []
    if not rows:
        return
    table = Table(title=title)
    for heading in (subject, "on"):
        table.add_column(heading)
    for heading in ("ours s", "reference s", "ratio", "score", "reference score", "target"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = [row.get(key) for key in ("ours_seconds", "reference_seconds", "ratio", "score", "reference_score")]
        table.add_row(row["case"], row["on"], *("" if x is None else f"{x:.4g}" for x in numbers), verdict(row))
    console = Console(width=max(140, terminalreporter._tw.fullwidth))
    console.print()
    console.print(table)
    console.print("ratio: the reference implementation's time over ours, higher is better, below 1 is a loss.")


def verdict(row: dict[str, Any]) -> str:
    """Return the target of a row, and whether it was reached."""
    if row.get("most_seconds") is not None:
        return f"{row['most_seconds']:g} s {'ok' if row['ours_seconds'] <= row['most_seconds'] else 'MISSED'}"
    if row["target"] is None:
        return ""
    return f"{row['target']:g}x {'ok' if row['ratio'] >= row['target'] else 'MISSED'}"
