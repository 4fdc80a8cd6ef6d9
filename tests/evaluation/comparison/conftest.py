"""A store with five evaluations: two steps of y-aware, SimCLR, a random encoder, and y-aware with sites left out."""

from __future__ import annotations

import pytest

from evaluation import compare
from infra.tracking.tracker import Tracker
from tests.evaluation.comparison.stored import log_evaluation, log_reliability, people
from tests.stores import store_at


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    uri = store_at(root / "mlflow.db")
    tracker = Tracker.open(uri, "kept", "y-aware", tags={"yaware.kind": "pretraining"})
    tracker.log_params({"loss.name": "y-aware", "loss.note": "5 & <6>"})
    tracker.log_metrics(
        [(m, 1.0 + 1 / (s + 1), s) for s in range(30) for m in ("loss", "lr", "grad_norm", "scans_per_second")]
    )
    tracker.end()
    scans, linear = people(), {"yaware.protocol": "linear", "yaware.beside": '{"scz": [], "age": [], "site": []}'}
    y_aware = {**linear, "yaware.pretraining_run": str(tracker.run_id)}
    three = ("scz", "age", "site")
    scz = {"scz.auc": 0.7, "scz.auc.low": 0.6, "scz.auc.high": 0.8}
    log_evaluation(uri, root / "a", "y-aware", step=100, skill=0.3, scans=scans, tags=y_aware, tasks=three)
    log_evaluation(
        uri, root / "b", "y-aware", step=200, skill=0.9, scans=scans, tags=y_aware, tasks=three, saliency=True
    )
    log_evaluation(uri, root / "c", "SimCLR", step=200, skill=0.5, scans=scans, tags=linear, tasks=three, metrics=scz)
    log_evaluation(
        uri,
        root / "d",
        "random",
        step=0,
        skill=0.05,
        scans=scans[:-9],
        tags=linear,
        tasks=("scz",),
        sizes=(),
        halves=False,
    )
    log_evaluation(
        uri, root / "e", "y-aware", step=200, skill=0.9, scans=scans, tags={**y_aware, "yaware.leave_site_out": "True"},
        tasks=("age",), params={"leave_site_out": "True"}, halves=False,
        metrics={"age.mae": 5.5, "age.mae.low": 5.0, "age.mae.high": 6.0},
    )  # fmt: skip
    log_reliability(uri, "y-aware", 200, 0.5)  # measured again below
    log_reliability(uri, "y-aware", 200, 0.8)
    log_reliability(uri, "SimCLR", 200, 0.6)
    log_reliability(uri, "SimCLR", 200, 0.1, weights="6" * 64)  # other weights of the same name
    log_reliability(uri, "y-aware", 200, 0.3, layer="layer3", pooling="mean")  # other features of the same weights
    return uri


@pytest.fixture(scope="session")
def comparison(store):
    return compare("kept", tracking_uri=store)
