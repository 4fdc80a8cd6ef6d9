"""Evaluates encoders, models without a network and networks trained end to end on a clinic; nothing is fitted to test scans."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from evaluation.experiments.answers import MethodAnswers
from evaluation.experiments.evaluate import brain_ages, load_plan_task
from evaluation.experiments.networks import network_answers, network_jobs, network_points
from evaluation.experiments.plan import DISEASES
from evaluation.experiments.second.plan import (
    AUTO,
    BESIDE_OWN,
    CLINIC_TASKS,
    FINE_TUNED,
    SPATIAL,
    WHOLE,
    Piece,
    SecondPlan,
)
from evaluation.features.candidates import FeatureChoice, candidate_blocks, joined, joint_table
from evaluation.features.tables import SCALES, FeatureTable, reduced, table_of
from evaluation.features.voxels import voxel_coordinates
from evaluation.protocols.features import cache_name, features_of_each
from evaluation.protocols.nested_cv import PreparedTask, nested_fit, prepare
from evaluation.protocols.probes import LINEAR, LINEAR_WIDE
from evaluation.protocols.tune_networks import final_fit_trial
from evaluation.tasks.folds import outer_folds
from evaluation.tasks.leakage import check_copies, check_leakage, check_readouts
from infra.files import sha256_of
from infra.progress import Progress
from infra.ray_cluster import one_thread
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder
from pretrain.weights.layers import OWN, Block
from pretrain.weights.scan_source import check_preprocessing
from pretrain.weights.seen_scans import participants_of

Source = tuple[str, str, int]  # method, features, seed of the pretraining
POOLED: Block = (None, OWN)


def shards_of(out: Path, level: str, *, clinic: bool) -> Path:
    """Return the folder of a level's shards."""
    return out / "shards" / f"{'clinic' if clinic else 'healthy'}-{level}"


def run_of(out: Path, piece: Piece) -> Path:
    """Return the folder of an encoder's pretraining."""
    return out / "runs" / piece.name.replace("/", "-")


def evaluate_piece(out: Path, plan: SecondPlan, piece: Piece) -> list[MethodAnswers]:
    """Return the answers of a piece, whose shards and pretraining are in ``out``."""
    clinic = Clinic(out, plan, piece.level)
    if piece.kind == "encoder":
        return clinic.encoder_answers(piece)
    return clinic.voxel_answers() if piece.kind == "voxels" else clinic.network_answers(piece.method)


class Clinic:
    """The clinic of a level: its shards and tasks, and the models that are fitted to its training sets."""

    def __init__(self, out: Path, plan: SecondPlan, level: str) -> None:
        self.out, self.plan, self.level = out, plan, level
        self.manifest = Manifest.load(shards_of(out, level, clinic=True))
        self.tasks = {name: load_plan_task(out, name, self.manifest, CLINIC_TASKS) for name in DISEASES}
        check_copies(self.tasks.values(), self.manifest)
        self.rows = np.unique(np.concatenate([task.rows for task in self.tasks.values()]))

    def encoder_answers(self, piece: Piece, kinds: Sequence[str] = ()) -> list[MethodAnswers]:
        """Return the answers of linear models on each kind of an encoder's features, and the ages that its readout predicts.

        ``kinds`` stand in place of those of the piece.
        """
        kinds = kinds or piece.features
        path = run_of(self.out, piece)
        encoder = Encoder.from_pretrained(path)
        check_preprocessing(encoder.preprocessing, self.manifest, piece.name)
        check_leakage(encoder, path, self.manifest, self.rows, piece.name)
        readouts = encoder.need_readouts()
        check_readouts(readouts, self.manifest, self.rows, piece.name)
        blocks = [POOLED, SPATIAL, *(BESIDE_OWN[kind] for kind in kinds if kind in BESIDE_OWN)]
        if AUTO in kinds:
            blocks = [*candidate_blocks(encoder.network, self.manifest.grid["shape"]), *blocks]
        blocks = list(dict.fromkeys(blocks))
        work = self.out / "features" / path.name
        weights = sha256_of(find_encoder(path) / "model.safetensors")
        caches = {(layer, pooling): work / cache_name(weights, self.manifest.digest, layer, pooling)
                  for layer, pooling in blocks}  # fmt: skip
        work.mkdir(parents=True, exist_ok=True)
        features = features_of_each(encoder, self.manifest, self.rows, caches, f"features of {piece.name}")
        ages = readouts.predict(features[SPATIAL])[:, list(readouts.readouts).index("age")]
        answers = [self._age_answers((piece.method, "readout", piece.seed), ages)]
        with one_thread():
            for kind in kinds:
                source = piece.method, kind, piece.seed
                for name in self.tasks:
                    prepared = self._prepared(kind, name, features, ages)
                    answers.append(self._disease_answers(source, name, prepared))
        shutil.rmtree(work, ignore_errors=True)  # a hundred megabytes and more
        return answers

    def voxel_answers(self) -> list[MethodAnswers]:
        """Return the answers of linear models on the voxels, on these with the brain-age score, and on the score alone."""
        healthy = Manifest.load(shards_of(self.out, self.level, clinic=False))
        ages = brain_ages(healthy, self.manifest, self.rows)
        cache = self.out / "features" / f"voxels-{self.level}-{self.manifest.digest[:16]}.npz"
        cache.parent.mkdir(parents=True, exist_ok=True)
        answers = [self._age_answers(("brain-age", WHOLE, 0), ages)]
        with one_thread():
            for name, task in self.tasks.items():
                score = ages[self._places(name)][:, None]
                voxels = table_of(task, voxel_coordinates(self.manifest, task.rows, cache), "all")
                for method, table in (
                    ("voxels", voxels), ("voxels-brain-age", replace(voxels, readouts=score)),
                    ("brain-age", table_of(task, score, "each")),
                ):  # fmt: skip
                    answers.append(self._disease_answers((method, WHOLE, 0), name, self._prepare(name, table)))
        cache.unlink(missing_ok=True)
        return answers

    def network_answers(self, disease: str) -> list[MethodAnswers]:
        """Return the answers of networks that are trained end to end on one disease, fine-tuned and from scratch."""
        task = self.tasks[disease]
        jobs = network_jobs(self.manifest, task, run_of(self.out, FINE_TUNED), self.plan.seed)
        points, results = network_points(task, jobs, self.plan), []
        with Progress(len(points), "networks", disease) as progress:
            for point in points:
                results.append(final_fit_trial(point, {"jobs": jobs}))
                progress.advance()
        return network_answers(self.level, WHOLE, disease, task, results)

    def _prepared(
        self, kind: str, name: str, features: dict[Block, NDArray[np.float32]], ages: NDArray[Any]
    ) -> PreparedTask:
        """Return a task with one kind of an encoder's features.

        ``readout`` is the spatial ones with the predicted age beside them; kinds of BESIDE_OWN have the own features too.
        """
        task, places = self.tasks[name], self._places(name)
        if kind == "pooled":
            return self._prepare(name, table_of(task, features[POOLED][places], "each"))
        if kind in BESIDE_OWN:
            columns, blocks = joined(features[POOLED][places], features[BESIDE_OWN[kind]][places])
            return self._prepare(name, replace(joint_table(task, columns, blocks), readouts=ages[places][:, None]))
        spatial = table_of(task, features[SPATIAL][places], "all")
        if kind == "spatial":
            return self._prepare(name, spatial)
        if kind == "readout":
            return self._prepare(name, replace(spatial, readouts=ages[places][:, None]))
        choices = []
        for (layer, pooling), values in features.items():
            for scale in SCALES:
                columns, count = reduced(values[places], scale)
                params = {"layer": layer or "encoder", "pooling": "+".join(pooling), "scale": scale}
                choices.append(FeatureChoice(params, table_of(task, columns, scale, np.arange(len(task.rows)), count)))
        return self._prepare(name, choices[0].table, choices)

    def _prepare(self, name: str, table: FeatureTable, choices: list[FeatureChoice] | None = None) -> PreparedTask:
        plan = self.plan
        return prepare(
            self.tasks[name], table, folds=5, sizes=list(plan.sizes), draws=plan.draws, seed=plan.seed,
            candidates=choices or [],
        )  # fmt: skip

    def _disease_answers(self, source: Source, name: str, prepared: PreparedTask) -> MethodAnswers:
        """Fit a linear model to every training set, its penalty (and its features) chosen on inner folds of that set."""
        probe = LINEAR_WIDE if prepared.candidates else LINEAR
        test, task, answers = prepared.folds[0][1], self.tasks[name], []
        with Progress(len(prepared.draws), "training sets", f"{name}, {' '.join(map(str, source))}") as progress:
            for draw in prepared.draws:
                answers.append(nested_fit(probe, prepared, draw.train, draw.test).predictions.predicted)
                progress.advance()
        method, features, seed = source
        return MethodAnswers(
            clinic=self.level, method=method, variant=features, seed=seed, task=name,
            sizes=np.array([draw.size for draw in prepared.draws]),
            draws=np.array([draw.number for draw in prepared.draws]),
            answers=np.stack(answers).astype(np.float32), labels=task.labels[test], people=task.participants[test],
        )  # fmt: skip

    def _age_answers(self, source: Source, ages: NDArray[Any]) -> MethodAnswers:
        """Return the ages that a model of healthy people predicts for the controls at the test sites.

        ``ages``: predictions for all ``rows``.
        """
        controls = []
        for name, task in self.tasks.items():
            test = outer_folds(task, 5, self.plan.seed)[0][1]
            controls.append(self._places(name)[test[task.labels[test] == 0]])
        places = np.unique(np.concatenate(controls))
        scans = self.manifest.scans.iloc[self.rows[places]]
        method, features, seed = source
        return MethodAnswers(
            clinic=self.level, method=method, variant=features, seed=seed, task="age", sizes=np.array([0]),
            draws=np.array([0]), answers=ages[places][None].astype(np.float32), labels=scans["age"].to_numpy(float),
            people=np.array(participants_of(self.manifest, self.rows[places])),
        )  # fmt: skip

    def _places(self, name: str) -> NDArray[np.int64]:
        """Return the positions of a task's scans in ``rows``."""
        return np.asarray(np.searchsorted(self.rows, self.tasks[name].rows))
