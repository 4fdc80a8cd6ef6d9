"""One HTML file that says it all: opens from disk, needs no network, prints well, also in black and white."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.comparison import maps, sections
from evaluation.comparison import plots as figures
from evaluation.comparison.comparison import Comparison
from evaluation.comparison.latex import to_latex
from infra.files import atomic_write
from infra.page import STYLE

OWN_STYLE = """
h3 { font-size: 1rem; margin: 1.3rem 0 .2rem; } p { max-width: 76ch; }
td.n, th.n { text-align: right; white-space: nowrap; } td:first-child { min-width: 8em; } td.code { font-family: monospace; font-size: .9em; white-space: nowrap; }
details { margin: .6rem 0; } summary { cursor: pointer; }
code { font-size: .9em; background: #f4f4f4; padding: .1em .3em; overflow-wrap: anywhere; }
nav { font-size: .92em; margin: .8rem 0; } nav a { margin-right: .8em; display: inline-block; } figure { margin: .4rem 0 0; }
a { color: inherit; } .reference td, .reference th { color: #555; font-style: italic; }
@media (max-width: 640px) { body { margin: 1rem auto; padding: 0 .7rem; font-size: 14px; } figure { overflow-x: auto; }
  figure img { min-width: 600px; } }
@page { size: A4; margin: 14mm 12mm; }
@media print { body { margin: 0; padding: 0; max-width: none; font-size: 9.5pt; } nav { display: none; }
  h2, h3, p.note { break-after: avoid; } p, figure, table { break-inside: avoid; } .scroll { overflow: visible; }
  table { font-size: 8pt; } th, td { padding: .15rem .5rem .15rem 0; } thead { display: table-header-group; }
  code { background: none; padding: 0; } .simulated { print-color-adjust: exact; } }
"""


@dataclass(frozen=True)
class Part:
    """A section of the report: its title, a note, what it says (HTML), its picture, and whether there is anything to say."""

    title: str
    note: str = ""
    text: Callable[[Comparison], str] | None = None
    picture: Callable[[Comparison], Any] | None = None
    scans: bool = False  # a picture of dots or voxels: PNG, where others are SVG
    wanted: Callable[[Comparison], bool] = lambda comparison: True


# name -> part, in the order of the page; a picture is also written beside it as <report>_<name>.png
PARTS: dict[str, Part] = {
    "auc": Part(
        "Figures by task",
        "Value and 95 % interval: bootstrap over participants (BCa), the trained models fixed. p: labels dealt anew among "
        "participants, one-sided; how sure the first figure is better than chance. In the picture the dashed line is chance "
        "(for a number: what answering its median would cost).",
        sections.figures, figures.forest,
    ),
    "learning_curve": Part(
        "Learning curves",
        "The same probe fitted to fewer scans; with the same seed and folds every checkpoint has the same draws, each tested on "
        "the participants of its fold. Bars: 95 % intervals of the mean over draws, corrected for their overlap (Nadeau and Bengio). Differences are "
        "paired by draw; a star: p at most 5 % after Holm's correction over all of them.",
        sections.curves, figures.learning_curves, wanted=lambda c: len(c.curves) > 0,
    ),
    "published": Part(
        "Published values, for reference",
        text=sections.published, wanted=lambda c: bool(sections.published_tasks(c)),
    ),
    "differences": Part(
        "Paired differences",
        "First minus second, on the same scans, by the same protocol; voxels and networks from scratch also with other protocols "
        "on the same kind of folds. AUC: DeLong's test and interval, a participant's scans taken together; other "
        "figures: paired bootstrap over participants. p (Holm) is corrected over all rows and decides the reading at 5 %.",
        sections.differences,
    ),
    "steps": Part(
        "Over pretraining",
        "The same tasks at several steps of a run. Bands: 95 % intervals over participants; points of one run share their "
        "test scans, so bands that overlap may still differ.",
        picture=figures.steps, wanted=lambda c: bool(figures.series_of(c)),
    ),
    "calibration": Part(
        "Calibration",
        "Bins of equally many scans: the mean probability given, and the share that was positive, with Wilson's 95 % interval. "
        "On the diagonal a probability may be taken at its word. Below it, positives are fewer than said.",
        picture=figures.calibration, wanted=lambda c: bool(figures.calibrated_tasks(c.last)),
    ),
    "subgroups": Part(
        "Subgroups",
        f"The first figure of each task within women and men, age bands and sites; 95 % intervals (BCa). Groups of fewer than "
        f"{sections.MINIMUM} participants, or with fewer than 5 of a class, are listed without a figure. These are many "
        "looks at the same data: a gap here is a question, not a finding.",
        sections.subgroups, wanted=lambda c: bool(sections.has_subgroups(c)),
    ),
    "site_age": Part("Scanner and age", text=sections.site_and_age, wanted=sections.has_site_or_age),
    "embedding_age": Part(
        "What the features hold",
        "First two principal components of the features of the judged scans. Components are those of healthy people; their "
        "signs are chosen so that age grows to the right. r: correlation of the first axis with age.",
        picture=maps.embedding, scans=True, wanted=lambda c: bool(maps.mapped(c)),
    ),
    "umap": Part(
        "The same by UMAP",
        "Neighbourhoods are kept, distances are not: look for clusters of sites, not for their spacing.",
        picture=lambda c: maps.embedding(c, ("umap_x", "umap_y")), scans=True, wanted=maps.has_umap,
    ),
    "saliency": Part(
        "Where in the brain",
        "Occlusion: a cube of the scan is set to its mean, and the brighter the cube, the more that changes the probe's score, "
        "on average over held-out scans. Axial slices from below; left is left. It shows what the model uses, not what the "
        "disorder does.",
        picture=maps.saliency, scans=True, wanted=maps.has_saliency,
    ),
    "training_curves": Part(
        "Pretraining", "As logged by each run; thick lines are running means over nine steps.",
        picture=figures.training_curves, wanted=lambda c: bool(c.trainings),
    ),
    "provenance": Part("Provenance", text=sections.provenance),
}  # fmt: skip


def write_report(comparison: Comparison, out: Path) -> list[Path]:
    """Write the report to ``out``, and beside it two CSV tables, a LaTeX file and each picture; the paths written."""
    stem, parts, pictures = out.stem, [], []
    for name, part in PARTS.items():
        if not part.wanted(comparison):
            continue
        image = ""
        if part.picture is not None:
            drawn = part.picture(comparison)
            pictures.append((out.with_name(f"{stem}_{name}.png"), figures.to_png(drawn)))
            image = _image(part, pictures[-1][1] if part.scans else figures.to_svg(drawn))
            figures.pyplot().close(drawn)
        note = f'<p class="note">{html.escape(part.note)}</p>' if part.note else ""
        text = part.text(comparison) if part.text else ""
        parts.append((name, part.title, note + image + text))
    beside = [
        (out.with_name(f"{stem}_metrics.csv"), comparison.table.to_csv(index=False)),
        (out.with_name(f"{stem}_differences.csv"), comparison.differences.to_csv(index=False)),
        (out.with_name(f"{stem}_curves.csv"), comparison.curves.to_csv(index=False)),
        (out.with_name(f"{stem}_curve_differences.csv"), comparison.curve_differences.to_csv(index=False)),
        (out.with_name(f"{stem}.tex"), to_latex(comparison)),
    ]
    written = [(path, text.encode()) for path, text in [*beside, (out, _page(comparison, parts))]]
    for path, content in [*pictures, *written]:
        with atomic_write(path) as stream:
            stream.write(content)
    return [out, *(path for path, _ in beside), *(path for path, _ in pictures)]


def _image(part: Part, content: bytes) -> str:
    kind = "png" if part.scans else "svg+xml"
    return f'<figure><img alt="{html.escape(part.title)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}"></figure>'


def _page(comparison: Comparison, parts: list[tuple[str, str, str]]) -> str:
    title = html.escape(f"Comparison of checkpoints: {comparison.experiment}")
    links = " ".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in parts)
    body = "".join(f'<section><h2 id="{name}">{heading}</h2>{text}</section>' for name, heading, text in parts)
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'><title>{title}</title>"
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}{OWN_STYLE}</style></head><body><h1>{title}</h1>"
        f"{sections.banner(comparison)}{sections.summary(comparison)}<nav>{links}</nav>{body}</body></html>\n"
    )
