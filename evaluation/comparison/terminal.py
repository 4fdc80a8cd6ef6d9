"""Prints the comparison on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.comparison.formats import COVERS_BOTH, COVERS_PEOPLE, LABELS, p_text, rows_of, signed, verdict

if TYPE_CHECKING:
    from evaluation.comparison.comparison import Comparison


def print_comparison(comparison: Comparison) -> None:
    """Print each task's primary metric for every checkpoint, then the paired differences."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 118)
    data = "simulated data" if comparison.simulated else "data"
    summary = comparison.summary()
    table = Table(title=f"experiment {comparison.experiment}, {data}: value [95 % interval]", title_justify="left")
    table.add_column("checkpoint")
    for column in summary.columns:
        table.add_column(column, justify="right")
    for name, row in summary.iterrows():
        table.add_row(str(name), *row)
    console.print(table)
    for row in rows_of(comparison.differences):
        console.print(
            f"{row.task} {LABELS[row.metric]}: {row.first} - {row.second} = "
            f"{signed(row.difference, row.low, row.high)}, p {p_text(row.p)}, Holm {p_text(row.p_holm)}: {verdict(row)}; "
            f"models fixed ({row.fixed_test}): {signed(row.fixed_difference, row.fixed_low, row.fixed_high)}, "
            f"p {p_text(row.fixed_p)}",
            highlight=False, markup=False,
        )  # fmt: skip
    if len(comparison.differences):
        console.print(f"{COVERS_BOTH} {COVERS_PEOPLE}", highlight=False)
    for name, task, text in comparison.chosen_features:
        console.print(f"chosen features (layer, pooling, scale), {name}, {task}: {text}", highlight=False, markup=False)
    for line in comparison.unpaired:
        console.print(f"not compared: {line}", highlight=False)
    for line in comparison.superseded:
        console.print(f"superseded: {line}", highlight=False)
