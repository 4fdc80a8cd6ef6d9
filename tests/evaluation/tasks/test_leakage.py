"""Planted leaks are found and named: a participant's second session, a participant's voxels under another id."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from evaluation.tasks.leakage import check_copies, check_leakage, check_readouts, check_seen
from evaluation.tasks.tasks import load_task
from infra import cli
from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.encoders import build_encoder
from pretrain.run.loop import scans_seen
from pretrain.run.plan import Plan
from pretrain.weights.encoder import Encoder
from pretrain.weights.readouts import Readouts
from pretrain.weights.seen_scans import participants_of, read, source_of, to_json
from pretrain.weights.write import export, write_encoder
from tests.cohorts import write_cohort
from tests.pretrain.weights.encoders import write_encoders_of

OPTIONS = {"width": 0.25, "norm": "group"}


def renamed(folder, out, old, new):
    """Copy a cohort and give one participant another id."""
    shutil.copytree(folder, out)
    for path in sorted(out.rglob(f"*{old}*"), key=lambda path: -len(str(path))):
        path.rename(path.with_name(path.name.replace(old, new)))
    table = out / "participants.tsv"
    table.write_text(table.read_text().replace(old, new))
    return out


def only(folder, out, people, session=None):
    """Copy some participants of a cohort, all their sessions or one."""
    shutil.copytree(folder, out)
    table = (out / "participants.tsv").read_text().splitlines()
    (out / "participants.tsv").write_text(
        "\n".join([table[0], *(r for r in table[1:] if r.split("\t")[0] in people)]) + "\n"
    )
    for path in out.glob("sub-*"):
        if path.name not in people:
            shutil.rmtree(path)
            continue
        for folder_of_session in path.glob("ses-*"):
            if session and folder_of_session.name != session:
                shutil.rmtree(folder_of_session)
    return out


def encoder_of(folder, manifest, rows, seen=True):
    """Export an encoder that was trained on some scans."""
    torch.manual_seed(0)
    config = {
        "encoder": {"name": "resnet18", "options": OPTIONS}, "feature_size": 128, "step": 3, "run_id": None, "run_name": "x",
        "method": "y-aware", "manifest_digest": manifest.digest, "split": ["pretrain"], "version": "0", "simulated": True,
    }  # fmt: skip
    sources = [source_of(manifest, rows)] if seen else []
    preprocessing = {"grid": manifest.grid, "modality": "vbm", "scaling": "none"}
    write_encoder(folder, build_encoder("resnet18", OPTIONS).state_dict(), config, preprocessing, sources)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cohort with two sessions per participant, and an encoder trained on the first session of ten participants."""
    root = tmp_path_factory.mktemp("leaks")
    cohort = write_cohort(root / "tiny", participants=30, sessions=2)
    first = [f"sub-{n:03d}" for n in range(10)]
    trained = build(only(cohort, root / "first" / "tiny", first, "ses-1"), root / "trained")
    manifest = Manifest.load(trained)
    folder = encoder_of(root / "encoder", manifest, np.arange(len(manifest.scans)))
    shutil.rmtree(trained)  # the guard has only the record beside the weights
    return root, cohort, folder


def build(cohort, out):
    build_shards(cohort, out, dataset="tiny", splits={"downstream": 1.0})
    return out


def check(folder, manifest, rows=None):
    rows = np.arange(len(manifest.scans)) if rows is None else rows
    return check_leakage(Encoder.from_pretrained(folder), folder, manifest, rows, "x")


def test_another_session_of_a_training_participant_is_refused(world):
    root, cohort, folder = world
    second = build(
        only(cohort, root / "second" / "tiny", [f"sub-{n:03d}" for n in range(7, 30)], "ses-2"), root / "later"
    )
    manifest = Manifest.load(second)
    with pytest.raises(
        UserError,
        match=r"^x: pretrained on participants of the test scans \(tiny/007, tiny/008, tiny/009\); evaluate on other scans$",
    ):
        check(folder, manifest)
    seen = ["tiny/007", "tiny/008", "tiny/009"]
    others = np.flatnonzero(~np.isin(participants_of(manifest, np.arange(len(manifest.scans))), seen))
    assert check(folder, manifest, others) == {"leakage.checked": "participants, voxels", "leakage.watched": "0"}


def test_the_same_voxels_under_another_id_are_refused(world):
    root, cohort, folder = world
    fresh = only(cohort, root / "fresh" / "tiny", [f"sub-{n:03d}" for n in [4, *range(10, 20)]])
    manifest = Manifest.load(build(renamed(fresh, root / "renamed" / "tiny", "sub-004", "sub-777"), root / "copies"))
    refusal = r"under another name, on voxels of the test participants tiny/777 \(scan tiny_sub-777_ses-1"
    with pytest.raises(UserError, match=refusal):
        check(folder, manifest)
    # The second session alone, which the encoder never saw, is refused too: it is the same participant.
    with pytest.raises(UserError, match=refusal):
        check(folder, manifest, np.flatnonzero(~manifest.scans["key"].str.startswith("tiny_sub-777_ses-1")))
    others = np.flatnonzero(~manifest.scans["key"].str.startswith("tiny_sub-777"))
    assert check(folder, manifest, others)["leakage.checked"] == "participants, voxels"


def test_an_export_keeps_the_record_and_is_not_loaded_without_it(world, tmp_path):
    _, _, folder = world
    out = export(folder, tmp_path / "export")
    seen = json.loads((out / "seen_scans.json").read_text())
    assert len(seen["sources"][0]["participants"]) == 10
    assert "tiny" not in json.dumps(seen)  # digests instead of names
    (out / "seen_scans.json").unlink()
    with pytest.raises(UserError, match="seen_scans.json is missing or differs from checksums.json"):
        Encoder.from_pretrained(out)
    export(folder, tmp_path / "other")
    seen["sources"][0]["participants"].pop()
    (tmp_path / "other" / "seen_scans.json").write_text(json.dumps(seen))
    with pytest.raises(UserError, match="seen_scans.json is missing or differs from checksums.json"):
        Encoder.from_pretrained(tmp_path / "other")


def test_an_encoder_without_the_record_is_checked_by_its_manifest(shards, tmp_path, capsys):
    manifest = Manifest.load(shards)
    folder = encoder_of(tmp_path / "old", manifest, None, seen=False)
    with pytest.raises(UserError, match="pretrained on participants of the test scans"):
        check(folder, manifest, manifest.rows(split="pretrain"))
    assert check(folder, manifest, manifest.rows(split="downstream"))["leakage.checked"] == "participants, voxels"
    elsewhere = encoder_of(
        tmp_path / "elsewhere", type("M", (), {"digest": "0", "grid": manifest.grid}), None, seen=False
    )
    assert check(elsewhere, manifest) == {"leakage.checked": "nothing"}
    assert "has no record of the scans it was trained on" in capsys.readouterr().out


def test_a_task_with_equal_voxels_under_two_ids_is_refused(shards):
    manifest = Manifest.load(shards)
    task = load_task("age", manifest, folds=2)
    check_copies([task], manifest)
    one, other = task.rows[0], task.rows[np.flatnonzero(task.groups != task.groups[0])[0]]
    manifest.scans.loc[other, "voxels_sha256"] = manifest.scans.loc[one, "voxels_sha256"]
    names = sorted(participants_of(manifest, np.array([one, other])))
    several = rf"task age: several participants have the same voxels \({names[0]}, {names[1]}\)"
    with pytest.raises(UserError, match=several):
        check_copies([task], manifest)


def test_a_resumed_run_has_seen_the_scans_of_the_run_it_started_from(world, shards, tmp_path):
    _, _, folder = world
    manifest = Manifest.load(shards)
    recipe = load_recipe(
        "demo-cpu", [f"--run.output={tmp_path}/new", f"--run.resume={folder}", "--monitor.every_epochs=1"]
    )
    plan = Plan.build(recipe, manifest, manifest.rows(split="pretrain"), SimpleNamespace(length=40))
    seen = scans_seen(plan, 3)
    assert [source.role for source in seen[:2]] == ["trained", "trained"]
    assert seen[0] == read(folder)[0]
    assert seen[1] == source_of(manifest, plan.rows)
    # Its own checkpoint passes both records on, even if the old run is deleted.
    encoder = tmp_path / "new" / "checkpoints" / "step-00000003" / "encoder"
    old = Encoder.from_pretrained(folder)
    write_encoder(encoder, old.network.state_dict(), old.config, old.preprocessing, seen)
    (tmp_path / "new" / "checkpoints" / "latest").write_text("step-00000003\n")
    recipe.run.resume = "auto"
    assert [source for source in scans_seen(plan, 4) if source.role == "trained"][:2] == seen[:2]
    assert len(to_json(scans_seen(plan, 4))["sources"]) == len(seen)


def test_people_of_the_readouts_are_refused_by_name_and_by_voxels(tmp_path):
    """Readouts that were fitted to other people than the pretraining, also to scans under another name."""
    cohort = write_cohort(tmp_path / "cohort", 8)
    build_shards(cohort, tmp_path / "shards", splits={"pretrain": 1.0})
    copied = renamed(cohort, tmp_path / "copied", "sub-003", "sub-903")
    build_shards(copied, tmp_path / "other", splits={"pretrain": 1.0})
    manifest, other = Manifest.load(tmp_path / "shards"), Manifest.load(tmp_path / "other")
    rows_of = {str(name): row for row, name in enumerate(manifest.scans["participant_id"])}
    three, four = np.array([rows_of["003"]]), np.array([rows_of["004"]])
    readouts = Readouts({}, "0" * 64, fitted_on=[source_of(manifest, three, "readouts")])
    check_readouts(readouts, manifest, four, "mine")
    with pytest.raises(UserError, match=r"mine: its readouts were fitted on participants .*003.; evaluate on other"):
        check_readouts(readouts, manifest, np.concatenate([three, four]), "mine")
    calibrated = Readouts(
        {}, "0" * 64, fitted_on=[source_of(manifest, four, "readouts"), source_of(manifest, three, "calibration")]
    )
    with pytest.raises(
        UserError, match=r"mine: its readouts were calibrated on participants .*003.; evaluate on other"
    ):
        check_readouts(calibrated, manifest, three, "mine")
    with pytest.raises(UserError, match=r"its readouts were calibrated, under another name, on voxels of .*903"):
        check_readouts(calibrated, other, np.flatnonzero(other.scans["participant_id"] == "903"), "mine")
    renamed_row = np.flatnonzero(other.scans["participant_id"] == "903")
    with pytest.raises(UserError, match=r"its readouts were fitted, under another name, on voxels of .*903"):
        check_readouts(readouts, other, renamed_row, "mine")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("digests")
    cohort = write_cohort(root / "tiny", participants=20)
    build_shards(cohort, root / "shards", splits={"pretrain": 0.5, "downstream": 0.5})
    return root


def test_published_digests_name_nobody_and_find_their_people_elsewhere(shared, tmp_path, capsys):
    manifest, file = Manifest.load(shared / "shards"), tmp_path / "digests.json"
    assert cli.run(["digests", str(shared / "shards"), "--split", "pretrain", "--out", str(file)]) == 0
    trained = manifest.rows(split=["pretrain"])
    people = set(participants_of(manifest, trained))
    assert f"{len(people)} people, " in capsys.readouterr().out
    text = file.read_text()
    assert set(json.loads(text)["sources"][0]) == {"manifest_digest", "role", "participants", "voxels"}
    assert not any(name.partition("/")[2] in text for name in people)
    other = manifest.rows(split=["downstream"])
    assert check_seen(file, manifest, other, "table") == {"leakage.checked": "participants, voxels"}
    with pytest.raises(UserError, match="table: pretrained on participants of the test scans"):
        check_seen(file, manifest, trained, "table")
    renamed_cohort = renamed(shared / "tiny", tmp_path / "renamed", sorted(people)[0].partition("/")[2], "zz")
    elsewhere = build_shards(renamed_cohort, tmp_path / "elsewhere", splits={"downstream": 1.0})
    row = np.flatnonzero(elsewhere.scans["participant_id"] == "zz")
    with pytest.raises(UserError, match="pretrained, under another name, on voxels of the test participants"):
        check_seen(file, elsewhere, row, "table")


def test_an_evaluation_of_others_features_takes_the_digests(shared, tmp_path, capsys):
    manifest, file = Manifest.load(shared / "shards"), tmp_path / "digests.json"
    table = tmp_path / "table.tsv"
    table.write_text("key\tf\n" + "".join(f"{key}\t{n % 7}\n" for n, key in enumerate(manifest.scans["key"])))
    assert cli.run(["digests", str(shared / "shards"), "--out", str(file)]) == 0
    command = ["evaluate", "--shards", str(shared / "shards"), "--tasks", "age", "--folds", "2", "--seen", str(file),
               "--tracking-uri", f"sqlite:///{tmp_path / 'm.db'}", "--cache", str(tmp_path)]  # fmt: skip
    assert cli.run([*command, "--features", str(table)]) == 2
    assert "table: pretrained on participants of the test scans" in capsys.readouterr().err
    file.write_text('{"sources": []}')
    assert cli.run([*command, "--features", str(table)]) == 2
    assert "digests.json names nobody that an encoder was trained on" in capsys.readouterr().err
    file.write_text('{"sources": [{}]}')
    assert cli.run([*command, "--features", str(table)]) == 2
    assert "digests.json is damaged" in capsys.readouterr().err
    write_encoders_of(manifest, tmp_path / "encoder")
    assert cli.run([*command, str(tmp_path / "encoder")]) == 2
    assert "is about encoders of others; give features or an encoder with it" in capsys.readouterr().err
    assert cli.run(["digests", str(shared / "shards"), "--split", "nothing", "--out", str(tmp_path / "x.json")]) == 2
    assert cli.run(["digests", str(shared / "shards"), "--query", "age > 500", "--out", str(tmp_path / "x.json")]) == 2
    assert "--query 'age > 500' selects none of the " in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
