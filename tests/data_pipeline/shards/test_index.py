"""Foreign WebDataset shards: indexed as they are, read like our own, and what cannot be used left out with its reason."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
import webdataset
import zstandard

from data_pipeline.loading.augment import load_augmentation
from data_pipeline.loading.loader import TwoViewLoader, volumes
from data_pipeline.loading.stream import open_stream
from data_pipeline.shards.index import _grid, index_one, index_shards
from data_pipeline.shards.index_table import check_pattern, parse_key, read_people
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.remote import Access
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import ARRAY_BOXES, array_grid
from data_pipeline.volume.intensity import zscore
from data_pipeline.volume.load import load_volume
from infra import cli, ray_cluster
from infra.errors import UserError
from tests.cohorts import GRID, blob, write_cohort
from tests.servers import range_server

TABLE = "participant_id\tsession\tage\tsex\tsite\tdiagnosis\n"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_cluster.session(2):
        yield


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def nii(array, affine=GRID.affine) -> bytes:
    return nibabel.Nifti1Image(array, np.array(affine)).to_bytes()


PACK = {
    "npy": lambda a: npy(a[None, None].astype(np.float64)),
    "npy.gz": lambda a: gzip.compress(npy(a[None])),
    "npy.zst": lambda a: zstandard.ZstdCompressor(write_content_size=False).compress(npy(a)),
    "nii.gz": lambda a: gzip.compress(nii(a)),
    "nii": nii,
}


def write_tar(path, members) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def foreign(root, ending="npy.gz", participants=12, per_tar=4, key="bhb_sub-{p}_ses-{s}_run-1"):
    """Tars in two folders, a table with a row per session, and each key's voxels."""
    voxels = {key.format(p=f"{n:03d}", s=s): blob(10 * n + s, 20 + 4 * n) for n in range(participants) for s in (1, 2)}
    keys = list(voxels)
    for number, first in enumerate(range(0, len(keys), per_tar)):
        members = []
        for name in keys[first : first + per_tar]:
            members += [(f"{name}.json", b"{}"), (f"{name}.{ending}", PACK[ending](voxels[name]))]
        write_tar(root / f"part-{number % 2}" / f"{number:04d}.tar", members)
    rows = [
        f"sub-{n:03d}\tses-{s}\t{20 + 4 * n + s / 2}\t{'FM'[n % 2]}\tsite{n % 3}\t{'AD' if n % 5 == 0 else 'control'}"
        for n in range(participants)
        for s in (1, 2)
    ]
    (root / "participants.tsv").write_text(TABLE + "\n".join(rows) + "\n")
    return voxels


def sums(root):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*.tar"))}


@pytest.mark.parametrize("ending", PACK)
def test_indexed_shards_read_as_webdataset_itself_reads_them(tmp_path, ending):
    voxels = foreign(tmp_path / "tars", ending)
    before = sums(tmp_path / "tars")
    found = index_shards(str(tmp_path / "tars"), tmp_path / "index", spacing=6.0, dataset="bhb")
    assert sums(tmp_path / "tars") == before
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == [
        "manifest.json",
        "quarantine.tsv",
        "scans.parquet",
    ]
    assert set(found.scans["key"]) == set(voxels)
    assert found.grid["shape"] == list(GRID.shape)
    assert found.grid["spacing"] == [6.0, 6.0, 6.0]
    urls = [found.shard_url(row["name"]) for row in found.shards]
    theirs = {sample["__key__"]: sample[ending] for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    for row, key in enumerate(found.scans["key"]):
        mine = found.read_volume(row)
        assert (mine.shape, mine.dtype) == (GRID.shape, np.float16)
        assert np.array_equal(mine, voxels[key].astype(np.float16))
        payload, at = theirs[key], found.scans.loc[row]
        with open(found.shard_url(found.shards[at["shard"]]["name"]), "rb") as tar:
            tar.seek(at["offset"])
            assert tar.read(at["size"]) == payload


def test_rows_have_the_tables_values_of_their_session_and_splits_by_participant(tmp_path):
    foreign(tmp_path / "tars")
    scans = index_shards(str(tmp_path / "tars"), tmp_path / "tars", spacing=6.0).scans
    scan = scans[scans["key"] == "bhb_sub-007_ses-2_run-1"].iloc[0]
    values = [scan[name] for name in ("participant_id", "session", "run", "dataset", "age", "sex", "site", "diagnosis")]
    assert values == ["007", "2", "1", "bhb", 49.0, "M", "site1", "control"]
    assert scans.groupby("participant_id")["split"].nunique().max() == 1
    assert set(scans[scans["diagnosis"] == "AD"]["split"]) == {"downstream"}


def test_the_commands_work_on_an_index(tmp_path, capsys):
    foreign(tmp_path / "tars")
    index, tars = str(tmp_path / "index"), str(tmp_path / "tars")
    assert cli.run(["shards", "index", tars, "--out", index, "--spacing", "6", "--modality", "t1w"]) == 0
    printed = capsys.readouterr().out
    assert "indexed: 24 scans in 6 shards" in printed
    assert "indexing: 6/6 shards" in printed
    assert cli.run(["shards", "info", index]) == 0
    assert "24 of 12 participants in 6 shards" in capsys.readouterr().out
    assert cli.run(["shards", "verify", index]) == 0
    assert cli.run(["shards", "preview", index, "--scans", "2"]) == 0
    assert (tmp_path / "index" / "preview.png").is_file()
    first = next((tmp_path / "tars").rglob("*.tar"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    capsys.readouterr()
    assert cli.run(["shards", "verify", index]) == 1
    assert f"{first.parent.name}/{first.name}: damaged: content differs from its checksum" in capsys.readouterr().out


def test_an_index_is_neither_appended_to_nor_repaired(tmp_path, capsys):
    foreign(tmp_path / "tars")
    index_shards(str(tmp_path / "tars"), tmp_path / "index", spacing=6.0)
    write_cohort(tmp_path / "cohort", participants=3)
    next((tmp_path / "tars").rglob("*.tar")).unlink()
    for command in (["append", str(tmp_path / "cohort"), str(tmp_path / "index")],
                    ["verify", str(tmp_path / "index"), "--repair", str(tmp_path / "cohort")]):  # fmt: skip
        assert cli.run(["shards", *command]) == 2
        assert "is an index of shards made elsewhere" in capsys.readouterr().err


def test_index_and_tars_can_be_moved_together_and_the_index_made_again(tmp_path):
    foreign(tmp_path / "a" / "tars")
    found = index_shards(str(tmp_path / "a" / "tars"), tmp_path / "a" / "index", spacing=6.0)
    again = index_shards(str(tmp_path / "a" / "tars"), tmp_path / "a" / "index", spacing=6.0, workers=1)
    assert again.digest == found.digest
    expected = found.read_volume(5)
    (tmp_path / "a").rename(tmp_path / "b")
    assert np.array_equal(Manifest.load(tmp_path / "b" / "index").read_volume(5), expected)


def test_the_loader_gives_batches_from_an_index(tmp_path):
    voxels = foreign(tmp_path / "tars")
    found = index_shards(str(tmp_path / "tars"), tmp_path / "index", spacing=6.0)
    rows = found.rows()
    loader = TwoViewLoader(found, rows=rows, global_batch=6, augmentation="none", workers=2)
    try:
        batch = next(loader)
    finally:
        loader.close()
    for place, row in enumerate(batch["scan"].tolist()):
        expected = zscore(voxels[found.scans.at[row, "key"]].astype(np.float16))
        np.testing.assert_allclose(batch["views"][1, place, 0].numpy(), expected, atol=3e-6)
    ((_, first), *_) = volumes(found, rows, 6)
    assert torch.isfinite(first).all()


def test_tars_on_a_web_server_are_indexed_and_read_from_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    foreign(tmp_path / "served" / "tars", participants=4)
    here = index_shards(str(tmp_path / "served" / "tars"), tmp_path / "served" / "index", spacing=6.0)
    with range_server(tmp_path / "served") as server:
        there = index_shards(f"{server.url}/tars", tmp_path / "index", spacing=6.0)
        assert there.scans.equals(here.scans)
        assert [row["sha256"] for row in there.shards] == [row["sha256"] for row in here.shards]
        assert np.array_equal(there.read_volume(3), here.read_volume(3))
        moved = Manifest.load(f"{server.url}/index", Access(cache=str(tmp_path / "cache")))
        assert moved.shards_root == f"{server.url}/tars"
        assert np.array_equal(moved.read_volume(3), here.read_volume(3))


def test_what_cannot_be_used_is_quarantined_with_its_reason(tmp_path, capsys):
    foreign(tmp_path / "tars", participants=6)
    good = blob(1, 30.0)
    members = {
        "bhb_sub-000_ses-1_run-2": (npy(good[:, :, :-1]), "grid 14x16x11, the data set's is 14x16x12"),
        "bhb_sub-000_ses-1_run-3": (npy(np.full_like(good, np.nan)), "2688 voxels are NaN or infinite"),
        "bhb_sub-000_ses-1_run-4": (npy(np.ones_like(good)), "every voxel is 1"),
        "bhb_sub-000_ses-1_run-5": (npy(np.stack([good, good])), "shape (2, 14, 16, 12) is not one 3D volume"),
        "bhb_sub-000_ses-1_run-6": (npy(good)[:-100], "unreadable: ValueError"),
        "bhb_sub-999_ses-1": (npy(good), "participant_id 999, session 1, dataset bhb is not in participants.tsv"),
        "bhb_sub-001_ses-9": (npy(good), "participant_id 001, session 9, dataset bhb is not in participants.tsv"),
        "nobody": (npy(good), "its key names no participant"),
        "bhb_sub-001_ses-1_run-1": (npy(good), "its key is there twice"),
        "bhb_sub-003_desc-1.5mm": (npy(good), "member ends in .5mm.npy"),
    }
    write_tar(tmp_path / "tars" / "z.tar", [(f"{key}.npy", content) for key, (content, _) in members.items()])
    write_tar(tmp_path / "tars" / "masks.tar", [("bhb_sub-001.mask", b"1")])
    cut = (tmp_path / "tars" / "part-0" / "0000.tar").read_bytes()
    (tmp_path / "tars" / "cut.tar").write_bytes(cut.replace(b"_run-1", b"_run-9")[: len(cut) // 2])
    (tmp_path / "tars" / "none.tar").write_bytes(b"no tar at all")
    assert cli.run(["shards", "index", str(tmp_path / "tars"), "--out", str(tmp_path / "index"), "--spacing", "6"]) == 0
    quarantine = pd.read_csv(tmp_path / "index" / "quarantine.tsv", sep="\t", keep_default_na=False)
    reasons = dict(zip(quarantine["key"], quarantine["reason"], strict=True))
    for key, (_, reason) in members.items():
        name = key.partition(".")[0]
        assert reason in reasons[name], (key, reasons)
    whole = quarantine[quarantine["key"] == ""].set_index("path")["reason"]
    assert "no member ends in" in whole["masks.tar"]
    assert "cannot be read beyond" in whole["cut.tar"]
    assert "cannot be read beyond its beginning" in whole["none.tar"]
    assert f"{len(quarantine)} samples were excluded" in capsys.readouterr().out
    found = Manifest.load(tmp_path / "index")
    assert len(found.scans) + len(quarantine) == found.settings["scans_found"]
    assert all(found.read_volume(row).shape == GRID.shape for row in range(len(found.scans)))
    assert cli.run(["shards", "verify", str(tmp_path / "index")]) == 0


def test_an_affine_tells_the_grid_and_another_one_is_left_out(tmp_path):
    foreign(tmp_path / "tars", "nii.gz", participants=5)
    shifted = np.array(GRID.affine)
    shifted[0, 3] += 3
    write_tar(tmp_path / "tars" / "z.tar", [("bhb_sub-001_ses-1_run-2.nii", nii(blob(1, 30.0), shifted))])
    found = index_shards(str(tmp_path / "tars"), tmp_path / "index")
    assert found.grid == GRID.to_dict()
    reason = pd.read_csv(tmp_path / "index" / "quarantine.tsv", sep="\t")["reason"].item()
    assert reason.startswith("grid 14x16x12 of (6.0, 6.0, 6.0) mm at (-36, -60, -30), the data set's is 14x16x12 of")
    with pytest.raises(UserError, match=r"--spacing=2.0, but the members' affine says \(6.0, 6.0, 6.0\) mm"):
        index_shards(str(tmp_path / "tars"), tmp_path / "other", spacing=2.0)


def test_known_shapes_tell_modality_and_grid():
    for shape, box in ARRAY_BOXES.items():
        assert _grid((shape, None), None) == (box.modality, array_grid(shape), box.orientation)
    vbm, quasiraw = (_grid((shape, None), None)[1] for shape in ((121, 145, 121), (182, 218, 182)))
    assert (vbm.spacing, quasiraw.spacing) == ((1.5, 1.5, 1.5), (1.0, 1.0, 1.0))
    # The anterior commissure, world (0, 0, 0), lies inside both.
    for grid in (vbm, quasiraw):
        origin = np.linalg.inv(np.array(grid.affine))[:3, 3]
        assert np.all(origin > 0)
        assert np.all(origin < np.array(grid.shape))


@pytest.mark.parametrize("order", ["RAS", "LAS", "PIR"])
def test_arrays_of_any_order_of_axes_are_read_as_the_same_brain(tmp_path, order):
    turn = nibabel.orientations.ornt_transform(*(nibabel.orientations.axcodes2ornt(o) for o in ("RAS", order)))
    brain = np.arange(4 * 5 * 6, dtype=np.float16).reshape(4, 5, 6)
    stored = io.BytesIO()
    np.save(stored, nibabel.orientations.apply_orientation(brain, turn))
    write_tar(tmp_path / "tars" / "0.tar", [("a_sub-1_ses-1.npy", stored.getvalue())])
    (tmp_path / "tars" / "participants.tsv").write_text("participant_id\tage\n1\t30\n")
    found = index_shards(str(tmp_path / "tars"), tmp_path / "index", spacing=6.0, orientation=order)
    assert found.grid["shape"] == [4, 5, 6]
    assert np.array_equal(found.read_volume(0), brain)


def test_a_quasi_raw_array_is_the_same_from_an_index_and_from_a_cohort(tmp_path):
    brain = np.zeros((182, 218, 182), dtype=np.float32)
    brain[10:60, 50:90, 20:40] = 1.0
    np.save(tmp_path / "scan.npy", brain)
    write_tar(tmp_path / "tars" / "0.tar", [("a_sub-1_ses-1.npy", (tmp_path / "scan.npy").read_bytes())])
    (tmp_path / "tars" / "participants.tsv").write_text("participant_id\tage\n1\t30\n")
    found = index_shards(str(tmp_path / "tars"), tmp_path / "index")
    grid = array_grid(brain.shape)
    assert found.grid == grid.to_dict()
    assert np.array_equal(found.read_volume(0), load_volume(tmp_path / "scan.npy", grid))


def test_a_sequential_reader_finds_indexed_shards_where_they_lie(tmp_path):
    foreign(tmp_path / "tars", "npy.zst")
    found = index_shards(str(tmp_path / "tars"), tmp_path / "index", spacing=6.0, modality="t1w")
    rows = np.arange(len(found.scans))
    one = open_stream(found, rows, "stream", load_augmentation("none"), seed=0, batch=4, rank=0, world_size=1, buffer=4)
    for sample in one.samples(0, range(4)):
        assert not sample.bad
        assert np.array_equal(sample.arrays[0][..., 0], found.read_volume(sample.row))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("abide_sub-01_ses-2_run-1", ("01", "2", "1", "abide")),
        ("run-1_ses-2_sub-01_dataset-abide", ("01", "2", "1", "abide")),
        ("my-study_sub-01", ("01", None, None, "my-study")),
        ("sub-01/ses-2/sub-01_ses-2_T1w", ("01", "2", None, None)),
        ("subject-01_session-A_study-ixi_desc-gm", ("01", "A", None, "ixi")),
    ],
)
def test_keys_are_read_in_any_order_of_their_entities(key, expected):
    found = parse_key(key)
    assert tuple(found.get(name) for name in ("participant_id", "session", "run", "dataset")) == expected


def test_a_pattern_reads_keys_of_another_make():
    pattern = r"(?P<dataset>\w+?)\.?(?P<participant_id>\d{5})$"
    assert parse_key("ixi00042", pattern) == {"dataset": "ixi", "participant_id": "00042"}
    with pytest.raises(BadScan, match="names no participant"):
        parse_key("ixi42", pattern)
    for wrong, text in (("(", "is no regular expression"), ("(?P<id>.)", r"it needs \(\?P<participant_id>")):
        with pytest.raises(UserError, match=text):
            check_pattern(wrong)


def test_a_row_is_found_for_its_scan_alone_and_never_guessed():
    rows = ["participant_id study ses age sex iq", "sub-1 a 1 20 F 3", "sub-1 a 2 22 F n/a", "sub-1 b n/a 60 male 4"]
    text = "\n".join(rows).replace(" ", "\t")
    people = read_people(text.encode(), "x/participants.tsv")
    assert people.find({"participant_id": "1", "session": "2", "dataset": "a"})["age"] == 22
    assert people.find({"participant_id": "1", "session": "7", "dataset": "b"}) == {
        "dataset": "b", "age": 60.0, "sex": "M", "iq": 4.0,
    }  # fmt: skip
    for entities, reason in (
        ({"participant_id": "1", "dataset": "a"}, "has 2 different rows in participants.tsv"),
        ({"participant_id": "1", "session": "1"}, "has 2 different rows"),
        ({"participant_id": "1", "dataset": "c"}, "is not in participants.tsv"),
        ({"participant_id": "01"}, "is not in participants.tsv"),
    ):
        with pytest.raises(BadScan, match=reason):
            people.find(entities)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subject\tage\n1\t3\n", "has no column participant_id; found: subject, age"),
        ("participant_id\tage\n1\ttwenty\n", "line 2: age='twenty' is not a number of years"),
        ("participant_id\tage\n1\t999\n", "line 2: age='999' is not a number of years in 0..130"),
        ("participant_id\tsex\n1\tF\n2\t1\n", "line 3: sex='1' is not F, M, O"),
        ("participant_id\tses\tsession_id\n1\t1\t1\n", "has several columns for session"),
    ],
)
def test_a_wrong_table_is_one_clear_line(text, message):
    with pytest.raises(UserError, match=message):
        read_people(text.encode(), "participants.tsv")


def test_wrong_requests_are_one_clear_line(tmp_path, capsys):
    foreign(tmp_path / "tars", participants=3)
    (tmp_path / "empty").mkdir()
    for given, text in (
        ([str(tmp_path / "tars")], "members are arrays of shape 14x16x12, which tells no voxel size"),
        ([str(tmp_path / "none")], "is not a folder"),
        ([str(tmp_path / "empty")], "has no .tar file"),
        ([str(tmp_path / "tars"), "--spacing", "60"], "--spacing=60.0 is not in 0.1..20 mm"),
        ([str(tmp_path / "tars"), "--participants", str(tmp_path / "p.tsv")], "p.tsv is missing"),
        ([str(tmp_path / "tars"), "--key-pattern", "x"], "it needs (?P<participant_id>...)"),
    ):
        assert cli.run(["shards", "index", *given, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_shards_that_yaware_built_keep_their_manifest(manifest, capsys):
    before = (manifest.root / "manifest.json").read_bytes()
    assert cli.run(["shards", "index", str(manifest.root), "--out", str(manifest.root)]) == 2
    assert re.search("holds shards that yaware built", capsys.readouterr().err)
    assert (manifest.root / "manifest.json").read_bytes() == before


def test_our_own_shards_indexed_elsewhere_give_the_places_that_the_build_wrote(manifest, cohort, tmp_path):
    found = index_shards(
        str(manifest.root), tmp_path / "index", participants=str(cohort / "participants.tsv"), spacing=6.0
    )
    assert not found.settings["quarantined"]
    for column in (
        "key",
        "shard",
        "offset",
        "size",
        "crc32c",
        "participant_id",
        "session",
        "age",
        "sex",
        "site",
        "tiv",
    ):
        assert found.scans[column].tolist() == manifest.scans[column].tolist()
    for mine, theirs in zip(found.shards, manifest.shards, strict=True):
        assert (mine["name"], mine["bytes"], mine["sha256"]) == (theirs["name"], theirs["bytes"], theirs["sha256"])


def test_a_tar_is_read_once_and_forward(tmp_path):
    foreign(tmp_path / "tars", participants=2)
    path = next((tmp_path / "tars").rglob("*.tar"))
    shard = index_one(str(path), Access())
    assert (shard.size, shard.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(shard.members) == 4
