"""``yaware cohort prepare`` on small brains: a derivative that inspect and build read, resumed runs, quarantine, dry run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from data_pipeline.prepare import driver
from data_pipeline.prepare.job import Outcome, finished, prepare_one, record_path
from data_pipeline.prepare.page import write_page
from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.grid import Grid
from infra import cli
from infra.errors import UserError
from tests.data_pipeline.prepare.heads import empty, four_dimensional
from tests.data_pipeline.prepare.phantoms import SMALL_OPTIONS, contents, small_recipe

IMAGE = "space-MNI152NLin2009_desc-preproc_T1w"


def test_the_derivative_has_a_row_a_volume_and_a_description_for_each_scan(prepared):
    table = pd.read_csv(prepared / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert list(table["participant_id"]) == ["sub-00", "sub-00", "sub-01", "sub-02", "sub-02"]
    assert list(table["session_id"]) == ["ses-1", "ses-2", "ses-1", "ses-1", "ses-1"]
    assert list(table["run"]) == ["n/a", "n/a", "n/a", "1", "2"]
    assert list(table["age"]) == ["30.5", "30.5", "31.5", "32.5", "32.5"]
    assert (table["given_tiv"] == "1500").all()
    assert list(table["note"]) == ["a note", "a note", "n/a", "n/a", "n/a"]
    assert table["brain_ml"].astype(float).between(1400, 2300).all()
    assert (table["prepare_correlation"].astype(float) > 0.9).all()
    names = {path.name for path in prepared.rglob("sub-02_*")}
    assert f"sub-02_ses-1_run-2_{IMAGE}.nii.gz" in names
    assert "sub-02_ses-1_run-1_from-MNI152NLin2009_to-T1w_mode-points_xfm.txt" in names
    image = nibabel.load(prepared / f"sub-01/ses-1/anat/sub-01_ses-1_{IMAGE}.nii.gz")
    assert Grid.of(image.shape, image.affine) == Grid.vbm(6.0)
    voxels = image.get_fdata()
    assert (voxels.min(), voxels.max()) == (0.0, 1.0)
    described = json.loads((prepared / "dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative"
    assert {"yaware", "antspyx"} <= {program["Name"] for program in described["GeneratedBy"]}
    sidecar = json.loads((prepared / f"sub-01/ses-1/anat/sub-01_ses-1_{IMAGE}.json").read_text())
    assert sidecar["Preparation"]["linear"]["iterations"] == [20, 10, 0]
    assert sidecar["Preparation"] == described["Preparation"]


def test_build_and_inspect_read_the_derivative_as_it_is(prepared, tmp_path, capsys):
    shards = tmp_path / "shards"
    assert cli.run(["shards", "build", str(prepared), str(shards), "--modality", "quasiraw", "--scaling", "none"]) == 0
    manifest = Manifest.load(shards)
    assert len(manifest.scans) == 5
    assert set(manifest.scans["run"]) == {"", "1", "2"}
    assert manifest.scans["tiv"].between(1200, 2300).all()
    assert manifest.grid["spacing"] == [6.0, 6.0, 6.0]
    assert cli.run(["cohort", "inspect", str(prepared), "--modality", "quasiraw", "--out", str(tmp_path / "page")]) == 0
    assert "5 of 3 participants" in capsys.readouterr().out


def test_the_image_is_the_raw_one_seen_through_the_written_transform(prepared, raw):
    stem = "sub-01/ses-1/anat/sub-01_ses-1"
    text = (prepared / f"{stem}_from-MNI152NLin2009_to-T1w_mode-points_xfm.txt").read_text()
    numbers = [
        float(word) for word in next(line for line in text.splitlines() if line.startswith("Parameters")).split()[1:]
    ]
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = np.reshape(numbers[:9], (3, 3)), numbers[9:]
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    to_raw = flip @ lps @ flip
    image = nibabel.load(prepared / f"{stem}_{IMAGE}.nii.gz")
    scan = nibabel.load(raw / f"{stem}_T1w.nii.gz")
    inside = np.argwhere(image.get_fdata() > 0.5)[::50]
    index = (np.linalg.inv(scan.affine) @ to_raw @ image.affine @ np.c_[inside, np.ones(len(inside))].T)[:3]
    there = scan.get_fdata()[tuple(np.round(index).astype(int))]
    assert np.corrcoef(there, image.get_fdata()[tuple(inside.T)])[0, 1] > 0.6


def test_a_second_run_does_nothing_and_another_folder_gets_the_same_bytes(prepared, raw, tmp_path, monkeypatch, capsys):
    before = contents(prepared)
    monkeypatch.setattr(driver, "prepare_one", None)
    assert cli.run(["cohort", "prepare", str(raw), str(prepared), *SMALL_OPTIONS, "--workers", "1"]) == 0
    assert contents(prepared) == before
    assert "5 of all by an earlier run" in capsys.readouterr().out
    monkeypatch.undo()
    # As a killed run leaves it: a scan without its record, another with a damaged volume, and an unfinished file.
    left = tmp_path / "left"
    shutil.copytree(prepared, left)
    record_path(left, "small_sub-01_ses-1").unlink()
    (left / f"sub-00/ses-2/anat/sub-00_ses-2_{IMAGE}.nii.gz").write_bytes(b"half a file")
    (left / "participants.tsv").unlink()
    done = driver.prepare_cohort(raw, left, small_recipe(), workers=1)
    assert done.already == 3
    assert contents(left) == before


def test_new_scans_are_added_and_bad_ones_go_to_quarantine(raw, prepared, tmp_path):
    grown, out = tmp_path / "small", tmp_path / "out"
    shutil.copytree(raw, grown)
    shutil.copytree(prepared, out)
    rows = (grown / "participants.tsv").read_text()
    for name, image in (("series", four_dimensional()), ("zeros", empty()), ("nobody", empty())):
        (grown / f"sub-{name}" / "anat").mkdir(parents=True)
        nibabel.save(image, grown / f"sub-{name}" / "anat" / f"sub-{name}_T1w.nii.gz")
        rows += f"sub-{name}\t50\tF\tsite0\t1500\tn/a\n" if name != "nobody" else ""
    (grown / "participants.tsv").write_text(rows)
    done = driver.prepare_cohort(grown, out, small_recipe(), workers=1)
    assert (done.already, done.prepared, len(done.removals)) == (5, 5, 3)
    quarantine = pd.read_csv(out / "quarantine.tsv", sep="\t").set_index("key")
    assert quarantine["rule"].to_dict() == {
        "small_sub-nobody_ses-1": "participant", "small_sub-series_ses-1": "shape", "small_sub-zeros_ses-1": "constant",
    }  # fmt: skip
    assert len(build_shards(out, tmp_path / "shards", modality="quasiraw").scans) == 5


def test_the_quality_page_needs_no_other_file_and_shows_the_worst_scan_first(prepared):
    page = (prepared / "prepare.html").read_text()
    assert not re.search(r"(src|href)=.(?!data:image/png;base64,)", page)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    order = re.findall(r"<strong>(small_[^<]*)</strong>", page)
    table = pd.read_csv(prepared / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    runs = [f"_run-{run}" if run != "n/a" else "" for run in table["run"]]
    keys = [f"small_{p}_{s}{run}" for p, s, run in zip(table["participant_id"], table["session_id"], runs, strict=True)]
    expected = [key for _, key in sorted(zip(table["prepare_correlation"].astype(float), keys, strict=True))]
    assert order == expected
    assert page.count("data:image/png;base64,") == 1 + len(keys)


def test_a_refused_scan_is_first_on_the_page_with_its_reason_and_many_pictures_stay_files(
    raw, prepared, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    cohort = driver.read_raw_cohort(raw, out)
    outcomes = dict(zip([scan.key for scan in cohort.scans],
                        driver.find_finished(driver.scan_tasks(cohort, small_recipe(), gpu=False)), strict=True))  # fmt: skip
    outcomes["small_sub-01_ses-1"] = Outcome({"brain_ml": 90.0}, ("its <brain> has 90 ml", "brain_ml", 90.0, 800.0))
    monkeypatch.setattr("data_pipeline.prepare.page.MOST_PICTURES", 2)
    page = write_page(out, cohort.name, small_recipe(), cohort.scans, outcomes, cohort.roots).read_text()
    assert re.findall(r"<strong>(small_[^<]*)</strong>", page)[0] == "small_sub-01_ses-1"
    assert "brain_ml: its &lt;brain&gt; has 90 ml" in page
    assert "5 scans: 4 prepared, 1 refused" in page
    assert re.findall(r"<td class='number wrong'>([^<]*)", page) == ["90"]
    linked = re.findall(r"<a href='([^']*)'>", page)
    assert len(linked) == 3
    assert all((out / link).is_file() for link in linked)


def test_a_page_without_any_figure_has_no_histograms(raw, tmp_path):
    cohort = driver.read_raw_cohort(raw, tmp_path)
    refused = Outcome({}, ("every voxel is 0", "constant", 0.0, None))
    outcomes = {scan.key: refused for scan in cohort.scans}
    page = write_page(tmp_path, cohort.name, small_recipe(), cohort.scans, outcomes, cohort.roots).read_text()
    assert "<img" not in page
    assert page.count("constant: every voxel is 0") == len(cohort.scans) == page.count("no picture: refused before")


def test_another_recipe_needs_another_folder(raw, prepared, tmp_path):
    with pytest.raises(UserError, match=r"holds scans prepared otherwise \(spacing was 6.0, now 4.0\)"):
        driver.prepare_cohort(raw, prepared, small_recipe("spacing=4"), workers=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no prepared scans"):
        driver.prepare_cohort(raw, tmp_path, small_recipe(), workers=1)
    with pytest.raises(UserError, match="is inside the cohort"):
        driver.prepare_cohort(raw, raw / "out", small_recipe(), workers=1)


def test_a_step_that_fails_refuses_the_scan_only(raw, tmp_path, monkeypatch):
    def broken(*_arguments, **_options):
        raise RuntimeError("no\nconvergence")

    monkeypatch.setattr("data_pipeline.prepare.steps.antspy.register_linear", broken)
    task = driver.scan_tasks(driver.read_raw_cohort(raw, tmp_path / "out"), small_recipe(), gpu=False)[0]
    outcome = prepare_one(task)
    assert str(outcome.error) == "a step failed: RuntimeError: no convergence"
    assert outcome.error.rule == "failed"
    assert finished(task) is None  # it may have been the machine's fault: the next run tries again


def test_a_dry_run_lists_the_scans_and_their_cost_and_writes_nothing(raw, prepared, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    record_path(out, "small_sub-01_ses-1").unlink()
    before = contents(tmp_path)
    assert cli.run(["cohort", "prepare", str(raw), str(out), *SMALL_OPTIONS, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "5 raw scans, 4 of them done; pipeline quasiraw, 30 x 36 x 30 voxels of 6 x 6 x 6 mm" in printed
    assert "small_sub-01_ses-1:" in printed
    assert "small_sub-02" not in printed
    assert "of CPU for a scan (from 5 scans): 0.00 CPU hours" in printed
    assert contents(tmp_path) == before


@pytest.mark.jobs
def test_several_data_sets_have_a_folder_each_and_are_read_as_one_cohort(raw, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(raw / "sub-01", other / "sub-01")
    (other / "participants.tsv").write_text("participant_id\tage\tgroup\nsub-01\t44\tpatient\n")
    (tmp_path / "both.yaml").write_text(f"datasets: [{{path: {raw}, name: one}}, {{path: {other}, name: two}}]\n")
    (raw / "derivatives").mkdir(exist_ok=True)
    tasks = driver.scan_tasks(
        driver.read_raw_cohort(tmp_path / "both.yaml", tmp_path / "out"), small_recipe(), gpu=False
    )
    assert {Path(task.root).name for task in tasks} == {"one", "two"}
    (tmp_path / "both.yaml").write_text(f"datasets: [{{path: {other}, name: two}}, {{path: {other}, name: three}}]\n")
    driver.prepare_cohort(tmp_path / "both.yaml", tmp_path / "out", small_recipe(), workers=1)
    manifest = build_shards(tmp_path / "out", tmp_path / "shards", modality="quasiraw")
    assert set(manifest.scans["dataset"]) <= {"two", "three"}
    assert len(manifest.scans) == 1  # the second is a duplicate


@pytest.mark.jobs
def test_pseudonyms_leave_no_trace_of_the_ids(raw, tmp_path):
    (tmp_path / "key").write_bytes(b"x" * 32)
    arguments = ["cohort", "prepare", str(raw), str(tmp_path / "out"), *SMALL_OPTIONS, "--workers", "1"]
    assert cli.run([*arguments, "--pseudonymise", str(tmp_path / "key")]) == 0
    for path, content in contents(tmp_path / "out").items():
        assert "sub-01" not in path
        assert b"sub-01" not in content


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pipeline", "vbm", "--rigid"], "pipeline vbm needs affine registration"),
        (["--pipeline", "fast"], "pipeline"),
        (["--spacing", "0"], "spacing"),
        (["--pipeline", "deepmriprep"], "--pipeline=deepmriprep: it is not installed"),
        (["--quick"], "unrecognized argument: --quick"),
        (["--workers", "0"], "workers=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(raw, tmp_path, capsys, arguments, words):
    assert cli.run(["cohort", "prepare", str(raw), str(tmp_path / "out"), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "out").exists()
