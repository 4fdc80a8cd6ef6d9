"""The commands that ``tests.faults.kill_campaign`` kills, each with its inputs and what is compared at its end."""

from __future__ import annotations

import re
import shutil
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pretrain.run.intact import verify_checkpoint
from pretrain.run.newest import newest_first
from tests.cohorts import write_cohort
from tests.runs import environment, losses, pretrain_command

STEPS = 6
EVALUATION = [
    "--tasks", "age", "--protocols", "linear,voxels", "--folds", "2", "--repeats", "1", "--halvings", "5",
]  # fmt: skip
TABLES = (".csv", ".tex")
Result = dict[str, object]


@dataclass(frozen=True)
class Command:
    """A command that writes into a folder.

    Attributes:
        name: as typed after ``yaware``.
        line: returns the command line for an output folder.
        prepare: makes an output folder with what the command needs in it.
        result: returns what must be equal at the end, by name.
        undisturbed: output folder of the run that is not killed; the next commands read it.
        killed: output folder of the runs that are killed.
        environment: returns its variables for an output folder; the MLflow store is in that folder.
    """

    name: str
    line: Callable[[Path], list[str]]
    prepare: Callable[[Path], None]
    result: Callable[[Path], Result]
    undisturbed: Path
    killed: Path
    environment: Callable[[Path], dict[str, str]] = environment


def commands_in(folder: Path) -> dict[str, Command]:
    """Return the commands by name; their inputs, outputs and a small cohort of 60 participants lie in ``folder``."""
    cohort = write_cohort(folder / "cohort", participants=60)
    build, pretrain, evaluate = (folder / "undisturbed" / name for name in ("build", "pretrain", "evaluate"))
    shards, run = build / "shards", pretrain / "run"

    def command(name: str, line: Callable[[Path], list[str]], prepare: Callable[[Path], None],
                result: Callable[[Path], Result]) -> Command:  # fmt: skip
        place = name.split()[-1]
        return Command(name=name, line=line, prepare=prepare, result=result,
                       undisturbed=folder / "undisturbed" / place, killed=folder / "killed" / place)  # fmt: skip

    def with_store(out: Path) -> None:
        out.mkdir(parents=True)
        shutil.copy(pretrain / "mlflow.db", out)

    return {
        made.name: made
        for made in (
            command(
                "shards build",  # two workers of Ray, although the scans are few: they are the child processes
                lambda out: yaware(["shards", "build", cohort, out / "shards", "--scans-per-shard=5", "--workers=2"]),
                empty, lambda out: contents(out / "shards"),
            ),
            command(
                "pretrain", lambda out: pretrain_command(shards, out / "run", STEPS, "--checkpoint.every_steps=2"),
                empty, pretraining,
            ),
            command(
                "evaluate",
                lambda out: yaware(["evaluate", run, "--shards", shards, *EVALUATION, "--cache", out / "cache",
                                    "--storage", out / "storage"]),
                with_store, evaluation,
            ),
            command(
                "compare",
                lambda out: yaware(["compare", "--out", out / "report.html", "--tracking-uri",
                                    f"sqlite:///{evaluate / 'mlflow.db'}"]),
                empty, lambda out: contents(out, TABLES),
            ),
            command("export", lambda out: yaware(["export", run, out / "encoder"]), empty,
                    lambda out: contents(out / "encoder")),
        )
    }  # fmt: skip


def yaware(arguments: list[object]) -> list[str]:
    return [sys.executable, "-m", "infra.cli", *map(str, arguments)]


def empty(out: Path) -> None:
    out.mkdir(parents=True)


def contents(folder: Path, ends: tuple[str, ...] = ("",)) -> Result:
    """Return the bytes of every file below a folder whose name ends so."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name.endswith(ends)
    }
    assert found, f"{folder} holds nothing to compare"
    return found


def pretraining(out: Path) -> Result:
    """Return the losses, the last checkpoint, the bytes of its encoder's weights, and damaged checkpoints."""
    run = out / "run"
    found = losses(run)
    assert [step for step, _ in found] == list(range(STEPS)), found
    last = (run / "checkpoints" / "latest").read_text().strip()
    return {
        "losses": found,
        "last checkpoint": last,
        "damaged": [folder.name for folder in newest_first(run / "checkpoints") if verify_checkpoint(folder)],
        **contents(run / "checkpoints" / last / "encoder", ("safetensors",)),
    }


def evaluation(out: Path) -> Result:
    """Return the metrics of each finished evaluation, to the last digit, and the bytes of their tables.

    A command that is killed after its last step evaluates again; this second evaluation must be equal to the first.
    """
    with sqlite3.connect(f"file:{out / 'mlflow.db'}?mode=ro", uri=True) as store:
        rows = store.execute(
            "select runs.run_uuid, runs.name, key, step, value from metrics join runs using (run_uuid) "
            "join experiments using (experiment_id) where experiments.name = 'yaware' and status = 'FINISHED'"
        ).fetchall()
    store.close()
    assert rows, "no evaluation was logged"
    metrics: dict[str, list[tuple[object, ...]]] = {}
    for run_id, name, *metric in rows:
        metrics.setdefault(f"{run_id} {name}", []).append((*metric[:2], repr(metric[2])))
    ends: dict[str, set[object]] = {}
    for run, logged in metrics.items():
        run_id, name = run.split(" ", 1)
        ends.setdefault(f"{name}: metrics", set()).add(tuple(sorted(logged)))
        for file, content in contents(out / "artifacts" / run_id).items():
            if not file.endswith("trials.csv"):  # has the seconds that each trial took
                ends.setdefault(f"{name}: {file}", set()).add(content)
    return dict(ends)


def file_names(folder: Path) -> set[str]:
    """Return the names of all files and folders below a folder, with ID in place of ids that are drawn at random.

    Checkpoints are numbered from the newest. Ranks whose command is killed save the step that they have reached, so that
    a run may keep another step before its last one than a run that was not killed.
    """
    names = {re.sub("[0-9a-f]{32}", "ID", str(path.relative_to(folder))) for path in folder.rglob("*")}
    steps = sorted({found[0] for name in names if (found := re.search("step-[0-9]{8}", name))}, reverse=True)
    return {re.sub("step-[0-9]{8}", lambda step: f"checkpoint {steps.index(step[0])}", name) for name in names}
