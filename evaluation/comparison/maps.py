"""The report's maps: projections of the features, and occlusion maps of the brain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evaluation.comparison.age_and_site import age_correlation
from evaluation.comparison.evaluations import CheckpointEvaluation
from evaluation.comparison.plots import MARKERS, PALETTE, new_figure

if TYPE_CHECKING:
    from evaluation.comparison.comparison import Comparison

MOST_ROWS = 4  # checkpoints; with more, the maps would be too small to read
MOST_GROUPS = 7  # sites or diagnoses with a marker of their own; the rest share one
SLICES = 7
AIR = 0.1  # of the background's maximum; voxels below are shown white


def with_embedding(comparison: Comparison) -> list[CheckpointEvaluation]:
    """Return the evaluations whose features are shown: the first MOST_ROWS that stored an embedding."""
    return [evaluation for evaluation in comparison.last if len(evaluation.embedding)][:MOST_ROWS]


def embedding(comparison: Comparison, columns: tuple[str, str] = ("x", "y")) -> Any:
    """Plot two columns of each checkpoint's embedding, coloured by age, by diagnosis and by site."""
    evaluations = with_embedding(comparison)
    figure, axes = new_figure(len(evaluations), 3, 2.9 * len(evaluations) + 0.5)
    for row, evaluation in zip(axes, evaluations, strict=True):
        table = evaluation.embedding.dropna(subset=list(columns))
        _by_age(figure, row[0], table, columns)
        _by_group(row[1], table, "diagnosis", columns)
        _by_group(row[2], table, "site", columns)
        correlation = age_correlation(table, columns[0])
        suffix = f", |r| = {correlation:.2f}" if np.isfinite(correlation) else ""
        rank = evaluation.run["metrics"].get("features.rankme", np.nan)
        suffix += f", rank {rank:.1f}" if np.isfinite(rank) else ""
        row[0].set_title(f"{evaluation.name}\nby age{suffix}")  # the name has a line of its own, over all columns
        row[0].set_ylabel("second axis")
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis in axes[-1]:
        axis.set_xlabel("first axis")
    return figure


def has_umap(comparison: Comparison) -> bool:
    """Whether all shown evaluations stored UMAP coordinates, as they do if umap-learn is installed."""
    evaluations = with_embedding(comparison)
    return bool(evaluations) and all("umap_x" in evaluation.embedding for evaluation in evaluations)


def saliency(comparison: Comparison) -> Any:
    """Plot axial slices of each occlusion map over the mean scan; brighter regions change the score more."""
    maps = [
        (evaluation, task, arrays) for evaluation in comparison.evaluations for task, arrays in evaluation.saliency.items()
    ]  # fmt: skip
    figure, axes = new_figure(len(maps), SLICES, 1.85 * len(maps))
    for row, (evaluation, task, arrays) in zip(axes, maps, strict=True):
        background, change = arrays["background"].astype(float), arrays["map"].astype(float)
        brain = background > background.max() * AIR
        heights = np.flatnonzero(brain.any((0, 1)))
        ceiling = float(np.quantile(change, 0.999)) or 1.0
        image: Any = None
        slices = np.linspace(heights[0], heights[-1], SLICES + 2)[1:-1].round().astype(int)
        for axis, height in zip(row, slices, strict=True):
            inside = brain[:, :, height].T
            anatomy = np.where(inside, background[:, :, height].T, np.nan)
            axis.imshow(anatomy, cmap="gray", origin="lower", vmin=0, vmax=background.max() * 1.2)
            overlay = np.where(inside, change[:, :, height].T, 0.0)
            # inferno rises in lightness, so that the map can be read in grey.
            image = axis.imshow(
                overlay, cmap="inferno", origin="lower", vmin=0, vmax=ceiling, alpha=np.clip(overlay / ceiling, 0, 0.85)
            )
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for spine in axis.spines.values():
                spine.set_visible(False)
        row[0].set_title(f"{evaluation.name}: {comparison.tasks[task].title}", fontsize=9)
        figure.colorbar(image, ax=list(row), fraction=0.02, pad=0.01, label="change of score")
    return figure


def has_saliency(comparison: Comparison) -> bool:
    """Whether any evaluation has an occlusion map."""
    return any(evaluation.saliency for evaluation in comparison.evaluations)


def _by_age(figure: Any, axis: Any, table: pd.DataFrame, columns: tuple[str, str]) -> None:
    """Draw the scans of known age, coloured by it."""
    age = table["age"].to_numpy(float) if "age" in table else np.full(len(table), np.nan)
    known = np.isfinite(age)
    x, y = (table[name].to_numpy() for name in columns)
    if not known.any():
        return
    dots = axis.scatter(x[known], y[known], c=age[known], s=12, lw=0, cmap="viridis", rasterized=True)
    figure.colorbar(dots, ax=axis, label="age (years)", fraction=0.05, pad=0.02)


def _by_group(axis: Any, table: pd.DataFrame, column: str, columns: tuple[str, str]) -> None:
    """Draw the scans with a marker and colour for each of the most frequent groups, and one for the rest."""
    axis.set_title(f"by {column}")
    if column not in table:
        axis.annotate(f"{column} not known", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return
    groups = table[column].fillna("unknown").astype(str)
    frequent = list(groups.value_counts().index[:MOST_GROUPS])
    for number, name in enumerate(frequent):
        members = table[groups == name]
        axis.scatter(
            members[columns[0]], members[columns[1]], s=13, lw=0.7, marker=MARKERS[number], label=name, alpha=0.8,
            facecolor="none" if number % 2 else PALETTE[number], edgecolor=PALETTE[number], rasterized=True,
        )  # fmt: skip
    rest = table[~groups.isin(frequent)]
    if len(rest):
        others = groups[~groups.isin(frequent)].nunique()
        axis.scatter(
            rest[columns[0]], rest[columns[1]], s=5, color="#b5b5b5", label=f"{others} others", rasterized=True
        )
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.1, borderpad=0.1)
