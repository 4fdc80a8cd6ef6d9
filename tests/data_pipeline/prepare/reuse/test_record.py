"""What a manifest records of the preparation of its scans, and what an encoder's export takes from it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_pipeline.cohort.read import preparations_of
from data_pipeline.prepare.reuse.record import difference, recipe_of, training_preparation, unusual
from data_pipeline.prepare.settings import PrepareRecipe, load_prepare_recipe, recorded
from data_pipeline.shards.append import append_shards
from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from pretrain.weights.write import preprocessing_of
from tests.cohorts import write_cohort

RECIPE = recorded(PrepareRecipe(pipeline="vbm", spacing=3.0))
PROGRAMS = [{"Name": "yaware", "Version": "1"}, {"Name": "antspyx", "Version": "0.6.3"}, "damaged"]


def prepared_cohort(root, recipe=RECIPE, **options):
    """A cohort that `cohort prepare` has made, by its description."""
    write_cohort(root, **options)
    description = {"Name": "x", "Preparation": recipe, "GeneratedBy": PROGRAMS}
    (root / "dataset_description.json").write_text(json.dumps(description))
    table = (root / "participants.tsv").read_text().splitlines()
    rows = [f"{line}\t{1000 + 10 * number}" for number, line in enumerate(table[1:])]
    (root / "participants.tsv").write_text("\n".join([f"{table[0]}\tbrain_ml", *rows]) + "\n")
    return root


def test_recipe_libraries_and_ranges_go_from_the_derivative_to_preprocessing_json(tmp_path):
    manifest = build_shards(prepared_cohort(tmp_path / "one", participants=6), tmp_path / "shards")
    assert manifest.settings["preparations"] == {
        "one": {"recipe": RECIPE, "libraries": {"yaware": "1", "antspyx": "0.6.3"}}
    }
    rows = np.arange(1, 5)
    recorded_there = preprocessing_of(Manifest.load(tmp_path / "shards"), rows)["preparation"]
    values = manifest.scans["brain_ml"].to_numpy()[rows]
    assert recorded_there["recipe"] == RECIPE
    assert recorded_there["figures"]["brain_ml"] == [values.min(), values.max()]
    # The same build again is the same data set, also if an earlier version wrote no preparation.
    assert build_shards(tmp_path / "one", tmp_path / "shards").digest == manifest.digest


def test_scans_that_were_prepared_in_two_ways_have_no_recipe(tmp_path):
    build_shards(prepared_cohort(tmp_path / "one", participants=4), tmp_path / "shards")
    same = prepared_cohort(tmp_path / "two", {**RECIPE, "limits": {}}, participants=3, seed=1)
    manifest = append_shards(same, tmp_path / "shards")
    assert training_preparation(manifest)["recipe"] == RECIPE
    manifest = append_shards(write_cohort(tmp_path / "three", participants=3, seed=2), tmp_path / "shards")
    assert training_preparation(manifest) is None
    first = np.flatnonzero(manifest.scans["dataset"] == "one")
    assert training_preparation(manifest, first)["recipe"] == RECIPE
    assert "preparation" not in preprocessing_of(manifest)


def test_a_list_of_data_sets_has_a_preparation_for_each(tmp_path):
    prepared_cohort(tmp_path / "a", participants=2)
    write_cohort(tmp_path / "b", participants=2)
    (tmp_path / "datasets.yaml").write_text("datasets: [{path: a, name: first}, {path: b, name: second}]\n")
    assert list(preparations_of(tmp_path, "all")) == ["first"]


def test_shards_of_another_recipe_are_refused_by_a_build_in_a_line(tmp_path):
    root = prepared_cohort(tmp_path / "one", participants=3)
    build_shards(root, tmp_path / "shards")
    description = json.loads((root / "dataset_description.json").read_text())
    (root / "dataset_description.json").write_text(json.dumps({**description, "Preparation": {**RECIPE, "seed": 7}}))
    with pytest.raises(UserError, match="built with other settings") as caught:
        build_shards(root, tmp_path / "shards")
    assert len(str(caught.value)) < 1000


def test_the_first_different_parameter_is_named():
    recipe = recorded(load_prepare_recipe(None, ["--prepare.linear.spacing=3"]))
    assert difference(recipe, recorded(PrepareRecipe())) == "linear.spacing 3.0 instead of 2.0"
    assert difference(RECIPE, recorded(PrepareRecipe())).startswith("pipeline 'vbm' instead of")
    assert difference(RECIPE, {**RECIPE, "limits": {}, "keep_warp": False}) == ""
    assert difference(RECIPE, {**RECIPE, "later": 1}) == "later None instead of 1"


def test_a_recorded_recipe_is_read_back():
    recipe = load_prepare_recipe(None, ["--prepare.linear.iterations=[9,8,7]", "--prepare.brain.method=given"])
    assert recipe_of(json.loads(json.dumps(recorded(recipe))), "here") == load_prepare_recipe(
        None, ["--prepare.linear.iterations=[9,8,7]", "--prepare.brain.method=given", "--prepare.spacing=1"]
    )


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"tiv": 1650.0}, "tiv is 1650, that of training scans 1400 to 1600"),
        ({"tiv": 1385.0, "correlation": 0.99, "rotation": 0.0}, ""),
        ({"tiv": 1500.0, "correlation": 0.8}, "correlation is 0.8, that of training scans 0.9 to 0.95"),
        ({"rotation": 30.0}, "rotation is 30, that of training scans 2 to 10"),
        ({"tiv": float("nan")}, "tiv is nan"),
        ({}, ""),
    ],
)
def test_a_figure_outside_the_range_of_training_scans_is_named(figures, words):
    ranges = {"tiv": [1400.0, 1600.0], "correlation": [0.9, 0.95], "rotation": [2.0, 10.0]}
    found = unusual(figures, ranges)
    assert found.startswith(words) if words else not found
