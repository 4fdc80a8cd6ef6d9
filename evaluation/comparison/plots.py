"""The report's pictures of numbers. White, plain; told apart by marker and line as well as by colour."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from evaluation.comparison.comparison import Comparison
from evaluation.comparison.tables import Judged, probabilities
from evaluation.statistics.metrics import METRICS
from evaluation.statistics.subgroups import calibration_curve
from evaluation.tasks.published import PUBLISHED

# Okabe and Ito (2008), from the darkest: neighbours differ in grey too.
PALETTE = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
REFERENCE = "#8a8a8a"
WIDE = 9.6  # inches: a page's width at 100 dots an inch
MOST_LINES = 7


def pyplot() -> Any:
    """matplotlib.pyplot with the look of the report."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5, "legend.frameon": False,
         "axes.grid": True, "grid.alpha": 0.25, "figure.facecolor": "white", "savefig.facecolor": "white",
         "axes.titlelocation": "left", "svg.hashsalt": "yaware"}
    )  # fmt: skip
    return plt


def looks(judged: list[Judged]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each checkpoint, by name."""
    return {
        each.name: {
            "color": PALETTE[n % len(PALETTE)], "marker": MARKERS[n % len(MARKERS)], "linestyle": LINES[n % len(LINES)],
        }
        for n, each in enumerate(judged)
    }  # fmt: skip


def panels(count: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    """A figure of the page's width with ``count`` axes, ``columns`` a row."""
    plt = pyplot()
    columns = max(1, min(columns, count))
    rows = -(-max(1, count) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDE, height * rows), squeeze=False, layout="constrained")
    for axis in axes.ravel()[count:]:
        axis.set_visible(False)
    return figure, list(axes.ravel()[:count])


def forest(comparison: Comparison) -> Any:
    """Each task's first figure with its 95 % interval, a line a checkpoint; the dashed line is chance."""
    last, tasks = comparison.last, comparison.tasks
    style, table = looks(last), comparison.table
    figure, axes = panels(len(tasks), 2, 0.75 + 0.27 * len(last))
    longest = max(len(each.name) for each in last)
    for number, (axis, (task, (kind, title))) in enumerate(zip(axes, tasks.items(), strict=True)):
        name = next(iter(METRICS[kind]))
        part = table[(table["task"] == task) & (table["metric"] == name)].set_index("checkpoint")
        for place, each in enumerate(last):
            if each.name not in part.index:
                continue
            row = part.loc[each.name]
            value, error = row["value"], [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            axis.errorbar(
                value, place, xerr=error, capsize=3, lw=1.4, markersize=6, color=style[each.name]["color"],
                marker=style[each.name]["marker"],
            )  # fmt: skip
            text = f"{value:.1f}" if name == "mae" else f"{value:.2f}"
            axis.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        chance = _chance(each_label=_labels_of(last, task), kind=kind)
        if chance is not None:
            axis.axvline(chance, color=REFERENCE, lw=1, ls="--", zorder=0)
        axis.set_ylim(len(last) - 0.5, -0.5)
        axis.set_yticks(range(len(last)), [each.name for each in last] if number % 2 == 0 or longest < 18 else [])
        axis.set_title(title)
        axis.set_xlabel(comparison.label(task, name))
        axis.grid(axis="y", visible=False)
    return figure


def learning_curves(comparison: Comparison) -> Any:
    """AUC over the number of training scans; bars are Nadeau and Bengio's 95 % intervals over the draws."""
    curves, last = comparison.curves, comparison.last
    tasks = [task for task in comparison.tasks if task in set(curves["task"])]
    figure, axes = panels(len(tasks), 2, 3.3)
    style = looks(last)
    for axis, task in zip(axes, tasks, strict=True):
        sizes = sorted(set(curves.loc[curves["task"] == task, "n_train"]))
        for number, each in enumerate(last[:MOST_LINES]):
            part = curves[(curves["task"] == task) & (curves["checkpoint"] == each.name)]
            # Beside each other, so that bars do not hide bars; the axis is logarithmic.
            x = part["n_train"] * 1.025 ** (number - (min(len(last), MOST_LINES) - 1) / 2)
            bars = np.abs(part[["low", "high"]].to_numpy().T - part["auc"].to_numpy())
            axis.errorbar(
                x, part["auc"], yerr=bars, capsize=2, lw=1.3, elinewidth=0.8, label=each.name, **style[each.name]
            )
        if not comparison.simulated:
            sizes = _reference(axis, task, sizes)
        axis.axhline(0.5, color=REFERENCE, lw=1, ls="--", zorder=0)
        axis.set_xscale("log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xticks([], minor=True)
        axis.set_ylim(max(0.0, axis.get_ylim()[0]), min(1.02, axis.get_ylim()[1]))
        axis.set_title(comparison.tasks[task][1])
        axis.set_xlabel("training scans")
        axis.set_ylabel("AUC")
    _legend(figure, axes)
    return figure


def _reference(axis: Any, task: str, sizes: list[int]) -> list[int]:
    """The published curves behind, in grey, each named at its end; the sizes to mark."""
    published = PUBLISHED.get(task, {})
    for method in ("y-Aware", "SimCLR", "age supervision"):
        points = [(size, row[method]) for size, row in published.items()]
        if points:
            axis.plot(*zip(*points, strict=True), color=REFERENCE, lw=1, marker=".", zorder=0)
            axis.annotate(f"published: {method}", points[-1], xytext=(4, 0), textcoords="offset points", fontsize=7.5,
                          color="#5f5f5f", va="center")  # fmt: skip
    # Of two marks that would run into each other only ours stays.
    return sorted({*sizes, *(size for size in published if all(abs(np.log(size / own)) > 0.3 for own in sizes))})


def steps(comparison: Comparison) -> Any:
    """Each task's first figure over the pretraining steps of every run that was judged at several."""
    series = series_of(comparison)
    tasks = comparison.tasks
    figure, axes = panels(len(tasks), 2, 3.0)
    table = comparison.table.set_index(["checkpoint", "task", "metric"])
    for axis, (task, (kind, title)) in zip(axes, tasks.items(), strict=True):
        name = next(iter(METRICS[kind]))
        for number, (label, members) in enumerate(list(series.items())[:MOST_LINES]):
            rows = [(each.step, *table.loc[(each.name, task, name), ["value", "low", "high"]])
                    for each in members if (each.name, task, name) in table.index]  # fmt: skip
            if not rows:
                continue
            at, value, low, high = np.array(rows, float).T
            colour = PALETTE[number % len(PALETTE)]
            axis.plot(at, value, label=label, lw=1.4, marker=MARKERS[number % 7], ls=LINES[number % 7], color=colour)
            axis.fill_between(at, low, high, color=colour, alpha=0.12, lw=0)
        chance = _chance(each_label=_labels_of(comparison.judged, task), kind=kind)
        if chance is not None:
            axis.axhline(chance, color=REFERENCE, lw=1, ls="--", zorder=0)
        axis.set_title(title)
        axis.set_xlabel("pretraining step")
        axis.set_ylabel(comparison.label(task, name))
    _legend(figure, axes)
    return figure


def series_of(comparison: Comparison) -> dict[str, list[Judged]]:
    """Run (and protocol, where there are several) -> its evaluations by step, of runs judged at two steps or more."""
    found: dict[str, list[Judged]] = {}
    several = len({each.protocol for each in comparison.judged}) > 1
    for each in sorted(comparison.judged, key=lambda judged: judged.step):
        found.setdefault(f"{each.series}, {each.protocol}" if several else each.series, []).append(each)
    return {name: members for name, members in found.items() if len({each.step for each in members}) > 1}


def calibration(comparison: Comparison) -> Any:
    """Share of positives among scans given a probability, against that probability; the diagonal is perfect."""
    last = [each for each in comparison.last if calibrated_tasks([each])][:MOST_LINES]
    tasks = calibrated_tasks(last)
    figure, axes = panels(len(tasks), 3, 3.4)
    style = looks(last)
    for axis, task in zip(axes, tasks, strict=True):
        axis.plot([0, 1], [0, 1], color=REFERENCE, lw=1, ls="--", zorder=0)
        for each in last:
            if task not in calibrated_tasks([each]):
                continue
            part = each.of(task)
            people = part["participant"].to_numpy()
            shares = probabilities(part)
            assert shares is not None
            # Twenty people a bin at least, and no more than ten bins.
            bins = int(np.clip(len(np.unique(people)) // 20, 2, 10))
            curve = calibration_curve(part["label"].to_numpy(np.int64), shares, people, bins)
            bars = np.abs(curve[["low", "high"]].to_numpy().T - curve["observed"].to_numpy())
            axis.errorbar(
                curve["predicted"],
                curve["observed"],
                yerr=bars,
                lw=1.3,
                elinewidth=0.6,
                label=each.name,
                **style[each.name],
            )
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel="probability given")
        axis.set_title(comparison.tasks[task][1])
    if axes:
        axes[0].set_ylabel("share of positives")
    _legend(figure, axes)
    return figure


def calibrated_tasks(judged: list[Judged]) -> list[str]:
    """Binary tasks of which probabilities were stored."""
    found = [
        task for each in judged for task in each.tasks
        if each.kind(task) == "binary" and probabilities(each.of(task)) is not None
    ]  # fmt: skip
    return list(dict.fromkeys(found))


def training_curves(comparison: Comparison) -> Any:
    """Loss, learning rate, gradient norm and speed over the steps of every pretraining run."""
    titles = {
        "loss": "loss",
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "scans_per_second": "scans per second",
    }
    figure, axes = panels(4, 2, 2.4)
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for number, (name, curves) in enumerate(comparison.trainings.items()):
            at, values = np.array(curves[metric], float).T if curves[metric] else (np.array([]), np.array([]))
            colour, line = PALETTE[number % len(PALETTE)], LINES[number % len(LINES)]
            smooth = metric != "lr" and len(values) > 20
            if smooth:
                axis.plot(at, values, color=colour, alpha=0.25, lw=0.8)
            axis.plot(at, running_mean(values, 9) if smooth else values, color=colour, ls=line, lw=1.5, label=name)
        axis.set_title(title, pad=14)  # above the power of ten
        axis.set_xlabel("step")
        if metric == "grad_norm":
            axis.set_yscale("log")
        else:
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    _legend(figure, axes)
    return figure


def to_png(figure: Any, dots: int = 150) -> bytes:
    """A figure's PNG bytes; the figure stays."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dots)
    return stream.getvalue()


def to_svg(figure: Any) -> bytes:
    """A figure's SVG bytes, which print sharp at any size."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def running_mean(values: Any, width: int) -> Any:
    """Mean over a centred window that shrinks at the ends."""
    sums, counts = (np.convolve(v, np.ones(width), mode="same") for v in (values, np.ones(len(values))))
    return sums / counts


def _labels_of(judged: list[Judged], task: str) -> pd.Series:
    return next(each.of(task)["label"] for each in judged if task in each.tasks)


def _chance(each_label: pd.Series, kind: str) -> float | None:
    """What answers that know nothing come to: AUC 0.5, 1 of K classes, the MAE of answering the median."""
    if kind == "binary":
        return 0.5
    if kind == "multiclass":
        return 1 / each_label.nunique()
    return float(np.abs(each_label - each_label.median()).mean())


def _legend(figure: Any, axes: list[Any]) -> None:
    """One legend above all panels, of every line that any of them has."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if found:
        width = max(len(label) for label in found)
        columns = max(1, min(len(found), 100 // (width + 6)))
        figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=columns)


Picture = Callable[[Comparison], Any]
