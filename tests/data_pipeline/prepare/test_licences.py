"""A derivative of `cohort prepare` has the licence that the raw data set states."""

from __future__ import annotations

import json

from data_pipeline.prepare.derivative import claim
from data_pipeline.prepare.driver import read_raw_cohort
from data_pipeline.prepare.settings import PrepareRecipe


def license_of(folder):
    return json.loads((folder / "dataset_description.json").read_text()).get("License")


def raw_data_set(folder, name="dataset_description.json", **described):
    anat = folder / "sub-01" / "anat"
    anat.mkdir(parents=True)
    (anat / "sub-01_T1w.nii.gz").write_bytes(b"not read")
    (folder / "participants.tsv").write_text("participant_id\tage\nsub-01\t40\n")
    (folder / name).write_text(json.dumps({"Name": folder.name, **described}))
    return folder


def test_the_licences_of_raw_data_sets_are_read(tmp_path):
    raw_data_set(tmp_path / "raw" / "a", License="CC BY-NC 4.0"), raw_data_set(tmp_path / "raw" / "b")
    (tmp_path / "raw" / "datasets.yaml").write_text("datasets: [{path: a}, {path: b}]\n")
    assert read_raw_cohort(tmp_path / "raw", tmp_path / "out").licences == {"a": "CC BY-NC 4.0"}
    assert read_raw_cohort(tmp_path / "raw" / "a", tmp_path / "out", dataset="c").licences == {"c": "CC BY-NC 4.0"}


def test_the_licence_is_written_and_kept(tmp_path):
    claim(tmp_path / "one", PrepareRecipe(), name="a", simulated=False, licence="CC BY-NC 4.0")
    assert license_of(tmp_path / "one") == "CC BY-NC 4.0"
    claim(tmp_path / "one", PrepareRecipe(), name="a", simulated=False)
    assert license_of(tmp_path / "one") == "CC BY-NC 4.0", "the raw data set states none; what is there stays"
    claim(tmp_path / "one", PrepareRecipe(), name="a", simulated=False, licence="CC0")
    assert license_of(tmp_path / "one") == "CC0"
    claim(tmp_path / "two", PrepareRecipe(), name="a", simulated=False)
    assert license_of(tmp_path / "two") is None
