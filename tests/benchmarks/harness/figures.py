"""The figures of the page: ratios of all rows, the loss by batch, and steps on several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.harness.statistics import median_of, ratio

OURS, THEIRS, DPI = "#2b6ca3", "#c46f2b", 90


def draw(content: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draw the figures for which there are results; return title and file name of each. The ratios come first."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for title, name, plot in (
        ("Ours / theirs, every row", "performance_ratios.png", _ratios),
        ("Loss: time and memory by batch", "performance_loss.png", _losses),
        ("Training: steps on 1, 2 and 4 ranks", "performance_ranks.png", _ranks),
    ):
        figure = plot(content["rows"])
        if figure is not None:
            figure.tight_layout()
            figure.savefig(folder / name, dpi=DPI, metadata={"Software": None})
            drawn.append((title, name))
    return drawn


def _ratios(rows: list[Mapping[str, Any]]) -> Any:
    """Draw a bar for every peer of every row, on a logarithmic axis."""
    from matplotlib.figure import Figure

    found = [
        (f"{row['name']}: {side['name']}{' *' * row['noisy']}", share)
        for row in rows
        if row["section"] != "Roofline"
        for side in row["sides"]
        if (share := ratio(row, side["name"])) is not None
    ]
    if not found:
        return None
    labels, shares = zip(*reversed(found), strict=True)
    figure = Figure(figsize=(8, 1 + 0.21 * len(found)))
    axes = figure.subplots()
    axes.barh(
        labels, [share - 1 for share in shares], left=1, color=[OURS if share <= 1 else THEIRS for share in shares]
    )
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("ours / theirs; left of 1: ours is cheaper\n*: a program of the row varied by more than 15 %")
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    return figure


def _losses(rows: list[Mapping[str, Any]]) -> Any:
    """Draw time and peak memory of the loss against the batch."""
    from matplotlib.figure import Figure

    sizes = {int(row["name"].removeprefix("loss-")): row for row in rows if row["name"].removeprefix("loss-").isdigit()}
    if len(sizes) < 2:
        return None
    figure = Figure(figsize=(8, 3.2))
    for axes, key, label, scale in zip(
        figure.subplots(1, 2), ("cpu", "peak"), ("CPU seconds", "MiB"), (1.0, 2**-20), strict=True
    ):
        for side, colour in (("ours", OURS), ("nidl", THEIRS)):
            found = {size: median_of(row, side, key) for size, row in sorted(sizes.items())}
            points = {size: scale * value for size, value in found.items() if value}
            axes.plot(list(points), list(points.values()), "o-", color=colour, label=side)
        axes.set(xscale="log", yscale="log", xlabel="2N", ylabel=label)
        axes.set_xscale("log", base=2)
    axes.legend()
    return figure


def _ranks(rows: list[Mapping[str, Any]]) -> Any:
    """Draw the wall-clock time of a step against the number of ranks, with the same scans on each rank."""
    from matplotlib.figure import Figure

    found = {int(row["name"].removeprefix("weak-")): row for row in rows if row["name"].startswith("weak-")}
    if len(found) < 2:
        return None
    figure = Figure(figsize=(5, 3.2))
    axes = figure.subplots()
    for side, colour in (("ours", OURS), ("torch DDP", THEIRS)):
        points = {ranks: 1e3 * value for ranks, row in sorted(found.items()) if (value := median_of(row, side, "wall"))}
        axes.plot(list(points), list(points.values()), "o-", color=colour, label=side)
    axes.set(xlabel="ranks", ylabel="ms a step, wall clock", ylim=(0, None), xticks=sorted(found))
    axes.legend()
    return figure
