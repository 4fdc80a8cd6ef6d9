"""Runs the experiment of docs/experiments.md on simulated people, from cohorts to tables and plots: ``make experiment``.

The question, the comparisons and the analysis were written down there before the first run. Finished steps are skipped, so
that a killed experiment continues when it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from data_pipeline.shards.build import build_shards
from data_pipeline.simulation.cohort import simulate_cohort
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
from evaluation.experiments.report import write_report
from infra import ray_cluster
from infra.errors import UserError
from infra.files import atomic_write, read_text, write_json
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
        make_shards(out, plan, jobs)
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


def make_shards(out: Path, plan: ExperimentPlan, jobs: int) -> None:
    """Simulate every cohort and build its shards.

    Clinics have another seed than the healthy cohorts, and so other people and other sites.
    """
    patients = {"AD": 0.15, "SCZ": 0.15}
    for offset, (cohorts, people, shares) in enumerate(((HEALTHY, plan.healthy, {}), (CLINICS, plan.clinic, patients))):
        for name, differences in cohorts.items():
            simulate_cohort(
                out / "cohorts" / name, participants=people, spacing=plan.spacing, seed=plan.seed + offset, shares=shares,
                workers=jobs, **differences,
            )  # fmt: skip
    for name, (cohort, scaling) in SHARDS.items():
        splits = {"downstream": 1.0} if cohort in CLINICS else {"pretrain": 0.9, "monitor": 0.1}
        target = out / "shards" / name
        if not (target / "manifest.json").is_file():
            # Participants are identified by data set and id: sub-00001 exists in every cohort and is another person in each.
            build_shards(out / "cohorts" / cohort, target, dataset=cohort, scaling=scaling, splits=splits, workers=jobs,
                         scans_per_shard=512, seed=plan.seed)  # fmt: skip


def pretrain_all(out: Path, plan: ExperimentPlan, jobs: int) -> None:
    """Run every unfinished pretraining as a ``yaware pretrain`` process, ``jobs`` at a time, each on its own CPU cores.

    Raises UserError if a pretraining fails. SIGTERM and Ctrl-C are passed on to the running processes, which save a
    checkpoint and continue at the next start.
    """
    cores = sorted(os.sched_getaffinity(0))
    free_cores: SimpleQueue[list[int]] = SimpleQueue()
    for job in range(jobs):
        free_cores.put(cores[job::jobs])
    unfinished = [pretraining for pretraining in pretrainings(plan) if not _is_done(out, plan, pretraining)]
    start, running = time.monotonic(), set[subprocess.Popen[bytes]]()

    def run_one(number: int) -> None:
        """Run a pretraining on the next free cores."""
        pretraining, job_cores = unfinished[number], free_cores.get()
        try:
            _pretrain(out, plan, pretraining, job_cores, running)
        finally:
            free_cores.put(job_cores)
        minutes = (time.monotonic() - start) / 60
        print(
            f"pretraining: {pretraining.name} done, {minutes:.1f} min for {number + 1} of {len(unfinished)}", flush=True
        )

    pool = ThreadPoolExecutor(jobs)
    try:
        with _sigterm_as_interrupt():
            list(pool.map(run_one, range(len(unfinished))))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True)


def _pretrain(
    out: Path, plan: ExperimentPlan, pretraining: Pretraining, cores: list[int], running: set[subprocess.Popen[bytes]]
) -> None:
    folder = out / "runs" / pretraining.name
    folder.parent.mkdir(exist_ok=True)
    command = [
        sys.executable, "-m", "infra.cli", "pretrain", "--config", "simulated-6mm", f"--train.steps={plan.steps}",
        f"--optimizer.warmup_steps={max(1, plan.steps // 7)}", f"--data.shards={out / 'shards' / pretraining.data}",
        f"--run.output={folder}", f"--run.name={pretraining.name}", f"--run.seed={plan.seed + pretraining.seed}",
        f"--run.experiment={EXPERIMENT}", f"--data.device={'gpu' if torch.cuda.is_available() else 'cpu'}",
        *pretraining.overrides,
    ]  # fmt: skip
    log = out / "runs" / f"{pretraining.name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, preexec_fn=lambda: os.sched_setaffinity(0, cores)
        )
    running.add(process)
    status = process.wait()
    running.discard(process)
    if status or not (folder / "checkpoints" / "latest").exists():
        last_line = next((line for line in reversed(read_text(log, errors="replace").splitlines()) if line.strip()), "")
        raise UserError(f"pretraining {pretraining.name} ended with status {status}: {last_line[:300]} (log: {log})")
    write_json(folder / "done.json", {"settings": _settings_digest(plan, pretraining)})


def _settings_digest(plan: ExperimentPlan, pretraining: Pretraining) -> str:
    settings = json.dumps([plan.steps, plan.seed, asdict(pretraining)], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()


def _is_done(out: Path, plan: ExperimentPlan, pretraining: Pretraining) -> bool:
    path = out / "runs" / pretraining.name / "done.json"
    return path.exists() and json.loads(read_text(path))["settings"] == _settings_digest(plan, pretraining)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, so that both signals stop the running processes."""

    def interrupt(*_: Any) -> None:
        """Handle SIGTERM."""
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_plan_file(out: Path, plan: ExperimentPlan) -> None:
    """Write the plan to OUT/plan.json, or compare it with the plan that is there.

    Raises UserError if the folder holds an experiment with another plan.
    """
    path, settings = out / "plan.json", json.loads(json.dumps(asdict(plan)))
    if path.exists():
        stored = json.loads(read_text(path))
        changed = [key for key in settings if stored.get(key) != settings[key]]
        if changed:
            raise UserError(
                f"{out} holds an experiment with {changed[0]}={stored.get(changed[0])}, but this one has "
                f"{changed[0]}={settings[changed[0]]}; choose another --out, or remove {out}"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as stream:
        json.dump(settings, stream, indent=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m evaluation.experiments.run`` and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.experiments.run", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("experiment"), help="folder of the experiment")
    parser.add_argument("--jobs", type=int, help="processes at a time (default: one per core, or 1 on a GPU)")
    for setting in fields(ExperimentPlan):
        is_list = isinstance(setting.default, tuple)
        kind = float if isinstance(setting.default, float) else int
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}", type=kind, default=setting.default, nargs="+" if is_list else None
        )
    options = vars(parser.parse_args(arguments))
    out, jobs = options.pop("out"), options.pop("jobs")
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
    }
    plan = ExperimentPlan(**settings)
    if len(plan.network_draws) != len(plan.sizes):
        print(
            f"yaware: error: --network-draws has {len(plan.network_draws)} numbers and --sizes {len(plan.sizes)}; "
            "give a number of draws for each size",
            file=sys.stderr,
        )
        return 2
    try:
        run(out, plan, jobs or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))))
    except UserError as error:
        print(f"yaware: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
