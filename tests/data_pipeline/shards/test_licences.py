"""Licences go from the data sets into the manifest, stay in appends, and can be stated later; old manifests have none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_pipeline.shards.annotate import annotate_shards, state_licences
from data_pipeline.shards.append import append_shards
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.index import index_shards
from data_pipeline.storage.manifest import Manifest
from infra import cli
from infra.errors import UserError
from tests.cohorts import write_cohort
from tests.data_pipeline.shards.strangers import write_content
from tests.data_pipeline.shards.test_index import foreign


def licensed(root, licence, **options):
    write_cohort(root, **options)
    describe(root, licence)
    return root


def describe(root, licence):
    (root / "dataset_description.json").write_text(
        json.dumps({"Name": root.name, **({"License": licence} if licence else {})})
    )


@pytest.fixture
def shards(tmp_path):
    build_shards(licensed(tmp_path / "ixi", "CC BY-SA 3.0", participants=4), tmp_path / "shards")
    return tmp_path / "shards"


def test_a_build_records_the_licence_and_where_it_is_stated(shards):
    manifest = Manifest.load(shards)
    stated = {"licence": "CC BY-SA 3.0", "stated_in": "dataset_description.json"}
    assert manifest.settings["licences"] == {"ixi": stated}
    assert manifest.licences() == {"ixi": ["CC BY-SA 3.0"]}


def test_an_append_keeps_licences_and_adds_those_of_the_new_scans(shards, tmp_path):
    manifest = append_shards(write_cohort(tmp_path / "clinic", participants=3, seed=1), shards)
    assert manifest.licences() == {"clinic": [], "ixi": ["CC BY-SA 3.0"]}
    manifest = append_shards(licensed(tmp_path / "open", "CC0", participants=3, seed=2), shards)
    assert manifest.licences() == {"clinic": [], "ixi": ["CC BY-SA 3.0"], "open": ["CC0"]}
    rows = np.flatnonzero(manifest.scans["dataset"] != "ixi")
    assert manifest.licences(rows) == {"clinic": [], "open": ["CC0"]}


def test_scans_that_are_appended_under_another_licence_have_both_named(shards, tmp_path):
    root = licensed(tmp_path / "more", "CC0", participants=3, seed=1)
    for number in range(3):  # other people of the same data set
        (root / f"sub-{number:03d}").rename(root / f"sub-9{number:02d}")
    table = root / "participants.tsv"
    table.write_text(table.read_text().replace("sub-0", "sub-9"))
    for path in list(root.rglob("sub-0*.nii.gz")):
        path.rename(path.with_name(path.name.replace("sub-0", "sub-9")))
    assert append_shards(root, shards, dataset="ixi").licences() == {"ixi": ["CC BY-SA 3.0", "CC0"]}


def test_a_manifest_of_an_earlier_version_loads_and_its_licences_are_unknown(shards, tmp_path):
    content = json.loads((shards / "manifest.json").read_text())
    del content["settings"]["licences"]
    write_content(shards, content)
    assert Manifest.load(shards).licences() == {"ixi": []}
    assert append_shards(licensed(tmp_path / "open", "CC0", participants=3, seed=2), shards).licences() == {
        "ixi": [], "open": ["CC0"],
    }  # fmt: skip


def test_the_same_build_is_not_refused_for_a_licence_that_is_stated_now(tmp_path, capsys):
    root = write_cohort(tmp_path / "ixi", participants=3)
    before = build_shards(root, tmp_path / "shards")
    describe(root, "PDDL or 'mine'")
    capsys.readouterr()
    assert build_shards(root, tmp_path / "shards").digest == before.digest
    error = capsys.readouterr().err
    assert "ixi: licence \"PDDL or 'mine'\" is stated in dataset_description.json" in error
    assert "records ixi: unknown; to change it: yaware shards annotate" in error
    state_licences(tmp_path / "shards", {"ixi": "PDDL or 'mine'"})
    build_shards(root, tmp_path / "shards")
    assert capsys.readouterr().err == ""


def test_licences_are_stated_later_from_the_command_line(shards, tmp_path, capsys):
    append_shards(write_cohort(tmp_path / "clinic", participants=3, seed=1), shards)
    before = Manifest.load(shards)
    assert cli.run(["shards", "annotate", str(shards), "--licence", "clinic=DUA 7, no  redistribution"]) == 0
    assert "licences: clinic: DUA 7, no redistribution; ixi: CC BY-SA 3.0" in capsys.readouterr().out
    after = Manifest.load(shards)
    assert after.licences() == {"clinic": ["DUA 7, no redistribution"], "ixi": ["CC BY-SA 3.0"]}
    assert after.digest != before.digest
    assert after.scans.equals(before.scans)
    assert cli.run(["shards", "info", str(shards)]) == 0
    assert "licences   clinic: DUA 7, no redistribution; ixi: CC BY-SA 3.0" in capsys.readouterr().out


def test_a_licence_is_replaced_only_if_that_is_asked_for(shards, tmp_path):
    append_shards(licensed(tmp_path / "open", "CC0", participants=3, seed=2), shards)
    with pytest.raises(UserError, match="the licence of open is CC0 already; give --replace"):
        state_licences(shards, {"open": "PDDL"})
    assert state_licences(shards, {"open": "PDDL"}, replace=True).licences()["open"] == ["PDDL"]
    assert state_licences(shards, {"open": "PDDL"}).licences()["open"] == ["PDDL"], "the command is repeated"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--licence", "ixj=CC0"], "has no data set 'ixj' (did you mean 'ixi'?)"),
        (["--licence", "ixi="], "--licence=ixi=: give each data set once"),
        (["--licence", "CC0"], "--licence=CC0: give each data set once"),
        (["--licence", "ixi=a", "--licence", "ixi=b"], "give each data set once"),
        (["--licence", "ixi=n/a", "--replace"], "licence of ixi='n/a' is not a licence"),
        (["--licence", "ixi=CC0", "--columns", "age"], "leave them out beside --licence"),
        ([], "give either a table of columns or --licence NAME=TEXT"),
        (["t.tsv", "--licence", "ixi=CC0"], "give either a table of columns or --licence NAME=TEXT"),
    ],
)
def test_wrong_commands_end_in_one_line(shards, capsys, arguments, message):
    before = (shards / "manifest.json").read_bytes()
    capsys.readouterr()
    assert cli.run(["shards", "annotate", str(shards), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (shards / "manifest.json").read_bytes() == before


def test_rules_for_columns_hold_no_licence(shards, tmp_path):
    (tmp_path / "rules.yaml").write_text("licence: CC0\n")
    (tmp_path / "iq.tsv").write_text("participant_id\tiq\nsub-000\t100\n")
    with pytest.raises(UserError, match="rules.yaml: licence is no rule for a column.*--licence NAME=TEXT"):
        annotate_shards(shards, tmp_path / "iq.tsv", rules=tmp_path / "rules.yaml")


def test_a_declared_licence_is_that_of_the_only_data_set(tmp_path):
    foreign(tmp_path / "tars")
    (tmp_path / "rules.yaml").write_text("licence: CC BY 4.0\n")
    index = index_shards(str(tmp_path / "tars"), tmp_path / "index", spacing=6.0, columns=tmp_path / "rules.yaml")
    assert index.licences() == {"bhb": ["CC BY 4.0"]}
    foreign(tmp_path / "other", key="sub-{p}_ses-{s}")
    table = tmp_path / "other" / "participants.tsv"
    head, *rows = table.read_text().splitlines()
    lines = [f"{head}\tdataset", *(f"{row}\t{'ab'[n % 4 // 2]}" for n, row in enumerate(rows))]
    table.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="licence is that of one data set, the scans are of 2 .a, b."):
        index_shards(str(tmp_path / "other"), tmp_path / "two", spacing=6.0, columns=tmp_path / "rules.yaml")
    assert not (tmp_path / "two" / "manifest.json").exists()
