"""A nested search of the penalty beside scikit-learn's: `python -m tests.benchmarks.bench_search [--quick]`.

Logistic regression on made-up features of 2,000 scans with 512 features, and of 10,000 with 2,560, as spatial features have;
seven penalties, five outer and three inner folds. Ours is the search of `yaware evaluate` in one process, as it runs without a
cluster; scikit-learn's is GridSearchCV over a pipeline of StandardScaler and LogisticRegression, with the same folds, the same
penalties and one thread. Each runs in a new process. CPU seconds include the imports; `most different` compares the
scores of the test scans, divided by their standard deviation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.protocols.nested_cv import PreparedTask, prepare, search_grid
from evaluation.protocols.probes import LINEAR
from evaluation.statistics.metrics import auc
from evaluation.tasks.folds import inner_folds
from evaluation.tasks.tasks import Task

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


def run_case(who: str, size: str) -> dict[str, Any]:
    """Run one side in this process; return its AUC, scores and seconds."""
    prepared, started, used = made_up(*SIZES[size]), time.perf_counter(), time.process_time()
    scores = {"ours": ours, "theirs": theirs}[who](prepared)
    return {
        "auc": auc(prepared.table.labels, scores), "scores": scores.tolist(), "cpu": time.process_time() - used,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def apart(who: str, size: str) -> dict[str, Any]:
    """Run one side in a new process with one thread."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-m", "tests.benchmarks.bench_search", "--case", who, size]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **one})
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="has no effect: nothing runs on a GPU")
    parser.add_argument("--quick", action="store_true", help="only the small size")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(*options.case)))
        return
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores {platform.machine()}, load average {load}")
    print(f"{'':<18}{'CPU s, ours':>14}{'scikit-learn':>14}{'ratio':>8}{'AUC':>10}{'AUC':>10}{'most different':>16}")
    for size in list(SIZES)[: 1 if options.quick else None]:
        our, their = apart("ours", size), apart("theirs", size)
        scores, others = np.array(our["scores"]), np.array(their["scores"])
        most = np.abs(scores - others).max() / others.std()
        print(
            f"{size:<18}{our['cpu']:>14.1f}{their['cpu']:>14.1f}{our['cpu'] / their['cpu']:>8.2f}{our['auc']:>10.5f}"
            f"{their['auc']:>10.5f}{most:>16.1e}", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
