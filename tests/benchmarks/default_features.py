"""Which features ``yaware evaluate`` should use by default: inner-fold scores of all candidates on simulated cohorts.

    python -m tests.benchmarks.default_features OUT [--seeds 11,12] [--participants 1200] [--steps 120] [--width 0.25]

For every seed a cohort is simulated, an encoder is pretrained on its healthy people with the recipe demo-cpu, and a second one
is left untrained; both get readouts of age, whose penalty is chosen out of fold. The candidates of ``--layer auto`` are
compared on the tasks ad, scz and age, and three more: ``auto`` itself, ``default`` (what ``yaware evaluate`` uses if nothing is
named) and ``own without age`` (what it used before: the encoder's own features, without readouts and without the covariate
age).

Only the training scans of the first outer fold are used. They are divided into three folds, ``--repeats`` times; a model is
fitted to two of them, with its penalty (and for ``auto`` the candidate) chosen on folds inside these two, and scored on the
third. Use seeds that no experiment uses. What is finished in OUT is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from data_pipeline.storage.manifest import Manifest
from evaluation.features.candidates import FeatureChoice, candidate_blocks
from evaluation.features.tables import SCALES, FeatureTable, reduced, table_of
from evaluation.protocols.context import Candidate, EvaluationContext
from evaluation.protocols.features import cache_name, features_of_each
from evaluation.protocols.inputs import add_readouts, joint_tables
from evaluation.protocols.nested_cv import PreparedTask, nested_fit
from evaluation.protocols.probes import LINEAR, LINEAR_WIDE
from evaluation.protocols.settings import EvaluationSettings
from evaluation.statistics.metrics import inner_metric
from evaluation.tasks.folds import make_folds, outer_folds
from evaluation.tasks.tasks import Task, load_task
from infra import cli
from infra.files import sha256_of
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder

TASKS = ("ad", "scz", "age")
BEFORE = "own without age"
SMALL_SET = 100  # people of the smaller of two sizes of training data
COLUMNS = ["seed", "encoder", "task", "people", "repeat", "fold", "features", "score"]


def prepare_cohort(out: Path, seed: int, participants: int, *, steps: int, width: float) -> Path:
    """Simulate a cohort, build its shards, pretrain an encoder and leave one untrained; return the folder."""
    folder = out / f"seed-{seed}"
    shards, uri = folder / "shards", f"--run.tracking_uri=sqlite:///{folder}/mlflow.db"
    commands = [
        ["cohort", "simulate", str(folder / "cohort"), "--participants", str(participants), "--spacing", "6",
         "--modality", "vbm", "--seed", str(seed)],
        ["shards", "build", str(folder / "cohort"), str(shards), "--dataset", "simulated", "--modality", "vbm",
         "--scaling", "tiv", "--scans-per-shard", "128", "--seed", "0"],
    ]  # fmt: skip
    for name, length in (("y-aware", steps), ("untrained", 0)):
        commands.append([
            "pretrain", "--config", "demo-cpu", "--launch.ranks=1", f"--run.seed={seed}", f"--run.name={name}", uri,
            f"--data.shards={shards}", f"--run.output={folder / name}", f"--train.steps={length}", "--data.workers=0",
            f"--encoder.options.width={width}",
        ])  # fmt: skip
    commands += [
        ["readouts", str(folder / name), "--shards", str(shards), "--calibration", "none", "--replace"]
        for name in ("y-aware", "untrained")
    ]
    done = folder / "done"
    for number, command in enumerate(commands):
        finished = done.with_suffix(f".{number}")
        if not finished.exists():
            if cli.run(command):
                raise SystemExit(f"default_features: {' '.join(command[:2])} failed")
            finished.touch()
    return folder


def choices(folder: Path, encoder_name: str, manifest: Manifest, task: Task) -> list[FeatureChoice]:
    """Return all candidates for a task."""
    path = folder / encoder_name
    encoder = Encoder.from_pretrained(path)
    weights = sha256_of(find_encoder(path) / "model.safetensors")
    rows = np.arange(len(manifest.scans))
    caches = {
        block: folder / cache_name(weights, manifest.digest, *block)
        for block in candidate_blocks(encoder.network, manifest.grid["shape"])
    }
    found = []
    for (layer, pooling), features in features_of_each(encoder, manifest, rows, caches, encoder_name).items():
        for scale in SCALES:
            columns, count = reduced(features[task.rows], scale)
            params = {"layer": layer or "encoder", "pooling": "+".join(pooling), "scale": scale}
            places = np.arange(len(task.rows))
            found.append(FeatureChoice(params, table_of(task, columns, scale, places, count)))
    return found


def default_table(folder: Path, encoder_name: str, manifest: Manifest, task: Task) -> FeatureTable:
    """Return a task with the features that ``yaware evaluate`` uses by default: own and spatial ones, and the predicted age."""
    path = folder / encoder_name
    encoder = Encoder.from_pretrained(path)
    weights = sha256_of(find_encoder(path) / "model.safetensors")
    context = EvaluationContext(
        manifest=manifest, tasks=[task], rows=np.arange(len(manifest.scans)), settings=EvaluationSettings((task.name,)),
        cache=folder, storage=folder, uri="", experiment="",
    )  # fmt: skip
    candidate = Candidate(encoder_name, encoder_name, weights=weights, encoder=encoder)
    table = joint_tables(context, candidate)[task.name]
    prepared = add_readouts(context, candidate, {task.name: PreparedTask(table, [], [], 0)})
    return prepared[task.name].table


def scores_of(
    candidates: list[FeatureChoice], default: FeatureTable, task: Task, repeats: int
) -> Iterator[tuple[int, int, int, str, float]]:
    """Yield people, repeat, fold, features and score for every candidate and for the choice among them."""
    own = candidates[0].table
    before = replace(own, covariates=np.empty((len(task.rows), 0)))
    named = [(" ".join(choice.params.values()), [choice]) for choice in candidates] + [("auto", candidates)]
    named += [("default", [FeatureChoice({}, default)]), (BEFORE, [FeatureChoice({}, before)])]
    train = outer_folds(task, 5, 0)[0][0]
    for small in (True, False):
        for repeat in range(repeats):
            people = np.random.default_rng(repeat).permutation(train)[: SMALL_SET * 3 // 2] if small else train
            folds = make_folds(task.labels[people], task.groups[people], task.kind, 3, repeat)
            for number, (inner, test) in enumerate(folds):
                labels = task.labels[people[test]]
                for name, of_name in named:
                    prepared = PreparedTask(of_name[0].table, [], [], 0, candidates=of_name if name == "auto" else [])
                    probe = LINEAR if name.startswith("encoder") or name in ("default", BEFORE) else LINEAR_WIDE
                    fit = nested_fit(probe, prepared, people[inner], people[test])
                    yield len(inner), repeat, number, name, inner_metric(labels, fit.predictions.predicted, task.kind)


def report(table: pd.DataFrame) -> str:
    """Return the mean scores as text: features by encoder, task and size; and in how many cells they beat today's default."""
    table = table.assign(size=np.where(table["people"] > 1.2 * SMALL_SET, "all", str(SMALL_SET)))
    cells = table.pivot_table("score", "features", ["encoder", "task", "size"], sort=False)
    of_seeds = table.pivot_table("score", "features", ["encoder", "task", "size", "seed"], sort=False)
    better = of_seeds.gt(of_seeds.loc[BEFORE]).drop(columns="untrained", level="encoder", errors="ignore")
    text = pd.concat([cells.round(3), better.sum(axis=1).rename(("better", "", "")).to_frame()], axis=1).to_string()
    return f"{text}\nbetter: than {BEFORE!r}, of {better.shape[1]} cells of the pretrained encoder and one seed"


def main() -> None:
    """Print the table of ``report``; all scores are in OUT/scores.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="11,12")
    parser.add_argument("--participants", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--width", type=float, default=0.25, help="of the ResNet18; the demo has 0.5")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    tables = []
    for seed in map(int, options.seeds.split(",")):
        folder = prepare_cohort(
            options.out.resolve(), seed, options.participants, steps=options.steps, width=options.width
        )
        manifest = Manifest.load(folder / "shards")
        for encoder in ("y-aware", "untrained"):
            for name in TASKS:
                path = folder / f"scores-{encoder}-{name}-{options.repeats}.csv"
                if not path.exists():
                    task = load_task(name, manifest)
                    candidates = choices(folder, encoder, manifest, task)
                    rows = scores_of(candidates, default_table(folder, encoder, manifest, task), task, options.repeats)
                    table = pd.DataFrame([(seed, encoder, name, *row) for row in rows], columns=COLUMNS)
                    table.to_csv(path, index=False)
                    print(f"default_features: seed {seed}, {encoder}, {name}: done", flush=True)
                tables.append(pd.read_csv(path))
    scores = pd.concat(tables)
    scores.to_csv(options.out / "scores.csv", index=False)
    print(report(scores))


if __name__ == "__main__":
    main()
