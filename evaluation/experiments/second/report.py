"""Writes the tables and plots of the second experiment from the stored answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from evaluation.comparison.plots import style, to_png
from evaluation.experiments.bootstrap import BootstrapMetrics
from evaluation.experiments.second import plots, tables
from evaluation.experiments.second.piece import is_done
from evaluation.experiments.second.plan import LEVELS, MIDDLE, SecondPlan, pieces_of
from evaluation.experiments.second.store import check_same_people, code_of, load_piece
from evaluation.experiments.tables import markdown
from infra.files import atomic_write

PICTURES = {"middle": plots.plot_middle, "levels": plots.plot_levels, "differences": plots.plot_differences}


def write_report(out: Path, results: Path, plan: SecondPlan) -> None:
    """Write results.md, a .csv file for each table and a .png file for each plot, from the pieces that are done.

    Raises UserError if pieces of a level were evaluated on different people.
    """
    pieces = pieces_of(plan)
    done = [piece for piece in pieces if is_done(results, plan, piece)]
    files = [piece.file(results) for piece in done]
    check_same_people(files)
    answers = [entry for file in files for entry in load_piece(file)]
    metrics = BootstrapMetrics(answers, plan.resamples, plan.seed)
    primary, auc = tables.primary_table(metrics, plan), tables.auc_table(metrics, plan)
    complete = all(piece in done for piece in pieces if piece.level == MIDDLE)
    contents = {
        "hopes": tables.hopes_table(primary, complete), "primary": primary, "secondary": tables.secondary_table(metrics, plan),
        "levels": tables.levels_table(metrics, plan), "auc": auc, "age": tables.age_table(metrics),
    }  # fmt: skip
    missing = [piece.name for piece in pieces if piece not in done]
    people = {(entry.clinic, entry.task): len(np.unique(entry.people)) for entry in answers}
    missing_lines = [f"Not yet: {', '.join(missing)}.", ""] if missing else []
    lines = [
        f"Plan: {plan}", "", f"{len(done)} of {len(pieces)} pieces are done.", "", *missing_lines,
        "Code: " + "; ".join(f"{commit}: {', '.join(made)}" for commit, made in code_of(files).items()), "",
        "Test people: " + ", ".join(f"{level} {task} {count}" for (level, task), count in people.items()), "",
        *_sections(contents),
    ]  # fmt: skip
    for name, table in contents.items():
        with atomic_write(out / f"{name}.csv", "w") as stream:
            table.to_csv(stream, index=False)
    with atomic_write(out / "results.md", "w") as stream:
        stream.write("\n".join(lines))
    _write_plots(out, contents)


def _sections(contents: dict[str, pd.DataFrame]) -> Iterator[str]:
    """Yield the lines of results.md with the tables."""
    auc, wide = contents["auc"], tables.wide
    sections = {
        "What was hoped for": contents["hopes"],
        "Primary comparisons at the middle level: difference in AUC, 95 % interval, p corrected by Holm's method": wide(
            contents["primary"], ["minus"], "difference"
        ),
        "Other comparisons at the middle level, not corrected": wide(
            contents["secondary"], ["method", "minus"], "difference"
        ),
    }
    for level, rows in contents["levels"].groupby("level", sort=False):
        if level != MIDDLE:
            sections[f"Primary comparisons at the {level} level, not corrected"] = wide(rows, ["minus"], "difference")
    for level in LEVELS:
        sections[f"AUC at the {level} level, 95 % interval"] = wide(auc[auc["level"] == level], ["method"], "auc")
    sections["Error of the predicted age of healthy people at the test sites, years"] = contents["age"]
    for title, table in sections.items():
        if len(table):
            yield from (f"## {title}", "", *markdown(table), "")


def _write_plots(out: Path, contents: dict[str, pd.DataFrame]) -> None:
    auc = contents["auc"]
    sources = {"middle": auc[auc["level"] == MIDDLE], "levels": auc, "differences": contents["levels"]}
    for name, plot in PICTURES.items():
        if len(sources[name]):
            with style():
                image = to_png(plot(sources[name]), dpi=110)
            with atomic_write(out / f"experiment2_{name}.png") as stream:
                stream.write(image)
