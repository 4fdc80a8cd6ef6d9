"""``yaware export --hub-layout``: what is published is loaded by its address, and checked; it tells nothing of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from infra import cli
from infra.errors import UserError
from pretrain import Encoder, add_readouts, embed, export
from pretrain.weights.embedder import Embedder
from pretrain.weights.readouts import read_readouts
from tests.pretrain.hub.hub_server import cache_snapshot
from tests.pretrain.hub.test_download import use
from tests.pretrain.weights import encoders
from tests.pretrain.weights.encoders import CONFIG, write_scans, write_small_encoder
from tests.runs import ROOT

LICENCES = {"ixi": ["CC BY-SA 3.0"], "abide": ["CC BY-NC-SA 3.0, no redistribution"], "clinic": []}
PUBLISHED = {"README.md", "checksums.json", "config.json", "model.safetensors", "preprocessing.json"}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint with what a run leaves in it."""
    private = {"run_id": "0123456789abcdef", "experiment": "/Users/ann/brains", "run_name": "/home/ann/runs/y-aware"}
    monkeypatch.setattr(encoders, "CONFIG", {**CONFIG, **private, "licences": LICENCES})
    folder = tmp_path / "run" / "checkpoints" / "step-00000005" / "encoder"
    write_small_encoder(folder)
    (folder / "mlflow.json").write_text(json.dumps({"model_id": "m-1", "run_id": private["run_id"]}))
    (folder / ".notes").write_text("mine")
    return tmp_path / "run" / "checkpoints" / "step-00000005"


@pytest.fixture
def published(checkpoint, tmp_path, monkeypatch):
    """The address of an encoder in the local cache, offline; the export; and the folder in the cache."""
    out = export(checkpoint, tmp_path / "out", hub_layout=True, licence="cc-by-nc-4.0")
    snapshot = cache_snapshot(tmp_path / "cache", "lab/brains", out)
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache", offline=True)
    return "hf://lab/brains", out, snapshot


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_hub_reads_the_card(published):
    card = ModelCard.load(published[1] / "README.md")
    assert card.data.to_dict() == {
        "license": "cc-by-nc-4.0", "library_name": "yaware", "pipeline_tag": "image-feature-extraction",
        "tags": ["brain-mri", "neuroimaging", "medical-imaging", "3d", "safetensors", "t1w", "resnet18", "y-aware",
                 "simulated-data"],
    }  # fmt: skip
    for row in (
        "| ixi | CC BY-SA 3.0 |", "| abide | CC BY-NC-SA 3.0, no redistribution |",
        "| clinic | unknown (the data set states none) |",
    ):  # fmt: skip
        assert row in card.text
    assert 'from_pretrained("hf://OWNER/NAME@REVISION")' in card.text
    assert "## Licence of the weights\n\ncc-by-nc-4.0\n" in card.text


@pytest.mark.parametrize(
    ("licence", "metadata", "words"),
    [
        (None, {"license": "unknown"}, "unknown: the publisher states none"),
        ("Apache-2.0", {"license": "apache-2.0"}, "Apache-2.0"),
        ("DUA 7: research only", {"license": "other", "license_name": "dua-7-research-only"}, "DUA 7: research only"),
    ],
)
def test_the_licence_of_the_weights_is_what_the_publisher_states(checkpoint, tmp_path, licence, metadata, words):
    out = export(checkpoint, tmp_path / "out", hub_layout=True, licence=licence)
    text = (out / "README.md").read_text()
    found = yaml.safe_load(text.split("---\n")[1])
    assert {key: value for key, value in found.items() if key.startswith("license")} == metadata
    assert f"## Licence of the weights\n\n{words}\n" in text


def test_nothing_published_tells_of_this_machine(published, tmp_path):
    out = published[1]
    assert names(out) == PUBLISHED
    config = json.loads((out / "config.json").read_text())
    assert config["run_name"] == "y-aware"
    assert not {"run_id", "experiment"} & config.keys()
    content = b"".join(path.read_bytes() for path in out.iterdir())
    for word in (str(tmp_path), str(ROOT), "/home/", "/Users/", "0123456789abcdef", "mlflow.db", "m-1"):
        assert word.encode() not in content, word


@pytest.mark.parametrize(
    ("config", "key"),
    [({"licences": {"/data/ann/ixi": []}}, "a key of licences"), ({"split": ["file:///x"]}, "split"),
     ({"method": "y-aware of ~/work"}, "method"), ({"source": {"file": "from /mnt/disk/a.pth"}}, "source.file")],
)  # fmt: skip
def test_a_path_that_would_be_published_is_refused_in_a_line(tmp_path, monkeypatch, config, key):
    monkeypatch.setattr(encoders, "CONFIG", {**CONFIG, **config})
    write_small_encoder(tmp_path / "encoder")
    with pytest.raises(UserError, match=f"config.json: {key}=.* is a path of this machine") as caught:
        export(tmp_path / "encoder", tmp_path / "out", hub_layout=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_links_of_licences_are_no_paths_of_this_machine(tmp_path, monkeypatch):
    texts = ["CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)", "GPL / MIT, and/or CC0", "see doi:10.1/abc/d"]
    monkeypatch.setattr(encoders, "CONFIG", {**CONFIG, "licences": {"ixi": texts}})
    write_small_encoder(tmp_path / "encoder")
    assert export(tmp_path / "encoder", tmp_path / "out", hub_layout=True).is_dir()


def test_an_address_gives_the_published_encoder(published, checkpoint, tmp_path, capsys):
    address, _, snapshot = published
    scans = write_scans(tmp_path / "scans", 2)
    expected = Encoder.from_pretrained(checkpoint).embed(scans, progress=False)
    for path in (address, Path(address), f"{address}@{snapshot.name}"):
        loaded = Encoder.from_pretrained(path)
        assert loaded.folder == snapshot
        assert loaded.config["licences"] == LICENCES
    assert embed(address, scans, progress=False).equals(expected)
    assert np.array_equal(Embedder(address).fit_transform([str(path) for path in scans]), expected.to_numpy())
    assert cli.run(["embed", address, *map(str, scans), "--out", str(tmp_path / "features.tsv")]) == 0
    assert "wrote" in capsys.readouterr().out
    assert len((tmp_path / "features.tsv").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessing.json"])
def test_a_file_that_was_changed_after_its_export_is_refused_in_a_line(published, name):
    address, _, snapshot = published
    content = bytearray((snapshot / name).read_bytes())
    content[len(content) // 2] ^= 1
    (snapshot / name).unlink()
    (snapshot / name).write_bytes(bytes(content))
    with pytest.raises(
        UserError, match=f"{name} is missing or differs from checksums.json; remove .*lab--brains"
    ) as caught:
        Encoder.from_pretrained(address)
    assert "the file was changed after its export" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_readouts_are_published_and_are_not_added_to_the_cache(checkpoint, healthy, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "CONFIG", {**encoders.CONFIG, "manifest_digest": healthy.digest})
    folder = tmp_path / "with"
    write_small_encoder(folder, healthy.grid, modality="vbm")
    add_readouts(folder, healthy, columns=["age"], progress=False)
    out = export(folder, tmp_path / "out", hub_layout=True)
    assert names(out) == PUBLISHED | {
        f"readouts/{name}" for name in ("checksums.json", "readouts.json", "readouts.safetensors")
    }
    cache_snapshot(tmp_path / "cache", "lab/ages", out)
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache", offline=True)
    loaded = Encoder.from_pretrained("hf://lab/ages")
    assert list(loaded.need_readouts().readouts) == ["age"]
    assert read_readouts(out, loaded.readouts.weights) is not None
    with pytest.raises(
        UserError, match="hf://lab/ages is in a cache.*export it first: yaware export hf://lab/ages OUT"
    ):
        add_readouts("hf://lab/ages", healthy, replace=True)


def test_an_address_can_be_exported_again(published, tmp_path):
    address, out, _ = published
    again = export(address, tmp_path / "again")
    assert {name: (again / name).read_bytes() for name in names(again)} == {
        name: (out / name).read_bytes() for name in names(out)
    }
    assert not any(path.is_symlink() for path in again.rglob("*"))
    assert export(address, out, hub_layout=True, licence="cc-by-nc-4.0") == out, "the same export stays"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"licence": "mit"}, "licence='mit' is for the card of the hub's layout; add hub_layout"),
        ({"hub_layout": True, "licence": " "}, "licence=' ' is not a licence"),
        ({"hub_layout": True, "licence": 5}, "licence=5 is of type int"),
    ],
)
def test_wrong_options_are_refused(checkpoint, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export(checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_says_that_the_licence_is_unknown(checkpoint, tmp_path, capsys):
    assert cli.run(["export", str(checkpoint), str(tmp_path / "a"), "--hub-layout"]) == 0
    assert "says that the licence of the weights is unknown; --licence states it" in capsys.readouterr().out
    assert cli.run(["export", str(checkpoint), str(tmp_path / "b"), "--hub-layout", "--licence", "mit"]) == 0
    assert "unknown" not in capsys.readouterr().out
    assert cli.run(["export", str(checkpoint), str(tmp_path / "c"), "--licence", "mit"]) == 2


def test_the_variables_of_the_hub_are_read(published, tmp_path):
    """In a process of its own, with the cache and the offline mode set as a user sets them."""
    (scan,) = write_scans(tmp_path / "scans", 1)
    code = f"""
import os, sys
os.environ |= {{"HF_HUB_CACHE": {str(tmp_path / "cache")!r}, "HF_HUB_OFFLINE": "1"}}
from infra import cli
found = cli.run(["embed", "hf://lab/brains", {str(scan)!r}])
missing = cli.run(["embed", "hf://lab/brain@v1", {str(scan)!r}])
print(found, missing)
"""
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[-1] == "0 2", done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "yaware: error: hf://lab/brain@v1 cannot be loaded: its checksums.json is not in "
    )
