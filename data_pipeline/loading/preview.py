"""Draws a preview of built shards: some scans, each with two augmented views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.loading.loader import TwoViewLoader
from data_pipeline.storage.manifest import Manifest
from infra.files import atomic_write

PLANES = ("sagittal", "coronal", "axial")


def write_preview(
    manifest: Manifest, out: Path, *, augmentation: Any = "default", scans: int = 4, seed: int = 0
) -> Path:
    """Write a PNG image and return its path.

    Each row shows one scan: its three middle planes, then an axial and a coronal plane of two augmented views.

    Args:
        manifest: the data set.
        out: the file to write.
        augmentation: a preset's name, a recipe's section, or an ``Augmentation``.
        scans: number of rows; the scans are spread over age.
        seed: of the augmentation.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = _spread_over_age(manifest, scans)
    loader = TwoViewLoader(
        manifest, rows=rows, global_batch=len(rows), seed=seed, augmentation=augmentation, proxies=["age"]
    )
    batch = next(loader)
    loader.close()
    views = {int(row): batch["views"][:, i, 0].numpy() for i, row in enumerate(batch["scan"])}
    figure, axes = plt.subplots(
        len(rows), 7, figsize=(13.5, 2.15 * len(rows) + 1.0), squeeze=False, facecolor="white",
        gridspec_kw={"width_ratios": [1.2, 1, 1, 1, 1, 1, 1], "wspace": 0.04, "hspace": 0.08},
    )  # fmt: skip
    for row_axes, row in zip(axes, rows, strict=True):
        volume = manifest.read_volume(int(row)).astype(np.float32)
        limits = (float(np.percentile(volume, 1)), float(np.percentile(volume, 99.7)))
        for axis, plane in zip(row_axes[:3], range(3), strict=True):
            _show(axis, _slice(volume, plane), limits)
        row_axes[0].set_ylabel(
            _caption(manifest, int(row)), rotation=0, ha="right", va="center", fontsize=9, labelpad=10
        )
        for number in range(2):
            view = views[int(row)][number]
            view_limits = (float(np.percentile(view, 1)), float(np.percentile(view, 99.7)))
            _show(row_axes[3 + 2 * number], _slice(view, 2), view_limits)
            _show(row_axes[4 + 2 * number], _slice(view, 1), view_limits)
    titles = [*PLANES, "view 1, axial", "view 1, coronal", "view 2, axial", "view 2, coronal"]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10, pad=6)
    for axis, side in ((axes[-1][1], "L          R"), (axes[-1][2], "L          R")):
        axis.set_xlabel(side, fontsize=9, color="#555555", labelpad=3)
    kind = "Simulated scans" if manifest.simulated else "Scans"
    figure.suptitle(
        f"{kind} and two augmented views of each (neurological: left is left), preset {augmentation}, "
        f"{manifest.grid['shape'][0]} x {manifest.grid['shape'][1]} x {manifest.grid['shape'][2]} voxels",
        fontsize=12, y=1.0 - 0.12 / figure.get_figheight(), va="top",
    )  # fmt: skip
    figure.subplots_adjust(
        left=0.13, right=0.995, top=1.0 - 0.72 / figure.get_figheight(), bottom=0.3 / figure.get_figheight()
    )
    with atomic_write(out) as stream:
        figure.savefig(stream, format="png", dpi=150)
    plt.close(figure)
    return out


def _spread_over_age(manifest: Manifest, count: int) -> Any:
    """Return row numbers of ``count`` scans at even steps through the sorted ages."""
    rows = manifest.rows()
    ages = manifest.proxies(["age"], rows)[:, 0]
    by_age = rows[np.argsort(np.where(np.isnan(ages), np.inf, ages), kind="stable")][
        : max(1, int((~np.isnan(ages)).sum()))
    ]
    places = np.linspace(0.08, 0.92, min(count, len(by_age))) * (len(by_age) - 1)
    return by_age[np.unique(places.round().astype(int))]


def _slice(volume: Any, plane: int) -> Any:
    """Return the middle slice across axis ``plane`` as an image with superior or anterior at the top.

    The sagittal slice is moved off the midline by a twelfth of the volume's width.
    """
    return np.take(volume, volume.shape[plane] // 2 + (plane == 0) * (volume.shape[0] // 12), axis=plane).T[::-1]


def _show(axis: Any, image: Any, limits: tuple[float, float]) -> None:
    axis.imshow(image, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="bilinear")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _caption(manifest: Manifest, row: int) -> str:
    scan = manifest.scans.loc[row]
    lines = [f"sub-{scan['participant_id']}", f"{scan['age']:.0f} years, {scan['sex'] or 'sex unknown'}"]
    if scan["site"]:
        lines.append(f"site {scan['site']}")
    if isinstance(scan.get("diagnosis"), str):
        lines.append(str(scan["diagnosis"]))
    return "\n".join(lines)
