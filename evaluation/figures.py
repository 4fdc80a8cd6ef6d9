"""The report's pictures. One look: white, plain, a palette that colour-blind readers can tell apart."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from evaluation.compare import Comparison

# Okabe and Ito (2008)
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "legend.frameon": False,
         "axes.grid": True, "grid.alpha": 0.25, "figure.facecolor": "white", "savefig.facecolor": "white"}
    )  # fmt: skip
    return plt


def _colours(comparison: Comparison) -> dict[str, str]:
    names = [each.name for each in comparison.judged]
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(names)}


def training_curves(comparison: Comparison) -> Any:
    """Loss, learning rate, gradient norm and speed over the steps of every pretraining run."""
    plt, colours = _pyplot(), _colours(comparison)
    titles = {
        "loss": "contrastive loss",
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "scans_per_second": "scans per second",
    }
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1), layout="constrained")
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for number, (name, curves) in enumerate(comparison.trainings.items()):
            steps, values = np.array(curves[metric]).T if curves[metric] else (np.array([]), np.array([]))
            colour = colours.get(name, PALETTE[number % len(PALETTE)])
            smooth = metric in ("loss", "grad_norm", "scans_per_second") and len(values) > 20
            axis.plot(steps, values, color=colour, alpha=0.3 if smooth else 1.0, lw=1, label=None if smooth else name)
            if smooth:
                axis.plot(steps, _running_mean(values, 9), color=colour, lw=1.8, label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        if metric == "grad_norm":
            axis.set_yscale("log")
        else:
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    if comparison.trainings:
        axes[0].legend()
    return figure


def embedding_by_age(comparison: Comparison) -> Any:
    """The first two principal components of each checkpoint's features, coloured by age; patients as crosses."""
    plt = _pyplot()
    count = len(comparison.judged)
    figure, axes = plt.subplots(1, count, figsize=(4.1 * count + 0.8, 3.9), squeeze=False, layout="constrained")
    ages = np.concatenate([each.embedding["age"].to_numpy(float) for each in comparison.judged])
    limits = {"vmin": np.nanmin(ages), "vmax": np.nanmax(ages), "cmap": "viridis"}
    dots: Any = None
    for axis, each in zip(axes[0], comparison.judged, strict=True):
        table = each.embedding
        known = table["age"].notna().to_numpy()
        dots = axis.scatter(
            table["x"][known], table["y"][known], c=table["age"][known], s=14, alpha=0.85, linewidths=0, **limits
        )
        correlation = (
            abs(float(np.corrcoef(table["x"][known], table["age"][known])[0, 1])) if known.sum() > 2 else float("nan")
        )
        axis.set_title(f"{each.name}: |r(first axis, age)| = {correlation:.2f}")
        axis.set_xlabel("first principal component")
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0][0].set_ylabel("second principal component")
    if dots is not None:
        figure.colorbar(dots, ax=axes[0], label="age (years)", fraction=0.03, pad=0.01)
    return figure


def auc_intervals(comparison: Comparison) -> Any:
    """AUC of every binary task and checkpoint with its 95 % interval, and the line of chance."""
    plt, colours = _pyplot(), _colours(comparison)
    table = comparison.table[comparison.table["figure"] == "auc"]
    tasks = list(dict.fromkeys(table["task"]))
    titles = dict(zip(table["task"], table["title"], strict=True))
    names = [each.name for each in comparison.judged]
    figure, axis = plt.subplots(
        figsize=(max(5.0, 1.4 + 1.1 * len(tasks) * max(1, len(names)) * 0.75), 3.9), layout="constrained"
    )
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        part = table[table["checkpoint"] == name].set_index("task")
        for place, task in enumerate(tasks):
            if task not in part.index:
                continue
            row = part.loc[task]
            x = place + (number - (len(names) - 1) / 2) * width
            axis.bar(x, row["value"], width * 0.9, color=colours[name], alpha=0.85, label=name if place == 0 else None)
            axis.errorbar(
                x,
                row["value"],
                [[row["value"] - row["low"]], [row["high"] - row["value"]]],
                color="black",
                capsize=3,
                lw=1.2,
            )
            axis.text(x, min(row["high"] + 0.012, 1.03), f"{row['value']:.2f}", ha="center", va="bottom", fontsize=9)
    axis.axhline(0.5, color="black", lw=1, ls="--")
    axis.text(1.0, 0.5, " chance", transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    axis.set_xticks(range(len(tasks)), [titles[task] for task in tasks])
    axis.set_ylim(0, 1.08)
    axis.set_ylabel("AUC (95 % interval over participants)")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=min(4, max(1, len(names))))
    return figure


def learning_curves(comparison: Comparison) -> Any:
    """AUC on the fixed test participants over the number of training scans; bands are 95 % intervals of the mean draw."""
    plt, colours = _pyplot(), _colours(comparison)
    tasks = list(dict.fromkeys(task for each in comparison.judged for task in each.curve["task"]))
    titles = dict(zip(comparison.table["task"], comparison.table["title"], strict=True))
    wide = 4.4 * max(1, len(tasks)) + 0.4
    figure, axes = plt.subplots(
        1, max(1, len(tasks)), figsize=(wide, 3.7), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, task in zip(axes[0], tasks, strict=False):
        for number, each in enumerate(comparison.judged):
            groups = each.curve[each.curve["task"] == task].groupby("n_train")["auc"]
            sizes = np.array(sorted(groups.groups))
            means = groups.mean().to_numpy()
            error = 1.96 * (groups.std(ddof=1) / np.sqrt(groups.count())).fillna(0).to_numpy()
            axis.plot(sizes, means, marker=MARKERS[number % len(MARKERS)], color=colours[each.name], label=each.name)
            axis.fill_between(sizes, means - error, means + error, color=colours[each.name], alpha=0.15, lw=0)
            axis.set_xticks(sizes)
        axis.axhline(0.5, color="black", lw=1, ls="--")
        axis.set_title(titles.get(task, task))
        axis.set_xlabel("training scans")
    axes[0][0].set_ylabel("AUC on held-out participants")
    axes[0][-1].legend(loc="best")
    return figure


FIGURES_OF_THE_REPORT: dict[str, Callable[[Comparison], Any]] = {
    "auc": auc_intervals,
    "learning_curve": learning_curves,
    "embedding_age": embedding_by_age,
    "training_curves": training_curves,
}


def to_png(figure: Any) -> bytes:
    """A figure's PNG bytes, and the end of the figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    _pyplot().close(figure)
    return stream.getvalue()


def _running_mean(values: Any, width: int) -> Any:
    """Mean over a centred window that shrinks at the ends."""
    sums, counts = (np.convolve(v, np.ones(width), mode="same") for v in (values, np.ones(len(values))))
    return sums / counts
