"""A nested search of the penalty beside scikit-learn's.

Logistic regression on made-up features of 2,000 scans with 512 features, and of 10,000 with 2,560, as spatial features have;
seven penalties, five outer and three inner folds. Ours is the search of `yaware evaluate` as it runs without a cluster;
scikit-learn's is GridSearchCV over a pipeline of StandardScaler and LogisticRegression, with the same folds, the same penalties
and one thread.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.protocols.nested_cv import PreparedTask, prepare, search_grid
from evaluation.protocols.probes import LINEAR
from evaluation.statistics.metrics import auc
from evaluation.tasks.folds import inner_folds
from evaluation.tasks.tasks import Task
from tests.benchmarks.harness.measure import measured, tree_cpu

SIZES = {"2,000 x 512": (2_000, 512), "10,000 x 2,560": (10_000, 2_560)}


def made_up(scans: int, features: int) -> PreparedTask:
    """Return a binary task with features of falling variance, correlated as those of a network are."""
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(scans, features)) / np.sqrt(1 + np.arange(features))
    values = hidden @ generator.normal(size=(features, features)) / np.sqrt(features)
    odds = hidden[:, :20].sum(1)
    labels = (odds + generator.logistic(size=scans) * odds.std() > 0).astype(float)
    task = Task("t", "t", "binary", np.arange(scans), labels, np.arange(scans), classes=["0", "1"])
    return prepare(task, values, folds=5, sizes=[], draws=0, seed=0)


def ours(prepared: PreparedTask) -> np.ndarray:
    """Return the out-of-fold scores of the search of `yaware evaluate`."""
    with tempfile.TemporaryDirectory() as folder:
        return np.asarray(search_grid({"t": prepared}, LINEAR, Path(folder), "search")["t"].predicted)


def theirs(prepared: PreparedTask) -> np.ndarray:
    """Return the out-of-fold scores of scikit-learn's GridSearchCV with the same folds and penalties."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    table, scores = prepared.table, np.full(len(prepared.table.labels), np.nan)
    grid = {"logisticregression__C": [1 / params["penalty"] for params in LINEAR.grid]}
    warnings.simplefilter("ignore")
    for train, test in prepared.folds:
        inner = inner_folds(table.labels[train], table.groups[train], "binary", prepared.seed, 1)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
        search = GridSearchCV(model, grid, scoring="roc_auc", cv=list(inner))
        scores[test] = search.fit(table.features[train], table.labels[train]).decision_function(table.features[test])
    return scores


def run_case(who: str, size: str, scans: int | None = None) -> dict[str, Any]:
    """Run one side in this process; return its AUC, seconds, and the largest and smallest score of the test scans."""
    rows, features = SIZES[size]
    prepared = made_up(scans or rows, features)
    found: list[np.ndarray] = []
    seconds = measured(lambda: found.append({"ours": ours, "theirs": theirs}[who](prepared)), cpu=tree_cpu)
    return {**seconds, "check": auc(prepared.table.labels, found[0])}
