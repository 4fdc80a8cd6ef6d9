"""The quality page of a preparation: one HTML file that needs no network, with a row for each scan, the worst first."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.cohort.scan import Scan
from data_pipeline.prepare.job import RECORDS, Outcome, picture_path
from data_pipeline.prepare.picture import MASK, TISSUE
from data_pipeline.prepare.settings import PrepareRecipe
from data_pipeline.quality.drawing import as_png, html_image, pyplot
from infra.files import atomic_write, read_bytes
from infra.page import STYLE

PAGE = "prepare.html"
MOST_PICTURES = 300  # inside the page: 30 MB; the pictures of other scans are files beside it
KEPT, REFUSED = "#0072B2", "#D55E00"  # from Okabe and Ito (2008)
# Figures with a histogram: name -> the words under it, and the limits that hold for it.
SHOWN = {
    "brain_ml": ("brain's mask (ml)", "brain_ml"), "tiv": ("total intracranial volume (ml)", ""),
    "grey_ml": ("grey matter (ml)", ""), "correlation": ("correlation with the template", "correlation"),
    "overlap": ("overlap with the template (Dice)", "overlap"), "contrast": ("white - grey contrast", "contrast"),
    "rotation": ("rotation (degrees)", "rotation"),
}  # fmt: skip
OWN_STYLE = f"""
body {{ max-width: 1500px; }} td img {{ width: 560px; max-width: none; }}
tr.refused {{ background: #fdf0e6; }} td.reason {{ min-width: 17rem; max-width: 22rem; overflow-wrap: anywhere; }}
td.wrong {{ color: {REFUSED}; font-weight: 600; }}
.mask {{ color: {MASK}; }} .tissue {{ color: {TISSUE}; }} td.number, th.number {{ text-align: right; }}
@media print {{ body {{ margin: 0; max-width: none; font-size: 11px; }} tr {{ break-inside: avoid; }} }}
"""


def write_page(
    folder: Path, name: str, recipe: PrepareRecipe, scans: Sequence[Scan], outcomes: Mapping[str, Outcome],
    roots: Mapping[str, Path], *, simulated: bool = False,
) -> Path:  # fmt: skip
    """Write ``prepare.html`` into a folder; return its path.

    Args:
        folder: the derivative.
        name: of the cohort.
        recipe: its limits are drawn.
        scans: all scans that a table lists.
        outcomes: of each scan by key.
        roots: the root of each data set's files in the derivative.
        simulated: whether the cohort is simulated.
    """
    ranked = sorted(scans, key=lambda scan: (*_badness(outcomes[scan.key]), scan.key))
    figures = [figure for figure in SHOWN if any(figure in outcomes[scan.key].figures for scan in scans)]
    refused = sum(outcomes[scan.key].refused is not None for scan in scans)
    banner = (
        "<p class='simulated'><strong>Simulated data.</strong> The scans come from a simulator, not from people.</p>"
        if simulated
        else ""
    )
    rows = []
    for number, scan in enumerate(ranked):
        picture = picture_path(roots[scan.dataset], scan.key)
        rows.append(_row(scan, outcomes[scan.key], figures, picture, folder, inside=number < MOST_PICTURES))
    heads = "".join(f"<th class='number'>{html.escape(SHOWN[figure][0])}</th>" for figure in figures)
    note = (
        "The refused scans come first, then those that correlate least with the template. "
        "<span class='mask'>&#9632;</span> the brain's mask; <span class='tissue'>&#9632;</span> white matter of the template: "
        "it must follow the scan's. Left is on the left."
    )
    title = html.escape(f"Preparation of {name}")
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{title}</title>"
    with atomic_write(folder / PAGE, "w") as stream:
        stream.write(f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}{OWN_STYLE}</style></head><body>")
        stream.write(f"<h1>{title}</h1><p class='note'>Pipeline {recipe.pipeline}, {recipe.grid}. {len(scans)} scans: ")
        stream.write(f"{len(scans) - refused} prepared, {refused} refused.</p>{banner}")
        if figures:
            stream.write(html_image(_histograms(figures, scans, outcomes, recipe), "histograms of the figures"))
        stream.write(f"<h2>Scans</h2><p class='note'>{note}</p><div class='scroll'><table><tr><th>scan</th>")
        stream.write(f"<th>sagittal, coronal, axial</th>{heads}</tr>")
        stream.writelines(rows)
        stream.write("</table></div></body></html>\n")
    return folder / PAGE


def _badness(outcome: Outcome) -> tuple[bool, float]:
    """The place of a scan among the others: refused ones first, then by their correlation."""
    return outcome.refused is None, outcome.figures.get("correlation", -1.0)


def _row(
    scan: Scan, outcome: Outcome, figures: Sequence[str], picture: Path, folder: Path, *, inside: bool
) -> str:  # fmt: skip
    """A scan's row of the table."""
    if not picture.is_file():
        image = "no picture: refused before it was registered" if outcome.refused else ""
    elif inside:
        image = html_image(read_bytes(picture), scan.key)
    else:
        image = (
            f"<a href='{html.escape(picture.relative_to(folder).as_posix())}'>{RECORDS}/{html.escape(picture.name)}</a>"
        )
    rule = outcome.refused[1] if outcome.refused else ""
    cells = "".join(
        f"<td class='number{' wrong' if figure == rule else ''}'>{_shown(outcome.figures.get(figure))}</td>"
        for figure in figures
    )
    reason = f"<br>{html.escape(f'{outcome.refused[1]}: {outcome.refused[0]}')}" if outcome.refused else ""
    style = " class='refused'" if outcome.refused else ""
    key = html.escape(scan.key)
    return f"<tr{style}><td class='reason'><strong>{key}</strong>{reason}</td><td>{image}</td>{cells}</tr>"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _histograms(
    figures: Sequence[str], scans: Sequence[Scan], outcomes: Mapping[str, Outcome], recipe: PrepareRecipe
) -> bytes:  # fmt: skip
    """A histogram of each figure, stacked by whether scans are refused, with the limits as dashed lines."""
    plt = pyplot()
    columns = 4
    lines = -(-len(figures) // columns)
    drawing, axes = plt.subplots(lines, columns, figsize=(12, 2.4 * lines), layout="constrained", squeeze=False)
    for axis, figure in zip(axes.flat, figures, strict=False):
        groups = [
            [outcomes[s.key].figures[figure] for s in scans
             if figure in outcomes[s.key].figures and (outcomes[s.key].refused is not None) == refused]
            for refused in (False, True)
        ]  # fmt: skip
        values = [value for group in groups for value in group if np.isfinite(value)]
        low, high = min(values, default=0.0), max(values, default=1.0)
        edges = np.linspace(low, high + max(1e-6, 1e-6 * abs(high)), 30)
        axis.hist(groups, bins=edges, stacked=True, color=[KEPT, REFUSED], label=["prepared", "refused"])
        limits = getattr(recipe.limits, SHOWN[figure][1]) if SHOWN[figure][1] else ()
        for limit in limits if isinstance(limits, tuple) else (limits,):
            if low - (high - low) <= limit <= high + (high - low):
                axis.axvline(limit, color="black", lw=1.0, ls="--")
        axis.set_xlabel(SHOWN[figure][0])
        axis.yaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(figures) :]:
        axis.axis("off")
    axes[0][0].legend(fontsize=8)
    axes[0][0].set_ylabel("scans")
    return as_png(drawing)
