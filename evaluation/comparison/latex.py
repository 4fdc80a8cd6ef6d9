"""The comparison as LaTeX tables (booktabs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evaluation.comparison.tables import LABELS, p_text, rows_of, shown
from evaluation.statistics.metrics import METRICS

if TYPE_CHECKING:
    from evaluation.comparison.comparison import Comparison

ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "²": r"\textsuperscript{2}",
}  # fmt: skip


def to_latex(comparison: Comparison) -> str:
    """Two tables: figures by checkpoint and task, and paired differences. Needs \\usepackage{booktabs}."""
    data = " Simulated data." if comparison.simulated else ""
    lines = [
        f"% experiment {' '.join(comparison.experiment.split())}; needs \\usepackage{{booktabs}}",
        *_table(*_figures(comparison), f"Value and 95\\,\\% interval (BCa bootstrap over participants).{data}"),
        "",
        *_table(
            *_differences(comparison),
            "Paired differences on the same scans with 95\\,\\% intervals; AUC: DeLong's test, other figures: paired "
            f"bootstrap; $p$ corrected by Holm over all rows.{data}",
        ),
    ]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text as LaTeX shows it, letter by letter."""
    return "".join(ESCAPES.get(letter, letter) for letter in text)


def _figures(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    keys = [(task, next(iter(METRICS[kind]))) for task, (kind, _) in comparison.tasks.items()]
    head = ["checkpoint", *(f"{comparison.tasks[task][1]}, {LABELS[figure]}" for task, figure in keys)]
    rows = []
    for name, part in comparison.table.groupby("checkpoint", sort=False):
        found = {(r.task, r.metric): shown(str(r.metric), r.value, r.low, r.high) for r in rows_of(part)}
        rows.append([str(name), *(found.get(key, "-") for key in keys)])
    return head, rows


def _differences(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    head = ["task", "metric", "pair", "difference", "p", "p (Holm)"]
    rows = [
        [str(r.task), LABELS[str(r.metric)], f"{r.first} - {r.second}", f"{r.difference:+.3f} [{r.low:+.3f}, {r.high:+.3f}]",
         p_text(r.p), p_text(r.p_holm)]
        for r in rows_of(comparison.differences)
    ]  # fmt: skip
    return head, rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> list[str]:
    text = [" & ".join(escape(cell) for cell in row) + r" \\" for row in (head, *rows)]
    return [
        r"\begin{table}", r"\centering", f"\\caption{{{caption}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule",
        text[0], r"\midrule", *text[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}",
    ]  # fmt: skip
