"""Judges checkpoints on tasks: guards, features, tuned models, figures with intervals; an MLflow run for each result."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.storage.manifest import Manifest
from evaluation.protocols.embedding import embedding_table
from evaluation.protocols.features import cache_name, features_of
from evaluation.protocols.finetune import TrainingJob
from evaluation.protocols.nested_cv import NestedCVResult, prepare, search_grid, search_networks
from evaluation.protocols.protocols import PROTOCOLS, Protocol, check_protocols, published_lines
from evaluation.protocols.record import Result, Subject, is_whole, log_result, open_run, write_result
from evaluation.protocols.tune_networks import gpus_per_trial, search_fine_tuning
from evaluation.protocols.voxels import voxel_coordinates
from evaluation.statistics.metrics import METRICS, PROBABILITY_METRICS, with_interval
from evaluation.tasks.leakage import check_copies, check_leakage
from evaluation.tasks.tasks import Task, load_task
from infra import ray_cluster
from infra.errors import UserError
from infra.files import sha256_of, write_json
from infra.tracking.tracker import default_uri
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder
from pretrain.weights.layers import intermediate_features
from pretrain.weights.scan_source import check_preprocessing

Array = np.ndarray[Any, np.dtype[Any]]


def evaluate(
    checkpoints: Sequence[str | Path], shards: str | Path, protocol: Protocol, *, experiment: str = "yaware",
    tracking_uri: str | None = None, workers: int | None = None, cache: Path | None = None, storage: Path | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Evaluate checkpoints (run folders, step folders or exports) by each protocol and log them; the metrics, in order.

    Every subject is judged on the same folds and draws. Nothing is fitted or chosen on the scans it is judged by. Killed
    and started again with the same arguments it goes on: what has finished lies in ``storage`` until all is done.
    """
    check_protocols(protocol.protocols)
    manifest, uri = Manifest.load(shards), tracking_uri or default_uri()
    tasks = [load_task(name, manifest, protocol.folds) for name in protocol.tasks]
    if not tasks:
        raise UserError("no task given; name some with --tasks, such as ad,scz,age,site")
    check_copies(tasks, manifest)
    rows = np.unique(np.concatenate([task.rows for task in tasks]))
    given = [_checkpoint(path, manifest, rows, protocol) for path in checkpoints]
    _announce(tasks, manifest)
    place = _Place(manifest, tasks, rows, protocol, cache or manifest.root / ".features", storage or default_storage())
    place.store = [uri, experiment]
    metrics = []
    with ray_cluster.session(workers):
        for name, subject in _subjects(given, protocol):
            work = place.work_folder(name, subject)
            result = _judged(place, name, subject, work, experiment, uri)
            metrics.append(result)
            first = [(task.name, next(iter(METRICS[task.kind]))) for task in tasks]
            shown = ", ".join(f"{task}.{figure} {result[f'{task}.{figure}']:.3f}" for task, figure in first)
            print(f"evaluate: {subject.name} step {subject.step}, {protocol.variant(name).label}: {shown}")
    place.clear()
    return metrics


def default_storage() -> Path:
    """Where unfinished searches lie: a folder of the user's own, since Ray keeps pickles there."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "yaware" / "evaluations"


class _Place:
    """What all results of an evaluation share, and the folders of their unfinished work."""

    def __init__(
        self, manifest: Manifest, tasks: list[Task], rows: Array, protocol: Protocol, cache: Path, storage: Path
    ) -> None:
        self.manifest, self.tasks, self.rows, self.protocol = manifest, tasks, rows, protocol
        self.cache, self._storage = cache, storage
        self._places = {int(row): number for number, row in enumerate(rows)}
        self._used: list[Path] = []
        self.store: list[str] = []  # what was logged elsewhere is to be logged here too

    def of_task(self, task: Task) -> list[int]:
        """Places of a task's scans among all."""
        return [self._places[int(row)] for row in task.rows]

    def work_folder(self, name: str, subject: Subject) -> Path:
        """The folder of one result, named after everything that it depends on."""
        digest = hashlib.sha256()
        about = {
            "protocol": name, "settings": self.protocol.settings_of(name), "weights": subject.weights,
            "subject": subject.name, "manifest": self.manifest.digest, "version": version("yaware"),
            "store": self.store, "encoder": subject.encoder.config["encoder"] if subject.encoder is not None else None,
        }  # fmt: skip
        digest.update(json.dumps(about, sort_keys=True).encode())
        for task in self.tasks:
            digest.update(task.name.encode())
            parts = (task.rows, task.labels, task.groups, task.strata, task.test, task.covariates, task.confounds)
            for values in parts:
                digest.update(b"-" if values is None else np.ascontiguousarray(values).tobytes())
        folder = self._storage / digest.hexdigest()[:24]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._used.append(folder)
        return folder

    def clear(self) -> None:
        """All is in MLflow: nothing is left to go on with."""
        for folder in self._used:
            shutil.rmtree(folder, ignore_errors=True)


def _checkpoint(path: str | Path, manifest: Manifest, rows: Array, protocol: Protocol) -> Subject:
    """A checkpoint, checked against the shards it is to be judged on."""
    folder, encoder = find_encoder(path), Encoder.from_pretrained(path)
    check_preprocessing(encoder.preprocessing, manifest, str(path))
    about = check_leakage(encoder, path, manifest, rows, str(path))
    if any(PROTOCOLS[name].model != "network" for name in protocol.protocols):
        intermediate_features(encoder.network, protocol.layer, protocol.pooling)
    config, weights = encoder.config, sha256_of(folder / "model.safetensors")
    return Subject(config["run_name"], config["method"], int(config["step"]), weights, encoder, folder.resolve(), about)


def _subjects(given: Sequence[Subject], protocol: Protocol) -> Iterator[tuple[str, Subject]]:
    """Every protocol with all that it judges."""
    for name in protocol.protocols:
        if PROTOCOLS[name].subject == "checkpoint":
            yield from ((name, subject) for subject in given)
        elif PROTOCOLS[name].subject == "shards":
            yield name, Subject(name, name)
        else:
            seen = []
            for subject in given:
                assert subject.encoder is not None
                if subject.encoder.config["encoder"] not in seen:
                    seen.append(subject.encoder.config["encoder"])
                    number = f" {len(seen)}" if len(seen) > 1 else ""
                    yield name, Subject(f"{name} {seen[-1]['name']}{number}", name, encoder=subject.encoder)


def _judged(
    place: _Place, name: str, subject: Subject, work: Path, experiment: str, uri: str
) -> dict[str, float]:  # fmt: skip
    """One result, logged; read back where an earlier start of the command had come so far.

    UserError where the store has not all of it: it stays in ``work``, from where the next start logs it.
    """
    done, run, kept = work / "metrics.json", work / "run.json", work / "result"
    metrics: dict[str, float]
    if done.is_file():
        metrics = json.loads(done.read_text())
        return metrics
    known = json.loads(run.read_text())["run_id"] if run.is_file() else None
    settings = place.protocol.settings_of(name)
    params = {"tasks": ",".join(place.protocol.tasks), "protocol": name, **settings, "scans": len(place.rows)}
    variant = place.protocol.variant(name)
    tracker = open_run(subject, variant, place.manifest, params, uri=uri, experiment=experiment, run_id=known)
    write_json(run, {"run_id": tracker.run_id})
    try:
        if not is_whole(kept):
            write_result(judge(place, name, subject, work), kept)
        log_result(tracker, subject, name, place.manifest, kept, uri)
    except BaseException:
        tracker.end("FAILED")
        raise
    if not tracker.stored:
        if tracker.answers:
            tracker.end("FAILED")  # without its tables it must not be taken for a finished one
        raise UserError(
            f"MLflow store {uri} has not taken all of {subject.name} step {subject.step}, {variant.label}; the result is kept "
            f"in {kept}: run the same command again when the store answers"
        )
    metrics = json.loads((kept / "metrics.json").read_text())
    write_json(done, metrics)
    return metrics


def judge(place: _Place, name: str, subject: Subject, work: Path) -> Result:
    """Nested cross-validation and learning curves of every task for one subject by one protocol."""
    title = f"{name} of {subject.name} step {subject.step}" if subject.name != name else name
    kind, protocol = PROTOCOLS[name], place.protocol
    features = _features(place, name, subject)
    curve = kind.curve or (kind.model == "network" and protocol.finetune.curve)
    prepared = {
        task.name: prepare(
            task, features[place.of_task(task)], folds=protocol.folds, sizes=list(protocol.n_train) if curve else [],
            draws=protocol.draws, seed=protocol.seed, repeats=protocol.inner_repeats, by_site=protocol.leave_site_out,
            scale="all" if kind.subject == "shards" else "each",
        )
        for task in place.tasks
    }  # fmt: skip
    if kind.model == "network":
        found = search_fine_tuning(_jobs(place, subject), prepared, work, title)
    elif kind.model == "mlp":
        found = search_networks(prepared, protocol.mlp_trials, work, title)
    else:
        found = search_grid(prepared, kind.model, work, title)
    if curve:
        _say_left_out(place.tasks, found, protocol)
    if kind.subject == "shards":
        features = features[:, -2:]  # a map of the scans by the two widest of their coordinates
    return _result(place, found, features)


def _features(place: _Place, name: str, subject: Subject) -> Array:
    """(rows, F): what the protocol's model is given; networks see the scans themselves."""
    kind, protocol = PROTOCOLS[name], place.protocol
    if kind.model == "network":
        return np.empty((len(place.rows), 0), dtype=np.float32)
    if kind.subject == "shards":
        return voxel_coordinates(place.manifest, place.rows, place.cache / f"voxels-{place.manifest.digest[:16]}.npz")
    assert subject.encoder is not None
    cache = place.cache / cache_name(subject.weights, place.manifest.digest, protocol.layer, protocol.pooling)
    title = f"features of {subject.name} step {subject.step}"
    return features_of(
        subject.encoder, place.manifest, place.rows, cache, title, protocol.layer, protocol.pooling
    )  # fmt: skip


def _jobs(place: _Place, subject: Subject) -> dict[str, TrainingJob]:
    assert subject.encoder is not None
    settings = place.protocol.finetune
    device = "cuda" if gpus_per_trial(settings.gpus_per_trial) else "cpu"
    folder = None if subject.folder is None else str(subject.folder)
    shards = place.manifest.url if "://" in place.manifest.url else str(Path(place.manifest.url).resolve())
    jobs = {}
    for task in place.tasks:
        if task.confounds is not None and task.confounds.shape[1]:
            raise UserError(
                f"task {task.name}: confounds are regressed out of features, and the protocols finetune and scratch have "
                "none; leave confounds out, or choose another protocol"
            )
        covariates = np.empty((len(task.rows), 0)) if task.covariates is None else task.covariates
        encoder = subject.encoder.config["encoder"]
        jobs[task.name] = TrainingJob(
            shards, folder, encoder, task.rows, task.labels, task.groups, task.kind, covariates, settings, device
        )
    return jobs


def _result(place: _Place, found: dict[str, NestedCVResult], features: Array) -> Result:
    metrics: dict[str, float] = {}
    predictions, curves = [], []
    for task in place.tasks:
        mine = found[task.name]
        asked = mine.fold >= 0
        labels, people = task.labels[asked], task.participants[asked]
        for figures, of in ((METRICS, mine.predicted[asked]), (PROBABILITY_METRICS, mine.probabilities[asked])):
            for figure, statistic in figures[task.kind].items():
                value, low, high = with_interval(statistic, labels, of, people, place.protocol.seed)
                key = f"{task.name}.{figure}"
                metrics |= {key: value, f"{key}.low": low, f"{key}.high": high}
        predictions.append(predictions_table(place.manifest, task, mine))
        curves.append(pd.DataFrame(mine.curve, columns=["n_train", "draw", "auc"]).assign(task=task.name))
        for size, values in curves[-1].groupby("n_train")["auc"]:
            metrics[f"{task.name}.auc.n{size}"] = float(values.mean())
    trials = {name: mine.trials for name, mine in found.items()}
    if features.shape[1]:
        embedding = embedding_table(place.manifest, place.rows, features)
    else:
        embedding = pd.DataFrame({"x": [], "y": [], "age": [], "sex": [], "site": []})
    return Result(metrics, pd.concat(predictions), pd.concat(curves), trials, embedding)


def predictions_table(manifest: Manifest, task: Task, found: NestedCVResult) -> pd.DataFrame:
    """A row for every scan that was asked about: what comparison, subgroups and calibration need."""
    asked = np.flatnonzero(found.fold >= 0)
    scans = manifest.scans.loc[task.rows[asked]]
    table = {
        "key": scans["key"].to_numpy(), "participant": task.participants[asked],
        "label": task.labels[asked].astype(float), "answer": found.predicted[asked], "fold": found.fold[asked],
    }  # fmt: skip
    if task.kind == "multiclass":
        table |= {f"p{code}": found.probabilities[asked, code] for code in range(len(task.classes))}
    else:
        table["probability"] = found.probabilities[asked]
    beside = {column: scans[column].to_numpy() for column in ("age", "sex", "site") if column in scans}
    return pd.DataFrame({"task": task.name, "kind": task.kind, "title": task.title, **table, **beside})


def _announce(tasks: list[Task], manifest: Manifest) -> None:
    for task in tasks:
        counts = "" if task.kind == "regression" else f" ({_class_counts(task)})"
        print(
            f"evaluate: task {task.name}: {len(task.rows)} scans of {len(np.unique(task.groups))} participants{counts}"
        )
        for line in [] if manifest.simulated else published_lines(task.name):
            print(f"evaluate: {line}")


def _say_left_out(tasks: list[Task], found: dict[str, NestedCVResult], protocol: Protocol) -> None:
    for task in tasks:
        missing = sorted(set(protocol.n_train) - {size for size, _, _ in found[task.name].curve})
        if task.kind == "binary" and missing:
            print(f"evaluate: task {task.name}: too few scans for a learning curve at {', '.join(map(str, missing))}")


def _class_counts(task: Task) -> str:
    shown = [f"{name} {int((task.labels == code).sum())}" for code, name in enumerate(task.classes)]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
