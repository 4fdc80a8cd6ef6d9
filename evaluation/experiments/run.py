"""Runs the experiment of docs/experiments.md on simulated people, from cohorts to tables and plots: ``make experiment``.

The question, the comparisons and the analysis were written down there before the first run. Finished steps are skipped, so
that a killed experiment continues when it is started again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.experiments.cohorts import make_cohort, make_shards
from evaluation.experiments.evaluate import evaluate_clinic
from evaluation.experiments.networks import train_networks
from evaluation.experiments.plan import (
    CLINICS,
    EXPERIMENT,
    HEALTHY,
    PRETRAINED_ON,
    SHARDS,
    ExperimentPlan,
    Pretraining,
    pretrainings,
)
from evaluation.experiments.plan_options import add_plan_options, check_plan_file, default_jobs, plan_of
from evaluation.experiments.pretraining import is_pretrained, pretrain_command
from evaluation.experiments.processes import Job, run_jobs
from evaluation.experiments.report import write_report
from infra import ray_cluster
from infra.errors import UserError
from infra.tracking.tracker import default_uri


def run(out: Path, plan: ExperimentPlan, jobs: int) -> None:
    """Run the whole experiment in folder ``out``, ``jobs`` processes at a time.

    Raises UserError if the folder holds an experiment with another plan, or a pretraining fails.
    """
    check_plan_file(out, plan)
    start = time.monotonic()

    def announce(stage: str) -> None:
        """Print a heading that stands out from the output of the commands."""
        print(f"\n== [{(time.monotonic() - start) / 60:.1f} min] {stage}", flush=True)

    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(out / 'mlflow.db').resolve()}")
    uri = default_uri()
    with ray_cluster.session(jobs):
        announce("cohorts and shards")
        make_all_shards(out, plan, jobs)
    announce(f"{len(pretrainings(plan))} pretrainings, {jobs} at a time")
    pretrain_all(out, plan, jobs)
    with ray_cluster.session(jobs):
        for clinic in PRETRAINED_ON:
            announce(f"evaluation on {clinic}")
            evaluate_clinic(out, plan, clinic, uri)
        announce("networks trained end to end")
        train_networks(out, plan, uri)
    announce("tables and plots")
    write_report(out, plan)
    announce(f"done; tables in {out / 'results.md'}, plots beside it")


def make_all_shards(out: Path, plan: ExperimentPlan, jobs: int) -> None:
    """Simulate every cohort and build its shards."""
    for name, differences in (HEALTHY | CLINICS).items():
        is_clinic = name in CLINICS
        make_cohort(
            out / "cohorts" / name, participants=plan.clinic if is_clinic else plan.healthy, spacing=plan.spacing,
            seed=plan.seed, clinic=is_clinic, jobs=jobs, differences=differences,
        )  # fmt: skip
    for name, (cohort, scaling) in SHARDS.items():
        make_shards(
            out / "cohorts" / cohort, out / "shards" / name, scaling=scaling, seed=plan.seed, clinic=cohort in CLINICS,
            jobs=jobs,
        )  # fmt: skip


def pretrain_all(out: Path, plan: ExperimentPlan, jobs: int) -> None:
    """Run every unfinished pretraining as a ``yaware pretrain`` process, ``jobs`` at a time.

    Raises UserError if a pretraining fails.
    """
    unfinished = [
        pretraining
        for pretraining in pretrainings(plan)
        if not is_pretrained(out / "runs" / pretraining.name, _settings(plan, pretraining))
    ]
    commands = [
        pretrain_command(
            out / "runs" / pretraining.name, shards=out / "shards" / pretraining.data, steps=plan.steps,
            seed=plan.seed + pretraining.seed, experiment=EXPERIMENT, settings=_settings(plan, pretraining),
            overrides=pretraining.overrides,
        )
        for pretraining in unfinished
    ]  # fmt: skip
    named = zip(unfinished, commands, strict=True)
    run_jobs([Job(pretraining.name, [command]) for pretraining, command in named], jobs, "pretraining")


def _settings(plan: ExperimentPlan, pretraining: Pretraining) -> list[Any]:
    return [plan.steps, plan.seed, asdict(pretraining)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m evaluation.experiments.run`` and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.experiments.run", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("experiment"), help="folder of the experiment")
    parser.add_argument("--jobs", type=int, help="processes at a time (default: one per core, or 1 on a GPU)")
    add_plan_options(parser, ExperimentPlan)
    options = parser.parse_args(arguments)
    try:
        run(options.out, plan_of(options, ExperimentPlan), options.jobs or default_jobs())
    except UserError as error:
        print(f"yaware: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
