"""The result of one candidate under one protocol: metrics, tables and trials, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from evaluation.features.chosen import choices_text
from evaluation.features.embedding import embedding_table
from evaluation.protocols.context import EvaluationContext
from evaluation.protocols.nested_cv import NestedCVResult, ResampledPredictions
from evaluation.statistics.metrics import METRICS, PROBABILITY_METRICS, chance_level, interval_text, with_interval
from evaluation.statistics.training_sets import BOTH, PEOPLE, metric_interval
from evaluation.tasks.resamples import Resample
from evaluation.tasks.tasks import Task
from infra.files import write_json
from pretrain.effective_rank import rankme

TABLES = ("predictions.parquet", "embedding.parquet", "curve.csv", "trials.csv", "resamples.csv", "chosen.csv")
RESAMPLE_COLUMNS = ["task", "metric", "kind", "number", "side", "value", "chance"]


@dataclass
class EvaluationResult:
    """The result of one candidate under one protocol, for all tasks.

    ``metrics`` holds, by name:

    - ``TASK.METRIC``, with ``.low`` and ``.high``: the mean over repeats; its interval covers participants and training sets
    - ``TASK.METRIC.fixed``, with ``.low`` and ``.high``: the first cross-validation; its interval covers participants only.
      Without halves this is ``TASK.METRIC``, and there is no ``.fixed``
    - ``TASK.auc.nSIZE``: the mean AUC over the draws of a learning curve
    - ``features.rankme``: the effective rank of the features

    ``trials`` holds the rows of ``nested_cv`` by task.
    """

    metrics: dict[str, float]
    predictions: pd.DataFrame
    curve: pd.DataFrame
    trials: dict[str, list[dict[str, Any]]]
    embedding: pd.DataFrame
    resamples: pd.DataFrame
    chosen: pd.DataFrame


def make_result(
    context: EvaluationContext, results: dict[str, NestedCVResult], map_features: NDArray[Any]
) -> EvaluationResult:  # fmt: skip
    """Compute metrics with intervals and make the tables; ``map_features`` (N, F), F > 1, give the map of the scans."""
    metrics: dict[str, float] = {}
    predictions, curves, rows = [], [], []
    for task in context.tasks:
        result = results[task.name]
        predictions.append(predictions_table(context.manifest, task, result))
        rows += resample_rows(task, result)
        curve = pd.DataFrame(result.curve, columns=["n_train", "draw", "auc"]).assign(task=task.name)
        curves.append(curve)
        for size, values in curve.groupby("n_train")["auc"]:
            metrics[f"{task.name}.auc.n{size}"] = float(values.mean())
    resamples = pd.DataFrame(rows, columns=RESAMPLE_COLUMNS)
    for task in context.tasks:
        metrics |= _metrics(task, results[task.name], resamples, context.settings.seed)
    if map_features.shape[1] > 1:
        embedding = embedding_table(context.manifest, context.rows, map_features)
        metrics["features.rankme"] = rankme(map_features)
    else:
        embedding = pd.DataFrame({"x": [], "y": [], "age": [], "sex": [], "site": []})
    trials = {name: result.trials for name, result in results.items()}
    return EvaluationResult(
        metrics, pd.concat(predictions), pd.concat(curves), trials, embedding,
        resamples=resamples, chosen=chosen_table(results),
    )  # fmt: skip


def resample_rows(task: Task, result: NestedCVResult) -> list[tuple[Any, ...]]:
    """Return RESAMPLE_COLUMNS: every metric of every resample; nothing if the protocol makes no resamples.

    Repeat 0 is the first cross-validation. ``chance`` is the task's first metric of uninformative answers to the same scans.
    """
    if not result.resampled:
        return []
    first = Resample("repeat", 0, 0, [], 0)
    rows: list[tuple[Any, ...]] = []
    for resample, predicted, probabilities in (
        ResampledPredictions(first, result.predicted, result.probabilities), *result.resampled,
    ):  # fmt: skip
        tested = np.isfinite(predicted)
        labels = task.labels[tested]
        for statistics, answers in ((METRICS, predicted), (PROBABILITY_METRICS, probabilities)):
            for name, statistic in statistics[task.kind].items():
                value = float(statistic(labels, answers[tested]))
                chance = chance_level(task.kind, labels)
                rows.append((task.name, name, resample.kind, resample.number, resample.side, value, chance))
    return rows


def _metrics(task: Task, result: NestedCVResult, resamples: pd.DataFrame, seed: int) -> dict[str, float]:
    """Return the metrics of a task over all scans that were in a test fold, with their intervals; see EvaluationResult."""
    tested = result.fold >= 0
    labels, people = task.labels[tested], task.participants[tested]
    metrics: dict[str, float] = {}
    for statistics, predictions in ((METRICS, result.predicted), (PROBABILITY_METRICS, result.probabilities)):
        for name, statistic in statistics[task.kind].items():
            first = with_interval(statistic, labels, predictions[tested], people, seed)
            over_repeats = metric_interval(resamples, task.name, task.kind, name)
            key = f"{task.name}.{name}"
            if over_repeats is None:
                metrics |= _named(key, *first)
            else:
                metrics |= _named(key, over_repeats.value, over_repeats.low, over_repeats.high)
                metrics |= _named(f"{key}.fixed", *first)
    return metrics


def _named(key: str, value: float, low: float, high: float) -> dict[str, float]:
    """Return a metric and its limits by their names in MLflow."""
    return {key: value, f"{key}.low": low, f"{key}.high": high}


def first_metrics_text(tasks: Sequence[Task], metrics: Mapping[str, float]) -> str:
    """Return the first metric of each task with its interval, as ``compare`` shows them."""
    texts = []
    for task in tasks:
        metric = next(iter(METRICS[task.kind]))
        key = f"{task.name}.{metric}"
        texts.append(f"{key} {interval_text(metric, metrics[key], metrics[f'{key}.low'], metrics[f'{key}.high'])}")
    return ", ".join(texts)


def metric_rows(
    source: tuple[str, int, str], tasks: Sequence[Task], metrics: Mapping[str, float], run_id: str
) -> list[tuple[Any, ...]]:
    """Return the rows of ``evaluate``'s table for one candidate and protocol, a row for each task and metric.

    ``source`` is the checkpoint's name, its step and the protocol.
    """
    rows = []
    for task in tasks:
        for metric in (*METRICS[task.kind], *PROBABILITY_METRICS[task.kind]):
            key = f"{task.name}.{metric}"
            covers = BOTH if f"{key}.fixed" in metrics else PEOPLE
            limits = metrics[f"{key}.low"], metrics[f"{key}.high"]
            rows.append((*source, task.name, metric, metrics[key], *limits, covers, run_id))
    return rows


def predictions_table(manifest: Manifest, task: Task, result: NestedCVResult) -> pd.DataFrame:
    """Return a row for every scan that was in a test fold, with what comparison, subgroups and calibration need.

    The columns are task, kind, title, key, participant, label, answer (the prediction), fold, probability (or p0, p1, ... for
    the classes of a multiclass task), and age, sex and site if the manifest has them.
    """
    tested = np.flatnonzero(result.fold >= 0)
    scans = manifest.scans.loc[task.rows[tested]]
    table = {
        "key": scans["key"].to_numpy(), "participant": task.participants[tested],
        "label": task.labels[tested].astype(float), "answer": result.predicted[tested], "fold": result.fold[tested],
    }  # fmt: skip
    if task.kind == "multiclass":
        table |= {f"p{code}": result.probabilities[tested, code] for code in range(len(task.classes))}
    else:
        table["probability"] = result.probabilities[tested]
    scan_columns = {column: scans[column].to_numpy() for column in ("age", "sex", "site") if column in scans}
    return pd.DataFrame({"task": task.name, "kind": task.kind, "title": task.title, **table, **scan_columns})


def trials_table(trials: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """Return a row per trial: task, part (fold or draw), point (params, JSON), inner_score; of networks steps, stopped."""
    rows = [
        {
            "task": task,
            **{key: value for key, value in row.items() if key != "scores"},
            "point": json.dumps(row["point"], sort_keys=True),
        }
        for task, task_trials in trials.items()
        for row in task_trials
    ]
    return pd.DataFrame(rows)


def chosen_table(results: dict[str, NestedCVResult]) -> pd.DataFrame:
    """Return what was chosen for each task and fold: task, fold, and a column for each setting, such as layer and penalty."""
    rows = [
        {"task": task, "fold": fold, **params}
        for task, result in results.items()
        for fold, params in enumerate(result.chosen)
    ]
    return pd.DataFrame(rows, columns=None if rows else ["task", "fold"])


def chosen_lines(results: dict[str, NestedCVResult]) -> list[str]:
    """Return a line for each task whose features were chosen: which, and in how many folds."""
    texts = {task: choices_text(result.chosen) for task, result in results.items()}
    return [f"task {task}: chosen features (layer, pooling, scale): {text}" for task, text in texts.items() if text]


def write_result(result: EvaluationResult, folder: Path) -> None:
    """Write a result as files, from which ``record.log_result`` logs it; ``is_complete`` is true once all are written."""
    folder.mkdir(parents=True, exist_ok=True)
    result.predictions.to_parquet(folder / "predictions.parquet", index=False)
    result.embedding.to_parquet(folder / "embedding.parquet", index=False)
    result.curve.to_csv(folder / "curve.csv", index=False)
    trials_table(result.trials).to_csv(folder / "trials.csv", index=False)
    result.resamples.to_csv(folder / "resamples.csv", index=False)
    result.chosen.to_csv(folder / "chosen.csv", index=False)
    write_json(folder / "trials.json", result.trials)
    write_json(folder / "metrics.json", result.metrics)


def is_complete(folder: Path) -> bool:
    """Return whether ``write_result`` finished."""
    return (folder / "metrics.json").is_file()
