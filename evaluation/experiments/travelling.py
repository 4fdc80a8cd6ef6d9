"""Runs the experiment of docs/reliability.md on simulated travelling heads: does training for reliability help?

    python -m evaluation.experiments.travelling --out experiment-travelling          # 2 cores: three quarters of an hour

Question, arms and rule were written down before the first run. Finished pretrainings are not repeated; a killed run continues
when it is started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.shards.build import build_shards
from data_pipeline.simulation.cohort import simulate_cohort
from evaluation.experiments.pretraining import pretrain_command
from evaluation.experiments.processes import Job, run_jobs
from evaluation.protocols.evaluate import evaluate
from evaluation.retest.api import reliability
from evaluation.tasks.tasks import FILES
from infra.files import atomic_write, read_text

EXPERIMENT = "yaware-travelling"
PAIRS, POSITIVES = "--data.balance.by=subject", "--loss.subject_positives=true"
SITES = "--loss.site_negatives=0.5"
ARMS: dict[str, tuple[str, ...]] = {
    "y-aware": (), "pairs": (PAIRS,), "positives": (PAIRS, POSITIVES), "sites": (SITES,), "both": (PAIRS, POSITIVES, SITES),
}  # fmt: skip
CONTROL = "y-aware"
# Travelling heads have sessions site00r1, site00r2, ...; other participants 1, 2, 3.
HEADS, OTHERS = 'split == "downstream" and session.str.startswith("site")', 'not session.str.startswith("site")'
TASKS = ("age", "ad", "scz")
MEASURES = {
    "scanners.icc21": "reliability", "scanners.icc31": "reliability", "repeats.icc21": "reliability",
    "identification": "reliability", "scanner": "reliability", "scanners.sd.age": "reliability",
    "age.mae": "accuracy", "ad.auc": "accuracy", "scz.auc": "accuracy",
}  # fmt: skip
RISE = 0.02  # of the median ICC(2,1), in every seed: reliability has risen
COSTS = {"age.mae": 0.2, "ad.auc": -0.02, "scz.auc": -0.02}  # of the mean over seeds: accuracy was paid


@dataclass(frozen=True)
class TravellingPlan:
    """The size of the experiment; the defaults are those of docs/reliability.md."""

    participants: int = 1500
    heads: int = 160
    scanners: int = 8
    repeats: int = 2
    spacing: float = 6.0
    site_effects: float = 2.0
    steps: int = 600
    seeds: tuple[int, ...] = (0, 1)
    seed: int = 11  # of the cohort


def run(out: Path, plan: TravellingPlan, jobs: int = 2) -> pd.DataFrame:
    """Simulate, pretrain all arms, measure both, write results.csv and differences.csv, and return the results.

    Raises UserError if a command fails, or if the folder holds a cohort of another plan.
    """
    simulate_cohort(
        out / "cohort", participants=plan.participants, travelling=plan.heads, scanners=plan.scanners,
        repeats=plan.repeats, spacing=plan.spacing, site_effects=plan.site_effects, seed=plan.seed,
        shares={"AD": 0.1, "SCZ": 0.1}, workers=jobs,
    )  # fmt: skip
    shards = out / "shards"
    if not (shards / "manifest.json").is_file():
        build_shards(out / "cohort", shards, workers=jobs)
    folders = {(arm, seed): out / "runs" / f"{arm}-{seed}" for arm in ARMS for seed in plan.seeds}
    commands = [
        Job(folder.name, [pretrain_command(
            folder, shards=shards, steps=plan.steps, seed=seed, experiment=EXPERIMENT,
            settings={**asdict(plan), "arm": ARMS[arm], "run": seed}, overrides=("--readouts.fit=true", *ARMS[arm]),
        )])
        for (arm, seed), folder in folders.items()
    ]  # fmt: skip
    run_jobs(commands, jobs, "experiment")
    store = f"sqlite:///{(out / 'mlflow.db').resolve()}"
    repeats = reliability(
        list(folders.values()), shards, query=HEADS, experiment=EXPERIMENT, tracking_uri=store, voxels=True
    )
    repeats.report(out / "reliability.html")
    accuracy = evaluate(
        list(folders.values()), shards, tasks=task_files(out / "tasks"), protocols="linear", layer="own", readouts="no",
        repeats=1, halvings=0, experiment=EXPERIMENT, tracking_uri=store, workers=jobs,
    )  # fmt: skip
    results = results_of(folders, repeats.summary, accuracy)
    for name, table in {"results": results, "differences": differences_of(results)}.items():
        with atomic_write(out / f"{name}.csv", "w") as stream:
            table.to_csv(stream, index=False)
    return results


def task_files(folder: Path) -> list[str]:
    """Write the shipped tasks without the travelling heads, whose many scans are of few people; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in TASKS:
        path = folder / f"{name}.yaml"
        with atomic_write(path, "w") as stream:
            stream.write(read_text(FILES / f"{name}.yaml").rstrip("\n") + f"\nquery: '{OTHERS}'\n")
        files.append(str(path))
    return files


def results_of(folders: Mapping[tuple[str, int], Path], summary: pd.DataFrame, accuracy: pd.DataFrame) -> pd.DataFrame:
    """Return a row per arm and seed with every measure; ``folders``: (arm, seed) -> run, whose name is the checkpoint's."""
    repeats = summary.set_index("checkpoint")
    values = {(row.checkpoint, f"{row.task}.{row.metric}"): row.value for row in accuracy.itertuples()}
    rows: list[dict[str, Any]] = []
    for (arm, seed), folder in folders.items():
        row: dict[str, Any] = {"arm": arm, "seed": seed}
        for measure, source in MEASURES.items():
            known = measure in repeats if source == "reliability" else (folder.name, measure) in values
            found = repeats[measure].get(folder.name) if source == "reliability" and known else None
            row[measure] = values[folder.name, measure] if source == "accuracy" and known else found
        rows.append(row)
    return pd.DataFrame(rows)


def differences_of(results: pd.DataFrame) -> pd.DataFrame:
    """Return each arm's measures minus those of the control with the same seed, by seed and as mean, with the verdict.

    ``reliability``: risen if the median ICC(2,1) between scanners is higher by at least RISE in every seed. ``accuracy``: paid
    if a mean difference is worse than that of COSTS.
    """
    measures = list(MEASURES)
    control = results[results["arm"] == CONTROL].set_index("seed")[measures]
    rows = []
    for arm, own in results[results["arm"] != CONTROL].groupby("arm", sort=False):
        change = own.set_index("seed")[measures].astype(float) - control.astype(float)
        risen = bool((change["scanners.icc21"] >= RISE).all())
        mean = change.mean()
        paid = [name for name, limit in COSTS.items() if (mean[name] > limit if limit > 0 else mean[name] < limit)]
        for seed, values in [*change.iterrows(), ("mean", mean)]:
            rows.append({"arm": arm, "seed": seed, **values.to_dict(), "reliability": "risen" if risen else "not risen",
                         "accuracy": f"paid: {', '.join(paid)}" if paid else "not paid"})  # fmt: skip
    return pd.DataFrame(rows)


def main() -> None:
    """Run the experiment with the plan's size, or another."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.experiments.travelling", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("experiment-travelling"), help="folder to write")
    parser.add_argument("--jobs", type=int, default=2, help="pretrainings at a time (default 2)")
    default = TravellingPlan()
    for name in ("participants", "heads", "scanners", "repeats", "spacing", "steps"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help="for a trial (default %(default)s)")
    options = vars(parser.parse_args())
    out, jobs = options.pop("out"), options.pop("jobs")
    print(run(out, TravellingPlan(**options), jobs).round(3).to_string(index=False))
    print(f"experiment: {out / 'results.csv'}, {out / 'differences.csv'}, {out / 'reliability.html'}")


if __name__ == "__main__":
    main()
