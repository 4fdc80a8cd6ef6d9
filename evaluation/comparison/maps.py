"""The report's pictures of scans: maps of the features, and where in the brain an answer comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from evaluation.comparison.comparison import Comparison
from evaluation.comparison.plots import MARKERS, PALETTE, WIDE, pyplot
from evaluation.comparison.tables import Judged

MOST_MAPS = 4  # rows: more would be too small to read
MOST_GROUPS = 7  # sites with a marker of their own; the rest share one
SLICES = 7


def mapped(comparison: Comparison) -> list[Judged]:
    """The checkpoints whose features are shown: the first few that have a map."""
    return [each for each in comparison.last if len(each.embedding)][:MOST_MAPS]


def embedding(comparison: Comparison, columns: tuple[str, str] = ("x", "y")) -> Any:
    """Two axes of each checkpoint's features, a row each, by age, by diagnosis and by site."""
    plt, rows = pyplot(), mapped(comparison)
    figure, axes = plt.subplots(
        len(rows), 3, figsize=(WIDE, 2.9 * len(rows) + 0.5), squeeze=False, layout="constrained"
    )
    for line, each in zip(axes, rows, strict=True):
        table = each.embedding.dropna(subset=list(columns))
        _by_age(figure, line[0], table, columns)
        _by_group(line[1], table, "diagnosis", columns)
        _by_group(line[2], table, "site", columns)
        line[0].set_title(f"{each.name}: by age{_correlation(table, columns[0])}")
        line[0].set_ylabel("second axis")
        for axis in line:
            axis.set(xticks=[], yticks=[])
    for axis in axes[-1]:
        axis.set_xlabel("first axis")
    return figure


def has_umap(comparison: Comparison) -> bool:
    """Whether evaluations left UMAP coordinates (they do where umap-learn is installed)."""
    return bool(mapped(comparison)) and all("umap_x" in each.embedding for each in mapped(comparison))


def saliency(comparison: Comparison) -> Any:
    """Axial slices of each stored occlusion map over the mean scan; the brighter, the more the answer hangs on it."""
    plt = pyplot()
    found = [(each, task, maps) for each in comparison.judged for task, maps in each.saliency.items()]
    figure, axes = plt.subplots(
        len(found), SLICES, figsize=(WIDE, 1.85 * len(found)), squeeze=False, layout="constrained"
    )
    for line, (each, task, maps) in zip(axes, found, strict=True):
        background, change = maps["background"].astype(float), maps["map"].astype(float)
        brain = np.flatnonzero((background > background.max() * 0.1).any((0, 1)))
        ceiling = float(np.quantile(change, 0.999)) or 1.0
        image: Any = None
        for axis, height in zip(
            line, np.linspace(brain[0], brain[-1], SLICES + 2)[1:-1].round().astype(int), strict=True
        ):
            below = background[:, :, height].T
            # Air is left white, which spares ink.
            below = np.where(below > background.max() * 0.1, below, np.nan)
            axis.imshow(below, cmap="gray", origin="lower", vmin=0, vmax=background.max() * 1.2)
            part = np.where(np.isnan(below), 0.0, change[:, :, height].T)
            # Dark where nothing changes, so that the picture needs no colour to be read.
            image = axis.imshow(
                part, cmap="inferno", origin="lower", vmin=0, vmax=ceiling, alpha=np.clip(part / ceiling, 0, 0.85)
            )
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for spine in axis.spines.values():
                spine.set_visible(False)
        line[0].set_title(f"{each.name}: {task}", fontsize=9)
        figure.colorbar(image, ax=line, fraction=0.02, pad=0.01, label="change of score")
    return figure


def has_saliency(comparison: Comparison) -> bool:
    """Whether any evaluation has an occlusion map."""
    return any(each.saliency for each in comparison.judged)


def _by_age(figure: Any, axis: Any, table: pd.DataFrame, columns: tuple[str, str]) -> None:
    age = table["age"].to_numpy(float) if "age" in table else np.full(len(table), np.nan)
    known = np.isfinite(age)
    x, y = (table[name].to_numpy() for name in columns)
    if not known.any():
        return
    dots = axis.scatter(x[known], y[known], c=age[known], s=12, lw=0, cmap="viridis", rasterized=True)
    figure.colorbar(dots, ax=axis, label="age, years", fraction=0.05, pad=0.02)


def _correlation(table: pd.DataFrame, axis: str) -> str:
    """``, r = 0.84`` of an axis with age, without its sign, which is arbitrary."""
    known = table["age"].notna() if "age" in table else pd.Series(False, index=table.index)
    age = table.loc[known, "age"].to_numpy(float) if known.any() else np.empty(0)
    if len(age) < 3 or np.ptp(age) == 0:
        return ""
    return f", |r| = {abs(float(np.corrcoef(table.loc[known, axis], age)[0, 1])):.2f}"


def _by_group(axis: Any, table: pd.DataFrame, column: str, columns: tuple[str, str]) -> None:
    axis.set_title(f"by {column}")
    if column not in table:
        axis.annotate(f"no {column} known", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return
    text = table[column].fillna("unknown").astype(str)
    common = list(text.value_counts().index[:MOST_GROUPS])
    for number, name in enumerate(common):
        part = table[text == name]
        axis.scatter(
            part[columns[0]], part[columns[1]], s=13, lw=0.7, marker=MARKERS[number], label=name, alpha=0.8, rasterized=True,
            facecolor="none" if number % 2 else PALETTE[number], edgecolor=PALETTE[number],
        )  # fmt: skip
    rest = table[~text.isin(common)]
    if len(rest):
        others = text[~text.isin(common)].nunique()
        axis.scatter(
            rest[columns[0]], rest[columns[1]], s=5, color="#b5b5b5", label=f"{others} others", rasterized=True
        )
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.1, borderpad=0.1)
