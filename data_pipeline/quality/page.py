"""The page of ``yaware cohort inspect``: one HTML file with embedded pictures, which needs no network."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.quality.columns import table_as_html
from data_pipeline.quality.drawing import as_png, html_image, pyplot
from data_pipeline.quality.survey import Survey, tables
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.load import read_voxels
from infra.files import atomic_write
from infra.page import STYLE
from infra.progress import Progress

KEPT, EXCLUDED = "#0072B2", "#D55E00"  # all colours are from Okabe and Ito (2008)
SEXES = {"F": ("female", "#CC79A7"), "M": ("male", "#56B4E9"), "O": ("other", "#009E73"), "": ("missing", "#999999")}
MOST_SITES = 40  # bars of the chart of sites
MOST_OTHERS = 8  # thumbnails of scans that another rule than the outlier rule excludes
OWN_STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid #ddd; border-radius: 4px; overflow: hidden; } figure img { display: block; width: 100%; }
figcaption { padding: .4rem .6rem; font-size: 13px; overflow-wrap: anywhere; } figure.excluded { border: 2px solid #D55E00; }
@media print { body { margin: 0; max-width: none; font-size: 11px; }
  h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


def write_page(survey: Survey, out: Path) -> Path:
    """Write the page to ``out`` and return ``out``: tables, histograms, and three slices of the least typical scans."""
    overview, sites, rules, worst, excluded = (table_as_html(table) for table in tables(survey))
    banner = (
        "<p class='simulated'><strong>Simulated data.</strong> The scans come from a simulator, not from people.</p>"
        if survey.simulated
        else ""
    )
    sections = [
        f"<h1>Cohort {html.escape(survey.dataset)}</h1><p class='note'>{html.escape(str(survey.root))}</p>", banner, overview,
        rules, "<h2>Ages and sexes</h2>", html_image(_ages(survey), "ages, and scans by sex"), "<h2>Scans by site</h2>",
        html_image(_by_site(survey), "scans by site"), sites, "<h2>Correlation with the median scan</h2>",
        "<p class='note'>Correlation of each scan's coarse volume with the voxelwise median of all scans. Duplicates do not "
        "count in the median.</p>", html_image(_correlations(survey), "correlations"), _cards(survey), worst, excluded,
        *(table_as_html(table) for table in survey.columns),
    ]  # fmt: skip
    title = html.escape(f"Cohort {survey.dataset}")
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{title}</title>"
    with atomic_write(out, "w") as stream:
        stream.write(f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}{OWN_STYLE}</style></head>")
        stream.write(f"<body>{''.join(sections)}</body></html>\n")
    return out


def _cards(survey: Survey) -> str:
    """The thumbnails: the most typical scan, the scans of lowest correlation, and some that other rules exclude."""
    ranked = survey.worst(len(survey.scans))
    worst = survey.worst()
    others = survey.scans[(survey.scans["rule"] != "") & ~survey.scans["key"].isin(worst["key"])]
    rows_and_remarks = [
        *((row, "most typical: the highest correlation") for row in ranked[-1:].to_dict("records")),
        *((row, "") for row in worst.to_dict("records")),
        *((row, "") for row in others[:MOST_OTHERS].to_dict("records")),
    ]
    reasons = {removal.key: f"{removal.rule}: {removal.reason}" for removal in survey.removals}
    cards = []
    with Progress(len(rows_and_remarks), "scans", "drawing") as progress:
        for row, remark in rows_and_remarks:
            cards.append(_card(survey, row, remark or reasons.get(str(row["key"]), "kept")))
            progress.advance()
    note = "Middle sagittal, coronal and axial slice; left is on the left; each scan has its own grey scale. "
    note += "Excluded scans are framed."
    return f"<h2>The least typical scans</h2><p class='note'>{note}</p><div class='cards'>{''.join(cards)}</div>"


def _card(survey: Survey, row: Any, remark: str) -> str:
    """A thumbnail with its caption; without a picture if the scan is unreadable."""
    # Read from the scan's own path, because the path in the table may be a pseudonym.
    scan, crop = survey.files[str(row["key"])], survey.preparation.crop
    try:
        voxels = read_voxels(scan.path, survey.grid, frozenset(), crop=crop, orientation=scan.orientation)
        picture = html_image(slices(voxels, survey.grid.spacing), str(row["key"]))
    except BadScan:
        picture = ""
    age = "" if row["age"] != row["age"] else f", {row['age']:.0f} years"
    lines = [f"<strong>{html.escape(str(row['key']))}</strong>{age}", html.escape(remark)]
    if row["quality_mean"] == row["quality_mean"]:
        z = "" if row["robust_z"] != row["robust_z"] else f" (robust z {row['robust_z']:.1f})"
        lines.insert(1, f"r = {row['quality_correlation']:.3f}{z}, mean {row['quality_mean']:.3g}, "
                        f"SD {row['quality_std']:.3g}, zeros {row['quality_zeros']:.0%}")  # fmt: skip
    style = " class='excluded'" if row["rule"] else ""
    return f"<figure{style}>{picture}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def slices(volume: Any, spacing: tuple[float, ...]) -> bytes:
    """Draw three slices of a volume (D, H, W) in RAS as a PNG.

    The slices are a sagittal one slightly right of the midline, and the middle coronal and axial ones. Superior is at the
    top of the first two, anterior at the top of the axial one, left on the left. ``spacing`` is in mm.
    """
    plt = pyplot()
    low, high = (float(np.percentile(volume, q)) for q in (1, 99.7))
    pictures = []
    for plane in range(3):
        middle = volume.shape[plane] // 2 + (plane == 0) * (volume.shape[0] // 12)
        across, up = [axis for axis in range(3) if axis != plane]
        pictures.append((np.take(volume, middle, axis=plane).T[::-1], spacing[up] / spacing[across]))
    widths = [picture.shape[1] / (picture.shape[0] * ratio) for picture, ratio in pictures]
    figure, axes = plt.subplots(
        1, 3, figsize=(1.55 * sum(widths), 1.55), facecolor="black",
        gridspec_kw={"width_ratios": widths, "wspace": 0.02, "left": 0, "right": 1, "top": 1, "bottom": 0},
    )  # fmt: skip
    for axis, (picture, ratio) in zip(axes, pictures, strict=True):
        axis.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="bilinear", aspect=ratio)
        axis.axis("off")
    return as_png(figure, dpi=130)


def _ages(survey: Survey) -> bytes:
    """Histogram of ages stacked by sex; next to it the number of scans by sex, also those without an age."""
    from matplotlib.ticker import MaxNLocator

    plt = pyplot()
    figure, (axis, sex_axis) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", width_ratios=[4, 1])
    scans = survey.scans.dropna(subset=["age"])
    groups = [(scans["age"][scans["sex"] == code].to_numpy(), *style) for code, style in SEXES.items()]
    groups = [group for group in groups if len(group[0])]
    if groups:
        low, high = np.floor(scans["age"].min() / 5) * 5, np.floor(scans["age"].max() / 5) * 5 + 5
        step = 5 if high - low > 30 else 1
        axis.hist(
            [ages for ages, *_ in groups], bins=np.arange(low, high + step, step), stacked=True, edgecolor="white",
            linewidth=0.6, color=[colour for *_, colour in groups],
            label=[f"{name} ({len(ages)})" for ages, name, _ in groups],
        )  # fmt: skip
        axis.legend()
    axis.set_xlabel("age (years)")
    axis.set_ylabel("scans")
    counts = [(int((survey.scans["sex"] == code).sum()), *style) for code, style in SEXES.items()]
    counts = [bar for bar in counts if bar[0]]
    bars = sex_axis.bar(
        [name for _, name, _ in counts], [n for n, *_ in counts], color=[colour for *_, colour in counts]
    )
    sex_axis.bar_label(bars)
    sex_axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    sex_axis.grid(axis="x", visible=False)
    sex_axis.set_xlabel("sex")
    return as_png(figure)


def _by_site(survey: Survey) -> bytes:
    """Bars of the kept and the excluded scans of each site, the largest site at the top."""
    plt = pyplot()
    scans = survey.scans.assign(site=survey.scans["site"].replace("", "missing"))
    counts = scans.assign(kept=scans["rule"] == "").groupby("site")["kept"].agg(["sum", "size"])
    counts = counts.sort_values("size", ascending=False)
    shown = counts[:MOST_SITES][::-1]
    figure, axis = plt.subplots(figsize=(9, 1.0 + 0.24 * len(shown)), layout="constrained")
    axis.barh(shown.index, shown["sum"], color=KEPT, label="kept")
    axis.barh(shown.index, shown["size"] - shown["sum"], left=shown["sum"], color=EXCLUDED, label="excluded")
    axis.grid(axis="y", visible=False)
    axis.margins(y=0.02)
    axis.set_xlim(0, 1.15 * max(1, shown["size"].max()))
    axis.legend(loc="lower right")
    axis.set_xlabel(
        "scans" if len(counts) <= MOST_SITES else f"scans (the {MOST_SITES} largest of {len(counts)} sites)"
    )
    return as_png(figure)


def _correlations(survey: Survey) -> bytes:
    """Two histograms: all correlations (log scale, so that single outliers show), and those near the threshold."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3), layout="constrained")
    measured = survey.scans.dropna(subset=["quality_correlation"])
    r, outlier = measured["quality_correlation"].to_numpy(), (measured["rule"] == "outlier").to_numpy()
    limit, scale = survey.threshold, survey.verdict.scale
    near = r if limit is None or scale is None else r[r >= limit - 3 * scale]
    for axis, values in zip(axes, (r, near), strict=True):
        ends = [*values, *([] if limit is None else [limit])]
        if ends:
            bins = np.linspace(min(ends), max(ends) + 1e-6, 50)
            groups = [r[~outlier], r[outlier]]  # values outside the bins are not drawn
            axis.hist(groups, bins=bins, stacked=True, color=[KEPT, EXCLUDED], label=["others", "outliers"])
        if limit is not None:
            axis.axvline(limit, color="black", lw=1.2, ls="--")
        axis.set_xlabel("correlation with the median scan")
        axis.xaxis.set_major_locator(MaxNLocator(6))
    axes[0].set(title="all scans", ylabel="scans (log scale)", yscale="log")
    axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes[0].set_ylim(bottom=0.7)
    axes[0].legend(loc="upper left")
    name = "near the threshold" if limit is not None else "all scans, linear scale (outliers are not judged)"
    axes[1].set(title=name, ylabel="scans")
    if limit is not None:
        rule = survey.quality.outlier
        text = f" threshold {limit:.3f}\n (robust z {rule.robust_z:g}, {rule.least_drop:g} below)"
        axes[1].annotate(text, (limit, 0.97), xycoords=("data", "axes fraction"), va="top")
    return as_png(figure)
