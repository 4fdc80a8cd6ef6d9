"""The experiment of docs/experiments.md on simulated people, from nothing to its tables and pictures: ``make experiment``.

What is asked, what is compared and how it is judged was written down there before the first run. Every step goes through
the project's own parts; one that is done is not done again, so that a killed experiment goes on.
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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from data_pipeline.shards.build import build_shards
from data_pipeline.simulation.cohort import Simulation, simulate_cohort
from infra import ray_cluster
from infra.errors import UserError
from infra.files import atomic_write, write_json
from infra.tracking.tracker import default_uri

EXPERIMENT = "yaware-experiment"
SITES = tuple(f"site{number:02d}" for number in range(12))
TEST_SITES = SITES[6:]  # of the clinics: no scan of theirs is fitted to


@dataclass(frozen=True)
class Plan:
    """How large the experiment is; the defaults are those of docs/experiments.md."""

    healthy: int = 3600  # participants of the cohort that encoders are pretrained on
    clinic: int = 5000  # participants of each cohort that they are judged on
    spacing: float = 6.0  # mm
    steps: int = 200  # of pretraining, with 64 scans each
    seeds: int = 3  # pretrainings of each method
    variant_seeds: int = 2  # of each variant
    sizes: tuple[int, ...] = (100, 500)  # labelled training scans
    draws: int = 20  # training sets of each size
    network_draws: tuple[int, ...] = (20, 5)  # the first so many of them for networks that are trained whole
    network_epochs: int = 15
    resamples: int = 1000
    seed: int = 41


@dataclass(frozen=True)
class Pretraining:
    """One encoder: ``method`` of ``variant`` (main: the recipe as it is), trained on the shards ``data``."""

    method: str
    variant: str
    seed: int
    data: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique; the run's folder."""
        return f"{self.method}-{self.variant}-{self.seed}"


# Cohorts by name: what differs from the simulation's defaults. Healthy people are the same in all clinics but "sites".
HEALTHY: dict[str, dict[str, Any]] = {"healthy": {}, "healthy-sites": {"site_effects": 3.0}}
CLINICS: dict[str, dict[str, Any]] = {
    "clinic-a0": {"acceleration": 0.0}, "clinic-a1": {"acceleration": 1.0}, "clinic-a2": {"acceleration": 2.0},
    "clinic-mixed": {"acceleration": 1.0, "heterogeneity": 1.0}, "clinic-sites": {"acceleration": 1.0, "site_effects": 3.0},
}  # fmt: skip
# Shards by name: cohort and scaling.
SHARDS = {name: (name, "tiv") for name in (*HEALTHY, *CLINICS)} | {
    "healthy-unscaled": ("healthy", "none"), "clinic-a1-unscaled": ("clinic-a1", "none"),
}  # fmt: skip
# Shards that encoders are judged on -> shards that they were trained on.
JUDGED = dict.fromkeys(CLINICS, "healthy") | {
    "clinic-sites": "healthy-sites", "clinic-a1-unscaled": "healthy-unscaled",
}  # fmt: skip
METHODS: dict[str, tuple[str, ...]] = {
    "y-aware": (), "simclr": ("--loss.proxies.age.bandwidth=0",), "age-regression": ("--loss.name=regression",),
    "random": ("--train.steps=0",),
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    disease: {
        "title": title, "kind": "binary", "label": "diagnosis", "positive": [positive], "negative": ["control"],
        "query": "session == '1'", "test": f"site in {list(TEST_SITES)}", "covariates": ["age"],
        "match": {"column": "age", "within": 5.0, "ratio": 1},
    }
    for disease, title, positive in (("scz", "schizophrenia", "SCZ"), ("ad", "Alzheimer's disease", "AD"))
}  # fmt: skip
# Of four sites: enough people, and no more to be encoded than the diseases ask for.
TASKS["age"] = {
    "title": "age of healthy people", "kind": "regression", "label": "age", "test": f"site in {[SITES[6], SITES[7]]}",
    "query": f"session == '1' and diagnosis == 'control' and site in {[SITES[0], SITES[1], SITES[6], SITES[7]]}",
}  # fmt: skip


def pretrainings(plan: Plan) -> list[Pretraining]:
    """Every encoder of the experiment, the main ones first."""
    found = [
        Pretraining(method, "main", seed, "healthy", overrides)
        for seed in range(plan.seeds) for method, overrides in METHODS.items()
    ]  # fmt: skip
    few = range(plan.variant_seeds)
    trained = ("y-aware", "age-regression")
    for variant, data, methods, overrides in (
        ("unscaled", "healthy-unscaled", ("y-aware", "simclr", "age-regression"), ()),
        ("cutout", "healthy", trained, ("--augmentation.preset=paper-cutout",)),
        ("plain", "healthy", trained, ("--augmentation.preset=none",)),
        ("batch256", "healthy", trained, ("--batch.global=256", f"--train.steps={max(1, plan.steps // 4)}",
                                          f"--optimizer.warmup_steps={max(1, plan.steps // 28)}")),
        ("sites", "healthy-sites", trained, ()),
    ):  # fmt: skip
        found += [
            Pretraining(method, variant, seed, data, METHODS[method] + overrides) for method in methods for seed in few
        ]
    found += [
        Pretraining("y-aware", f"bandwidth{years}", 0, "healthy", (f"--loss.proxies.age.bandwidth={years}",))
        for years in (2, 10)
    ]
    found.append(Pretraining("random", "unscaled", 0, "healthy-unscaled", METHODS["random"]))
    return found


def judged_on(clinic: str, plan: Plan) -> list[Pretraining]:
    """The encoders that a clinic's shards judge: all trained on its kind of shards; variants in one clinic only."""
    found = [each for each in pretrainings(plan) if each.data == JUDGED[clinic]]
    return found if clinic in ("clinic-a1", "clinic-sites", "clinic-a1-unscaled") else [
        each for each in found if each.variant == "main"
    ]  # fmt: skip


def run(out: Path, plan: Plan, jobs: int) -> None:
    """The whole experiment in ``out``, which belongs to one plan."""
    _claim(out, plan)
    began = time.monotonic()

    def say(text: str) -> None:
        """A line that tells a stage from the commands' own lines."""
        print(f"\n== [{(time.monotonic() - began) / 60:.1f} min] {text}", flush=True)

    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(out / 'mlflow.db').resolve()}")
    uri = default_uri()
    with ray_cluster.session(jobs):
        say("cohorts and shards")
        make_shards(out, plan, jobs)
    say(f"{len(pretrainings(plan))} pretrainings, {jobs} at a time")
    pretrain_all(out, plan, jobs)
    from evaluation.experiments.judge import judge_clinic, train_networks
    from evaluation.experiments.report import write_report

    with ray_cluster.session(jobs):
        for clinic in JUDGED:
            say(f"judging on {clinic}")
            judge_clinic(out, plan, clinic, uri)
        say("networks trained whole")
        train_networks(out, plan, uri)
    say("tables and pictures")
    write_report(out, plan)
    say(f"done; tables in {out / 'results.md'}, pictures beside it")


def make_shards(out: Path, plan: Plan, jobs: int) -> None:
    """Every cohort and its shards. Clinics have another seed than healthy cohorts, hence other people and other sites."""
    for number, cohorts in enumerate((HEALTHY, CLINICS)):
        for name, differs in cohorts.items():
            people = plan.clinic if number else plan.healthy
            shares = (("AD", 0.15), ("SCZ", 0.15)) if number else ()
            settings = Simulation(people, plan.spacing, "vbm", plan.seed + number, shares=shares, **differs)
            if not (out / "cohorts" / name / "participants.tsv").is_file():
                simulate_cohort(out / "cohorts" / name, settings, jobs)
    for name, (cohort, scaling) in SHARDS.items():
        splits = {"downstream": 1.0} if cohort in CLINICS else {"pretrain": 0.9, "monitor": 0.1}
        target = out / "shards" / name
        if not (target / "manifest.json").is_file():
            # The data set's name tells people apart: sub-00001 of a clinic is nobody of the healthy cohort.
            build_shards(out / "cohorts" / cohort, target, dataset=cohort, scaling=scaling, splits=splits, workers=jobs,
                         scans_per_shard=512, seed=plan.seed)  # fmt: skip


def pretrain_all(out: Path, plan: Plan, jobs: int) -> None:
    """Every pretraining by the project's own command, ``jobs`` at a time, each on cores of its own."""
    cores = sorted(os.sched_getaffinity(0))
    lanes: SimpleQueue[list[int]] = SimpleQueue()
    for lane in range(jobs):
        lanes.put(cores[lane::jobs])
    waiting = [each for each in pretrainings(plan) if not _is_done(out, plan, each)]
    began, running = time.monotonic(), set[subprocess.Popen[bytes]]()

    def one(number: int) -> None:
        """A pretraining on whichever cores are free."""
        each, lane = waiting[number], lanes.get()
        try:
            _pretrain(out, plan, each, lane, running)
        finally:
            lanes.put(lane)
        minutes = (time.monotonic() - began) / 60
        print(f"pretraining: {each.name} done, {minutes:.1f} min for {number + 1} of {len(waiting)}", flush=True)

    pool = ThreadPoolExecutor(jobs)
    try:
        with _terminated_as_interrupted():
            list(pool.map(one, range(len(waiting))))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()  # a run that is asked to end saves, and goes on at the next start
        raise
    finally:
        pool.shutdown(wait=True)


def _pretrain(out: Path, plan: Plan, each: Pretraining, lane: list[int], running: set[Any]) -> None:
    folder = out / "runs" / each.name
    folder.parent.mkdir(exist_ok=True)
    command = [
        sys.executable, "-m", "infra.cli", "pretrain", "--config", "simulated-6mm", f"--train.steps={plan.steps}",
        f"--optimizer.warmup_steps={max(1, plan.steps // 7)}", f"--data.shards={out / 'shards' / each.data}",
        f"--run.output={folder}", f"--run.name={each.name}", f"--run.seed={plan.seed + each.seed}",
        f"--run.experiment={EXPERIMENT}", f"--data.device={'gpu' if torch.cuda.is_available() else 'cpu'}",
        *each.overrides,
    ]  # fmt: skip
    log = out / "runs" / f"{each.name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, preexec_fn=lambda: os.sched_setaffinity(0, lane)
        )
    running.add(process)
    status = process.wait()
    running.discard(process)
    if status or not (folder / "checkpoints" / "latest").exists():
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
        raise UserError(f"pretraining {each.name} ended with status {status}: {last[:300]} (all of it: {log})")
    write_json(folder / "done.json", {"settings": _settings(plan, each)})


def _settings(plan: Plan, each: Pretraining) -> str:
    given = json.dumps([plan.steps, plan.seed, asdict(each)], sort_keys=True)
    return hashlib.sha256(given.encode()).hexdigest()


def _is_done(out: Path, plan: Plan, each: Pretraining) -> bool:
    path = out / "runs" / each.name / "done.json"
    return path.is_file() and json.loads(path.read_text())["settings"] == _settings(plan, each)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, so that what it started is asked to end too."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _claim(out: Path, plan: Plan) -> None:
    """The folder's plan; UserError where it has another one."""
    path, given = out / "plan.json", json.loads(json.dumps(asdict(plan)))
    if path.is_file():
        known = json.loads(path.read_text())
        changed = [key for key in given if known.get(key) != given[key]]
        if changed:
            raise UserError(
                f"{out} holds an experiment with {changed[0]}={known.get(changed[0])}, now {given[changed[0]]}; choose "
                "another --out, or remove that one"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as stream:
        json.dump(given, stream, indent=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m evaluation.experiments.run``."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.experiments.run", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("experiment"))
    parser.add_argument("--jobs", type=int, help="processes at a time (default: every core, or 1 on a GPU)")
    for each in fields(Plan):
        many = isinstance(each.default, tuple)
        kind = float if isinstance(each.default, float) else int
        parser.add_argument(
            f"--{each.name.replace('_', '-')}", type=kind, default=each.default, nargs="+" if many else None
        )
    options = vars(parser.parse_args(arguments))
    out, jobs = options.pop("out"), options.pop("jobs")
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    plan = Plan(**given)
    if len(plan.network_draws) != len(plan.sizes):
        print("yaware: error: --network-draws must have a number for each of --sizes", file=sys.stderr)
        return 2
    try:
        run(out, plan, jobs or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))))
    except UserError as error:
        print(f"yaware: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
