"""A pipe, folder, socket or device in place of a file is named at once by every reader; opening it could wait forever."""

from __future__ import annotations

import json

import pytest

from data_pipeline.cohort.pseudonyms import read_key
from data_pipeline.cohort.texts import read_text as read_table
from data_pipeline.storage.open_files import OpenFiles
from infra.errors import UserError
from infra.files import open_file, other_kind, read_bytes, read_object, read_text, regular_file, sha256_of
from infra.settings import load_settings
from infra.tracking.spool import Spool
from infra.trust.results import read_result
from pretrain.config import Recipe, load_recipe
from pretrain.engine.safe_load import find_code
from pretrain.launch.hosts import read_hostfile
from pretrain.run.checkpoint import newest_step, read_best, verify_checkpoint
from pretrain.run.folder import read_metrics, read_run
from pretrain.run.intact import read_state
from pretrain.weights.folder import find_encoder
from pretrain.weights.import_weights import read_published
from tests.odd_files import KINDS, put_in_place

READERS = {
    "file": open_file, "bytes": read_bytes, "text": read_text, "digest": sha256_of, "regular": regular_file,
    "object": lambda path: read_object(path, "restore it"), "shard": lambda path: OpenFiles().get(0, lambda: path),
    "recipe.yaml": lambda path: load_recipe(str(path), []), "settings.yaml": lambda path: load_settings(Recipe, path),
    "hostfile": read_hostfile, "spool.jsonl": lambda path: Spool(path).read(), "key": read_key, "table.tsv": read_table,
    "result": read_result, "published.pth": read_published, "metrics.jsonl": lambda path: list(read_metrics(path)),
    "run.json": lambda path: read_run(path.parent), "best.json": lambda path: read_best(path.parent),
    "latest": lambda path: newest_step(path.parent), "state.json": lambda path: read_state(path.parent),
    "encoder/model.safetensors": lambda path: find_encoder(path.parent.parent) and read_bytes(path),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_something_else_in_place_of_a_file_is_named(tmp_path, name, kind):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    put_in_place(path, kind)
    with pytest.raises(UserError, match=f"{path} is a {kind}, not a file") as caught:
        READERS[name](path)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_no_intact_part_of_a_checkpoint(tmp_path, kind):
    put_in_place(tmp_path / "a.pt", kind)
    (tmp_path / "checksums.json").write_text(json.dumps({"a.pt": "0" * 64}))
    assert verify_checkpoint(tmp_path) == "a.pt is missing"
    assert "a.pt is not a file of tensors" in find_code(tmp_path)
    put_in_place(tmp_path / "checksums.json", kind)
    assert f"is a {kind}, not a file" in verify_checkpoint(tmp_path)


def test_a_file_and_a_link_to_one_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in ("a", "link"):
        assert read_bytes(tmp_path / name) == b"one\r\ntwo\n"
        assert read_text(tmp_path / name) == "one\ntwo\n"
        assert other_kind(tmp_path / name) == ""
    for reader in (open_file, read_text, sha256_of):
        with pytest.raises(FileNotFoundError):
            reader(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "null", "[" * 100_000, "\x00"])
def test_what_is_no_json_object_is_refused_in_one_line(tmp_path, text):
    for name, reader in (("run.json", read_run), ("best.json", read_best)):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} (is not valid JSON|holds)") as caught:
            reader(tmp_path)
        assert "\n" not in str(caught.value)
