"""Which features ``yaware evaluate`` should use by default: inner-fold scores of all candidates on simulated cohorts.

    python -m tests.benchmarks.studies.default_features OUT [--seeds 21,22] [--level middle] [--participants 2000] [--steps N]

For every seed a cohort of a level of realism (docs/experiments_2.md) is simulated, an encoder is pretrained on its healthy
people with the recipe simulated-6mm, and a second one is left untrained; both get readouts of age from their own features. On
the tasks ad, scz and age these are compared:

- the candidates of ``--layer auto``, ``auto`` itself, and ``own without age`` (the encoder's own features without the covariate
  age), all without readouts;
- ``default`` (what ``yaware evaluate`` uses if nothing is named), and every position of each block, alone or beside the own
  features, all with readouts.

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
from evaluation.experiments.second.plan import LEVELS, MIDDLE
from evaluation.features.candidates import FeatureChoice, joined, joint_table
from evaluation.features.tables import FeatureTable
from evaluation.protocols.context import Candidate, EvaluationContext
from evaluation.protocols.inputs import add_readouts, candidate_features, candidate_tables, joint_tables
from evaluation.protocols.nested_cv import PreparedTask, nested_fit
from evaluation.protocols.probes import LINEAR, LINEAR_WIDE
from evaluation.protocols.protocols import has_wide
from evaluation.protocols.settings import EvaluationSettings
from evaluation.statistics.metrics import inner_metric
from evaluation.tasks.folds import make_folds, outer_folds
from evaluation.tasks.tasks import Task, load_task
from infra import cli
from infra.files import sha256_of
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder
from pretrain.weights.layers import OWN

TASKS = ("ad", "scz", "age")
SHARES = "AD=0.15,SCZ=0.15"
BEFORE = "own without age"
SMALL_SET = 100  # people of the smaller of two sizes of training data
COLUMNS = ["seed", "encoder", "task", "people", "repeat", "fold", "features", "score"]


def prepare_cohort(out: Path, seed: int, participants: int, *, level: str, steps: int) -> Path:
    """Simulate a cohort, build its shards, pretrain an encoder and leave one untrained; return the folder."""
    realism = [word for option, value in LEVELS[level].items() for word in (f"--{option}", str(value))]
    folder = out / f"{level}-{participants}-people-{steps}-steps-seed-{seed}"
    shards, uri = folder / "shards", f"--run.tracking_uri=sqlite:///{folder}/mlflow.db"
    commands = [
        ["cohort", "simulate", str(folder / "cohort"), "--participants", str(participants), "--spacing", "6",
         "--modality", "vbm", "--seed", str(seed), "--shares", SHARES, *realism],
        ["shards", "build", str(folder / "cohort"), str(shards), "--dataset", "simulated", "--modality", "vbm",
         "--scaling", "tiv", "--scans-per-shard", "128", "--seed", "0"],
    ]  # fmt: skip
    for name, length in (("y-aware", steps), ("untrained", 0)):
        commands.append([
            "pretrain", "--config", "simulated-6mm", f"--run.seed={seed}", f"--run.name={name}", uri,
            f"--data.shards={shards}", f"--run.output={folder / name}", f"--train.steps={length}",
        ])  # fmt: skip
    commands += [
        ["readouts", str(folder / name), "--shards", str(shards), "--replace"] for name in ("y-aware", "untrained")
    ]
    done = folder / "done"
    for number, command in enumerate(commands):
        finished = done.with_suffix(f".{number}")
        if not finished.exists():
            if cli.run(command):
                raise SystemExit(f"default_features: {' '.join(command[:2])} failed")
            finished.touch()
    return folder


def features_of(
    folder: Path, encoder_name: str, manifest: Manifest, task: Task
) -> tuple[list[FeatureChoice], dict[str, FeatureTable]]:  # fmt: skip
    """Return the candidates of ``--layer auto`` for a task, and by name the tables with the predicted age beside them.

    ``default`` has the features that ``yaware evaluate`` uses by default; then come all positions of each block, alone and
    beside the encoder's own features.
    """
    path = folder / encoder_name
    context = EvaluationContext(
        manifest=manifest, tasks=[task], rows=task.rows, settings=EvaluationSettings((task.name,)), cache=folder,
        storage=folder, uri="", experiment="",
    )  # fmt: skip
    weights = sha256_of(find_encoder(path) / "model.safetensors")
    candidate = Candidate(encoder_name, encoder_name, weights=weights, encoder=Encoder.from_pretrained(path))
    choices = candidate_tables(context, candidate)[task.name]
    tables = {"default": joint_tables(context, candidate)[task.name]}
    features = candidate_features(context, candidate)
    for params, table in choices:
        layer, pooling, scale = params.values()
        if layer != "encoder" and (pooling, scale) == ("none", "all"):
            tables[f"{layer} none all, readouts"] = table
            columns, blocks = joined(features[(None, OWN)], features[layer, (pooling,)])
            tables[f"own and {layer}, readouts"] = joint_table(task, columns, blocks)
    named = [FeatureChoice({"name": name}, table) for name, table in tables.items()]
    prepared = PreparedTask(choices[0].table, [], [], 0, candidates=named)
    prepared = add_readouts(context, candidate, {task.name: prepared})[task.name]
    return choices, {choice.params["name"]: choice.table for choice in prepared.candidates}


def scores_of(
    candidates: list[FeatureChoice], others: dict[str, FeatureTable], task: Task, repeats: int
) -> Iterator[tuple[int, int, int, str, float]]:
    """Yield people, repeat, fold, features and score for every candidate, the choice among them, and ``others``."""
    own = candidates[0].table
    before = replace(own, covariates=np.empty((len(task.rows), 0)))
    named = [(" ".join(choice.params.values()), [choice]) for choice in candidates] + [("auto", candidates)]
    named += [(name, [FeatureChoice({}, table)]) for name, table in (*others.items(), (BEFORE, before))]
    train = outer_folds(task, 5, 0)[0][0]
    for small in (True, False):
        for repeat in range(repeats):
            people = np.random.default_rng(repeat).permutation(train)[: SMALL_SET * 3 // 2] if small else train
            folds = make_folds(task.labels[people], task.groups[people], task.kind, 3, repeat)
            for number, (inner, test) in enumerate(folds):
                labels = task.labels[people[test]]
                for name, of_name in named:
                    prepared = PreparedTask(of_name[0].table, [], [], 0, candidates=of_name if name == "auto" else [])
                    of_evaluate = name.startswith("encoder") or name in (*others, BEFORE)
                    probe = LINEAR if of_evaluate and not has_wide(prepared) else LINEAR_WIDE
                    fit = nested_fit(probe, prepared, people[inner], people[test])
                    yield len(inner), repeat, number, name, inner_metric(labels, fit.predictions.predicted, task.kind)


def report(table: pd.DataFrame) -> str:
    """Return the mean scores as text: features by encoder, task and size; and in how many cells they beat pooled ones."""
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
    parser.add_argument("--seeds", default="21,22,23,24")
    parser.add_argument("--level", choices=list(LEVELS), default=MIDDLE)
    parser.add_argument("--participants", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    tables = []
    for seed in map(int, options.seeds.split(",")):
        folder = prepare_cohort(
            options.out.resolve(), seed, options.participants, level=options.level, steps=options.steps
        )
        manifest = Manifest.load(folder / "shards")
        for encoder in ("y-aware", "untrained"):
            for name in TASKS:
                path = folder / f"scores-{encoder}-{name}-{options.repeats}.csv"
                if not path.exists():
                    task = load_task(name, manifest)
                    rows = scores_of(*features_of(folder, encoder, manifest, task), task, options.repeats)
                    table = pd.DataFrame([(seed, encoder, name, *row) for row in rows], columns=COLUMNS)
                    table.to_csv(path, index=False)
                    print(f"default_features: seed {seed}, {encoder}, {name}: done", flush=True)
                tables.append(pd.read_csv(path))
    scores = pd.concat(tables)
    scores.to_csv(options.out / "scores.csv", index=False)
    print(report(scores))


if __name__ == "__main__":
    main()
