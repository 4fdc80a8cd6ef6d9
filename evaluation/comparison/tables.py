"""The numbers behind the comparison, as tables: figures, chance, paired differences, learning curves, steps, subgroups."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluation.protocols.variant import ProtocolVariant
from evaluation.statistics.brain_age import BiasLine, corrected_gaps
from evaluation.statistics.intervals import with_interval
from evaluation.statistics.metrics import (
    HIGHER_IS_BETTER,
    METRICS,
    PROBABILITY_METRICS,
    Statistic,
    openbhb_score,
    pearson,
    site_leakage,
)
from evaluation.statistics.paired import Difference, delong_difference, holm, paired_bootstrap, permutation_p
from evaluation.statistics.subgroups import age_bands, subgroup_table

METRIC_COLUMNS = ["checkpoint", "task", "title", "metric", "value", "low", "high", "p_chance"]
DIFFERENCE_COLUMNS = [
    "task", "metric", "first", "second", "difference", "low", "high", "p", "p_holm", "test", "boot_low", "boot_high",
]  # fmt: skip
ALL_PAIRS = 6  # up to so many evaluations of a protocol each is compared with each; beyond, each with the first
LABELS = {
    "auc": "AUC", "bacc": "balanced accuracy", "ap": "average precision", "brier": "Brier score", "mae": "MAE",
    "r2": "R²", "pearson": "Pearson r",
}  # fmt: skip


@dataclass
class Judged:
    """One checkpoint judged by one protocol, as the store knows it: by one evaluation, or by several on other tasks."""

    name: str
    run: dict[str, Any]  # the newest evaluation
    predictions: pd.DataFrame
    curve: pd.DataFrame
    embedding: pd.DataFrame
    saliency: dict[str, dict[str, Any]] = field(default_factory=dict)  # task -> map, background, ...
    series: str = ""  # the pretraining, by a name that its checkpoints share and no other pretraining has
    earlier: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # task -> its evaluation, where that is not ``run``

    def run_of(self, task: str) -> dict[str, Any]:
        """The evaluation that a task's answers are from."""
        return self.earlier.get(task, self.run)

    @property
    def runs(self) -> list[dict[str, Any]]:
        """All evaluations that count, newest first."""
        return list({run["run_id"]: run for run in (self.run, *self.earlier.values())}.values())

    @property
    def weights(self) -> str:
        """SHA-256 of the weights; empty for voxels and networks from scratch."""
        return str(self.run["tags"].get("yaware.weights_sha256", ""))

    @property
    def variant(self) -> ProtocolVariant:
        """The protocol with its options, from the run's tags."""
        return ProtocolVariant.from_tags(self.run["tags"])

    @property
    def protocol(self) -> str:
        """The protocol's label, for example ``linear`` or ``paper, sites left out``."""
        return self.variant.label

    @property
    def step(self) -> int:
        """The pretraining step of the checkpoint."""
        return int(self.run["tags"]["yaware.step"])

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order asked for."""
        return list(dict.fromkeys(self.predictions["task"]))

    def of(self, task: str) -> pd.DataFrame:
        """The predictions of a task."""
        return self.predictions[self.predictions["task"] == task]

    def kind(self, task: str) -> str:
        """binary, multiclass or regression."""
        return str(self.of(task)["kind"].iloc[0])


def metrics_of(part: pd.DataFrame) -> Iterator[tuple[str, Statistic, NDArray[Any]]]:
    """Name, figure and the answers that it takes, for one task's predictions: answers, or probabilities where stored."""
    kind = str(part["kind"].iloc[0])
    for name, statistic in METRICS[kind].items():
        yield name, statistic, part["answer"].to_numpy()
    shares = probabilities(part)
    for name, statistic in PROBABILITY_METRICS[kind].items():
        if shares is not None:
            yield name, statistic, shares


def probabilities(part: pd.DataFrame) -> NDArray[Any] | None:
    """(N,) of the positive class, (N, K) of every class of a multiclass task, or None where they were not stored."""
    if part["kind"].iloc[0] == "multiclass":
        columns = [name for name in part if re.fullmatch(r"p\d+", str(name)) and part[name].notna().all()]
        return part[sorted(columns, key=lambda name: int(str(name)[1:]))].to_numpy() if columns else None
    known = "probability" in part and part["probability"].notna().all()
    return part["probability"].to_numpy() if known else None


def metrics_table(judged: list[Judged]) -> pd.DataFrame:
    """METRIC_COLUMNS: as logged, and from the stored predictions what was not; the first figure's p of being by chance."""
    rows = []
    for each in judged:
        for task in each.tasks:
            part, metrics = each.of(task), each.run_of(task)["metrics"]
            labels, people = _labels(part), part["participant"].to_numpy()
            for number, (figure, statistic, answers) in enumerate(metrics_of(part)):
                key = f"{task}.{figure}"
                if f"{key}.low" in metrics:
                    found = metrics[key], metrics[f"{key}.low"], metrics[f"{key}.high"]
                else:
                    found = with_interval(statistic, labels, answers, people)
                p = float("nan")
                if number == 0:
                    p = permutation_p(statistic, labels, answers, people, higher_is_better=HIGHER_IS_BETTER[figure])
                rows.append((each.name, task, part["title"].iloc[0], figure, *found, p))
    return pd.DataFrame(rows, columns=METRIC_COLUMNS)


def pairs(judged: list[Judged], against: str | None = None) -> Iterator[tuple[Judged, Judged]]:
    """Each with each that comes after it and that it can be compared with, or each such one with the one named ``against``.

    Compared are evaluations of one protocol, and voxels and networks from scratch with all that were judged on folds of
    their kind. Of a protocol with more than ALL_PAIRS evaluations, all but the first are compared with the first alone.
    """
    members: dict[str, list[str]] = {}
    for each in judged:
        members.setdefault(each.protocol, []).append(each.name)
    first_of = {protocol: names[0] for protocol, names in members.items() if len(names) > ALL_PAIRS}
    for number, first in enumerate(judged):
        for second in judged[number + 1 :]:
            if not _comparable(first, second):
                continue
            if against is None:
                chosen = [first] if first.protocol == second.protocol else [first, second]
                if all(first_of.get(each.protocol, each.name) == each.name for each in chosen):
                    yield first, second
            elif second.name == against:
                yield first, second
            elif first.name == against:
                yield second, first


def _comparable(first: Judged, second: Judged) -> bool:
    """Whether a difference would be the checkpoints', and not that of two protocols or of two kinds of folds."""
    if first.protocol == second.protocol:
        return True
    one, other = first.variant, second.variant
    return (one.is_baseline or other.is_baseline) and one.leave_site_out == other.leave_site_out


def differences_table(judged: list[Judged], against: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """DIFFERENCE_COLUMNS for every of ``pairs`` judged on the same scans, by each task's first figure; and why others are not.

    AUC: DeLong's test and interval over participants; other figures: paired bootstrap. boot_low and boot_high are always
    the paired bootstrap's. p_holm is corrected over all rows of the table. ``against``: only pairs with this one.
    """
    rows, left_out = [], []
    for one, other in pairs(judged, against):
        for task in [task for task in one.tasks if task in other.tasks]:
            both = _paired(one, other, task)
            if both is None:
                left_out.append(f"{task}: {one.name} and {other.name} were judged on different scans or labels")
                continue
            rows.append((task, *_difference(both, one.name, other.name)))
    table = pd.DataFrame(rows, columns=[column for column in DIFFERENCE_COLUMNS if column != "p_holm"])
    table["p_holm"] = holm(table["p"].to_numpy(float))
    order = {task: place for place, task in enumerate(dict.fromkeys(t for each in judged for t in each.tasks))}
    table = table.sort_values("task", key=lambda column: column.map(order), kind="stable", ignore_index=True)
    return table[DIFFERENCE_COLUMNS], left_out


def subgroups_table(judged: list[Judged], minimum: int) -> pd.DataFrame:
    """checkpoint, task, figure and subgroups.COLUMNS of each task's first figure, by sex, age band and site as stored."""
    found = []
    for each in judged:
        for task in each.tasks:
            part = each.of(task)
            kind, labels = str(part["kind"].iloc[0]), _labels(part)
            figure, statistic, answers = next(metrics_of(part))
            by = {name: part[name].to_numpy() for name in ("sex", "site") if name in part and name != task}
            if "age" in part:
                by["age"] = age_bands(part["age"].to_numpy(float))
            by = {name: by[name] for name in ("sex", "age", "site") if name in by}
            table = subgroup_table(
                statistic, labels, answers, part["participant"].to_numpy(), by, classes=kind != "regression",
                minimum=minimum,
            )  # fmt: skip
            found.append(table.assign(checkpoint=each.name, task=task, metric=figure))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def predicts_age(part: pd.DataFrame) -> bool:
    """Whether a task's label is the age at the scan, in years; of other numbers nobody said the unit."""
    if part["kind"].iloc[0] != "regression" or "age" not in part:
        return False
    return np.allclose(part["label"].to_numpy(float), part["age"].to_numpy(float))


def brain_age_table(judged: list[Judged]) -> pd.DataFrame:
    """checkpoint, task, mae, r_raw, slope, gap_sd, r_corrected of tasks that predict age, with folds known.

    r_raw and r_corrected: Pearson's correlation of the gap with age before and after the correction.
    """
    rows = []
    for each in judged:
        for task in each.tasks:
            part = each.of(task)
            if not predicts_age(part) or part.get("fold", pd.Series([0])).nunique() < 2:
                continue
            ages, predicted = part["label"].to_numpy(float), part["answer"].to_numpy(float)
            folds, people = part["fold"].to_numpy(), part["participant"].to_numpy()
            gaps, line = corrected_gaps(ages, predicted, folds, people), BiasLine.fit(ages, predicted)
            raw = predicted - ages
            rows.append(
                (each.name, task, float(np.abs(raw).mean()), pearson(ages, raw), line.slope, float(gaps.std(ddof=1)),
                 pearson(ages, gaps))
            )  # fmt: skip
    return pd.DataFrame(rows, columns=["checkpoint", "task", "mae", "r_raw", "slope", "gap_sd", "r_corrected"])


def site_table(judged: list[Judged]) -> pd.DataFrame:
    """checkpoint, sites, bacc, leakage, external_mae, openbhb: what the features hold of the scanner.

    external_mae is the age MAE of the same model on sites that were left out of training; NaN, and no score, where none
    was evaluated.
    """
    rows = []
    for each in judged:
        if "site" not in each.tasks or each.kind("site") != "multiclass":
            continue
        part = each.of("site")
        labels, answers = _labels(part), part["answer"].to_numpy()
        bacc = METRICS["multiclass"]["bacc"](labels, answers)
        outside = [
            other.run_of("age")["metrics"]["age.mae"]
            for other in judged
            if (other.series, other.step, other.weights, other.variant.fitted)
            == (each.series, each.step, each.weights, each.variant.fitted)
            and other.variant.leave_site_out
            and "age.mae" in other.run_of("age")["metrics"]
        ]
        mae = float(outside[0]) if outside else float("nan")
        score = openbhb_score(bacc, mae) if outside else float("nan")
        rows.append((each.name, len(np.unique(labels)), bacc, site_leakage(labels, answers), mae, score))
    return pd.DataFrame(rows, columns=["checkpoint", "sites", "bacc", "leakage", "external_mae", "openbhb"])


def verdict(row: Any) -> str:
    """In words: which of a pair is better, if Holm's p says so."""
    if not row.p_holm <= 0.05:
        return "no difference shown"
    higher, lower = (row.first, row.second) if row.difference > 0 else (row.second, row.first)
    if row.metric == "bacc":
        return f"{higher} higher"  # good for a diagnosis, bad for a site
    return f"{higher if HIGHER_IS_BETTER[row.metric] else lower} better"


def shown(figure: str, value: float, low: float, high: float) -> str:
    """``0.812 [0.75, 0.87]``; years with one digit; ``-`` where there is none."""
    if value is None or not np.isfinite(value):
        return "-"
    if figure == "mae":
        return f"{value:.2f} [{low:.1f}, {high:.1f}]"
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"


def rows_of(table: pd.DataFrame) -> Iterator[Any]:
    """A table's rows with its columns as attributes."""
    yield from table.itertuples()


def p_text(p: float) -> str:
    """``0.031``, ``< 0.001``, or ``-`` where there was no test."""
    if not np.isfinite(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _labels(part: pd.DataFrame) -> NDArray[Any]:
    """Classes as integers, numbers as they are."""
    return part["label"].to_numpy(float if part["kind"].iloc[0] == "regression" else np.int64)


def _paired(first: Judged, second: Judged, task: str) -> pd.DataFrame | None:
    """Both predictions of a task side by side, or None where they are not of the same scans, labels and people."""
    one, other = first.of(task), second.of(task)
    columns = ["key", "label", "participant", "answer"]
    both = one.merge(other[columns], on=["key", "label", "participant"], suffixes=("", "_other"))
    return both if len(both) == len(one) == len(other) else None


def _difference(both: pd.DataFrame, first: str, second: str) -> tuple[Any, ...]:
    """figure, first, second, difference, low, high, p, test, boot_low, boot_high of one pair."""
    figure, statistic, one = next(metrics_of(both))
    labels, other, people = _labels(both), both["answer_other"].to_numpy(), both["participant"].to_numpy()
    bootstrap = paired_bootstrap(statistic, labels, one, other, people)
    found: Difference = delong_difference(labels, one, other, people) if figure == "auc" else bootstrap
    test = "DeLong" if figure == "auc" else "bootstrap"
    numbers = found.value, found.low, found.high, found.p, test, bootstrap.low, bootstrap.high
    return figure, first, second, *numbers
