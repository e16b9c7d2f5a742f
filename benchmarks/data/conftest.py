"""The table of the generators."""

import torch
from rich.console import Console
from rich.table import Table


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [b.extra_info for b in session.benchmarks if "images_per_second" in b.extra_info] if session else []
    if not rows:
        return
    table = Table(title=f"Generators, {torch.get_num_threads()} threads: images a second")
    for heading in ("generator", "what", "images", "s", "images/s", "memory copy", "plain write", "target"):
        table.add_column(heading, justify="left" if heading in ("generator", "what") else "right")
    for row in rows:
        target, found = row["target"], row["images_per_second"]
        verdict = "" if target is None else f"{target:,} {'ok' if found >= target else 'MISSED'}"
        table.add_row(
            row["generator"], row["what"], f"{row['images']:,}", f"{row['seconds_in_all']:.2f}", f"{found:,.0f}",
            f"{row['floor_images_per_second']:,.0f}",
            "" if row["write_images_per_second"] is None else f"{row['write_images_per_second']:,.0f}", verdict,
        )  # fmt: skip
    console = Console(width=max(120, terminalreporter._tw.fullwidth))
    console.print()
    console.print(table)
    console.print(
        "memory copy: the same bytes copied once, the floor of drawing. plain write: the same bytes written to a file "
        "in the same place, between the rounds, the floor of an uncompressed file. Medians."
    )
