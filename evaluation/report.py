"""One HTML file that says it all: opens from disk, needs no network, prints well."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from evaluation.compare import LABELS, Comparison, shown, verdict
from evaluation.figures import FIGURES_OF_THE_REPORT, to_png
from infra.files import atomic_write
from infra.page import STYLE
from infra.runs import ui_command

OWN_STYLE = """
td.n { text-align: right; }
code { font-size: .9em; background: #f4f4f4; padding: .1em .3em; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } h2 { break-after: avoid; } img, tr { break-inside: avoid; } }
"""
CAPTIONS = {
    "auc": ("Classification", "Area under the ROC curve of a logistic probe on frozen features: nested cross-validation "
            "grouped by participant, penalty chosen by Ray Tune in inner folds. Bars: 95 % bootstrap intervals over participants."),
    "learning_curve": ("Learning curve", "The same probe trained on fewer scans, tested on one fixed third of the participants; "
                       "every checkpoint sees the same draws. Bands: 95 % intervals of the mean over draws, not over test participants."),
    "embedding_age": ("What the features hold", "First two principal components of the features of scans that no encoder was "
                      "trained on, coloured by age."),
    "training_curves": ("Pretraining", "As logged by each run; thick lines are running means over nine steps."),
}  # fmt: skip


def write_report(comparison: Comparison, out: Path) -> list[Path]:
    """Write the report to ``out`` and each picture beside it (<report>_<picture>.png); the paths written."""
    written, parts = [], []
    for name, draw in FIGURES_OF_THE_REPORT.items():
        if name == "training_curves" and not comparison.trainings:
            continue
        png = to_png(draw(comparison))
        path = out.with_name(f"{out.stem}_{name}.png")
        with atomic_write(path) as stream:
            stream.write(png)
        written.append(path)
        title, note = CAPTIONS[name]
        image = base64.b64encode(png).decode()
        parts.append(
            f'<h2>{title}</h2><p class="note">{note}</p><img alt="{title}" src="data:image/png;base64,{image}">'
        )
    table = out.with_name(f"{out.stem}_figures.csv")
    with atomic_write(table, "w") as stream:
        comparison.table.to_csv(stream, index=False)
    with atomic_write(out, "w") as stream:
        stream.write(_page(comparison, parts))
    return [out, table, *written]


def _page(comparison: Comparison, pictures: list[str]) -> str:
    banner = (
        '<p class="simulated"><strong>Simulated data.</strong> These scans come from a simulator, not from people: the figures '
        "show that the pipeline works, and say nothing about real disorders.</p>"
        if comparison.simulated
        else ""
    )
    store = f"<p class='note'>All figures are read from the MLflow store. To browse it: <code>{html.escape(ui_command(comparison.uri))}</code></p>"
    sections = [
        f"<h1>Comparison of checkpoints: {html.escape(comparison.experiment)}</h1>", banner, _figures(comparison),
        *pictures, "<h2>Paired differences</h2>", _differences(comparison), "<h2>Provenance</h2>", _provenance(comparison), store,
    ]  # fmt: skip
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{html.escape(comparison.experiment)}</title>"
    return f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}{OWN_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"


def _figures(comparison: Comparison) -> str:
    keys = list(dict.fromkeys(zip(comparison.table["task"], comparison.table["figure"], strict=True)))
    head = ["checkpoint", *(f"{task} {LABELS[figure]}" for task, figure in keys)]
    rows = []
    for name, part in comparison.table.groupby("checkpoint", sort=False):
        found = {(row["task"], row["figure"]): shown(row) for _, row in part.iterrows()}
        rows.append([str(name), *(found.get(key, "-") for key in keys)])
    note = "<p class='note'>Value and 95 % interval. AUC, R²: higher is better; age MAE in years and site balanced accuracy: lower is better.</p>"
    return note + _table(head, rows)


def _differences(comparison: Comparison) -> str:
    rows = [
        [
            str(r.task),
            LABELS[str(r.figure)],
            f"{r.first} − {r.second}",
            f"{r.difference:+.3f} [{r.low:+.3f}, {r.high:+.3f}]",
            verdict(r),
        ]
        for r in comparison.differences.itertuples()
    ]
    note = "<p class='note'>On the same scans, with the same bootstrap samples of participants; not corrected for the number of comparisons.</p>"
    return note + _table(["task", "figure", "pair", "difference [95 % interval]", "reading"], rows)


def _provenance(comparison: Comparison) -> str:
    head = list(comparison.provenance[0])
    return _table(head, [[row[key] for key in head] for row in comparison.provenance])


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
