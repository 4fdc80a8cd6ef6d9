"""Ranks that were started with different recipes, data, code or run folders say so at the start, and none of them hangs."""

from __future__ import annotations

import contextlib
import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from data_pipeline.shards.build import build_shards
from infra.distributed import free_port
from pretrain.run.agreement import resumed
from tests.cohorts import write_cohort
from tests.faults import rank_process
from tests.faults.rank_process import wait
from tests.forkserver import imported
from tests.stores import store_at

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def start(commands: list[list[str]], folder: Path, harm=None) -> list[int | None]:
    """Run one rank for each command, each as the only rank of its host, and return their exit statuses."""
    context = imported()
    port, ranks = free_port(), []
    for rank, command in enumerate(commands):
        environment = {
            "RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": len(commands), "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port,
            "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        ranks.append(context.Process(target=rank_process._rank, args=(command, str(folder), environment, None, harm)))
        ranks[-1].start()
    return wait(ranks, 120)


def arguments(shards: Path, output: Path, **more: object) -> list[str]:
    given = {"data.shards": shards, "run.output": output, "train.steps": 2, "batch.global": 8, **more}
    options = [f"--{key}={value}" for key, value in given.items()]
    return ["--config", "demo-cpu", "--encoder.options={width: 0.25, norm: group}", *options]


def error_of(folder: Path, ranks: int = 2) -> str:
    """The error line, which is the same on every host; no rank prints a traceback."""
    lines = []
    for rank in range(ranks):
        log = (folder / f"rank-{rank}.log").read_text()
        assert "Traceback" not in log, log
        lines += [
            line.removeprefix("yaware: error: ") for line in log.splitlines() if line.startswith("yaware: error: ")
        ]
    assert len(lines) == ranks
    assert len(set(lines)) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("optimizer.lr", "0.001", "0.002"),
        ("run.seed", "1", "2"),
        ("loss.name", "y-aware", "decoupled-uniformity"),
        ("train.watchdog_seconds", "30.0", "0.0"),
        ("augmentation", "{preset: none}", "{preset: paper-all}"),
        ("deepspeed", "{zero_optimization: {stage: 1}}", "{zero_optimization: {stage: 2}}"),
    ],
)
def test_another_recipe_on_the_second_host(shards, tmp_path, key, first, second):
    commands = [arguments(shards, tmp_path / "run", **{key: value}) for value in (first, second)]
    assert start(commands, tmp_path) == [2, 2]
    line = error_of(tmp_path)
    assert line.startswith(f"the ranks do not agree: {key}")
    for rank, value in ((0, first), (1, second)):
        shown = value.strip("{}").split(": ")[-1].strip("}")
        assert shown in line.split(f" on rank {rank} ")[0], line
    assert not (tmp_path / "run").exists()


def test_other_shards_under_the_same_path_name(shards, tmp_path):
    cohort = write_cohort(tmp_path / "cohort", participants=36, sessions=2, seed=5)
    other = tmp_path / "other"
    build_shards(cohort, other, dataset="tiny", scans_per_shard=20)
    assert start([arguments(path, tmp_path / "run") for path in (shards, other)], tmp_path) == [2, 2]
    assert error_of(tmp_path).startswith("the ranks do not agree: data.shards is 'shards of manifest ")


def test_shards_that_only_one_host_lacks(shards, tmp_path):
    commands = [arguments(path, tmp_path / "run") for path in (shards, tmp_path / "nowhere")]
    assert start(commands, tmp_path) == [2, 2]
    line = error_of(tmp_path)
    assert line.startswith("rank 1 (")
    assert f"{tmp_path}/nowhere" in line


def test_a_recipe_file_that_only_one_host_lacks(shards, tmp_path):
    command = arguments(shards, tmp_path / "run")
    missing = ["--config", str(tmp_path / "mine.yaml"), *command[2:]]
    assert start([missing, command], tmp_path) == [2, 2]
    line = error_of(tmp_path)
    assert line.startswith("rank 0 (")
    assert "mine.yaml not found" in line


def checkpoint_of(shards, folder, **more):
    """Train a run of two steps in ``folder`` and return its checkpoint."""
    folder.mkdir()
    assert start([arguments(shards, folder / "run", **more)], folder) == [0], (folder / "rank-0.log").read_text()
    return folder / "run" / "checkpoints" / "step-00000002"


def test_a_checkpoint_on_a_disk_of_each_host_is_compared_by_its_content(shards, tmp_path):
    one = checkpoint_of(shards, tmp_path / "first", **{"run.seed": 1})
    other = checkpoint_of(shards, tmp_path / "second", **{"run.seed": 2})
    start_from = {"run.seed": 3}
    commands = [arguments(shards, tmp_path / "run", **start_from, **{"run.resume": path}) for path in (one, other)]
    assert start(commands, tmp_path) == [2, 2]
    line = error_of(tmp_path)
    assert line.startswith("the ranks do not agree: run.resume is 'step-00000002 with digest ")
    assert not (tmp_path / "run").exists()
    # The same content under another path is the same checkpoint.
    shutil.copytree(one, tmp_path / "copy" / one.name)
    same = [resumed(str(path), tmp_path / "run") for path in (one, tmp_path / "copy" / one.name, one.parents[1])]
    assert len(set(same)) == 1, same
    assert resumed(str(tmp_path / "nowhere"), tmp_path / "run") == "no checkpoint"
    assert resumed(str(other), one.parents[1]) == "not used, since run.output has a checkpoint"
    (tmp_path / "copy" / one.name / "encoder" / "model.safetensors").write_bytes(b"shorter")
    assert resumed(str(tmp_path / "copy" / one.name), tmp_path / "run") != same[0]


def other_version(name: str, rank: int) -> None:
    from pretrain.run import agreement

    if rank == 1:
        if name == "code":
            agreement.code_version = lambda: "0.1.0, code 00000000"
        else:
            installed = agreement.package_version
            agreement.package_version = lambda package: "9.9" if package == name else installed(package)


@pytest.mark.parametrize(
    ("name", "shown"), [("code", "the version of yaware is"), ("torch", "the version of torch is")]
)
def test_another_installation_on_the_second_host(shards, tmp_path, name, shown):
    command = arguments(shards, tmp_path / "run")
    assert start([command, command], tmp_path, partial(other_version, name)) == [2, 2]
    line = error_of(tmp_path)
    assert line.startswith(f"the ranks do not agree: {shown} ")
    assert ("code 00000000" if name == "code" else "'9.9' on rank 1") in line


def in_own_folder(folder: str, rank: int) -> None:
    from pretrain.run import agreement

    agreement.SHARED_SECONDS = 0.5
    own = Path(folder) / f"host-{rank}"
    own.mkdir()
    os.chdir(own)


def test_a_run_folder_that_hosts_do_not_share(shards, tmp_path):
    command = arguments(shards, Path("runs/mine"))
    assert start([command, command], tmp_path, partial(in_own_folder, str(tmp_path))) == [2, 2]
    line = error_of(tmp_path)
    assert line.startswith("run.output=runs/mine is not the same folder on all hosts: rank 0 (")
    assert f"wrote a file in {tmp_path}/host-0/runs/mine, which rank 1 (" in line
    assert f"does not see in {tmp_path}/host-1/runs/mine; choose a --run.output on a file system that all" in line
    assert not list((tmp_path / "host-0/runs/mine").iterdir())


def late_folder(rank: int) -> None:
    """A network file system that shows the new file to the other host only after a while."""
    if rank == 1:
        iterdir, calls = Path.iterdir, []

        def late(path):
            if path.name == "run":
                calls.append(path)
                if len(calls) < 4:
                    raise FileNotFoundError(path)
            return iterdir(path)

        Path.iterdir = late


def test_ranks_that_agree_train_with_other_paths_to_the_same_data(shards, tmp_path):
    with contextlib.suppress(FileExistsError):
        (tmp_path / "link").symlink_to(shards)
    store = store_at(tmp_path / "mlflow.db")
    commands = [
        arguments(path, tmp_path / "run", **{"run.tracking_uri": uri})
        for path, uri in ((shards, store), (tmp_path / "link", "sqlite:////elsewhere.db"))
    ]
    assert start(commands, tmp_path, late_folder) == [0, 0], (tmp_path / "rank-0.log").read_text()
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step-00000002"
    assert not list((tmp_path / "run").glob(".shared-*"))
