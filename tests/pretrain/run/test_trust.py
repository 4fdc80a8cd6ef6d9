"""A checkpoint that somebody else wrote runs no code, whichever of its files holds it, and another user's is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from infra.errors import UserError
from infra.files import sha256_of, write_json
from pretrain.config import load_recipe
from pretrain.engine import engine, safe_load
from pretrain.engine.reshard import load_resharded
from pretrain.run import checkpoint
from pretrain.run.folder import check_same_network
from pretrain.run.step import lr_factor
from tests.distributed.engine_cases import COMMON, batch_of, build
from tests.distributed.test_engine_ranks import zero

OTHER = 65533
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return Path.touch, (self.sprung,)


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def stored(request, one_rank, tmp_path_factory):
    """An engine under each ZeRO stage, and a folder with its checkpoint of step 1."""
    recipe = load_recipe("demo-cpu", [*COMMON, zero(request.param)])
    trained = engine.build_engine(recipe, build(recipe), lr_factor(recipe.optimizer, 20, 10))
    trained.backward(trained(batch_of(0, 0, 1)["views"])[0].square().mean())
    engine.update(trained)
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoint.save_checkpoint(folder, 1, trained, {}, lambda temporary: (temporary / "note").touch())
    yield request.param, trained, folder
    trained.destroy()


def plant(path: Path, sprung: Path, way: str) -> None:
    """Put a payload into a file of a checkpoint, and correct the file's checksum."""
    content = torch.load(path, weights_only=False, map_location="cpu")
    if way == "beside the tensors":
        torch.save({**content, "client_state": Payload(sprung)}, path)
    elif way == "old format":
        torch.save({**content, "ds_version": Payload(sprung)}, path, _use_new_zipfile_serialization=False)
    elif way == "no tensors":
        path.write_bytes(pickle.dumps(Payload(sprung)))
    else:
        torch.save(Payload(sprung), path, pickle_protocol=4)
    checksums = json.loads((path.parent / "checksums.json").read_text())
    write_json(path.parent / "checksums.json", {**checksums, path.name: sha256_of(path)})


WAYS = ["beside the tensors", "old format", "no tensors", "newer protocol"]


@pytest.mark.parametrize("way", WAYS)
def test_no_file_of_a_checkpoint_runs_code_on_the_same_or_other_ranks(stored, tmp_path, way):
    stage, trained, folder = stored
    original = folder / "step-00000001"
    files = sorted(path.name for path in original.glob("*.pt"))
    assert len(files) == (2 if stage == 0 else 3), files
    sprung = tmp_path / "sprung"
    for number, name in enumerate(files):
        run = tmp_path / f"run-{number}" / "checkpoints"
        copied = run / original.name
        copied.mkdir(parents=True)
        for path in original.iterdir():
            (copied / path.name).write_bytes(path.read_bytes())
        plant(copied / name, sprung, way)
        for world_size in (1, 2):  # 2: the state is converted from other ranks
            state = json.loads((copied / "state.json").read_text())
            write_json(copied / "state.json", {**state, "world_size": world_size})
            checksums = json.loads((copied / "checksums.json").read_text())
            write_json(copied / "checksums.json", {**checksums, "state.json": sha256_of(copied / "state.json")})
            for trust in (False, True):
                with pytest.raises(UserError, match=rf"{name} .*such code is never run"):
                    checkpoint.resume(run, trained, trust=trust)
                with pytest.raises(UserError, match="such code is never run"):
                    checkpoint.resume(tmp_path / "new", trained, str(copied), trust=trust)
        assert checkpoint.newest_step(run) is None, "the checkpoint was taken for a damaged one"
        # Without that check, the two ways to load do not run it either.
        if not name.startswith("random"):
            with pytest.raises(Exception, match="Weights only load failed|Unsupported|weights_only"):
                engine.load_engine(trained, run, original.name)
            with pytest.raises(UserError, match="cannot be read as one of ZeRO stage"):
                load_resharded(copied, stage, trained)
        assert not sprung.exists()


def test_a_checkpoint_of_ones_own_is_loaded_in_both_ways(stored):
    stage, trained, folder = stored
    state = checkpoint.load_checkpoint(folder, trained)
    assert (state["step"], state["zero_stage"]) == (1, stage)
    load_resharded(folder / "step-00000001", stage, trained)


def test_only_the_types_that_are_stored_are_allowed(stored):
    allowed = {f"{kind.__module__}.{kind.__qualname__}" for kind in safe_load.allowed_types()}
    _, _, folder = stored
    for path in (folder / "step-00000001").glob("*.pt"):
        assert set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) <= allowed


def test_torchs_switches_are_as_before(monkeypatch, one_rank):
    monkeypatch.setenv(safe_load.FORBID, "1")
    before = set(torch.serialization.get_safe_globals())
    with safe_load.no_code():
        assert safe_load.FORBID not in os.environ
        assert set(torch.serialization.get_safe_globals()) != before
    assert os.environ[safe_load.FORBID] == "1"
    assert safe_load.FORCE not in os.environ
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("given", ["auto", "path"])
@pytest.mark.parametrize("entry", [".", "state.json", "random-00000.pt"])
def test_a_checkpoint_of_another_user_is_refused_unless_it_is_trusted(stored, tmp_path, given, entry):
    _, trained, folder = stored
    path = folder / "step-00000001" / entry
    how = ("auto",) if given == "auto" else (str(folder.parent),)
    run = folder if given == "auto" else tmp_path
    os.chown(path, OTHER, OTHER)
    try:
        with pytest.raises(UserError, match=r"step-00000001.* belongs to .*give --trust \(run.trust=true\)"):
            checkpoint.resume(run, trained, *how)
        assert checkpoint.resume(run, trained, *how, trust=True)["step"] == 1
    finally:
        os.chown(path, 0, 0)
    assert checkpoint.resume(run, trained, *how)["step"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step=-1 is not a number from 0"),
        ({"step": "9"}, "step='9' is not a number from 0"),
        ({"world_size": 0}, "world_size=0 is not a number from 1"),
        ({"world_size": True}, "world_size=True is not"),
        ({"zero_stage": 4}, "zero_stage=4 is not a number from 0 to 3"),
        ({"world_size": None}, "world_size=None is not"),
    ],
)
def test_impossible_numbers_in_a_state_are_refused_with_their_key(stored, tmp_path, changes, message):
    _, trained, folder = stored
    copied = tmp_path / "checkpoints" / "step-00000001"
    copied.mkdir(parents=True)
    state = json.loads((folder / "step-00000001" / "state.json").read_text())
    write_json(copied / "state.json", {**state, **changes})
    write_json(copied / "checksums.json", {"state.json": sha256_of(copied / "state.json")})
    with pytest.raises(UserError, match=message):
        checkpoint.load_checkpoint(copied.parent, trained)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"/etc/passwd": "0"}', '{"../x": "0"}', "[" * 100_000])
def test_a_list_of_checksums_that_names_no_files_of_the_checkpoint_is_damage(tmp_path, text):
    (tmp_path / "checksums.json").write_text(text)
    assert "checksums.json" in checkpoint.verify_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "step-1", "step-x", "../../etc", "step-00000001/../..", "step-0000000\n1", "ü\0"])
def test_a_pointer_that_names_no_checkpoint_is_refused(tmp_path, text):
    (tmp_path / "latest").write_text(text)
    with pytest.raises(UserError, match=r"latest names .*, not a checkpoint as step-00000120"):
        checkpoint.newest_step(tmp_path)


@pytest.mark.parametrize("other", [None, {}, [], "recipe"])
def test_a_state_without_a_recipe_is_refused(other):
    with pytest.raises(UserError, match="state.json says no recipe"):
        check_same_network(load_recipe("demo-cpu", []), other)
