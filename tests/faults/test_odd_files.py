"""A pipe, folder, socket or device in place of a file is named at once by every reader; opening it could wait forever."""

from __future__ import annotations

import ast
import json
import textwrap
from collections.abc import Sequence

import pytest

from data_pipeline.cohort.pseudonyms import read_key
from data_pipeline.cohort.texts import read_text as read_table
from data_pipeline.storage.open_files import OpenFiles
from infra.errors import UserError
from infra.files import (
    open_file,
    open_for_update,
    other_kind,
    read_bytes,
    read_object,
    read_text,
    regular_file,
    sha256_of,
)
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
from tests.infra.house_rules import Module, read_modules
from tests.odd_files import KINDS, put_in_place
from tests.runs import ROOT

READERS = {
    "update": open_for_update,
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


PACKAGES = ("infra", "data_pipeline", "pretrain", "evaluation")
LIBRARY_READERS = {
    "np.load", "pd.read_csv", "pd.read_parquet", "load_file", "safe_open", "torch.load", "OmegaConf.load", "tarfile.open",
    "nibabel.load", "yaml.safe_load", "yaml.load",
}  # fmt: skip
CHECKED = ("regular_file", "open_file", "io.StringIO", "io.BytesIO", "read_text")


def unchecked_reads(modules: Sequence[Module]) -> list[str]:
    """Return places that open a file for reading without asking first whether it is a regular file: a pipe would wait forever.

    ``path.read_text()``, ``path.read_bytes()``, ``path.open("rb")``, ``open(path)``, ``os.open``, and readers of libraries that
    are given a path. A text or a stream is no path.
    """
    violations = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and (name := _unchecked(node)):
                violations.append(
                    f"{module.path}:{node.lineno} {name}: use infra.files (open_file, read_text, regular_file)"
                )
    return violations


def _unchecked(call: ast.Call) -> str:
    """Return the name of a function that reads an unchecked path; empty if the call does not."""
    name = ast.unparse(call.func)
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method in ("read_text", "read_bytes") and not call.args and not name.startswith("files."):
        return f".{method}"
    if name in ("open", "os.open") or method == "open":
        mode = (
            call.args[1]
            if name == "open" and len(call.args) > 1
            else call.args[0]
            if method == "open" and call.args
            else None
        )
        reads = isinstance(mode, ast.Constant) and mode.value in ("r", "rb", "rt")
        plain = name == "open" and len(call.args) < 2
        folder = name == "os.open" and "O_RDONLY" in ast.unparse(call)
        return name if reads or plain or folder else ""
    if name in LIBRARY_READERS and not any(word.arg == "fileobj" for word in call.keywords):
        given = call.args[0] if call.args else None
        stream = isinstance(given, ast.Name) and given.id in ("stream", "text", "content")
        checked = isinstance(given, ast.Call) and ast.unparse(given.func) in CHECKED
        return "" if stream or checked else name
    return ""


# Files that no user names and no stranger writes, and rooms whose readers check what they are given themselves.
UNCHECKED = {
    "infra/files.py": "the readers themselves, and locks on folders",
    "pretrain/launch/start.py": "/dev/tty",
    "data_pipeline/simulation/atlas.py": "a template that nilearn installs",
    "data_pipeline/quality/outliers.py": "coarse volumes that the same command has written",
    "data_pipeline/loading/dali_graph.py": "an index that the same process has written",
    "data_pipeline/volume/load.py": "open_image refuses what is no regular file",
    "data_pipeline/shards/unfinished.py": "the folder whose lock is held",
}


def test_only_regular_files_are_opened_for_reading():
    packages = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    modules = read_modules(ROOT, [str(path.relative_to(ROOT)) for path in packages])
    assert [line for line in unchecked_reads(modules) if not line.startswith(tuple(UNCHECKED))] == []


def test_a_read_of_an_unchecked_path_is_found(tmp_path):
    source = """
        a = path.read_text()
        b = open(path)
        c = path.open("rb")
        d = np.load(path)
        e = read_text(path), open_file(path), np.load(regular_file(path)), path.open("wb"), open(path, "a")
        f = os.open(folder, os.O_RDONLY)
        g = pd.read_csv(io.StringIO(text)), tarfile.open(fileobj=stream)
    """
    (tmp_path / "a.py").write_text(textwrap.dedent(source))
    lines = [line.partition(": ")[0] for line in unchecked_reads(read_modules(tmp_path, ["a.py"]))]
    assert lines == ["a.py:2 .read_text", "a.py:3 open", "a.py:4 path.open", "a.py:5 np.load", "a.py:7 os.open"]
