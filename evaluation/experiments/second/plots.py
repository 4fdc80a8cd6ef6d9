"""The plots of the second experiment, one panel for each disease and training size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from evaluation.comparison.plots import LINES, MARKERS, PALETTE, REFERENCE
from evaluation.experiments.plots import draw_interval, label_rows, panels_of_tasks
from evaluation.experiments.second.comparisons import ALL, CURVES, FEATURE_TITLES, PRIMARY
from evaluation.experiments.second.plan import LEVELS, MIDDLE

# Of the rows of the first plot: colour by kind of features; black for methods without an encoder, or trained end to end.
COLOURS = dict(zip(FEATURE_TITLES, (PALETTE[1], PALETTE[2], PALETTE[6], PALETTE[5], PALETTE[3]), strict=True))


def plot_middle(table: pd.DataFrame) -> Any:
    """Plot the AUC and interval of every method at the middle level."""
    table = table[table["level"] == MIDDLE]
    measured = [method for method in ALL if method.title in set(table["method"])]

    def draw(axis: Any, panel: pd.DataFrame) -> None:
        """Draw one panel."""
        rows = panel.set_index("method")
        for position, method in enumerate(measured):
            if method.title in rows.index:
                colour = COLOURS.get(method.features, PALETTE[0])
                draw_interval(axis, rows.loc[method.title], "auc", position, colour)
        label_rows(axis, [method.title for method in measured])
        axis.set_xlabel("AUC on held-out sites, 95 % interval")

    figure, _ = panels_of_tasks(table, draw, height=2.4 + 0.36 * len(measured), sharey=True, sharex="row")
    return figure


def plot_levels(table: pd.DataFrame) -> Any:
    """Plot the AUC of the main methods over the levels of realism, with intervals."""
    shown = [method for method in CURVES if method.title in set(table["method"])]

    def draw(axis: Any, panel: pd.DataFrame) -> None:
        """Draw one panel."""
        for number, method in enumerate(shown):
            points = (
                panel[panel["method"] == method.title].set_index("level").reindex(list(LEVELS)).dropna(subset="auc")
            )
            # Shifted sideways, so that intervals do not hide each other.
            x = [list(LEVELS).index(level) + 0.06 * (number - (len(shown) - 1) / 2) for level in points.index]
            bars = np.maximum([points["auc"] - points["low"], points["high"] - points["auc"]], 0)
            axis.errorbar(x, points["auc"], yerr=bars, label=method.title, color=PALETTE[number % 7], ms=5, capsize=2,
                          lw=1.3, elinewidth=0.8, marker=MARKERS[number % 7], ls=LINES[number % 7])  # fmt: skip
        axis.set_xticks(range(len(LEVELS)), list(LEVELS))
        axis.set_xlim(-0.4, len(LEVELS) - 0.6)
        axis.set_xlabel("level of realism")
        axis.set_ylabel("AUC on held-out sites")

    figure, axes = panels_of_tasks(table, draw, height=7.4)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def plot_differences(table: pd.DataFrame) -> Any:
    """Plot the primary comparisons at every level: y-aware with spatial features and readout minus the other."""
    others = [other.title for other in PRIMARY if other.title in set(table["minus"])]
    offsets = dict(zip(LEVELS, (-0.22, 0.0, 0.22), strict=True))
    colours = dict(zip(LEVELS, (PALETTE[6], PALETTE[0], PALETTE[1]), strict=True))

    def draw(axis: Any, panel: pd.DataFrame) -> None:
        """Draw one panel."""
        axis.axvline(0, color=REFERENCE, ls="--", lw=1)
        for _, row in panel.iterrows():
            draw_interval(
                axis, row, "difference", others.index(row["minus"]) + offsets[row["level"]], colours[row["level"]]
            )
        label_rows(axis, [f"minus {name}" for name in others])

    figure, axes = panels_of_tasks(table, draw, height=6.0, sharey=True, sharex=True)
    for axis in axes[-1]:
        axis.set_xlabel("difference in AUC, 95 % interval")
        axis.locator_params(axis="x", nbins=6)
    for level in dict.fromkeys(table["level"]):
        axes[0, 0].plot([], [], marker="o", ls="-", ms=5, color=colours[level], label=f"{level} level")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    title = "y-aware, spatial + readout, minus each other method"
    figure.legend(handles, labels, loc="outside upper center", ncols=3, title=title)
    return figure
