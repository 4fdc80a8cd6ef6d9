"""Compares learning rates and numbers of steps on healthy people alone: ``python -m evaluation.experiments.second.tune``.

Healthy people of another seed than the experiment's are simulated; no patient is. For every method, learning rate and number
of steps an encoder is pretrained on eight sites. Its features are judged on the people of the four other sites: by the error
of a ridge regression of age that is fitted to the pretraining people (penalty by inner folds), and by their effective rank.
A killed comparison continues when it is started again; what is finished in --out is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from evaluation.experiments.cohorts import CLINIC_SEED, is_built, make_cohort, make_shards
from evaluation.experiments.plan import METHODS, SITES
from evaluation.experiments.plan_options import add_plan_options, check_plan_file, default_jobs, plan_of
from evaluation.experiments.pretraining import is_pretrained, pretrain_command, settings_digest
from evaluation.experiments.processes import Command, Job, run_jobs
from evaluation.experiments.second.evaluate import POOLED
from evaluation.experiments.second.plan import LEVELS, MIDDLE, SPATIAL, SecondPlan, recipe_settings
from evaluation.experiments.tables import markdown
from evaluation.features.tables import FeatureTable
from evaluation.protocols.features import cache_name, features_of_each
from evaluation.protocols.nested_cv import PreparedTask, nested_fit
from evaluation.protocols.probes import LINEAR_WIDE
from evaluation.statistics.metrics import mae
from infra import ray_cluster
from infra.errors import UserError, nearest
from infra.files import atomic_write, read_text, sha256_of, write_json
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder

EXPERIMENT = "yaware-experiment-2-tuning"  # in MLflow
UNSEEN = SITES[8:]
KINDS = {"pooled": (POOLED, "each"), "spatial": (SPATIAL, "all")}  # features -> block and scale


@dataclass(frozen=True)
class TuningPlan:
    """The people of the comparison."""

    healthy: int = 3000
    spacing: float = 6.0  # mm
    seed: int = 81


@dataclass(frozen=True)
class Run:
    """One pretraining."""

    method: str
    rate: float
    steps: int

    @property
    def name(self) -> str:
        """A unique name; also the run's folder."""
        return f"{self.method}-lr{self.rate:g}-steps{self.steps}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """The changes of the recipe."""
        query = f"--data.query=site not in {list(UNSEEN)}"
        return (*METHODS[self.method], f"--optimizer.lr={self.rate}", "--readouts.fit=false", query)

    def settings(self, plan: TuningPlan) -> dict[str, Any]:
        """Return all that the run depends on."""
        people = [LEVELS[MIDDLE], plan.healthy, plan.spacing, plan.seed]
        return {"people": people, "steps": self.steps, "recipe": recipe_settings(), "overrides": list(self.overrides)}


def effective_rank(features: NDArray[Any]) -> float:
    """Return the effective rank of features (n, F): 1 if they lie on a line, at most min(n - 1, F).

    The exponential of the entropy of the singular values of the centred features, divided by their sum (Roy and Vetterli,
    EUSIPCO 2007).
    """
    values = np.linalg.svd(np.asarray(features, np.float64) - features.mean(0), compute_uv=False)
    shares = values[values > 1e-12 * max(values.max(), 1e-300)] / values.sum() if values.sum() else np.ones(1)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def measure(run_folder: Path, manifest: Manifest, work: Path) -> dict[str, float]:
    """Return age error in years and effective rank on the unseen sites, for pooled and spatial features of a run."""
    encoder = Encoder.from_pretrained(run_folder)
    scans = manifest.scans
    unseen = scans["site"].isin(UNSEEN).to_numpy()
    rows = np.flatnonzero(unseen | (scans["split"] == "pretrain").to_numpy())
    train, test = np.flatnonzero(~unseen[rows]), np.flatnonzero(unseen[rows])
    groups = np.unique(manifest.subjects()[rows], return_inverse=True)[1].reshape(-1)
    ages, none = scans["age"].to_numpy(float)[rows], np.empty((len(rows), 0))
    weights = sha256_of(find_encoder(run_folder) / "model.safetensors")
    caches = {block: work / cache_name(weights, manifest.digest, *block) for block, _ in KINDS.values()}
    work.mkdir(parents=True, exist_ok=True)
    features = features_of_each(encoder, manifest, rows, caches, f"features of {run_folder.name}")
    found = {}
    with ray_cluster.one_thread():
        for kind, (block, scale) in KINDS.items():
            table = FeatureTable(
                features[block].astype(np.float64), ages, groups, "regression", covariates=none, confounds=none, scale=scale
            )  # fmt: skip
            fit = nested_fit(LINEAR_WIDE, PreparedTask(table, [], [], 0), train, test)
            found[f"{kind}: age error"] = mae(ages[test], fit.predictions.predicted)
            found[f"{kind}: effective rank"] = effective_rank(features[block][test])
    for cache in caches.values():
        cache.unlink()
    return found


def tune(out: Path, plan: TuningPlan, runs: Sequence[Run], jobs: int) -> pd.DataFrame:
    """Pretrain and measure what is not finished; return a row for each run, and write tuning.csv and tuning.md.

    Raises UserError if the folder holds other people, or a pretraining fails.
    """
    check_plan_file(out, plan)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(out / 'mlflow.db').resolve()}")
    shards = out / "shards"
    with nullcontext() if is_built(shards) else ray_cluster.session(jobs):
        make_cohort(out / "cohort", participants=plan.healthy, spacing=plan.spacing, seed=plan.seed, clinic=False,
                    jobs=jobs, differences=LEVELS[MIDDLE])  # fmt: skip
        make_shards(out / "cohort", shards, scaling="tiv", seed=plan.seed, clinic=False, jobs=jobs)
    waiting = [run for run in runs if not is_pretrained(out / "runs" / run.name, run.settings(plan))]
    if waiting:
        run_jobs([Job(run.name, [_pretraining(out, plan, run)]) for run in waiting], jobs, "tuning")
    rows = []
    for run in runs:
        path, digest = out / "measured" / f"{run.name}.json", settings_digest(run.settings(plan))
        stored = json.loads(read_text(path)) if path.is_file() else {}
        if stored.get("settings") != digest:
            measured = measure(out / "runs" / run.name, Manifest.load(shards), out / "features")
            path.parent.mkdir(exist_ok=True)
            stored = {"settings": digest, "measured": measured}
            write_json(path, stored)
        rows.append({"method": run.method, "learning rate": f"{run.rate:g}", "steps": run.steps, **stored["measured"]})
    table = pd.DataFrame(rows)
    for name, text in (("tuning.csv", table.to_csv(index=False)), ("tuning.md", "\n".join(markdown(table)) + "\n")):
        with atomic_write(out / name, "w") as stream:
            stream.write(text)
    return table


def _pretraining(out: Path, plan: TuningPlan, run: Run) -> Command:
    return pretrain_command(
        out / "runs" / run.name, shards=out / "shards", steps=run.steps, seed=plan.seed, experiment=EXPERIMENT,
        settings=run.settings(plan), overrides=run.overrides,
    )  # fmt: skip


def check_choices(plan: TuningPlan, methods: Sequence[str]) -> None:
    """Raise UserError for the people of the experiment, or an unknown method."""
    seed = SecondPlan().seed
    if plan.seed in range(seed, seed + CLINIC_SEED + 1):
        raise UserError(
            f"--seed={plan.seed} is that of the experiment's people; choose another, such as {TuningPlan().seed}"
        )
    for method in methods:
        if method not in METHODS or method == "random":
            known = [name for name in METHODS if name != "random"]
            raise UserError(f"--methods={method} is not known{nearest(method, known)}; allowed: {', '.join(known)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of ``tune`` and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.experiments.second.tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("experiment2-tuning"), help="folder of the comparison")
    parser.add_argument("--methods", nargs="+", default=["y-aware"], help="y-aware, simclr, age-regression")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3], help="learning rates")
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1000], help="of pretraining, 64 scans each")
    parser.add_argument("--jobs", type=int, help="processes at a time (default: one per core, or 1 on a GPU)")
    add_plan_options(parser, TuningPlan)
    options = parser.parse_args(arguments)
    try:
        plan = plan_of(options, TuningPlan)
        check_choices(plan, options.methods)
        runs = [Run(*values) for values in itertools.product(options.methods, options.rates, options.steps)]
        table = tune(options.out, plan, runs, options.jobs or default_jobs())
    except UserError as error:
        print(f"yaware: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(markdown(table)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
