"""Reliability beside accuracy: what ``yaware reliability`` logged of the compared checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evaluation.comparison.evaluations import CheckpointEvaluation
from evaluation.comparison.formats import number, rows_of
from evaluation.comparison.plots import REFERENCE, line_styles, panels
from evaluation.comparison.sections import html_table
from evaluation.protocols.variant import JOINT, ProtocolVariant
from evaluation.statistics.metrics import HIGHER_IS_BETTER
from infra.tracking import runs as store

if TYPE_CHECKING:
    from evaluation.comparison.comparison import Comparison

COLUMNS = [
    "checkpoint", "compared", "icc21", "icc21_q25", "icc21_q75", "icc31", "icc31_q25", "icc31_q75", "age_sd", "age_sd_low",
    "age_sd_high", "identification", "identification_low", "identification_high", "identification_chance", "scanner",
    "scanner_low", "scanner_high", "scanner_chance", "run_id",
]  # fmt: skip
HEAD = [
    "checkpoint",
    "compared",
    "ICC(2,1)",
    "ICC(3,1)",
    "retest SD of age (years)",
    "identified",
    "scanner recognised",
]


def reliability_table(uri: str, experiment: str, evaluations: list[CheckpointEvaluation]) -> pd.DataFrame:
    """Return COLUMNS for each evaluation of whose features there is a finished run of ``yaware reliability``, the newest.

    Features are the same if weights, block and pooling are. The encoder's own features stand for the joint ones, of which
    they are a part; features that every fold chooses (``--layer auto``) have no row.
    ``compared`` is scanners, or repeats if there are no several scanners. ICCs are the median and the quartiles over features.
    """
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in store.runs(uri, experiment, "reliability"):  # newest first
        if run["status"] == "FINISHED":
            newest.setdefault(_identity(run["tags"]), run)
    rows = []
    for evaluation in evaluations:
        run = newest.get(_identity(evaluation.run["tags"]), {})
        metrics = run.get("metrics", {})
        compared = next((name for name in ("scanners", "repeats") if f"{name}.icc21" in metrics), "")
        if not compared:
            continue
        columns = {
            name: metrics.get(_key(name, compared), np.nan)
            for name in COLUMNS if name not in ("checkpoint", "compared", "run_id")
        }  # fmt: skip
        rows.append({"checkpoint": evaluation.name, "compared": compared, **columns, "run_id": run["run_id"]})
    return pd.DataFrame(rows, columns=COLUMNS)


def _identity(tags: dict[str, str]) -> tuple[Any, ...]:
    """Return what tells features apart: name, step and weights, and block and pooling if they are not the own features."""
    variant = ProtocolVariant.from_tags(tags)
    own = variant.is_given or variant.layer in ("", JOINT)
    block = ("", ()) if own else (variant.layer, variant.pooling)
    return tags.get("yaware.run_name", ""), tags.get("yaware.step", ""), tags.get("yaware.weights_sha256", ""), *block


def _key(column: str, compared: str) -> str:
    """The metric of a column: icc21_q25 -> scanners.icc21.q25, age_sd -> scanners.sd.age, scanner_low -> scanner.low."""
    name, _, end = column.partition("_")
    if name == "age":
        return f"{compared}.sd.age" + column.removeprefix("age_sd").replace("_", ".")
    return (f"{compared}." if name.startswith("icc") else "") + name + (f".{end}" if end else "")


def rows_as_text(comparison: Comparison) -> list[list[str]]:
    """Return the table as texts in the order of HEAD; the report and LaTeX show it."""
    return [
        [r.checkpoint, r.compared, _limits(r.icc21, r.icc21_q25, r.icc21_q75), _limits(r.icc31, r.icc31_q25, r.icc31_q75),
         _limits(r.age_sd, r.age_sd_low, r.age_sd_high),
         _limits(r.identification, r.identification_low, r.identification_high, r.identification_chance),
         _limits(r.scanner, r.scanner_low, r.scanner_high, r.scanner_chance)]
        for r in rows_of(comparison.reliability)
    ]  # fmt: skip


def section(comparison: Comparison) -> str:
    """Return the table as HTML."""
    return html_table(HEAD, rows_as_text(comparison), words=(0, 1))


def draw(comparison: Comparison) -> Any:
    """Draw each task's primary metric over the median ICC of the features; up and to the right is better."""
    table = comparison.reliability.set_index("checkpoint")
    tasks, styles = list(comparison.tasks), line_styles(comparison.last)
    figure, axes = panels(len(tasks), 2, 3.6)
    for axis, task in zip(axes, tasks, strict=True):
        about = comparison.tasks[task]
        metric = about.primary_metric
        rows = comparison.metrics[(comparison.metrics["task"] == task) & (comparison.metrics["metric"] == metric)]
        for row in rows_of(rows):
            if row.checkpoint not in table.index or row.checkpoint not in styles:
                continue
            repeats = table.loc[row.checkpoint]
            spread = [[repeats["icc21"] - repeats["icc21_q25"]], [repeats["icc21_q75"] - repeats["icc21"]]]
            error = (
                [[max(row.value - row.low, 0.0)], [max(row.high - row.value, 0.0)]] if np.isfinite(row.low) else None
            )
            axis.errorbar(
                repeats["icc21"],
                row.value,
                xerr=spread,
                yerr=error,
                elinewidth=1,
                label=row.checkpoint,
                **styles[row.checkpoint],
            )
        axis.set_xlim(0.0, 1.02)
        axis.axvline(0.75, color=REFERENCE, lw=1, ls="--", zorder=0)
        if not HIGHER_IS_BETTER[metric]:
            axis.invert_yaxis()
        axis.set_title(about.title)
        axis.set_xlabel("ICC(2,1) of features: median, quartiles")
        axis.set_ylabel(comparison.label(task, metric) + ("" if HIGHER_IS_BETTER[metric] else ", inverted"))
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside upper center", ncols=3, fontsize=9)
    return figure


def _limits(value: float, low: float, high: float, chance: float | None = None) -> str:
    if not np.isfinite(value):
        return "-"
    after = "" if chance is None else f"; {number(chance)}"
    return f"{value:.2f} [{number(low)}, {number(high)}{after}]"
