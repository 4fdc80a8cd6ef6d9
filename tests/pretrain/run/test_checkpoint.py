"""Checkpoints on disk are found, verified and cleaned; if one is damaged, the one before is loaded."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from infra.errors import UserError
from infra.files import sha256_of
from pretrain.config import load_recipe
from pretrain.engine import engine
from pretrain.model import build_model
from pretrain.run import checkpoint
from pretrain.run.step import lr_factor

SMALL = ["--encoder.options={width: 0.25, norm: group}", "--batch.global=4"]


@pytest.fixture(scope="module")
def trained(one_rank):
    """A DeepSpeed engine with one rank."""
    recipe = load_recipe("demo-cpu", SMALL)
    return engine.build_engine(recipe, build_model(recipe), lr_factor(recipe.optimizer, 20, 10))


def advance(trained, seed):
    generator = torch.Generator().manual_seed(seed)
    trained.backward(trained(torch.randn(2, 4, 1, 12, 12, 12, generator=generator))[0].square().mean())
    return engine.update(trained)


def weights(trained):
    return torch.cat([p.detach().flatten() for p in trained.module.parameters()]).clone()


def write_rest(folder):
    (folder / "encoder").mkdir()
    (folder / "encoder" / "note").write_text("x")


@pytest.fixture
def two(trained, tmp_path):
    """A folder with checkpoints of steps 1 and 2, and the weights of each."""
    kept = {}
    for step in (1, 2):
        advance(trained, step)
        checkpoint.save_checkpoint(tmp_path, step, trained, {"loader": {"step": step}}, write_rest)
        kept[step] = weights(trained)
    return tmp_path, kept


def test_a_loaded_checkpoint_continues_with_equal_weights(trained, two):
    folder, kept = two
    torch.manual_seed(5)
    expected = advance(trained, 3), weights(trained)
    advance(trained, 4)
    state = checkpoint.load_checkpoint(folder, trained)
    assert (state["step"], state["loader"]) == (2, {"step": 2})
    assert torch.equal(weights(trained), kept[2])
    assert advance(trained, 3) == expected[0]
    assert torch.equal(weights(trained), expected[1])


@pytest.mark.parametrize("harm", ["cut", "flip", "missing", "no list"])
def test_the_checkpoint_before_a_damaged_one_is_loaded(trained, two, harm, capsys):
    folder, kept = two
    newest = checkpoint.step_folder(folder, 2)
    path = newest / "mp_rank_00_model_states.pt"
    content = path.read_bytes()
    if harm == "cut":
        path.write_bytes(content[:-1000])
    elif harm == "flip":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif harm == "missing":
        (newest / "encoder" / "note").unlink()
    else:
        (newest / "checksums.json").unlink()
    assert checkpoint.verify_checkpoint(newest)
    assert checkpoint.load_checkpoint(folder, trained, own=False)["step"] == 1
    assert newest.is_dir(), "the folder of another run was changed"
    assert checkpoint.load_checkpoint(folder, trained)["step"] == 1
    assert torch.equal(weights(trained), kept[1])
    assert "step-00000002 is damaged" in capsys.readouterr().out
    # The damaged one is renamed, so that cleaning does not keep it as the newest and remove the good one.
    assert checkpoint.newest_step(folder) == 1
    checkpoint.clean_checkpoints(folder, keep=1)
    assert sorted(path.name for path in folder.glob("*step*")) == ["damaged-step-00000002", "step-00000001"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(trained, two):
    folder, _ = two
    for step in (1, 2):
        (checkpoint.step_folder(folder, step) / "encoder" / "note").write_text("y")
    with pytest.raises(UserError, match=r"holds no intact checkpoint \(encoder/note differs.*choose another run"):
        checkpoint.load_checkpoint(folder, trained)
    assert sorted(path.name for path in folder.glob("*step*")) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("place", ["DeepSpeed's", "random", "rest", "checksums", "pointer"])
def test_a_checkpoint_that_cannot_be_written_is_removed(trained, two, monkeypatch, place):
    folder, _ = two
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail_where(name, plain):
        def write(path, *rest, **options):
            if name in str(path):
                raise full
            return plain(path, *rest, **options)

        return write

    def rest_fails(folder):
        raise full

    if place == "DeepSpeed's":  # torch's zip writer raises this error

        def broken(*_, **__):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

        monkeypatch.setattr(torch, "save", broken)
    elif place == "random":
        monkeypatch.setattr(Path, "write_bytes", fail_where("random-", Path.write_bytes))
    elif place == "checksums":
        monkeypatch.setattr(checkpoint, "write_json", fail_where("checksums", checkpoint.write_json))
    elif place == "pointer":
        monkeypatch.setattr(checkpoint, "flush_folder", fail_where("", checkpoint.flush_folder))
    with pytest.raises(
        checkpoint.CheckpointFailed, match=r"step-00000003 cannot be written.*step 2 is the last good one"
    ):
        checkpoint.save_checkpoint(folder, 3, trained, {}, rest_fails if place == "rest" else write_rest)
    monkeypatch.undo()
    assert not list(folder.glob(".unfinished*"))
    assert checkpoint.newest_step(folder) == 2
    assert checkpoint.load_checkpoint(folder, trained)["step"] == 2


def test_another_runs_checkpoint_is_checked_before_it_is_loaded(trained, two, tmp_path_factory):
    folder, _ = two

    def refuse(state):
        raise UserError(f"no, not {state['step']}")

    with pytest.raises(UserError, match="no, not 2"):
        checkpoint.resume(tmp_path_factory.mktemp("new"), trained, str(folder / "step-00000002"), refuse)
    assert checkpoint.resume(folder, trained, "auto", refuse)["step"] == 2


def test_the_checksums_list_every_file(two):
    folder, _ = two
    one = checkpoint.step_folder(folder, 1)
    listed = json.loads((one / "checksums.json").read_text())
    files = {str(p.relative_to(one)) for p in one.rglob("*") if p.is_file()} - {"checksums.json"}
    assert set(listed) == files
    assert all(sha256_of(one / name) == digest for name, digest in listed.items())


def test_a_dangling_pointer_and_unfinished_folders_are_ignored(trained, two):
    folder, _ = two
    (folder / "latest").write_text("step-00000009\n")
    (folder / ".unfinished-step-00000009").mkdir()
    assert checkpoint.load_checkpoint(folder, trained)["step"] == 2
    checkpoint.clean_checkpoints(folder, keep=1)
    assert sorted(p.name for p in folder.glob("*step*")) == ["step-00000002"]
    assert not list(folder.glob(".unfinished*"))


def test_cleaning_keeps_the_newest_checkpoints(two):
    folder, _ = two
    checkpoint.clean_checkpoints(folder, keep=2)
    assert len(list(folder.glob("step-*"))) == 2
    checkpoint.clean_checkpoints(folder, keep=1)
    assert [p.name for p in folder.glob("step-*")] == ["step-00000002"]


def test_an_empty_folder_has_no_checkpoint(trained, tmp_path):
    assert checkpoint.load_checkpoint(tmp_path / "none", trained) is None
    assert checkpoint.newest_step(tmp_path / "none") is None


def test_a_new_run_starts_from_another_runs_checkpoint_until_it_has_its_own(trained, two, tmp_path_factory):
    folder, kept = two
    run = tmp_path_factory.mktemp("other")
    folder.rename(run / "checkpoints")
    for given, step in ((run, 2), (run / "checkpoints" / "step-00000001", 1)):
        state = checkpoint.resume(folder, trained, str(given))
        assert state["step"] == step
        assert torch.equal(weights(trained), kept[step])
    checkpoint.save_checkpoint(folder, 5, trained, {"loader": {}}, write_rest)
    assert checkpoint.resume(folder, trained, str(run))["step"] == 5
    with pytest.raises(UserError, match=r"holds a checkpoint of step 5; choose another run.output, or run.resume=auto"):
        checkpoint.resume(folder, trained, "never")
    assert checkpoint.resume(run / "nothing", trained, "never") is None
    with pytest.raises(UserError, match=r"run.resume=.*nowhere is not a checkpoint"):
        checkpoint.resume(run / "nothing", trained, str(run / "nowhere"))


def test_cleaning_keeps_the_best_checkpoint(trained, two):
    folder, _ = two
    checkpoint.note_best(folder, 1, "monitor/age_mae", 7.5)
    checkpoint.point_to_best(folder, 1)
    for step in (3, 4):
        checkpoint.save_checkpoint(folder, step, trained, {"loader": {}}, write_rest)
    checkpoint.clean_checkpoints(folder, keep=1)
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000001", "step-00000004"]
    written = {"step": 1, "metric": "monitor/age_mae", "score": 7.5}
    assert checkpoint.read_best(folder) == written
    path = folder / "best.json"
    path.write_text(path.read_text().replace('"metric"', '"figure"'))  # as older versions wrote it
    assert checkpoint.read_best(folder) == written


def test_a_checkpoint_is_due_by_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    clock, never = checkpoint.Clock(2.0), checkpoint.Clock(None)
    now[0] += 119.0
    assert not clock.due()
    now[0] += 1.0
    assert clock.due()
    clock.restart()
    assert not clock.due()
    assert not never.due()


def test_a_checkpoint_of_another_layout_is_converted_and_one_of_another_network_refused(trained, two, capsys):
    folder, kept = two
    state = checkpoint.step_folder(folder, 2) / "state.json"
    content = json.loads(state.read_text())
    assert content["layout"][:4] == [1, 1, "float32", ["none", "none"]]

    def written_as(layout):
        state.write_text(json.dumps({**content, "layout": layout}))
        sums = json.loads((state.parent / "checksums.json").read_text())
        (state.parent / "checksums.json").write_text(json.dumps({**sums, "state.json": sha256_of(state)}))

    advance(trained, 3)
    expected = advance(trained, 4), weights(trained)
    written_as([1, 1, "bfloat16", ["none", "none"], [3]])
    assert checkpoint.load_checkpoint(folder, trained)["step"] == 2
    assert "step-00000002 of 1 ranks under ZeRO 1 is converted" in capsys.readouterr().out
    assert torch.equal(weights(trained), kept[2])
    advance(trained, 3)
    assert advance(trained, 4) == expected[0]
    assert torch.equal(weights(trained), expected[1])
    recipe = load_recipe("demo-cpu", [*SMALL, "--projector.hidden=300"])
    other = engine.build_engine(recipe, build_model(recipe), lr_factor(recipe.optimizer, 20, 10))
    with pytest.raises(
        UserError, match=r"entries of projector.0.weight, this run's network has \d+; it is of another network"
    ):
        checkpoint.load_checkpoint(folder, other)
