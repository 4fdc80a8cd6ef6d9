"""Licences of data sets: read as stated, declared where a data set states none, never guessed."""

from __future__ import annotations

import json

import pytest

from data_pipeline.cohort.read import licences_of
from infra.errors import UserError


def data_set(folder, **described):
    folder.mkdir(parents=True)
    (folder / "dataset_description.json").write_text(json.dumps({"Name": folder.name, **described}))
    return folder


def test_the_field_of_bids_is_the_licence(tmp_path):
    folder = data_set(tmp_path / "ixi", License="CC BY-NC-SA 3.0;\n no redistribution ")
    stated = {"licence": "CC BY-NC-SA 3.0; no redistribution", "stated_in": "dataset_description.json"}
    assert licences_of(folder) == {"ixi": stated}
    assert licences_of(folder, "renamed") == {"renamed": stated}


@pytest.mark.parametrize("described", [{}, {"License": ""}, {"License": "n/a"}, {"License": None}, {"license": "CC0"}])
def test_what_is_not_stated_is_unknown(tmp_path, described):
    assert licences_of(data_set(tmp_path / "ixi", **described)) == {}


@pytest.mark.parametrize("value", [["CC0"], 4, {"a": 1}, "x" * 1001, "CC0\x07"])
def test_a_field_that_is_no_licence_is_named_and_taken_as_unknown(tmp_path, capsys, value):
    assert licences_of(data_set(tmp_path / "ixi", License=value)) == {}
    error = capsys.readouterr().err
    assert "dataset_description.json: License=" in error
    assert "is taken as unknown" in error
    assert error.count("\n") == 1


def test_a_declared_licence_is_that_of_a_data_set_that_states_none(tmp_path, capsys):
    folder = data_set(tmp_path / "clinic")
    (tmp_path / "columns.yaml").write_text("licence: Data use agreement of the clinic, no redistribution\n")
    assert licences_of(folder, columns=tmp_path / "columns.yaml") == {
        "clinic": {"licence": "Data use agreement of the clinic, no redistribution", "stated_in": "columns.yaml"}
    }
    assert capsys.readouterr().err == ""


def test_a_declared_licence_beside_another_one_is_taken_and_both_are_named(tmp_path, capsys):
    folder = data_set(tmp_path / "ixi", License="TODO")
    (tmp_path / "columns.yaml").write_text("licence: CC BY-SA 3.0\n")
    assert licences_of(folder, columns=tmp_path / "columns.yaml")["ixi"]["licence"] == "CC BY-SA 3.0"
    error = capsys.readouterr().err
    assert "ixi: licence 'CC BY-SA 3.0' is declared in columns.yaml" in error
    assert "License='TODO'" in error


def test_a_list_of_data_sets_has_a_licence_for_each_that_states_one(tmp_path):
    data_set(tmp_path / "a", License="CC0"), data_set(tmp_path / "b"), data_set(tmp_path / "c")
    (tmp_path / "datasets.yaml").write_text(
        "datasets: [{path: a, name: first}, {path: b, name: second}, {path: c, name: third, licence: PDDL}]\n"
    )
    assert {name: stated["licence"] for name, stated in licences_of(tmp_path).items()} == {
        "first": "CC0",
        "third": "PDDL",
    }
    assert licences_of(tmp_path)["third"]["stated_in"] == "datasets.yaml"


def test_a_derivative_without_a_licence_has_that_of_the_raw_data_set_around_it(tmp_path):
    data_set(tmp_path / "raw", License="CC0")
    derivative = data_set(tmp_path / "raw" / "derivatives" / "cat12")
    assert licences_of(derivative)["cat12"] == {
        "licence": "CC0", "stated_in": "dataset_description.json of the raw data set",
    }  # fmt: skip
    own = data_set(tmp_path / "raw" / "derivatives" / "own", License="PDDL")
    assert licences_of(own)["own"]["licence"] == "PDDL"
    assert licences_of(data_set(tmp_path / "other" / "cat12")) == {}


@pytest.mark.parametrize(("text", "found"), [("[]", "[]"), ("''", "''"), ("n/a", "'n/a'"), ("{a: b}", "{'a': 'b'}")])
def test_a_declaration_that_is_no_licence_is_refused_in_a_line(tmp_path, text, found):
    folder = data_set(tmp_path / "ixi")
    (tmp_path / "columns.yaml").write_text(f"licence: {text}\n")
    with pytest.raises(UserError, match="columns.yaml: licence=.* is not a licence; give its name") as caught:
        licences_of(folder, columns=tmp_path / "columns.yaml")
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_american_spelling_is_named(tmp_path):
    (tmp_path / "columns.yaml").write_text("license: CC0\n")
    with pytest.raises(UserError, match="unknown key 'license'.*did you mean 'licence'"):
        licences_of(data_set(tmp_path / "ixi"), columns=tmp_path / "columns.yaml")
