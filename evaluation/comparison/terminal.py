"""The comparison on the terminal."""

from __future__ import annotations

from evaluation.comparison.comparison import Comparison
from evaluation.comparison.tables import LABELS, p_text, rows_of, shown, verdict
from evaluation.statistics.metrics import METRICS


def print_comparison(comparison: Comparison) -> None:
    """Each task's first figure by checkpoint, and the paired differences below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 118)
    kind = "simulated data" if comparison.simulated else "data"
    table = Table(title=f"experiment {comparison.experiment}, {kind}: value [95 % interval]", title_justify="left")
    table.add_column("checkpoint")
    keys = [(task, next(iter(METRICS[kind]))) for task, (kind, _) in comparison.tasks.items()]
    for task, figure in keys:
        table.add_column(f"{task} {LABELS[figure]}", justify="right")
    for name, part in comparison.table.groupby("checkpoint", sort=False):
        found = {(r.task, r.metric): shown(str(r.metric), r.value, r.low, r.high) for r in rows_of(part)}
        table.add_row(str(name), *(found.get(key, "-") for key in keys))
    console.print(table)
    for row in rows_of(comparison.differences):
        sign = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        console.print(
            f"{row.task} {LABELS[str(row.metric)]}: {row.first} - {row.second} = {sign}, {row.test} p {p_text(row.p)}, "
            f"Holm {p_text(row.p_holm)}: {verdict(row)}",
            highlight=False,
        )
    for text in comparison.unpaired:
        console.print(f"not compared: {text}", highlight=False)
    for text in comparison.superseded:
        console.print(f"superseded: {text}", highlight=False)
