"""An exported encoder gives the features of the network it was written from; damaged folders are refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from data_pipeline.volume.grid import Grid
from infra.errors import UserError
from pretrain import Encoder
from pretrain.encoders import build_encoder
from pretrain.weights.folder import find_encoder
from pretrain.weights.write import export, write_encoder
from tests.pretrain.weights.encoders import CONFIG, write_small_encoder
from tests.runs import ROOT

GRID = Grid.centred((16, 16, 16), 6.0).to_dict()


@pytest.fixture
def written(tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step-00000005" / "encoder"
    network = write_small_encoder(folder, GRID)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000005\n")
    return network, folder, tmp_path


def test_a_loaded_encoder_gives_the_same_features(written):
    network, folder, _ = written
    encoder = Encoder.from_pretrained(folder)
    volumes = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(encoder(volumes), network(volumes))
    assert (encoder.feature_size, encoder.training) == (128, False)
    assert encoder.preprocessing["grid"]["spacing"] == [6.0, 6.0, 6.0]


def test_an_encoder_is_found_from_its_run_its_checkpoint_and_its_own_folder(written):
    _, folder, root = written
    checkpoints = root / "run" / "checkpoints"
    for path in (folder, folder.parent, root / "run", checkpoints, checkpoints / "latest"):
        assert find_encoder(path) == folder
    best = shutil.copytree(folder.parent, checkpoints / "step-00000003") / "encoder"
    (checkpoints / "best").write_text("step-00000003\n")
    assert find_encoder(checkpoints / "best") == best
    assert find_encoder(root / "run") == folder
    assert export(checkpoints / "best", root / "out") == root / "out"
    with pytest.raises(UserError, match="no encoder in .*; give a run folder"):
        find_encoder(root)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessing.json"])
def test_a_changed_or_missing_file_is_refused(written, name):
    _, folder, _ = written
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(UserError, match=f"{name} is missing or differs from checksums.json"):
        Encoder.from_pretrained(folder)


def test_weights_of_another_encoder_are_refused_in_one_line(written):
    root = written[2]
    other = build_encoder("resnet18", {"width": 0.5}).state_dict()
    write_encoder(root / "other", other, CONFIG, {"grid": GRID})
    with pytest.raises(UserError, match="weights do not fit resnet18") as caught:
        Encoder.from_pretrained(root / "other")
    assert "\n" not in str(caught.value)


def test_export_copies_the_whole_folder_and_may_be_repeated(written):
    _, _, root = written
    out = export(root / "run", root / "deep" / "exported")
    assert Encoder.from_pretrained(out).config["step"] == 5
    assert "**simulated** scans" in (out / "README.md").read_text()
    assert [p.name for p in out.parent.iterdir()] == ["exported"]
    before = out.stat()  # the time of the last reading may change
    assert export(root / "run", out) == out, "a command that was killed after its last step is repeated"
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [p.name for p in out.parent.iterdir()] == ["exported"]


@pytest.mark.parametrize("change", ["note", "weights", "empty", "file"])
def test_export_refuses_a_folder_that_holds_something_else(written, change):
    network, _, root = written
    out = root / "exported"
    if change == "file":
        out.write_text("mine")
    elif change == "empty":
        out.mkdir()
    elif change == "weights":
        state = {name: value + 1 for name, value in network.state_dict().items()}
        write_encoder(out, state, CONFIG, {"grid": GRID})
    else:
        (export(root / "run", out) / "note").write_text("mine")
    before = contents(out)
    with pytest.raises(UserError, match="exported exists already.*; choose a new folder"):
        export(root / "run", out)
    assert contents(out) == before
    assert not list(root.glob(".*"))


def contents(path):
    return path.read_bytes() if path.is_file() else {p.name: p.read_bytes() for p in path.iterdir()}


KILLED = """
import os, signal, sys
from pretrain.weights import write
write.find_encoder = lambda checkpoint: os.kill(os.getpid(), signal.SIGKILL)  # called inside the temporary folder
write.export(*sys.argv[1:])
"""


def test_export_removes_what_a_killed_export_left(written):
    _, _, root = written
    out = root / "deep" / "exported"
    assert subprocess.run([sys.executable, "-c", KILLED, root / "run", out], cwd=ROOT).returncode == -signal.SIGKILL
    assert len(list(out.parent.iterdir())) == 1, "the kill came inside the temporary folder"
    export(root / "run", out)
    assert list(out.parent.iterdir()) == [out]


def test_the_model_id_is_read_from_mlflow_json(written):
    _, folder, _ = written
    (folder / "mlflow.json").write_text(json.dumps({"model_id": "m-1"}))
    assert Encoder.from_pretrained(folder).config["model_id"] == "m-1"
