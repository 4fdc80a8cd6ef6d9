"""The report's plots of metrics. Lines differ in marker and dash as well as in colour, so that they print in grey."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evaluation.comparison.evaluations import CheckpointEvaluation
from evaluation.tasks.published import PUBLISHED

if TYPE_CHECKING:
    from evaluation.comparison.comparison import Comparison

# Okabe and Ito's palette (2008), starting with its darkest colour; neighbours differ in lightness too.
PALETTE = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
REFERENCE = "#8a8a8a"
WIDTH = 9.6  # inches
MOST_LINES = 7
RC_PARAMS = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5, "legend.frameon": False,
    "axes.grid": True, "grid.alpha": 0.25, "figure.facecolor": "white", "savefig.facecolor": "white",
    "axes.titlelocation": "left", "svg.hashsalt": "yaware",
}  # fmt: skip


def style() -> AbstractContextManager[None]:
    """Return a context in which figures are drawn and saved in the report's style; other figures keep theirs."""
    import matplotlib

    return matplotlib.rc_context(RC_PARAMS)


def new_figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a figure of the page's width and its axes (rows, columns). ``height`` is in inches.

    The figure does not belong to pyplot: it has no window, and a notebook does not show it twice.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def panels(count: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    """Return a figure with ``count`` axes in rows of up to ``columns``; ``height`` is that of a row in inches."""
    columns = max(1, min(columns, count))
    rows = -(-max(1, count) // columns)
    figure, axes = new_figure(rows, columns, height * rows)
    for axis in axes.ravel()[count:]:
        axis.set_visible(False)
    return figure, list(axes.ravel()[:count])


def line_styles(evaluations: list[CheckpointEvaluation]) -> dict[str, dict[str, Any]]:
    """Return name -> colour, marker and line style of each evaluation."""
    return {
        evaluation.name: {
            "color": PALETTE[n % len(PALETTE)], "marker": MARKERS[n % len(MARKERS)], "linestyle": LINES[n % len(LINES)],
        }
        for n, evaluation in enumerate(evaluations)
    }  # fmt: skip


def forest(comparison: Comparison) -> Any:
    """Plot each task's primary metric with its interval, a row per checkpoint; a dashed line marks chance."""
    last, tasks = comparison.last, comparison.tasks
    styles = line_styles(last)
    figure, axes = panels(len(tasks), 2, 0.75 + 0.27 * len(last))
    longest = max(len(evaluation.name) for evaluation in last)
    for number, (axis, (task, about)) in enumerate(zip(axes, tasks.items(), strict=True)):
        rows = _primary_rows(comparison, task)
        for position, evaluation in enumerate(last):
            if evaluation.name not in rows.index:
                continue
            row = rows.loc[evaluation.name]
            value, error = row["value"], [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            axis.errorbar(
                value, position, xerr=error, capsize=3, lw=1.4, markersize=6, color=styles[evaluation.name]["color"],
                marker=styles[evaluation.name]["marker"],
            )  # fmt: skip
            text = f"{value:.1f}" if about.primary_metric == "mae" else f"{value:.2f}"
            axis.annotate(text, (1.01, position), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        axis.axvline(_chance_of(rows, last), color=REFERENCE, lw=1, ls="--", zorder=0)
        axis.set_ylim(len(last) - 0.5, -0.5)
        named = number % 2 == 0 or longest < 18  # long names would run into the panel on the left
        axis.set_yticks(range(len(last)), [evaluation.name for evaluation in last] if named else [])
        axis.set_title(about.title)
        axis.set_xlabel(comparison.label(task, about.primary_metric))
        axis.grid(axis="y", visible=False)
    return figure


def learning_curves(comparison: Comparison) -> Any:
    """Plot AUC over the number of training scans, with intervals."""
    table, last = comparison.curves, comparison.last
    tasks = [task for task in comparison.tasks if task in set(table["task"])]
    figure, axes = panels(len(tasks), 2, 3.3)
    styles = line_styles(last)
    for axis, task in zip(axes, tasks, strict=True):
        sizes = sorted(set(table.loc[table["task"] == task, "n_train"]))
        for number, evaluation in enumerate(last[:MOST_LINES]):
            points = table[(table["task"] == task) & (table["checkpoint"] == evaluation.name)]
            if points.empty:
                continue
            # Shift the points sideways so that bars do not hide each other; the axis is logarithmic.
            x = points["n_train"] * 1.025 ** (number - (min(len(last), MOST_LINES) - 1) / 2)
            bars = np.abs(points[["low", "high"]].to_numpy().T - points["auc"].to_numpy())
            axis.errorbar(
                x, points["auc"], yerr=bars, capsize=2, lw=1.3, elinewidth=0.8, label=evaluation.name,
                **styles[evaluation.name],
            )  # fmt: skip
        if not comparison.simulated:
            sizes = _draw_published(
                axis, task, sizes, "published, another method" if comparison.unlike_published(task) else "published"
            )
        axis.axhline(0.5, color=REFERENCE, lw=1, ls="--", zorder=0)
        axis.set_xscale("log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xticks([], minor=True)
        axis.set_ylim(max(0.0, axis.get_ylim()[0]), min(1.02, axis.get_ylim()[1]))
        axis.set_title(comparison.tasks[task].title)
        axis.set_xlabel("number of training scans")
        axis.set_ylabel("AUC")
    _legend(figure, axes)
    return figure


def _draw_published(axis: Any, task: str, sizes: list[int], title: str) -> list[int]:
    """Draw the published curves in grey, each named at its end by ``title``; return the sizes to mark on the axis."""
    published = PUBLISHED.get(task, {})
    for method in ("y-Aware", "SimCLR", "age supervision"):
        points = [(size, row[method]) for size, row in published.items()]
        if points:
            axis.plot(*zip(*points, strict=True), color=REFERENCE, lw=1, marker=".", zorder=0)
            axis.annotate(f"{title}: {method}", points[-1], xytext=(4, 0), textcoords="offset points", fontsize=7.5,
                          color="#5f5f5f", va="center")  # fmt: skip
    # Published sizes close to a measured one are not marked, because the numbers would overlap.
    return sorted({*sizes, *(size for size in published if all(abs(np.log(size / own)) > 0.3 for own in sizes))})


def steps(comparison: Comparison) -> Any:
    """Plot each task's primary metric over the pretraining steps of every run that was evaluated at several."""
    tasks = comparison.tasks
    figure, axes = panels(len(tasks), 2, 3.0)
    for axis, (task, about) in zip(axes, tasks.items(), strict=True):
        rows = _primary_rows(comparison, task)
        for number, (label, members) in enumerate(list(comparison.over_steps.items())[:MOST_LINES]):
            points = [
                (each.step, *rows.loc[each.name, ["value", "low", "high"]])
                for each in members
                if each.name in rows.index
            ]
            if not points:
                continue
            x, value, low, high = np.array(points, float).T
            colour = PALETTE[number % len(PALETTE)]
            axis.plot(x, value, label=label, lw=1.4, marker=MARKERS[number % 7], ls=LINES[number % 7], color=colour)
            axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        axis.axhline(_chance_of(rows, comparison.evaluations), color=REFERENCE, lw=1, ls="--", zorder=0)
        axis.set_title(about.title)
        axis.set_xlabel("pretraining step")
        axis.set_ylabel(comparison.label(task, about.primary_metric))
    _legend(figure, axes)
    return figure


def calibration(comparison: Comparison) -> Any:
    """Plot the share of positives over the predicted probability; a perfectly calibrated model follows the diagonal."""
    table = comparison.calibration
    with_probabilities = [evaluation for evaluation in comparison.last if evaluation.name in set(table["checkpoint"])]
    names = [evaluation.name for evaluation in with_probabilities[:MOST_LINES]]
    styles = line_styles(with_probabilities[:MOST_LINES])
    table = table[table["checkpoint"].isin(names)]
    tasks = list(dict.fromkeys(table["task"]))
    figure, axes = panels(len(tasks), 3, 3.4)
    for axis, task in zip(axes, tasks, strict=True):
        axis.plot([0, 1], [0, 1], color=REFERENCE, lw=1, ls="--", zorder=0)
        for name, curve in table[table["task"] == task].groupby("checkpoint", sort=False):
            bars = np.abs(curve[["low", "high"]].to_numpy().T - curve["observed"].to_numpy())
            axis.errorbar(
                curve["predicted"], curve["observed"], yerr=bars, lw=1.3, elinewidth=0.6, label=name, **styles[str(name)]
            )  # fmt: skip
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel="predicted probability")
        axis.set_title(comparison.tasks[task].title)
    axes[0].set_ylabel("share of positives")
    _legend(figure, axes)
    return figure


def training_curves(comparison: Comparison) -> Any:
    """Plot loss, learning rate, gradient norm and speed over the steps of every pretraining."""
    titles = {
        "loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm", "scans_per_second": "scans per second",
    }  # fmt: skip
    figure, axes = panels(4, 2, 2.4)
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for number, (name, history) in enumerate(comparison.trainings.items()):
            x, values = np.array(history[metric], float).T if history[metric] else (np.array([]), np.array([]))
            colour, line = PALETTE[number % len(PALETTE)], LINES[number % len(LINES)]
            smooth = metric != "lr" and len(values) > 20
            if smooth:
                axis.plot(x, values, color=colour, alpha=0.25, lw=0.8)
            axis.plot(x, running_mean(values, 9) if smooth else values, color=colour, ls=line, lw=1.5, label=name)
        axis.set_title(title, pad=14)  # leaves room for the axis's power of ten
        axis.set_xlabel("step")
        if metric == "grad_norm":
            axis.set_yscale("log")
        else:
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    _legend(figure, axes)
    return figure


def to_png(figure: Any, dpi: int = 150) -> bytes:
    """Return a figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def to_svg(figure: Any) -> bytes:
    """Return a figure as SVG without a date: the same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def running_mean(values: Any, width: int) -> Any:
    """Return the mean (N,) over a centred window of ``width`` values, which is cut off at both ends."""
    sums, counts = (np.convolve(v, np.ones(width), mode="same") for v in (values, np.ones(len(values))))
    return sums / counts


def _primary_rows(comparison: Comparison, task: str) -> pd.DataFrame:
    """Rows of a task's primary metric, by checkpoint."""
    table = comparison.metrics
    return table[
        (table["task"] == task) & (table["metric"] == comparison.tasks[task].primary_metric)
    ].set_index("checkpoint")  # fmt: skip


def _chance_of(rows: pd.DataFrame, evaluations: list[CheckpointEvaluation]) -> float:
    """Chance level of the first of these evaluations that has the task; NaN, which draws nothing, if none has."""
    names = [evaluation.name for evaluation in evaluations if evaluation.name in rows.index]
    return float(rows["chance"][names[0]]) if names else float("nan")


def _legend(figure: Any, axes: list[Any]) -> None:
    """Draw one legend above all panels, with every line in any of them."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        longest = max(len(label) for label in handles)
        columns = max(1, min(len(handles), 100 // (longest + 6)))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns)
