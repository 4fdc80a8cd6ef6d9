"""The command ``yaware cohort inspect``: survey a cohort, print its tables, write its page and its quarantine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.quality.columns import Table
from data_pipeline.quality.page import write_page
from data_pipeline.quality.rules import write_quarantine
from data_pipeline.quality.survey import Survey, survey_cohort, tables
from infra.errors import UserError
from infra.files import check_output

FILE_COLUMNS = 140  # width of the tables if the output is not a terminal


def inspect_cohort(cohort: str | Path, out: Path | None = None, **reading: Any) -> Path:
    """Survey a cohort, print its tables, and write ``inspect.html`` and ``quarantine.tsv``.

    Args:
        cohort: see ``data_pipeline.cohort.read.read_cohort``.
        out: the folder to write; default ``inspect-<data set>`` in the current folder.
        reading: the other arguments of ``survey_cohort``.

    Returns:
        The path of ``inspect.html``.

    Raises:
        UserError: ``out`` is inside the cohort's folder, or the cohort or an option is wrong.
    """
    root = Path(cohort).resolve()
    folder = (out or Path(f"inspect-{reading.get('dataset') or root.name}")).resolve()
    if folder.is_relative_to(root):
        raise UserError(
            f"--out={folder} is inside the cohort, which is never written to; choose a folder outside {root}"
        )
    check_output(folder, "--out")
    survey = survey_cohort(root, parts=folder, **reading)
    print_tables(survey)
    write_quarantine(folder / "quarantine.tsv", survey.removals)
    return write_page(survey, folder / "inspect.html")


def print_tables(survey: Survey) -> None:
    """Print the survey's tables, as wide as the terminal, or ``FILE_COLUMNS`` wide if the output is a file."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else FILE_COLUMNS, highlight=False)
    for table in [*tables(survey), *survey.columns]:
        if not table.rows:
            continue
        rich_table = RichTable(title=table.title, title_justify="left", title_style="bold", show_header=any(table.head))
        for name in table.head:
            rich_table.add_column(name, justify="right" if _all_numbers(table, name) else "left", overflow="fold")
        for row in table.rows:
            rich_table.add_row(*(Text(cell) for cell in row))
        console.print(rich_table)


def _all_numbers(table: Table, name: str) -> bool:
    cells = [row[table.head.index(name)] for row in table.rows]
    return all(np.char.isnumeric(cell.strip("-%").replace(".", "")) for cell in cells if cell)
