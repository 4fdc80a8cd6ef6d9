"""The comparison as one HTML file that needs no network and prints well, with tables and plots as files beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.comparison import maps, plots, repeats, sections
from evaluation.comparison.formats import COVERS_BOTH, COVERS_PEOPLE, csv_files, write_files
from evaluation.comparison.latex import to_latex
from evaluation.statistics.subgroups import MINIMUM, MINIMUM_OF_A_CLASS
from infra.errors import UserError
from infra.page import STYLE

if TYPE_CHECKING:
    from evaluation.comparison.comparison import Comparison

REPORT_STYLE = """
h3 { font-size: 1rem; margin: 1.3rem 0 .2rem; } p { max-width: 76ch; }
td.n, th.n { text-align: right; white-space: nowrap; } td:first-child { min-width: 8em; }
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
class Section:
    """A section of the report.

    Attributes:
        title: heading.
        note: explanation below the heading.
        text: returns the section's HTML.
        plot: draws its figure.
        bitmap: whether the page shows the figure as PNG, for many dots or voxels; others are SVG.
        applies: whether the comparison has anything for this section.
    """

    title: str
    note: str = ""
    text: Callable[[Comparison], str] | None = None
    plot: Callable[[Comparison], Any] | None = None
    bitmap: bool = False
    applies: Callable[[Comparison], bool] = lambda comparison: True


# Name -> section, in the order of the page. A plot is also written beside the page as <report>_<name>.png.
SECTIONS: dict[str, Section] = {
    "auc": Section(
        "Metrics by task",
        f"{COVERS_BOTH} {COVERS_PEOPLE} p, chance: one-sided test of the first metric being no better than chance; refit: all "
        "models fitted again to permuted features, exact; halves: from the spread over halves. In the plot the dashed line is chance level (for a regression, the error of always predicting the median).",
        sections.metrics, plots.forest,
    ),
    "chosen": Section(
        "Chosen features",
        "Block, pooling and scale that the training scans of each fold chose on inner folds (--layer auto).",
        text=sections.chosen_features, applies=lambda comparison: bool(comparison.chosen_features),
    ),
    "learning_curve": Section(
        "Learning curves",
        "The same probe fitted to fewer training scans. With the same seed and folds, every checkpoint has the same draws, each "
        "tested on the participants of its fold. Intervals: 95 % for the mean over draws, corrected for their overlap (Nadeau and "
        "Bengio). Differences are paired by draw. A star marks p at most 5 % after Holm's correction over all of them.",
        sections.curves, plots.learning_curves, applies=lambda comparison: len(comparison.curves) > 0,
    ),
    "published": Section(
        "Published values, for reference",
        text=sections.published, applies=lambda comparison: bool(sections.published_tasks(comparison)),
    ),
    "differences": Section(
        "Paired differences",
        "First minus second, on the same scans and by the same protocol. Voxels and networks from scratch are also compared with "
        f"other protocols on the same kind of folds. {COVERS_BOTH} p (Holm) is corrected over all rows; a difference counts as "
        f"shown if it is at most 5 %. {COVERS_PEOPLE}",
        sections.differences,
    ),
    "steps": Section(
        "Over pretraining",
        "The same tasks at several steps of a run. Bands: 95 % intervals over participants. All points of a run are measured on the "
        "same test scans, so points with overlapping bands may still differ.",
        plot=plots.steps, applies=lambda comparison: bool(comparison.over_steps),
    ),
    "calibration": Section(
        "Calibration",
        "Bins of equally many scans: mean predicted probability and share of positives, with Wilson's 95 % interval. On the diagonal "
        "the probabilities are correct; below it they are too high.",
        plot=plots.calibration, applies=lambda comparison: len(comparison.calibration) > 0,
    ),
    "subgroups": Section(
        "Subgroups",
        "The first metric of each task within women and men, age bands and sites, with 95 % intervals (BCa). Groups of fewer than "
        f"{MINIMUM} participants, or with fewer than {MINIMUM_OF_A_CLASS} of a class, are listed without a value. With so many "
        "comparisons some groups differ by chance: take a gap as a question, not as a finding.",
        sections.subgroups, applies=lambda comparison: len(comparison.subgroups) > 0,
    ),
    "fairness": Section(
        "Fairness: gaps between groups",
        "The difference between the highest and the lowest group (fairlearn's MetricFrame.difference), with 95 % intervals over people (BCa). Calibration: mean probability minus share of positives. "
        "Sensitivity at the score's threshold 0. Groups as for the subgroups. Of several groups the two that are farthest apart are chosen by chance too, and their interval is then too far from 0.",
        sections.fairness, applies=lambda comparison: len(comparison.fairness) > 0,
    ),
    "site_age": Section(
        "Site and age", text=sections.site_and_age,
        applies=lambda comparison: len(comparison.site_leakage) + len(comparison.brain_age) > 0,
    ),
    "reliability": Section(
        "Reliability beside accuracy",
        "In people who were scanned several times (yaware reliability). ICC(2,1): the share of a feature's variance that is a person's own; constant offsets of scanners count as error; in brackets quartiles over features. ICC(3,1): without these offsets. "
        "Identified: share of scans whose nearest scan from another scanner is of the same person; scanner recognised: balanced accuracy; in brackets 95 % interval and chance. In the plot up and to the right is better; the dashed line is an ICC of 0.75.",
        repeats.section, repeats.draw, applies=lambda comparison: len(comparison.reliability) > 0,
    ),
    "embedding_age": Section(
        "What the features hold",
        "First two principal components of the features of the evaluated scans. The components are fitted to healthy people; their "
        "signs are chosen so that age grows to the right. |r|: absolute correlation of the first component with age; rank: the effective rank of the features (RankMe).",
        plot=maps.embedding, bitmap=True, applies=lambda comparison: bool(maps.with_embedding(comparison)),
    ),
    "umap": Section(
        "The features by UMAP",
        "UMAP keeps neighbourhoods but not distances: look for clusters, not for the space between them.",
        plot=lambda comparison: maps.embedding(comparison, ("umap_x", "umap_y")), bitmap=True, applies=maps.has_umap,
    ),
    "saliency": Section(
        "Where in the brain",
        "Occlusion: a cube of the scan is set to the scan's mean. The brighter the cube, the more this changes the probe's score, on "
        "average over held-out scans. Axial slices from the bottom up; left is left. The map shows what the model uses, not what the "
        "disorder does.",
        plot=maps.saliency, bitmap=True, applies=maps.has_saliency,
    ),
    "training_curves": Section(
        "Pretraining", "As logged by each run; thick lines are running means over nine logged steps.",
        plot=plots.training_curves, applies=lambda comparison: bool(comparison.trainings),
    ),
    "provenance": Section("Provenance", text=sections.provenance),
}  # fmt: skip


def write_report(comparison: Comparison, out: Path) -> list[Path]:
    """Write the page to ``out``, and every table (.csv), the LaTeX tables (.tex) and every plot (.png) beside it.

    A table without rows and a plot without data are not written; those that an earlier report of this name left are removed.
    Returns the paths, the page's first. Raises UserError if ``out`` does not end in .html.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"the report {out} is a page of HTML; give a name that ends in .html")
    images: dict[str, bytes] = {}
    content = []
    for name, section in SECTIONS.items():
        if not section.applies(comparison):
            continue
        note = f'<p class="note">{html.escape(section.note)}</p>' if section.note else ""
        image = ""
        if section.plot is not None:
            with plots.style():
                figure = section.plot(comparison)
                images[name] = plots.to_png(figure)
                image = _image(section, images[name] if section.bitmap else plots.to_svg(figure))
        text = section.text(comparison) if section.text else ""
        content.append((name, section.title, note + image + text))
    files = {out: _page(comparison, content).encode()}
    files |= csv_files(comparison.tables, out)
    files[out.with_name(f"{out.stem}.tex")] = to_latex(comparison).encode()
    files |= {out.with_name(f"{out.stem}_{name}.png"): image for name, image in images.items()}
    possible = [f"{name}.csv" for name in comparison.tables] + [
        f"{name}.png" for name, each in SECTIONS.items() if each.plot
    ]
    write_files(files, [out.with_name(f"{out.stem}_{name}") for name in possible])
    return list(files)


def _image(section: Section, data: bytes) -> str:
    kind = "png" if section.bitmap else "svg+xml"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{html.escape(section.title)}" src="{source}"></figure>'


def _page(comparison: Comparison, content: list[tuple[str, str, str]]) -> str:
    """Return the page; ``content`` is name, title and HTML of each section."""
    title = html.escape(f"Comparison of checkpoints: {comparison.experiment}")
    links = " ".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in content)
    body = "".join(f'<section><h2 id="{name}">{heading}</h2>{text}</section>' for name, heading, text in content)
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'><title>{title}</title>"
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}{REPORT_STYLE}</style></head><body><h1>{title}</h1>"
        f"{sections.banner(comparison)}{sections.summary(comparison)}<nav>{links}</nav>{body}</body></html>\n"
    )
