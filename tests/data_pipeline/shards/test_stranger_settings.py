"""The settings of a data set that somebody else made are checked when it is loaded, and those of earlier versions are read."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from data_pipeline.quality.rules import Quality, read_quarantine
from data_pipeline.shards.append import append_shards
from data_pipeline.shards.info import shards_info
from data_pipeline.shards.verify import find_problems, load_problem
from data_pipeline.storage import settings_schema
from data_pipeline.storage.manifest import Manifest, check_shards
from data_pipeline.storage.manifest_file import read_content
from data_pipeline.volume.intensity import INTENSITIES
from data_pipeline.volume.preparation import CROPS, SCALINGS
from infra.errors import UserError
from tests.cohorts import write_cohort
from tests.data_pipeline.shards.strangers import copy_of, refused, write_content
from tests.odd_files import KINDS, put_in_place


@pytest.fixture
def copy(shards, tmp_path):
    return copy_of(shards, tmp_path / "copy")


SETTINGS = [
    ("quality", None), ("quality", []), ("quality", "strict"), ("quality", 5), ("quality", {"nonfinite": 5}),
    ("quality", {"nonfinite": "keep"}), ("quality", {"limits": [1]}), ("quality", {"limits": {"age": {}}}),
    ("quality", {"limits": {"age": {"min": 3, "max": 1}}}), ("quality", {"limits": {"age": {"least": 1}}}),
    ("quality", {"outlier": True}), ("quality", {"outlier": {"robust_z": 5}}), ("quality", {"cat12": {"worst": "bad"}}),
    ("quality", {"unknown": 1}), ("quality", {"a\nb": 1}), ("intensity", None), ("intensity", "x"), ("intensity", []),
    ("crop", None), ("crop", 3), ("scaling", "half"), ("seed", None), ("seed", "a"), ("seed", 1.5), ("seed", True),
    ("seed", 2**70), ("scans_per_shard", None), ("scans_per_shard", "20"), ("scans_per_shard", 20.0), ("scans_per_shard", 0),
    ("scans_per_shard", -5), ("scans_per_shard", 2**40), ("splits", None), ("splits", []), ("splits", {}),
    ("splits", {"pretrain": "all"}), ("splits", {"pretrain": -1}), ("annotated", 5), ("annotated", [5]),
    ("annotated", [{"columns": 5, "table": "a"}]), ("annotated", None), ("simulated", "no"), ("pseudonymised", 1),
    ("pseudonym_key", 7), ("orientation", "XYZ"), ("orientation", None), ("array_orientations", ["LAS"]),
    ("array_orientations", {"tiny": "up"}), ("scans_found", -1), ("quarantined", None),
    ("appended", [{"dataset": "a", "scans": 1, "array_orientations": 5}]),
    ("appended", [{"dataset": "a", "scans": 1, "simulated": []}]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), SETTINGS, ids=[f"{key}={value!r}"[:60] for key, value in SETTINGS])
def test_an_impossible_setting_of_the_build_is_named(copy, key, value):
    content = read_content(copy)
    content["settings"][key] = value
    write_content(copy, content)
    refused(copy, [f"manifest.json: settings.{key}"])
    refused(copy, [f"manifest.json: settings.{key}"], shards_info)
    refused(copy, [f"manifest.json: settings.{key}"], lambda folder: append_shards(folder, folder))


@pytest.mark.parametrize("key", ["seed", "scans_per_shard", "splits"])
def test_an_append_names_the_setting_that_it_needs(copy, key, tmp_path):
    content = read_content(copy)
    del content["settings"][key]
    write_content(copy, content)
    assert len(Manifest.load(copy).scans) == 72
    cohort = write_cohort(tmp_path / "cohort", participants=3)
    refused(copy, [f"manifest.json: settings.{key} is missing"], lambda folder: append_shards(cohort, folder))


def test_a_manifest_of_an_earlier_version_is_read(copy):
    """Its settings are those that the first builds wrote."""
    content = read_content(copy)
    kept = ("dataset", "modality", "scaling", "codec", "scans_per_shard", "seed", "splits")
    content["settings"] = {key: content["settings"][key] for key in kept}
    write_content(copy, content)
    assert len(Manifest.load(copy).scans) == 72


def test_the_words_of_the_schema_are_those_of_the_readers():
    assert settings_schema.CROPS == CROPS
    assert settings_schema.SCALINGS == SCALINGS
    assert tuple(INTENSITIES) == settings_schema.INTENSITIES
    rules = {field.name for field in dataclasses.fields(Quality)}
    assert set(settings_schema.QUALITY) == rules
    for name, words in settings_schema.RULES.items():
        assert typing.get_args(typing.get_type_hints(Quality)[name]) == words


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "scans.parquet", "quarantine.tsv", "tiny-000000.tar"])
def test_something_else_in_place_of_a_file_is_named(copy, name, kind):
    manifest = Manifest.load(copy)
    put_in_place(copy / name, kind)
    if name == "quarantine.tsv":
        refused(copy, [f"{name} is a {kind}, not a file"], lambda folder: read_quarantine(folder / name))
    elif name.endswith(".tar"):
        refused(copy, [f"{name} is a {kind}, not a file"], lambda folder: manifest.read_volume(first_row(manifest)))
        refused(copy, [f"{name} is a {kind}, not a file"], lambda folder: check_shards(manifest, manifest.rows()))
        assert list(find_problems(manifest, 1)) == [name]
    else:
        for command in (Manifest.load, shards_info, load_problem_of):
            refused(copy, [f"{name} is a {kind}, not a file"], command)


def load_problem_of(folder):
    raise UserError(load_problem(folder))


def first_row(manifest):
    return int(manifest.scans.index[manifest.scans["shard"] == 0][0])
