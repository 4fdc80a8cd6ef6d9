"""The comparison as LaTeX tables (booktabs)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evaluation.comparison import repeats
from evaluation.comparison.formats import COVERS_BOTH, COVERS_PEOPLE, LABELS, number, p_text, rows_of, signed

if TYPE_CHECKING:
    from evaluation.comparison.comparison import Comparison

ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "²": r"\textsuperscript{2}", "−": r"$-$",
}  # fmt: skip

Content = tuple[list[str], list[list[str]]]  # head, rows


def to_latex(comparison: Comparison) -> str:
    """Return the comparison as LaTeX source: primary metrics, and what has rows of paired differences, site leakage and so on.

    The document needs ``\\usepackage{booktabs}``.
    """
    tables = [
        (
            _metrics(comparison),
            "Primary metric of each task with its 95\\,\\% interval. "
            f"{escape(COVERS_BOTH)} Without halves: bootstrap over participants.",
        ),
    ]
    if len(comparison.differences):
        caption = (
            "Paired differences between checkpoints on the same scans, with 95\\,\\% intervals. "
            f"{escape(COVERS_BOTH)} $p$ (Holm) is corrected over all rows. {escape(COVERS_PEOPLE)}"
        )
        tables.append((_differences(comparison), caption))
    if len(comparison.site_leakage):
        caption = (
            "How well the features tell the scanner site. Leakage is 0 at chance and 1 if every site is recognised. The "
            "OpenBHB score is the balanced accuracy to the power of 0.3, times the age MAE on sites left out of training."
        )
        tables.append((_site_leakage(comparison), caption))
    if len(comparison.brain_age):
        caption = (
            "Brain-age gap (predicted minus real age). The MAE is that of the uncorrected predictions. The correction removes "
            "the gap's linear dependence on age, which is estimated on participants outside the fold."
        )
        tables.append((_brain_age(comparison), caption))
    if len(comparison.reliability):
        caption = (
            "Reliability in people who were scanned several times. ICC: median and quartiles over features. Rates: "
            "95\\,\\% interval and chance."
        )
        tables.append(((repeats.HEAD, repeats.rows_as_text(comparison)), caption))
    note = " Simulated data." if comparison.simulated else ""
    head = f"% experiment {' '.join(comparison.experiment.split())}; needs \\usepackage{{booktabs}}\n"
    return head + "\n".join(latex_table(*content, caption + note) for content, caption in tables)


def escape(text: str) -> str:
    """Escape every character that LaTeX treats specially; the hyphen of a negative number becomes a minus sign."""
    return "".join(ESCAPES.get(character, character) for character in re.sub(r"(?<![\w-])-(?=\d)", "−", text))


def _metrics(comparison: Comparison) -> Content:
    summary = comparison.summary()
    head = [f"{task.title}, {LABELS[task.primary_metric]}" for task in comparison.tasks.values()]
    return ["checkpoint", *head], [[str(name), *row] for name, row in summary.iterrows()]


def _differences(comparison: Comparison) -> Content:
    head = ["task", "metric", "pair", "difference", "p", "p (Holm)", "with models fixed", "p with models fixed"]
    rows = [
        [comparison.tasks[r.task].title, LABELS[r.metric], f"{r.first} − {r.second}", signed(r.difference, r.low, r.high),
         p_text(r.p), p_text(r.p_holm), signed(r.fixed_difference, r.fixed_low, r.fixed_high), p_text(r.fixed_p)]
        for r in rows_of(comparison.differences)
    ]  # fmt: skip
    return head, rows


def _site_leakage(comparison: Comparison) -> Content:
    head = [
        "checkpoint",
        "sites",
        "balanced accuracy",
        "chance",
        "leakage",
        "MAE on unseen sites (years)",
        "OpenBHB score",
    ]
    rows = [
        [r.checkpoint, str(r.sites), number(r.bacc, 3), number(r.chance, 3), number(r.leakage, 3), number(r.external_mae),
         number(r.openbhb)]
        for r in rows_of(comparison.site_leakage)
    ]  # fmt: skip
    return head, rows


def _brain_age(comparison: Comparison) -> Content:
    head = ["checkpoint", "task", "MAE (years)", "slope", "r(gap, age)", "SD of corrected gap", "r(corrected gap, age)"]
    rows = [
        [r.checkpoint, r.task, number(r.mae), number(r.slope), number(r.r_raw), number(r.gap_sd), number(r.r_corrected)]
        for r in rows_of(comparison.brain_age)
    ]
    return head, rows


def latex_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Return a table of texts (booktabs); cells are escaped, the caption is LaTeX."""
    lines = [" & ".join(escape(cell) for cell in row) + r" \\" for row in (head, *rows)]
    return "\n".join([
        r"\begin{table}", r"\centering", f"\\caption{{{caption}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule",
        lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip
