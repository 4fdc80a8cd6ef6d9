"""``yaware cohort prepare`` on what earlier runs have prepared: other limits, changed files, killed workers, dry runs."""

from __future__ import annotations

import shutil

import pytest
import torch

from data_pipeline.prepare import driver
from data_pipeline.prepare.job import finished, picture_path, prepare_one, record_path
from data_pipeline.prepare.prepared import stem_of
from data_pipeline.shards.build import build_shards
from infra import cli
from infra.files import UNFINISHED_FILE, host_tag
from tests.data_pipeline.prepare.phantoms import SMALL_OPTIONS, contents, small_recipe


@pytest.mark.jobs
def test_limits_may_change_between_runs(raw, prepared, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    strict = driver.prepare_cohort(raw, out, small_recipe("limits.rotation=5"), workers=1)
    refused = [key for key, outcome in strict.outcomes.items() if outcome.refused]
    assert 0 < len(refused) < 5
    assert {removal.rule for removal in strict.removals} == {"rotation"}
    assert all(removal.measured > 5 == removal.threshold for removal in strict.removals)
    assert len(list(out.glob("sub-*/**/*_T1w.nii.gz"))) == 5 - len(refused)
    assert len(build_shards(out, tmp_path / "shards", modality="quasiraw").scans) == 5 - len(refused)
    lenient = driver.prepare_cohort(raw, out, small_recipe(), workers=1)
    assert (lenient.already, lenient.prepared) == (5, 5)
    assert contents(out / "sub-00") == contents(prepared / "sub-00")
    assert not list((out / ".prepare").rglob("*.nii.gz"))


def test_a_changed_raw_file_is_prepared_again(raw, prepared, tmp_path):
    cohort, out = tmp_path / "small", tmp_path / "out"
    shutil.copytree(raw, cohort)
    shutil.copytree(prepared, out)
    tasks = driver.scan_tasks(driver.read_raw_cohort(cohort, out), small_recipe(), gpu=False)
    assert [outcome is not None for outcome in driver.find_finished(tasks)] == [True] * 5
    shutil.copy(tasks[1].scan.path, tasks[0].scan.path)
    assert [outcome is not None for outcome in driver.find_finished(tasks)] == [False, True, True, True, True]


def test_of_a_scan_that_is_refused_later_nothing_stays(raw, prepared, tmp_path):
    cohort, out = tmp_path / "small", tmp_path / "out"
    shutil.copytree(raw, cohort)
    shutil.copytree(prepared, out)
    task = driver.scan_tasks(driver.read_raw_cohort(cohort, out), small_recipe(), gpu=False)[0]
    task.scan.path.write_bytes(b"")
    assert prepare_one(task).error.rule == "unreadable"
    assert not list(out.glob(f"{stem_of(task.scan)}_*"))
    assert not picture_path(out, task.scan.key).exists()
    assert finished(task).error.rule == "unreadable"


def test_a_file_that_cannot_be_read_for_a_while_loses_nothing(raw, prepared, tmp_path):
    cohort, out = tmp_path / "small", tmp_path / "out"
    shutil.copytree(raw, cohort)
    shutil.copytree(prepared, out)
    task = driver.scan_tasks(driver.read_raw_cohort(cohort, out), small_recipe(), gpu=False)[0]
    away = task.scan.path.rename(tmp_path / "away")
    assert prepare_one(task).error is not None
    assert contents(out) == contents(prepared)
    away.rename(task.scan.path)
    assert finished(task).error is None


def test_the_next_attempt_removes_what_a_killed_worker_left(raw, tmp_path):
    out = tmp_path / "out"
    task = driver.scan_tasks(driver.read_raw_cohort(raw, out), small_recipe(), gpu=False)[0]
    prepare_one(task)
    record_path(out, task.scan.key).unlink()
    left = [record_path(out, task.scan.key), out / f"{stem_of(task.scan)}_x.nii.gz"]
    left = [path.with_name(f".{path.name}.abc.{host_tag()}{UNFINISHED_FILE}") for path in left]
    for path in left:
        path.touch()
    prepare_one(task)  # not the first of this process in these folders
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("workers", [["--workers", "1"], pytest.param([], marks=pytest.mark.jobs)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_option_is_refused_in_one_line(raw, tmp_path, capsys, workers):
    assert cli.run(["cohort", "prepare", str(raw), str(tmp_path / "out"), *SMALL_OPTIONS, *workers, "--gpu"]) == 2
    assert "--gpu: no GPU was found" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        (["--prepare.limits.rotation=1"], "5 raw scans, 5 of them done"),
        (["--prepare.spacing=4"], "holds scans prepared otherwise (spacing was 6.0, now 4.0)"),
        (["--pipeline", ""], "pipeline"),
    ],
)
def test_a_dry_run_changes_nothing_whatever_the_recipe(raw, prepared, tmp_path, capsys, options, printed):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    arguments = ["cohort", "prepare", str(raw), str(out), *SMALL_OPTIONS, *options, "--dry-run"]
    assert cli.run(arguments) == (0 if "done" in printed else 2)
    assert printed in "".join(capsys.readouterr())
    assert contents(out) == contents(prepared)
