"""Error rates and power of the tests of ``yaware compare`` in studies whose truth is known.

    python -m tests.benchmarks.studies.null_studies [--studies 400] [--jobs 1] [--out FILE]

Every study goes through the whole path: features of two checkpoints, outer folds, search on inner folds, repeats, halves,
and the intervals and tests of the comparison. Only storage is left out. In a null study the features of both checkpoints hold
nothing about the classes; a number is predicted from checkpoints that hold equally much, and from some that hold nothing.
A null study has three checkpoints and three pairs. In a power study there are two, and the first holds more.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from evaluation.comparison.evaluations import CheckpointEvaluation
from evaluation.comparison.resampled import chance_test, paired_interval
from evaluation.protocols.nested_cv import prepare
from evaluation.protocols.probes import Params, Predictions, Probe, TrainTestSplit
from evaluation.protocols.results import RESAMPLE_COLUMNS, resample_rows
from evaluation.statistics.intervals import corrected_interval, with_interval
from evaluation.statistics.metrics import METRICS
from evaluation.statistics.paired import delong_difference, paired_bootstrap, permutation_p
from evaluation.statistics.training_sets import metric_interval
from evaluation.tasks.folds import Fold
from evaluation.tasks.resamples import Resampling
from evaluation.tasks.tasks import Task
from tests.searches import search_task

FEATURES = 10
GRID = [{"penalty": 1.0}, {"penalty": 100.0}]
REPORTED = {"binary": ("auc", "bacc"), "regression": ("mae",)}


@dataclass(frozen=True)
class Cell:
    """Studies of one kind: people, share of positives (or skew of the numbers), what either checkpoint holds."""

    kind: str
    people: int
    share: float  # of positives; of a regression 0.5: normal numbers, else exponential ones
    held: tuple[float, ...] = (
        0.0,
        0.0,
        0.0,
    )  # of each checkpoint: shift of one feature between the classes, or per unit


class Evaluated(NamedTuple):
    """A checkpoint's evaluation, and the folds and predictions of each repeat."""

    evaluation: CheckpointEvaluation
    repeats: list[tuple[list[Fold], np.ndarray]]


def ridge(split: TrainTestSplit, kind: str, params: Params, seed: int) -> Predictions:
    """Ridge regression on the numbers, or on classes of -1 and 1 with equal weight; a hundredth of scikit-learn's calls."""
    target = split.labels.astype(float) if kind == "regression" else 2.0 * split.labels - 1
    share = (target > 0).mean()
    weights = np.ones(len(target)) if kind == "regression" else np.where(target > 0, 0.5 / share, 0.5 / (1 - share))
    mean, level = weights @ split.train / weights.sum(), weights @ target / weights.sum()
    centred = split.train - mean
    gram = (centred * weights[:, None]).T @ centred + params["penalty"] * np.eye(centred.shape[1])
    predicted = (split.test - mean) @ np.linalg.solve(gram, centred.T @ (weights * (target - level))) + level
    return Predictions(predicted, np.full(len(predicted), np.nan))


def study(cell: Cell, seed: int) -> dict[str, list[dict[str, float]]]:
    """Return metric -> values of each checkpoint of one study, and of its difference from the next checkpoint."""
    generator = np.random.default_rng([seed, cell.people, int(cell.share * 100)])
    labels = _labels(cell, generator)
    people = np.arange(cell.people)
    task = Task(
        name="null", title="null", kind=cell.kind, rows=people, labels=labels, groups=people, classes=["no", "yes"],
        participants=people.astype(str),
    )  # fmt: skip
    signal = labels - labels.mean() if cell.kind == "regression" else labels - 0.5
    evaluations = []
    for number, held in enumerate(cell.held):
        features = generator.normal(size=(cell.people, FEATURES))
        features[:, 0] += held * signal
        evaluations.append(_evaluate(task, features, str(number), seed))
    pairs = list(zip(evaluations, evaluations[1:] + evaluations[:1], strict=True))[
        : 1 if len(evaluations) == 2 else None
    ]
    return {metric: [_values(task, one, other, metric) for one, other in pairs] for metric in REPORTED[cell.kind]}


def _labels(cell: Cell, generator: np.random.Generator) -> np.ndarray:
    if cell.kind == "binary":
        return (np.arange(cell.people) < round(cell.share * cell.people)).astype(np.int64)
    drawn = generator.normal(size=cell.people) if cell.share == 0.5 else generator.exponential(size=cell.people)
    return np.asarray(drawn)


def _evaluate(task: Task, features: np.ndarray, name: str, seed: int) -> Evaluated:
    prepared = prepare(task, features, folds=5, sizes=[], draws=1, seed=seed, resampling=Resampling())
    result = search_task(prepared, Probe(ridge, GRID))
    predictions = pd.DataFrame(
        {"task": "null", "kind": task.kind, "key": task.participants, "participant": task.participants,
         "label": task.labels.astype(float), "answer": result.predicted, "fold": result.fold}
    )  # fmt: skip
    run = {"run_id": name, "tags": {}, "params": {"seed": str(seed), "folds": "5"}}
    resamples = pd.DataFrame(resample_rows(task, result), columns=RESAMPLE_COLUMNS)
    evaluation = CheckpointEvaluation(name, run, predictions, pd.DataFrame(), pd.DataFrame(), resamples=resamples)
    repeats = [(prepared.folds, result.predicted)]
    repeats += [(each.folds, predicted) for each, predicted, _ in result.resampled if each.kind == "repeat"]
    return Evaluated(evaluation, repeats)


def _values(task: Task, one: Evaluated, other: Evaluated, metric: str) -> dict[str, float]:
    statistic = METRICS[task.kind][metric]
    first, second = (each.evaluation.predictions["answer"].to_numpy() for each in (one, other))
    interval = metric_interval(one.evaluation.resamples, "null", task.kind, metric)
    difference = paired_interval(one.evaluation, other.evaluation, "null", metric)[0]
    assert interval is not None
    assert difference is not None
    low, high = with_interval(statistic, task.labels, first, task.groups, resamples=200)[1:]
    fixed = (
        delong_difference(task.labels, first, second)
        if metric == "auc"
        else paired_bootstrap(statistic, task.labels, first, second, task.groups, resamples=200)
    )
    return {
        "value": interval.value, "low": interval.low, "high": interval.high, "p": difference.two_sided(),
        "p_chance": chance_test(one.evaluation, "null", metric)[0], "fixed_low": low, "fixed_high": high, "fixed_p": fixed.p,
        "fixed_p_chance": permutation_p(
            statistic, task.labels, first, task.groups, higher_is_better=metric != "mae", count=100
        ),
        "corrected_p": _corrected_p(task, one, other, metric, 1), "repeated_p": _corrected_p(task, one, other, metric, 3),
    }  # fmt: skip


def _corrected_p(task: Task, one: Evaluated, other: Evaluated, metric: str, repeats: int) -> float:
    """p of Nadeau and Bengio's corrected variance over the folds of some repeats, for comparison."""
    statistic, differences = METRICS[task.kind][metric], []
    for (folds, first), (_, second) in zip(one.repeats[:repeats], other.repeats[:repeats], strict=True):
        for _, test in folds:
            labels = task.labels[test]
            differences.append(statistic(labels, first[test]) - statistic(labels, second[test]))
    return corrected_interval(np.array(differences), 4, 1)[3]


def summary_of(cell: Cell, studies: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Return metric -> shares of the studies in which a test rejects or an interval misses the truth.

    The truth is chance level for the AUC and the balanced accuracy of checkpoints that hold nothing, else the mean over the
    studies.
    """
    rows = [study(cell, 100_000 * seed + number) for number in range(studies)]
    result = {}
    for metric in REPORTED[cell.kind]:
        table = pd.DataFrame([values for row in rows for values in row[metric]])
        truth = 0.5 if metric != "mae" and not any(cell.held) else table["value"].mean()
        result[metric] = {
            "different": (table["p"] <= 0.05).mean(), "missed": _missed(table, "low", "high", truth),
            "chance": (table["p_chance"] <= 0.05).mean(), "different_fixed": (table["fixed_p"] <= 0.05).mean(),
            "missed_fixed": _missed(table, "fixed_low", "fixed_high", truth),
            "chance_fixed": (table["fixed_p_chance"] <= 0.05).mean(),
            "different_corrected": (table["corrected_p"] <= 0.05).mean(),
            "different_repeated": (table["repeated_p"] <= 0.05).mean(),
        }  # fmt: skip
    return result


def _missed(table: pd.DataFrame, low: str, high: str, truth: float) -> float:
    return float(((table[low] > truth) | (table[high] < truth)).mean())


def cells() -> list[Cell]:
    """Null studies, then power studies."""
    null = [Cell("binary", people, share) for people in (40, 80, 200) for share in (0.5, 0.25)]
    null += [Cell("regression", people, share, (held, held, held)) for people in (40, 80, 200)
             for share, held in ((0.5, 1.0), (0.25, 1.0))]  # fmt: skip
    power = [Cell("binary", people, 0.5, (1.5, 0.0)) for people in (40, 80, 200)]
    nothing = [Cell("regression", people, 0.5) for people in (40, 80, 200)]
    return null + nothing + power + [Cell("regression", people, 0.5, (2.0, 0.5)) for people in (40, 80, 200)]


def _row(cell: Cell, metric: str, shares: dict[str, float]) -> str:
    kind = f"{cell.share:.2f}" if cell.kind == "binary" else "normal" if cell.share == 0.5 else "skewed"
    held = ", ".join(f"{each:g}" for each in dict.fromkeys(cell.held))
    return (
        f"| {metric} | {cell.people} | {kind} | {held} | "
        + " | ".join(f"{value:.3f}" for value in shares.values())
        + " |"
    )


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=200, help="studies of each kind (default: 200)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    started = time.monotonic()
    lines = [
        "| metric | people | classes | held | different | interval misses | better than chance | different, fixed | "
        "misses, fixed | chance, fixed | different, corrected over 5 folds | over 15 |",
        "|" + "---|" * 12,
    ]
    print("\n".join(lines), flush=True)
    null: dict[tuple[str, tuple[float, ...]], list[list[float]]] = {}
    # The matrices are small: more than one thread a process makes two processes five times slower.
    with ProcessPoolExecutor(options.jobs, initializer=threadpool_limits, initargs=(1,)) as pool:
        jobs = [(cell, pool.submit(summary_of, cell, options.studies, options.seed)) for cell in cells()]
        for cell, job in jobs:
            for metric, shares in job.result().items():
                lines.append(_row(cell, metric, shares))
                print(lines[-1], flush=True)
                if len(cell.held) == 3:
                    null.setdefault((metric, cell.held), []).append(list(shares.values()))
    for (metric, held), rows in null.items():
        mean = " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0))
        lines.append(f"| {metric} | all | all | {held[0]:g} | {mean} |")
        print(lines[-1], flush=True)
    print(f"{options.studies} studies a row, {time.monotonic() - started:.0f} s with {options.jobs} processes")
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
