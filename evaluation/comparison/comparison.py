"""Compares evaluated checkpoints. All data come from the MLflow store; the checkpoints themselves are not needed."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from evaluation.comparison import age_and_site, curves, repeats, report, tables
from evaluation.comparison.evaluations import CheckpointEvaluation, RunRow, last_steps, read_evaluations
from evaluation.comparison.formats import LABELS, rows_of
from evaluation.protocols.variant import unlike_published
from evaluation.statistics.metrics import METRICS, interval_text
from infra.errors import OPTIONAL_TEXT, PATH, TEXT, UserError, check_arguments
from infra.tracking import runs as store
from infra.tracking.tracker import default_uri

TRAINING_METRICS = ("loss", "lr", "grad_norm", "scans_per_second")


class TaskSummary(NamedTuple):
    """A task of the comparison, with the scans and participants of its first evaluation."""

    kind: str  # binary, multiclass or regression
    title: str
    scans: int
    participants: int
    positives: int  # participants of the positive class of a binary task, else 0
    classes: int  # of a multiclass task, else 0

    @property
    def primary_metric(self) -> str:
        """The metric that differences, subgroups and plots are about."""
        return next(iter(METRICS[self.kind]))


@dataclass(repr=False)
class Comparison:
    """Checkpoints side by side, as pandas tables; ``report`` writes them as files.

    A checkpoint is named as in the column ``checkpoint``: by its run, and by its step and protocol where several were
    evaluated. Intervals are 95 % intervals.

    Attributes:
        experiment: MLflow experiment.
        uri: MLflow store.
        evaluations: every evaluated checkpoint and protocol, best first.
        last: the evaluations of each pretraining's last step.
        trainings: pretraining -> metric -> list of (step, value).
        metrics: a row per checkpoint, task and metric: checkpoint, task, title, metric, value, low, high, covers (what the
            interval covers), fixed_value, fixed_low, fixed_high (models fixed), chance, p_chance, chance_test, p_fixed.
        differences: a row per pair of last steps and task: task, metric, first, second, difference (first minus second),
            low, high, p, p_holm, test (halves or none), fixed_difference, fixed_low, fixed_high, fixed_p, fixed_test (DeLong
            or bootstrap, with the models taken as given), boot_low, boot_high.
        curves: learning curves of last steps: checkpoint, task, n_train, draws, auc, low, high.
        curve_differences: task, n_train, first, second, draws, difference, low, high, p, p_holm.
        unpaired: why pairs were not compared, a line each.
        superseded: evaluations with results that newer ones replace, a line each.
        provenance: a row per evaluation run: where the checkpoint and its results come from.
        recipes: pretraining -> key -> value.
        reliability: a row per checkpoint that `yaware reliability` measured: the columns of ``repeats.COLUMNS``.
    """

    experiment: str
    uri: str
    evaluations: list[CheckpointEvaluation]
    last: list[CheckpointEvaluation]
    trainings: dict[str, dict[str, list[tuple[int, float]]]]
    metrics: pd.DataFrame
    differences: pd.DataFrame
    curves: pd.DataFrame
    curve_differences: pd.DataFrame
    unpaired: list[str] = field(default_factory=list)
    superseded: list[str] = field(default_factory=list)
    provenance: list[dict[str, str]] = field(default_factory=list)
    recipes: dict[str, dict[str, str]] = field(default_factory=dict)
    reliability: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=repeats.COLUMNS))

    @cached_property
    def subgroups(self) -> pd.DataFrame:
        """Each task's primary metric by sex, age band and site, for last steps.

        Columns: checkpoint, task, metric, by, group, participants, scans, value, low, high, note (why there is no value).
        """
        return tables.subgroups_table(self.last)

    @cached_property
    def fairness(self) -> pd.DataFrame:
        """Largest gaps of AUC, sensitivity and calibration between sexes, age bands and sites: binary tasks of last steps.

        Columns: checkpoint, task, by, measure, lowest, highest (the groups), groups (their number), gap, low, high.
        """
        return tables.fairness_gaps(self.last)

    @cached_property
    def calibration(self) -> pd.DataFrame:
        """Calibration of binary tasks' probabilities, for last steps.

        Columns: checkpoint, task, predicted (mean probability of a bin), observed (share of positives), low, high, scans.
        """
        return tables.calibration_table(self.last)

    @cached_property
    def site_leakage(self) -> pd.DataFrame:
        """How well the features tell the scanner site, for all evaluations of the task ``site``.

        Columns: checkpoint, sites, bacc, chance, leakage (0 none, 1 complete), external_mae (years), openbhb.
        """
        return age_and_site.site_leakage_table(self.evaluations)

    @cached_property
    def brain_age(self) -> pd.DataFrame:
        """The brain-age gap before and after its correction for age, for last steps.

        Columns: checkpoint, task, mae (years), slope, r_raw, gap_sd (years), r_corrected.
        """
        return age_and_site.brain_age_table(self.last)

    @property
    def chosen_features(self) -> list[tuple[str, str, str]]:
        """Checkpoint, task and the features that its folds chose, for evaluations with ``--layer auto``."""
        rows = [(each.name, task, each.chosen_features(task)) for each in self.evaluations for task in each.tasks]
        return [row for row in rows if row[2]]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by the name of its attribute."""
        names = (
            "metrics", "differences", "curves", "curve_differences", "subgroups", "calibration", "site_leakage", "brain_age",
            "reliability", "fairness",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @property
    def simulated(self) -> bool:
        """Whether any checkpoint was evaluated on simulated scans."""
        return any(evaluation.simulated for evaluation in self.evaluations)

    @cached_property
    def tasks(self) -> dict[str, TaskSummary]:
        """Tasks by name, in the order of the evaluations."""
        summaries: dict[str, TaskSummary] = {}
        for evaluation in self.evaluations:
            for task in evaluation.tasks:
                if task not in summaries:
                    summaries[task] = _summarise(evaluation.predictions_of(task))
        return summaries

    @property
    def over_steps(self) -> dict[str, list[CheckpointEvaluation]]:
        """Pretraining -> its evaluations by step, for pretrainings that were evaluated at several steps.

        With several protocols there is an entry for each, named after both.
        """
        runs: dict[str, list[CheckpointEvaluation]] = {}
        several = len({evaluation.protocol for evaluation in self.evaluations}) > 1
        for evaluation in sorted(self.evaluations, key=lambda evaluation: evaluation.step):
            name = f"{evaluation.pretraining}, {evaluation.protocol}" if several else evaluation.pretraining
            runs.setdefault(name, []).append(evaluation)
        return {name: steps for name, steps in runs.items() if len({evaluation.step for evaluation in steps}) > 1}

    def unlike_published(self, task: str) -> str:
        """Return what sets the evaluations of a task apart from the published ones; empty if one is made in the same way."""
        return unlike_published([each.beyond_paper(task) for each in self.last if task in each.tasks])

    def label(self, task: str, metric: str) -> str:
        """Return a metric's name for people, with its unit if that is known: the MAE of ages is in years."""
        members = [evaluation.predictions_of(task) for evaluation in self.evaluations if task in evaluation.tasks]
        if metric == "mae" and all(age_and_site.predicts_age(predictions) for predictions in members):
            return f"{LABELS[metric]} (years)"
        return LABELS[metric]

    def summary(self) -> pd.DataFrame:
        """Return the primary metric of every task as text with its interval: a row per checkpoint, a column per task."""
        columns = {task: f"{task} {LABELS[summary.primary_metric]}" for task, summary in self.tasks.items()}
        cells: dict[str, dict[str, str]] = {evaluation.name: {} for evaluation in self.evaluations}
        for row in rows_of(self.metrics):
            if row.metric == self.tasks[row.task].primary_metric:
                cells[row.checkpoint][columns[row.task]] = interval_text(row.metric, row.value, row.low, row.high)
        table = pd.DataFrame.from_dict(cells, orient="index", columns=list(columns.values())).fillna("-")
        return table.rename_axis("checkpoint")

    def report(self, path: str | Path = "report.html") -> list[Path]:
        """Write the HTML report to ``path``, and its CSV tables, LaTeX tables and plots beside it; return all paths.

        The files beside ``report.html`` are ``report_*.csv``, ``report.tex`` and ``report_*.png``, without those that would be
        empty. Raises UserError if ``path`` does not end in .html.
        """
        check_arguments(PATH, path=path)
        return report.write_report(self, Path(path))

    def __repr__(self) -> str:
        """Name the experiment and show the primary metrics."""
        return f"{self._heading()}\n{self.summary().to_string()}"

    def _repr_html_(self) -> str:
        """Show the primary metrics as a table in notebooks."""
        return f"<p>{html.escape(self._heading())}</p>{self.summary().to_html()}"

    def _heading(self) -> str:
        data = "simulated data" if self.simulated else "data"
        return f"Comparison of experiment {self.experiment}, {data}: value [95 % interval]"


def compare(
    experiment: str, *, tracking_uri: str | None = None, filter: str = "", against: str | None = None
) -> Comparison:
    """Compare the newest evaluation of every checkpoint, protocol and task of an MLflow experiment.

    Args:
        experiment: name of the MLflow experiment.
        tracking_uri: MLflow store; by default MLFLOW_TRACKING_URI, or else mlruns/mlflow.db.
        filter: MLflow filter over the evaluation runs, for example ``tags.`yaware.method` = 'SimCLR'``.
        against: name of the checkpoint that all others of its protocol are compared with. By default each is compared
            with each, or with the first if a protocol has more than six.

    Raises:
        UserError: if the store has no such experiment, no finished evaluation in it, or no checkpoint named ``against``.
    """
    check_arguments(TEXT, experiment=experiment, filter=filter)
    check_arguments(OPTIONAL_TEXT, tracking_uri=tracking_uri, against=against)
    uri = tracking_uri or default_uri()
    evaluations, superseded = read_evaluations(uri, experiment, filter)
    names = [evaluation.name for evaluation in last_steps(evaluations)]
    if against is not None and against not in names:
        raise UserError(f"against={against!r} is not a checkpoint of this comparison; choose one of {', '.join(names)}")
    metrics = tables.metrics_table(evaluations)
    evaluations = _best_first(evaluations, metrics)
    last = last_steps(evaluations)
    differences, unpaired = tables.differences_table(last, against)
    curve_differences, unpaired_curves = curves.curve_differences(last, against)
    pretrainings = _pretrainings(uri, experiment, evaluations)
    trainings = {
        name: {metric: store.metric_history(uri, run["run_id"], metric) for metric in TRAINING_METRICS}
        for name, run in pretrainings.items()
    }
    order = {evaluation.name: number for number, evaluation in enumerate(evaluations)}
    metrics = metrics.sort_values(
        "checkpoint", key=lambda column: column.map(order), kind="stable", ignore_index=True
    )  # fmt: skip
    return Comparison(
        experiment=experiment, uri=uri, evaluations=evaluations, last=last,
        trainings={name: history for name, history in trainings.items() if history["loss"]},
        metrics=metrics, differences=differences, curves=curves.curves_table(last), curve_differences=curve_differences,
        unpaired=unpaired + unpaired_curves, superseded=superseded,
        provenance=[_provenance(evaluation, run) for evaluation in evaluations for run in evaluation.runs],
        recipes={name: run["params"] for name, run in pretrainings.items()},
        reliability=repeats.reliability_table(uri, experiment, evaluations),
    )  # fmt: skip


def _summarise(predictions: pd.DataFrame) -> TaskSummary:
    kind, participants = str(predictions["kind"].iloc[0]), predictions["participant"]
    positives = participants[predictions["label"] == 1].nunique() if kind == "binary" else 0
    classes = predictions["label"].nunique() if kind == "multiclass" else 0
    title = str(predictions["title"].iloc[0])
    return TaskSummary(kind, title, len(predictions), participants.nunique(), positives, classes)


def _best_first(evaluations: list[CheckpointEvaluation], metrics: pd.DataFrame) -> list[CheckpointEvaluation]:
    """Sort pretrainings by their last step's mean AUC over binary tasks; within a pretraining, the last step comes first."""
    binary = {task for evaluation in evaluations for task in evaluation.tasks if evaluation.kind(task) == "binary"}
    auc = metrics[(metrics["metric"] == "auc") & metrics["task"].isin(binary)]
    mean = auc.groupby("checkpoint")["value"].mean()
    rank = {(last.pretraining, last.protocol): float(mean.get(last.name, 0.0)) for last in last_steps(evaluations)}
    return sorted(
        evaluations,
        key=lambda entry: (-rank[entry.pretraining, entry.protocol], entry.pretraining, entry.protocol, -entry.step),
    )


def _pretrainings(uri: str, experiment: str, evaluations: list[CheckpointEvaluation]) -> dict[str, RunRow]:
    """Return name -> pretraining run of the checkpoints, oldest first."""
    names = {str(entry.run["tags"].get("yaware.pretraining_run")): entry.pretraining for entry in evaluations}
    runs = reversed(store.runs(uri, experiment, "pretraining"))
    return {names[run["run_id"]]: run for run in runs if run["run_id"] in names}


def _provenance(evaluation: CheckpointEvaluation, run: RunRow) -> dict[str, str]:
    """Describe an evaluation run; its tasks are named if the checkpoint has several runs."""
    tags, params = run["tags"], run["params"]
    tasks = [task for task in evaluation.tasks if evaluation.run_of(task)["run_id"] == run["run_id"]]
    settings = [f"{params[key]} {key}" for key in ("folds", "draws") if params.get(key)]
    return {
        "checkpoint": evaluation.name + (f" ({', '.join(tasks)})" if len(evaluation.runs) > 1 else ""),
        "method": tags.get("yaware.method", ""),
        "encoder": tags.get("yaware.encoder", "") or "-",
        "step": tags.get("yaware.step", ""),
        "weights": tags.get("yaware.weights_sha256", "")[:10] or "-",
        "manifest": tags.get("yaware.manifest_digest", "")[:10],
        "pretraining run": tags.get("yaware.pretraining_run", "")[:10] or "-",
        "evaluation run": run["run_id"][:10],
        "version": tags.get("yaware.version", ""),
        "protocol": ", ".join(filter(None, [evaluation.protocol, *settings, f"seed {params.get('seed')}"])),
    }
