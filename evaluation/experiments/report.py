"""Writes the experiment's tables and plots."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from evaluation.comparison.plots import style, to_png
from evaluation.experiments import tables
from evaluation.experiments.answers import load_answers
from evaluation.experiments.bootstrap import BootstrapMetrics
from evaluation.experiments.plan import MAIN_CLINIC, ExperimentPlan
from evaluation.experiments.plots import plot_main, plot_sweep, plot_variants
from infra.files import atomic_write


def write_report(out: Path, plan: ExperimentPlan) -> None:
    """Write results.md, a .csv file for each table and a .png file for each plot, from the answers in OUT/results."""
    answers = [entry for path in sorted((out / "results").glob("*.npz")) for entry in load_answers(path)]
    metrics = BootstrapMetrics(answers, plan.resamples, plan.seed)
    contents = {
        "main": tables.main_table(metrics, MAIN_CLINIC, "main", plan),
        "unscaled": tables.main_table(metrics, "clinic-a1-unscaled", "unscaled", plan),
        "primary": tables.primary_table(metrics, plan), "sweep": tables.sweep_table(metrics, plan),
        "variants": tables.variants_table(metrics, plan), "bandwidth": tables.bandwidth_table(metrics, plan),
        "age": tables.age_table(metrics),
    }  # fmt: skip
    lines = [f"Plan: {plan}", ""]
    for name, table in contents.items():
        with atomic_write(out / f"{name}.csv", "w") as stream:
            table.to_csv(stream, index=False)
        lines += [f"## {name}", "", *tables.markdown(table), ""]
    people = {(entry.clinic, entry.task): len(np.unique(entry.people)) for entry in answers}
    lines += ["Test people: " + ", ".join(f"{clinic} {task} {count}" for (clinic, task), count in people.items()), ""]
    with atomic_write(out / "results.md", "w") as stream:
        stream.write("\n".join(lines))
    for name, plot in (("main", plot_main), ("sweep", plot_sweep), ("variants", plot_variants)):
        with style():
            image = to_png(plot(contents[name]), dpi=110)
        with atomic_write(out / f"experiment_{name}.png") as stream:
            stream.write(image)
