"""The report's text and tables as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evaluation.comparison.formats import LABELS, LEVEL, number, p_text, rows_of, signed, verdict
from evaluation.statistics.metrics import interval_text
from evaluation.tasks.published import PUBLISHED, SOURCE
from infra.tracking.runs import ui_command

if TYPE_CHECKING:
    from evaluation.comparison.comparison import Comparison, TaskSummary

MOST_COLUMNS = 4  # checkpoints side by side in the table of subgroups
LOWER_IS_BETTER = ("mae", "brier")


def banner(comparison: Comparison) -> str:
    """Return the warning shown above everything if scans are simulated."""
    if not comparison.simulated:
        return ""
    return (
        '<p class="simulated"><strong>Simulated data.</strong> These scans come from a simulator, not from people. The '
        "results show that the pipeline works. They say nothing about real disorders.</p>"
    )


def summary(comparison: Comparison) -> str:
    """Say in one line what is compared, and how to browse the MLflow store."""
    count, all_steps = len(comparison.last), len(comparison.evaluations)
    steps = f" ({all_steps} with earlier pretraining steps)" if all_steps > count else ""
    titles = ", ".join(task.title for task in comparison.tasks.values())
    return (
        f"<p>{count} evaluation{'s' * (count != 1)} of checkpoints{steps}. Tasks: {html.escape(titles)}. All values are read from the "
        f"MLflow store; browse it with <code>{html.escape(ui_command(comparison.uri))}</code></p>"
    )


def metrics(comparison: Comparison) -> str:
    """Return a table for each task: every metric of every checkpoint."""
    parts = []
    for task, about in comparison.tasks.items():
        table = comparison.metrics[comparison.metrics["task"] == task]
        names = list(dict.fromkeys(table["metric"]))
        rows = []
        for checkpoint, group in table.groupby("checkpoint", sort=False):
            by_metric = {r.metric: r for r in rows_of(group)}
            cells = [
                interval_text(name, by_metric[name].value, by_metric[name].low, by_metric[name].high)
                if name in by_metric else "-"
                for name in names
            ]  # fmt: skip
            primary = by_metric[about.primary_metric]
            fixed = interval_text(primary.metric, primary.fixed_value, primary.fixed_low, primary.fixed_high)
            chance = f"{p_text(primary.p_chance)} ({primary.chance_test})" if primary.chance_test else "-"
            rows.append([str(checkpoint), *cells, primary.covers, chance, fixed, p_text(primary.p_fixed)])
        labels = [f"{comparison.label(task, name)} {_arrow(task, name)}" for name in names]
        parts.append(
            f"<h3>{html.escape(about.title)}</h3><p class='note'>{html.escape(_counts(about))}</p>"
            + html_table(
                [
                    "checkpoint",
                    *labels,
                    "intervals cover",
                    "p, chance",
                    f"{labels[0]} with models fixed",
                    "p, chance, models fixed",
                ],
                rows,
            )
        )
    return "".join(parts)


def _counts(task: TaskSummary) -> str:
    text = f"{task.scans} scans of {task.participants} participants"
    if task.kind == "binary":
        return f"{text}, {task.positives} of them positive"
    return f"{text}, {task.classes} classes" if task.kind == "multiclass" else text


def _arrow(task: str, metric: str) -> str:
    """Return an arrow to the better side; features that tell the site poorly are the better ones."""
    down = (metric in LOWER_IS_BETTER) != (task == "site")
    return "↓" if down else "↑"


def curves(comparison: Comparison) -> str:
    """Return two tables for each task: mean AUC by training size, and its paired differences."""
    parts = []
    for task, about in comparison.tasks.items():
        table = comparison.curves[comparison.curves["task"] == task]
        if not len(table):
            continue
        sizes = sorted(set(table["n_train"]))
        rows = []
        for checkpoint, group in table.groupby("checkpoint", sort=False):
            cells = {r.n_train: interval_text("auc", r.auc, r.low, r.high) for r in rows_of(group)}
            rows.append([str(checkpoint), *(cells.get(size, "-") for size in sizes)])
        draws = " or ".join(str(count) for count in sorted(set(table["draws"])))
        title = f"{about.title}: AUC by number of training scans, mean of {draws} draws"
        parts.append(f"<h3>{html.escape(title)}</h3>{html_table(['checkpoint', *map(str, sizes)], rows)}")
        parts.append(_curve_differences(comparison, task, sizes))
    return "".join(parts)


def _curve_differences(comparison: Comparison, task: str, sizes: Sequence[int]) -> str:
    """Return a table of pairs (rows) and training sizes (columns), with a star where Holm's p is at most LEVEL."""
    table = comparison.curve_differences[comparison.curve_differences["task"] == task]
    rows = []
    for (first, second), group in table.groupby(["first", "second"], sort=False):
        cells = {
            r.n_train: signed(r.difference, r.low, r.high) + ("*" if r.p_holm <= LEVEL else "") for r in rows_of(group)
        }  # fmt: skip
        rows.append([f"{first} − {second}", *(cells.get(size, "-") for size in sizes)])
    return html_table(["difference", *map(str, sizes)], rows) if rows else ""


def published_tasks(comparison: Comparison) -> list[str]:
    """Return the tasks of the comparison for which the paper gives values; none if scans are simulated."""
    return [] if comparison.simulated else [task for task in comparison.tasks if task in PUBLISHED]


def published(comparison: Comparison) -> str:
    """Return the paper's values, marked as such."""
    tasks = published_tasks(comparison)
    note = (
        f"<p class='note'>These values were not measured here. They are AUCs of linear probes on the encoder's own pooled features "
        f"alone, without readouts or covariates, after pretraining on 10,000 scans, read off the figure of {SOURCE}. The scans differ "
        "from those above, so compare the shape of the curves, not the values, and only with results of the same method, which the "
        f"last column names.</p>"
    )
    methods = list(next(iter(PUBLISHED[tasks[0]].values())))
    rows = [
        [
            f"{comparison.tasks[task].title}, {size} training scans",
            *(f"{row[method]:.3f}" for method in methods),
            _same_method(comparison, task),
        ]
        for task in tasks
        for size, row in PUBLISHED[task].items()
    ]
    return note + html_table(["published", *methods, "results by this method"], rows, "reference")


def _same_method(comparison: Comparison, task: str) -> str:
    """Name the evaluations of a task that were made as the published ones, or say what sets all of them apart."""
    names = [each.name for each in comparison.last if task in each.tasks and not each.beyond_paper(task)]
    return ", ".join(names) or f"none: {comparison.unlike_published(task)}"


def differences(comparison: Comparison) -> str:
    """Return a table for each task: every pair of checkpoints."""
    parts = []
    for task, table in comparison.differences.groupby("task", sort=False):
        metric, delong = str(table["metric"].iloc[0]), table["fixed_test"].iloc[0] == "DeLong"
        test = "DeLong" if delong else "bootstrap"
        head = [
            "pair", "difference [95 %]", "p", "p (Holm)", "result", f"{test}, models fixed [95 %]",
            *["bootstrap, models fixed"] * delong, "p, models fixed",
        ]  # fmt: skip
        rows = [
            [f"{r.first} − {r.second}", signed(r.difference, r.low, r.high), p_text(r.p), p_text(r.p_holm), verdict(r),
             signed(r.fixed_difference, r.fixed_low, r.fixed_high),
             *[f"[{r.boot_low:+.3f}, {r.boot_high:+.3f}]"] * delong, p_text(r.fixed_p)]
            for r in rows_of(table)
        ]  # fmt: skip
        title = html.escape(f"{comparison.tasks[str(task)].title}: {comparison.label(str(task), metric)}")
        parts.append(f"<h3>{title}</h3>{html_table(head, rows, words=(0, 4))}")
    if comparison.unpaired:
        parts.append(f"<p class='note'>Not compared:</p>{_list(comparison.unpaired)}")
    return "".join(parts) or "<p>There is nothing to compare: no two checkpoints were evaluated by one protocol.</p>"


def subgroups(comparison: Comparison) -> str:
    """Return a table for each task: subgroups (rows) and the first few checkpoints (columns)."""
    shown = [evaluation.name for evaluation in comparison.last[:MOST_COLUMNS]]
    all_rows = comparison.subgroups
    parts = []
    for task, table in all_rows[all_rows["checkpoint"].isin(shown)].groupby("task", sort=False):
        names = list(dict.fromkeys(table["checkpoint"]))
        metric = str(table["metric"].iloc[0])
        rows = []
        for (by, group, people, scans), members in table.groupby(["by", "group", "participants", "scans"], sort=False):
            cells = {r.checkpoint: r.note or interval_text(metric, r.value, r.low, r.high) for r in rows_of(members)}
            rows.append([f"{by} {group}", str(people), str(scans), *(cells.get(name, "-") for name in names)])
        title = f"{comparison.tasks[str(task)].title}: {LABELS[metric]}"
        parts.append(f"<h3>{html.escape(title)}</h3>{html_table(['group', 'participants', 'scans', *names], rows)}")
    more = len(comparison.last) - len(shown)
    note = (
        f"<p class='note'>The first {len(shown)} checkpoints; the CSV table beside this report has {more} more.</p>"
        if more
        else ""
    )
    return note + "".join(parts)


def fairness(comparison: Comparison) -> str:
    """Return a table of the gaps between groups."""
    rows = [
        [
            r.checkpoint,
            comparison.tasks[r.task].title,
            r.by,
            r.measure,
            signed(r.gap, r.low, r.high),
            f"{r.lowest}, {r.highest}",
        ]
        for r in rows_of(comparison.fairness)
    ]
    head = ["checkpoint", "task", "between", "measure", "gap", "lowest, highest"]
    return html_table(head, rows, words=(0, 1, 2, 3, 5))


def chosen_features(comparison: Comparison) -> str:
    """Return the table of the features that folds chose."""
    return html_table(
        ["checkpoint", "task", "features: layer, pooling, scale"], [list(row) for row in comparison.chosen_features]
    )


def site_and_age(comparison: Comparison) -> str:
    """Return the tables of site leakage and of the brain-age gap."""
    parts = []
    if len(comparison.site_leakage):
        rows = [
            [r.checkpoint, str(r.sites), number(r.bacc, 3), number(r.chance, 3), number(r.leakage, 3),
             number(r.external_mae), number(r.openbhb)]
            for r in rows_of(comparison.site_leakage)
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
            "<h3>Site</h3><p class='note'>Leakage is 0 if the site is told no better than by chance, and 1 if every site is "
            "recognised. OpenBHB score: balanced accuracy to the power of 0.3, times the age MAE in years on sites left out of "
            f"training. It needs an evaluation of age with --leave-site-out.</p>{html_table(head, rows)}"
        )
    if len(comparison.brain_age):
        rows = [
            [
                r.checkpoint,
                f"{r.mae:.2f}",
                f"{r.slope:.2f}",
                f"{r.r_raw:+.2f}",
                f"{r.gap_sd:.2f}",
                f"{r.r_corrected:+.2f}",
            ]
            for r in rows_of(comparison.brain_age)
        ]
        head = [
            "checkpoint", "MAE (years) ↓", "slope", "r(gap, age)", "SD of corrected gap (years)", "r(corrected gap, age)",
        ]  # fmt: skip
        parts.append(
            "<h3>Brain-age gap</h3><p class='note'>The gap is predicted minus real age. For the corrected gap, a line of predicted "
            "over real age is fitted to participants outside the fold and subtracted from the prediction; a slope of 1 would be "
            "unbiased. The MAE is of the uncorrected predictions, because a corrected prediction uses the real "
            f"age; it is that of the metrics. The other columns are of the first cross-validation.</p>{html_table(head, rows)}"
        )
    return "".join(parts)


def provenance(comparison: Comparison) -> str:
    """Return the origin of every checkpoint and evaluation, and the recipes of the pretrainings."""
    head = list(comparison.provenance[0])
    rows = [[row[key] for key in head] for row in comparison.provenance]
    parts = [
        "<p class='note'>Weights and manifest: first 10 digits of their SHA-256. Runs: first 10 digits of their MLflow ids.</p>",
        html_table(head, rows, words=range(len(head))),
    ]
    if comparison.superseded:
        parts.append(
            "<p class='note'>Superseded: these tasks were evaluated again, and the newer results are used.</p>"
            + _list(comparison.superseded)
        )
    return "".join(parts) + _recipes(comparison.recipes)


def _recipes(recipes: dict[str, dict[str, str]]) -> str:
    """Return the keys in which the recipes differ, and the others in a part that unfolds."""
    keys = sorted({key for recipe in recipes.values() for key in recipe})
    if not keys:
        return ""
    names = list(recipes)
    differ = [key for key in keys if len({recipe.get(key) for recipe in recipes.values()}) > 1]
    parts = []
    if differ:
        rows = [[key, *(recipes[name].get(key, "-") for name in names)] for key in differ]
        parts.append(f"<h3>Recipes: differences</h3>{html_table(['key', *names], rows, words=range(len(names) + 1))}")
    shared = [[key, recipes[names[0]][key]] for key in keys if key not in differ]
    title = f"{len(shared)} keys with the same value in all recipes" if len(names) > 1 else f"Recipe of {names[0]}"
    parts.append(
        f"<details><summary>{html.escape(title)}</summary>{html_table(['key', 'value'], shared, words=(0, 1))}</details>"
    )
    return "".join(parts)


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "", words: Sequence[int] = (0,)) -> str:
    """Return a table; the columns ``words`` are text, all others are numbers and aligned to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        """Return the cells of a row."""
        styles = ["" if column in words else " class='n'" for column in range(len(row))]
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(styles, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>"
    return f"<div class='scroll'><table class='{style}'>{top}<tbody>{body}</tbody></table></div>"
