"""What the report says in words and tables, as HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from evaluation.comparison.comparison import Comparison
from evaluation.comparison.tables import (
    LABELS,
    brain_age_table,
    p_text,
    rows_of,
    shown,
    site_table,
    subgroups_table,
    verdict,
)
from evaluation.statistics.metrics import METRICS
from evaluation.tasks.published import PUBLISHED, SOURCE
from infra.tracking.runs import ui_command

MINIMUM = 20  # participants of a subgroup
MOST_COLUMNS = 4


def banner(comparison: Comparison) -> str:
    """The warning above everything made from simulated scans."""
    if not comparison.simulated:
        return ""
    return (
        '<p class="simulated"><strong>Simulated data.</strong> These scans come from a simulator, not from people: the '
        "figures show that the pipeline works, and say nothing about real disorders.</p>"
    )


def summary(comparison: Comparison) -> str:
    """What is compared, in one line, and where it can be looked up."""
    names = len(comparison.last)
    steps = f", {len(comparison.judged)} evaluations over pretraining" if len(comparison.judged) > names else ""
    titles = ", ".join(title for _, title in comparison.tasks.values())
    return (
        f"<p>{names} checkpoint{'s' * (names != 1)}{steps}; tasks: {html.escape(titles)}. All of it is read from the MLflow "
        f"store; to browse that: <code>{html.escape(ui_command(comparison.uri))}</code></p>"
    )


def figures(comparison: Comparison) -> str:
    """A table for each task: every figure of every checkpoint."""
    parts = []
    for task, (kind, title) in comparison.tasks.items():
        part = comparison.table[comparison.table["task"] == task]
        names = list(dict.fromkeys(part["metric"]))
        rows = []
        for name, mine in part.groupby("checkpoint", sort=False):
            found = {str(r.metric): r for r in rows_of(mine)}
            cells = [shown(n, found[n].value, found[n].low, found[n].high) if n in found else "-" for n in names]
            first = found.get(next(iter(METRICS[kind])))
            rows.append([str(name), *cells, p_text(float(first.p_chance)) if first else "-"])
        labels = [f"{comparison.label(task, name)} {_better(task, name)}" for name in names]
        table = _table(["checkpoint", *labels, "p, chance"], rows)
        parts.append(
            f"<h3>{html.escape(title)}</h3><p class='note'>{html.escape(_counts(comparison, task))}</p>{table}"
        )
    return "".join(parts)


def _counts(comparison: Comparison, task: str) -> str:
    part = next(each.of(task) for each in comparison.judged if task in each.tasks)
    text = f"{len(part)} scans of {part['participant'].nunique()} participants"
    if part["kind"].iloc[0] == "binary":
        people = part.groupby("label")["participant"].nunique()
        return f"{text}, {people.get(1.0, 0)} of them positive"
    if part["kind"].iloc[0] == "multiclass":
        return f"{text}, {part['label'].nunique()} classes"
    return text


def _better(task: str, figure: str) -> str:
    """An arrow to the better side; for site the worse answer is the better encoder."""
    down = figure in ("mae", "brier")
    if task == "site":
        down = not down
    return "↓" if down else "↑"


def curves(comparison: Comparison) -> str:
    """Mean AUC by training size, with the number of draws."""
    parts = []
    tasks = [task for task in comparison.tasks if task in set(comparison.curves["task"])]
    for task in tasks:
        part = comparison.curves[comparison.curves["task"] == task]
        sizes = sorted(set(part["n_train"]))
        rows = []
        for name, mine in part.groupby("checkpoint", sort=False):
            found = {int(r.n_train): shown("auc", r.auc, r.low, r.high) for r in rows_of(mine)}
            rows.append([str(name), *(found.get(size, "-") for size in sizes)])
        draws = " or ".join(str(count) for count in sorted(set(part["draws"])))
        title = html.escape(comparison.tasks[task][1])
        parts.append(
            f"<h3>{title}: AUC by training scans, mean of {draws} draws</h3>{_table(['checkpoint', *map(str, sizes)], rows)}"
            + _curve_differences(comparison, task, sizes)
        )
    return "".join(parts)


def _curve_differences(comparison: Comparison, task: str, sizes: Sequence[int]) -> str:
    """Pairs down, training sizes across; a star where Holm's p is 0.05 or less."""
    table = comparison.curve_differences
    mine = table[table["task"] == task]
    rows = []
    for (first, second), part in mine.groupby(["first", "second"], sort=False):
        found = {
            int(r.n_train): _signed(r.difference, r.low, r.high) + "*" * bool(r.p_holm <= 0.05) for r in rows_of(part)
        }
        rows.append([f"{first} − {second}", *(found.get(size, "-") for size in sizes)])
    return _table(["difference", *map(str, sizes)], rows) if rows else ""


def published_tasks(comparison: Comparison) -> list[str]:
    """Tasks of the comparison for which the paper gives figures."""
    return [task for task in comparison.tasks if task in PUBLISHED]


def published(comparison: Comparison) -> str:
    """The paper's own figures, marked as such."""
    tasks = published_tasks(comparison)
    kind = "simulated scans and " if comparison.simulated else ""
    note = (
        f"<p class='note'>Not measured here. AUC of linear probes read off the figure of {SOURCE}, on other scans, after "
        f"pretraining on 10,000; they cannot be compared with {kind}figures above beyond their shape.</p>"
    )
    methods = list(next(iter(PUBLISHED[tasks[0]].values())))
    rows = [
        [f"{comparison.tasks[task][1]}, {size} training scans", *(f"{row[method]:.3f}" for method in methods)]
        for task in tasks
        for size, row in PUBLISHED[task].items()
    ]
    return note + _table(["published", *methods], rows, "reference")


def differences(comparison: Comparison) -> str:
    """A table for each task: every pair of checkpoints."""
    parts, table = [], comparison.differences
    for task, part in table.groupby("task", sort=False):
        figure, by_delong = str(part["metric"].iloc[0]), part["test"].iloc[0] == "DeLong"
        head = ["pair", "difference [95 %]", *["bootstrap [95 %]"] * by_delong, "p", "p (Holm)", "reading"]
        rows = [
            [f"{r.first} − {r.second}", _signed(r.difference, r.low, r.high),
             *[f"[{r.boot_low:+.3f}, {r.boot_high:+.3f}]"] * by_delong, p_text(r.p), p_text(r.p_holm), verdict(r)]
            for r in rows_of(part)
        ]  # fmt: skip
        test = "DeLong's test" if by_delong else "paired bootstrap"
        title = html.escape(f"{comparison.tasks[str(task)][1]}: {comparison.label(str(task), figure)}, {test}")
        parts.append(f"<h3>{title}</h3>{_table(head, rows, words=(0, len(head) - 1))}")
    if comparison.unpaired:
        missing = "".join(f"<li>{html.escape(text)}</li>" for text in comparison.unpaired)
        parts.append(f"<p class='note'>Not compared:</p><ul>{missing}</ul>")
    return "".join(parts) or "<p>No two checkpoints judged by one protocol: nothing to compare.</p>"


def has_subgroups(comparison: Comparison) -> bool:
    """Whether predictions came with sex, age or site."""
    return any({"sex", "age", "site"} & set(each.predictions) for each in comparison.last)


def subgroups(comparison: Comparison) -> str:
    """A table for each task: groups down, the first few checkpoints across."""
    judged = comparison.last[:MOST_COLUMNS]
    table, parts = subgroups_table(judged, MINIMUM), []
    for task, part in table.groupby("task", sort=False):
        names = list(dict.fromkeys(part["checkpoint"]))
        figure = str(part["metric"].iloc[0])
        rows = []
        for (by, group, people, scans), mine in part.groupby(["by", "group", "participants", "scans"], sort=False):
            found = {r.checkpoint: str(r.note) or shown(figure, r.value, r.low, r.high) for r in rows_of(mine)}
            rows.append([f"{by} {group}", str(people), str(scans), *(found.get(name, "-") for name in names)])
        title = f"{comparison.tasks[str(task)][1]}: {LABELS[figure]}"
        parts.append(f"<h3>{html.escape(title)}</h3>{_table(['group', 'participants', 'scans', *names], rows)}")
    more = len(comparison.last) - len(judged)
    note = f"<p class='note'>The first {len(judged)} checkpoints; {more} more were judged.</p>" if more > 0 else ""
    return note + "".join(parts)


def has_site_or_age(comparison: Comparison) -> bool:
    """Whether the site task was judged, or an age with its folds."""
    return len(site_table(comparison.judged)) > 0 or len(brain_age_table(comparison.last)) > 0


def site_and_age(comparison: Comparison) -> str:
    """Site leakage with the OpenBHB score, and the brain-age gap before and after its correction."""
    parts = []
    sites = site_table(comparison.judged)
    if len(sites):
        rows = [
            [str(r.checkpoint), str(r.sites), f"{r.bacc:.3f}", f"{1 / r.sites:.3f}", f"{r.leakage:.3f}",
             _number(r.external_mae), _number(r.openbhb)]
            for r in rows_of(sites)
        ]  # fmt: skip
        head = [
            "checkpoint",
            "sites",
            "balanced accuracy",
            "chance",
            "leakage ↓",
            "MAE on unseen sites ↓",
            "OpenBHB score ↓",
        ]
        parts.append(
            "<h3>Site</h3><p class='note'>Leakage: 0 when the features hold nothing of the site, 1 when they give it away. "
            "OpenBHB score: balanced accuracy^0.3 x age MAE on sites left out of training; it needs an evaluation of age with sites "
            f"left out.</p>{_table(head, rows)}"
        )
    ages = brain_age_table(comparison.last)
    if len(ages):
        rows = [
            [
                str(r.checkpoint),
                f"{r.mae:.2f}",
                f"{r.slope:.2f}",
                f"{r.r_raw:+.2f}",
                f"{r.gap_sd:.2f}",
                f"{r.r_corrected:+.2f}",
            ]
            for r in rows_of(ages)
        ]
        head = ["checkpoint", "MAE (years) ↓", "slope", "r(gap, age)", "SD of corrected gap", "r(corrected gap, age)"]
        parts.append(
            "<h3>Brain-age gap</h3><p class='note'>Predicted minus real age. The line of predicted over real age (slope 1 would "
            "be unbiased) is fitted on people outside the fold and taken off. The MAE is the raw one: a corrected MAE would use the real "
            f"age.</p>{_table(head, rows)}"
        )
    return "".join(parts)


def provenance(comparison: Comparison) -> str:
    """Where every checkpoint and its evaluation come from, and the recipes of the pretrainings."""
    head = list(comparison.provenance[0])
    where = _table(head, [[row[key] for key in head] for row in comparison.provenance], words=range(len(head)))
    note = "<p class='note'>Weights and manifest: the first 10 digits of their SHA-256; runs: of their MLflow ids.</p>"
    if comparison.superseded:
        lines = "".join(f"<li>{html.escape(text)}</li>" for text in comparison.superseded)
        where += (
            f"<p class='note'>Superseded: tasks evaluated again, of which the newer answers count.</p><ul>{lines}</ul>"
        )
    return note + where + _recipes(comparison.recipes)


def _recipes(recipes: dict[str, dict[str, str]]) -> str:
    """What the pretrainings' recipes differ in, and folded away what they share."""
    keys = sorted({key for recipe in recipes.values() for key in recipe})
    if not keys:
        return ""
    names = list(recipes)
    differ = [key for key in keys if len({recipe.get(key) for recipe in recipes.values()}) > 1]
    parts = []
    if differ:
        rows = [[key, *(recipes[name].get(key, "-") for name in names)] for key in differ]
        parts.append(f"<h3>Recipes: what differs</h3>{_table(['key', *names], rows, words=range(len(names) + 1))}")
    shared = [[key, recipes[names[0]][key]] for key in keys if key not in differ]
    parts.append(
        f"<details><summary>{len(shared)} keys that the recipes share</summary>{_table(['key', 'value'], shared, words=(0, 1))}"
        "</details>"
    )
    return "".join(parts)


def _signed(value: float, low: float, high: float) -> str:
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "", words: Sequence[int] = (0,)) -> str:
    """A table; columns not among ``words`` hold numbers and stand to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ["" if place in words else " class='n'" for place in range(len(cells))]
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{line('th', head)}</tr></thead>"
    return f"<div class='scroll'><table class='{style}'>{top}<tbody>{body}</tbody></table></div>"
