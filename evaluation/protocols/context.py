"""What all results of an evaluation share: shards, tasks, settings, caches; and what a protocol evaluates."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from evaluation.external.given import GivenFeatures
from evaluation.protocols.settings import EvaluationSettings
from evaluation.protocols.variant import ProtocolVariant, unlike_published
from evaluation.tasks.division import Division, divide
from evaluation.tasks.published import PUBLISHED, SOURCE
from evaluation.tasks.resamples import Resampling
from evaluation.tasks.tasks import Task
from infra.errors import UserError
from infra.files import writable_folder
from infra.tracking.mlflow_store import absolute_uri
from pretrain.weights.encoder import Encoder


@dataclass
class Candidate:
    """What a protocol evaluates: a checkpoint, an architecture with random weights, given features, or the shards."""

    name: str
    method: str
    step: int = 0
    weights: str = ""  # SHA-256; empty without a checkpoint
    encoder: Encoder | None = None
    folder: Path | None = None  # of the exported encoder; None: random weights
    tags: dict[str, str] = field(default_factory=dict)  # further MLflow tags, without "yaware."
    given: GivenFeatures | None = None  # features of a table or an adapter; with an encoder: beside its features

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, of the given features, or of both; empty for baselines."""
        if self.given is None or not self.weights:
            return self.weights if self.given is None else self.given.digest
        return hashlib.sha256(f"{self.weights} {self.given.digest}".encode()).hexdigest()

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json; empty without a checkpoint, and with other features beside its own."""
        alone = self.folder is not None and self.given is None
        return self.encoder.config if self.encoder is not None and alone else {}


@dataclass
class EvaluationContext:
    """What all results of an evaluation share, and the folders of its unfinished work.

    ``rows`` (N,) are the manifest rows of the scans of all tasks, in rising order. ``cache`` keeps features between
    evaluations; ``storage`` keeps unfinished searches. ``uri`` and ``experiment`` name the MLflow store.
    """

    manifest: Manifest
    tasks: list[Task]
    rows: NDArray[np.int64]
    settings: EvaluationSettings
    cache: Path
    storage: Path
    uri: str
    experiment: str
    _work_folders: list[Path] = field(default_factory=list)
    _divisions: dict[tuple[Any, ...], tuple[Task, Division]] = field(default_factory=dict)

    def positions_of(self, task: Task) -> NDArray[np.int64]:
        """Return the positions of a task's scans in ``rows``."""
        return np.asarray(np.searchsorted(self.rows, task.rows))

    def division_of(self, task: Task, sizes: Sequence[int], resampling: Resampling) -> Division:
        """Return folds, learning-curve draws and resamples of a task: made once, since all candidates have the same."""
        settings = self.settings
        division: dict[str, Any] = {
            "folds": settings.folds, "sizes": tuple(sizes), "draws": settings.draws, "seed": settings.seed,
            "by_site": settings.leave_site_out, "resampling": resampling,
        }  # fmt: skip
        key = (id(task), *division.values())
        if key not in self._divisions:
            self._divisions[key] = (task, divide(task, **division))  # with the task, so that no other one gets its id
        return self._divisions[key][1]

    def work_folder(self, protocol: str, candidate: Candidate, params: Mapping[str, Any]) -> Path:
        """Create and return the folder of one unfinished result; its name is a digest of all that the result depends on."""
        encoder = candidate.encoder.config["encoder"] if candidate.encoder is not None else None
        inputs = {
            "protocol": protocol, "settings": params, "weights": candidate.digest, "candidate": candidate.name,
            "encoder": encoder, "manifest": self.manifest.digest, "version": version("yaware"),
            "store": [absolute_uri(self.uri), self.experiment],
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
        for task in self.tasks:
            digest.update(task.name.encode())
            for values in (
                task.rows, task.labels, task.groups, task.strata, task.test, task.covariates, task.confounds,
            ):  # fmt: skip
                digest.update(b"-" if values is None else np.ascontiguousarray(values).tobytes())
        folder = self.storage / digest.hexdigest()[:24]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._work_folders.append(folder)
        return folder

    def remove_work_folders(self) -> None:
        """Remove the folders of the results, once all of them are logged."""
        for folder in self._work_folders:
            shutil.rmtree(folder, ignore_errors=True)


def search_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of unfinished searches: ``folder``, or one in the user's cache that only the user can use.

    Tune keeps pickles in it. Raises UserError if it cannot be written.
    """
    if folder is not None:
        return writable_folder("evaluations", folder, "--storage")
    cached = writable_folder("evaluations", option="--storage")
    if cached.stat().st_uid == os.geteuid():
        cached.chmod(0o700)
    return cached


def feature_folder(manifest: Manifest, folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of computed features: ``folder``, ``.features`` in the shards, or one in the user's cache.

    The last is for shards in a read-only folder. Raises UserError if none can be written.
    """
    if folder is not None:
        return writable_folder("features", folder, "--cache")
    try:
        return writable_folder("features", manifest.root / ".features")
    except UserError:
        return writable_folder(f"features/{manifest.digest[:32]}", option="--cache")


def print_tasks(context: EvaluationContext, variants: Sequence[ProtocolVariant]) -> None:
    """Print what each task holds, and the published values, with what all ``variants`` of this evaluation do otherwise."""
    for task in context.tasks:
        classes = "" if task.kind == "regression" else f" ({_class_counts(task)})"
        participants = len(np.unique(task.groups))
        print(f"evaluate: task {task.name}: {len(task.rows)} scans of {participants} participants{classes}")
        if task.left_out:
            print(
                f"evaluate: task {task.name}: left out, too few participants for the folds: {', '.join(task.left_out)}; "
                "fewer --folds keep more of them"
            )
        if context.manifest.simulated:
            continue
        other = unlike_published([variant.beyond_paper(task.beside) for variant in variants])
        how = f"on other scans, by another method than here ({other})" if other else "on other scans"
        for size, row in PUBLISHED.get(task.name, {}).items():
            values = ", ".join(f"{method} {value:.3f}" for method, value in row.items())
            print(f"evaluate: published ({SOURCE}; {how}), {task.name}, {size} training scans: {values}")


def _class_counts(task: Task) -> str:
    counts = [f"{name} {int((task.labels == code).sum())}" for code, name in enumerate(task.classes)]
    return ", ".join(counts[:8]) + (f" and {len(counts) - 8} more" if len(counts) > 8 else "")
