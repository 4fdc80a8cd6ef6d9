"""The answers that each method gives about the test scans of a clinic, stored as .npz and logged to MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.experiments.plan import DISEASES, EXPERIMENT
from evaluation.statistics.metrics import auc, mae
from infra.files import atomic_write, regular_file
from infra.tracking.tracker import Tracker

Method = tuple[str, str, int]  # method, variant, pretraining seed


@dataclass(frozen=True)
class MethodAnswers:
    """One method's answers to one task: a row for each training set, a column for each test scan.

    Args:
        clinic: shards that hold the test scans.
        method: key of ``tables.NAMES``.
        variant: variant of the pretraining recipe; ``main`` for the unchanged one.
        seed: pretraining seed.
        task: key of ``plan.TASKS``.
        sizes: (R,) number of training scans of each row; 0: all scans of the training sites.
        draws: (R,) number of the training set among those of its size.
        answers: (R, T) float32 scores, or predicted numbers of a regression.
        labels: (T,) classes 0 and 1, or true numbers.
        people: (T,) participant of each test scan.
    """

    clinic: str
    method: str
    variant: str
    seed: int
    task: str
    sizes: NDArray[Any]
    draws: NDArray[Any]
    answers: NDArray[Any]
    labels: NDArray[Any]
    people: NDArray[Any]

    @property
    def metrics(self) -> NDArray[Any]:
        """(R,) AUC of each row, or MAE of a regression."""
        metric = auc if self.task in DISEASES else mae
        return np.array([metric(self.labels, row) for row in self.answers])


def save_answers(path: Path, answers: list[MethodAnswers]) -> None:
    """Write all answers to one .npz file, atomically."""
    path.parent.mkdir(exist_ok=True)
    arrays: dict[str, Any] = {}
    for number, entry in enumerate(answers):
        arrays |= {f"{number}.{name}": np.asarray(value) for name, value in vars(entry).items()}
        arrays[f"{number}.people"] = np.asarray(entry.people, dtype=str)
    with atomic_write(path) as stream:
        np.savez(stream, count=len(answers), **arrays)


def load_answers(path: Path) -> list[MethodAnswers]:
    """Read a file of ``save_answers``."""
    with np.load(regular_file(path)) as stored:
        return [
            MethodAnswers(**{
                name: stored[f"{number}.{name}"].item() if kind in ("str", "int") else stored[f"{number}.{name}"]
                for name, kind in MethodAnswers.__annotations__.items()
            })
            for number in range(int(stored["count"]))
        ]  # fmt: skip


def log_answers(uri: str, clinic: str, answers: list[MethodAnswers], experiment: str = EXPERIMENT) -> None:
    """Log an MLflow run for every method of a clinic, with its mean metric for each task and training size."""
    for key in sorted({(entry.method, entry.variant, entry.seed) for entry in answers}):
        of_method = [entry for entry in answers if (entry.method, entry.variant, entry.seed) == key]
        method, variant, seed = key
        tags = {
            "yaware.kind": "experiment", "yaware.method": method, "yaware.variant": variant, "yaware.clinic": clinic,
        }  # fmt: skip
        tracker = Tracker.open(uri, experiment, f"{clinic}: {method} {variant} {seed}", tags=tags)
        tracker.log_params({"clinic": clinic, "method": method, "variant": variant, "seed": seed})
        metrics = []
        for entry in of_method:
            metric = "auc" if entry.task in DISEASES else "mae"
            for size in np.unique(entry.sizes):
                value = float(entry.metrics[entry.sizes == size].mean())
                metrics.append((f"{entry.task}.{metric}" + (f".n{size}" if size else ""), value, 0))
        tracker.log_metrics(metrics)
        tracker.end()
