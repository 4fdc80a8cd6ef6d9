"""The experiment's plots, one panel for each task and training size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from evaluation.comparison.plots import LINES, MARKERS, PALETTE, REFERENCE, new_figure
from evaluation.experiments.plan import DISEASES
from evaluation.experiments.tables import NAMES, SWEEP, TITLES


def plot_main(table: pd.DataFrame) -> Any:
    """Plot the AUC and interval of every method."""
    methods = [name for name in NAMES.values() if name in set(table["method"])]

    def draw(axis: Any, panel: pd.DataFrame) -> None:
        """Draw one panel."""
        rows = panel.set_index("method")
        for position, method in enumerate(methods):
            if method in rows.index:
                color = PALETTE[1] if method == NAMES["y-aware"] else PALETTE[2]
                draw_interval(axis, rows.loc[method], "auc", position, color)
            else:
                axis.text(0.98, position, "not measured", transform=axis.get_yaxis_transform(), ha="right", va="center",
                          color=REFERENCE, fontsize=9)  # fmt: skip
        label_rows(axis, methods)
        axis.set_xlabel("AUC on held-out sites, 95 % interval")

    figure, _ = panels_of_tasks(table, draw, height=6.4, sharey=True, sharex="row")
    return figure


def plot_sweep(table: pd.DataFrame) -> Any:
    """Plot the AUC of every method over the acceleration of ageing in the disease."""
    methods = [name for name in NAMES.values() if name in set(table["method"])]

    def draw(axis: Any, panel: pd.DataFrame) -> None:
        """Draw one panel."""
        for number, method in enumerate(methods):
            points = panel[panel["method"] == method]
            axis.plot(points["acceleration"], points["auc"], label=method, color=PALETTE[number % 7], ms=5,
                      marker=MARKERS[number % 7], ls=LINES[number % 7])  # fmt: skip
        axis.set_xticks(list(SWEEP.values()), ["pattern\nalone", "both", "accelerated\nageing alone"])
        axis.set_ylabel("AUC on held-out sites")

    figure, axes = panels_of_tasks(table, draw, height=6.6)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def plot_variants(table: pd.DataFrame) -> Any:
    """Plot the difference between y-aware and age regression under each variant."""
    variants = list(dict.fromkeys(table["variant"]))

    def draw(axis: Any, panel: pd.DataFrame) -> None:
        """Draw one panel."""
        rows = panel.set_index("variant")
        axis.axvline(0, color=REFERENCE, ls="--", lw=1)
        for position, variant in enumerate(variants):
            if variant in rows.index:
                draw_interval(axis, rows.loc[variant], "difference", position, PALETTE[0])
        label_rows(axis, variants)

    figure, axes = panels_of_tasks(table, draw, height=6.8, sharey=True, sharex=True)
    for axis in axes[-1]:
        axis.set_xlabel("AUC of y-aware minus age regression")
        axis.locator_params(axis="x", nbins=5)
    return figure


def panels_of_tasks(
    table: pd.DataFrame, draw: Callable[[Any, pd.DataFrame], None], height: float, **shared: Any
) -> tuple[Any, Any]:
    """Draw a panel for each task (rows) and training size (columns); return the figure and its axes."""
    sizes = sorted(table["n_train"].unique())
    figure, axes = new_figure(len(DISEASES), len(sizes), height, **shared)
    for row, task in zip(axes, DISEASES, strict=True):
        for axis, size in zip(row, sizes, strict=True):
            draw(axis, table[(table["task"] == TITLES[task]) & (table["n_train"] == size)])
            axis.set_title(f"{TITLES[task]}, {size} labelled scans")
    return figure, axes


def label_rows(axis: Any, names: list[str]) -> None:
    """Write the names beside the rows of a panel, the first at the top."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)


def draw_interval(axis: Any, row: Any, column: str, position: float, color: str) -> None:
    """Draw a value with its interval as a horizontal bar."""
    value = row[column]
    error = [[value - row["low"]], [row["high"] - value]]
    axis.errorbar(value, position, xerr=np.maximum(error, 0), marker="o", ms=5, capsize=3, lw=1.4, color=color)
