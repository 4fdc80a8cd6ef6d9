"""Foreign WebDataset shards: indexed unchanged, read like built shards, unusable samples excluded with their reason."""

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
from data_pipeline.shards.index import index_one, index_shards, modality_and_grid
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.remote import Access
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
def test_indexed_shards_give_the_payloads_that_webdataset_reads(tmp_path, ending):
    voxels = foreign(tmp_path / "tars", ending)
    before = sums(tmp_path / "tars")
    index = index_shards(str(tmp_path / "tars"), tmp_path / "index", spacing=6.0, dataset="bhb")
    assert sums(tmp_path / "tars") == before
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == [
        "manifest.json",
        "quarantine.tsv",
        "scans.parquet",
    ]
    assert set(index.scans["key"]) == set(voxels)
    assert index.grid["shape"] == list(GRID.shape)
    assert index.grid["spacing"] == [6.0, 6.0, 6.0]
    urls = [index.shard_url(row["name"]) for row in index.shards]
    payloads = {sample["__key__"]: sample[ending] for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    for row, key in enumerate(index.scans["key"]):
        volume = index.read_volume(row)
        assert (volume.shape, volume.dtype) == (GRID.shape, np.float16)
        assert np.array_equal(volume, voxels[key].astype(np.float16))
        location = index.scans.loc[row]
        with open(index.shard_url(index.shards[location["shard"]]["name"]), "rb") as tar:
            tar.seek(location["offset"])
            assert tar.read(location["size"]) == payloads[key]


def test_rows_have_the_values_of_their_session_and_a_split_per_participant(tmp_path):
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


def test_an_index_cannot_be_appended_to_or_repaired(tmp_path, capsys):
    foreign(tmp_path / "tars")
    index_shards(str(tmp_path / "tars"), tmp_path / "index", spacing=6.0)
    write_cohort(tmp_path / "cohort", participants=3)
    next((tmp_path / "tars").rglob("*.tar")).unlink()
    for command in (["append", str(tmp_path / "cohort"), str(tmp_path / "index")],
                    ["verify", str(tmp_path / "index"), "--repair", str(tmp_path / "cohort")]):  # fmt: skip
        assert cli.run(["shards", *command]) == 2
        assert "is an index of shards made elsewhere" in capsys.readouterr().err


def test_index_and_tars_can_be_moved_together_and_indexed_again(tmp_path):
    foreign(tmp_path / "a" / "tars")
    index = index_shards(str(tmp_path / "a" / "tars"), tmp_path / "a" / "index", spacing=6.0)
    again = index_shards(str(tmp_path / "a" / "tars"), tmp_path / "a" / "index", spacing=6.0, workers=1)
    assert again.digest == index.digest
    expected = index.read_volume(5)
    (tmp_path / "a").rename(tmp_path / "b")
    assert np.array_equal(Manifest.load(tmp_path / "b" / "index").read_volume(5), expected)


def test_the_loader_gives_batches_from_an_index(tmp_path):
    voxels = foreign(tmp_path / "tars")
    index = index_shards(str(tmp_path / "tars"), tmp_path / "index", spacing=6.0)
    rows = index.rows()
    loader = TwoViewLoader(index, rows=rows, global_batch=6, augmentation="none", workers=2)
    try:
        batch = next(loader)
    finally:
        loader.close()
    for place, row in enumerate(batch["scan"].tolist()):
        expected = zscore(voxels[index.scans.at[row, "key"]].astype(np.float16))
        np.testing.assert_allclose(batch["views"][1, place, 0].numpy(), expected, atol=3e-6)
    ((_, first), *_) = volumes(index, rows, 6)
    assert torch.isfinite(first).all()


def test_tars_on_a_web_server_are_indexed_and_read_remotely(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    foreign(tmp_path / "served" / "tars", participants=4)
    local = index_shards(str(tmp_path / "served" / "tars"), tmp_path / "served" / "index", spacing=6.0)
    with range_server(tmp_path / "served") as server:
        remote = index_shards(f"{server.url}/tars", tmp_path / "index", spacing=6.0)
        assert remote.scans.equals(local.scans)
        assert [row["sha256"] for row in remote.shards] == [row["sha256"] for row in local.shards]
        assert np.array_equal(remote.read_volume(3), local.read_volume(3))
        moved = Manifest.load(f"{server.url}/index", Access(cache=str(tmp_path / "cache")))
        assert moved.shards_root == f"{server.url}/tars"
        assert np.array_equal(moved.read_volume(3), local.read_volume(3))


def test_unusable_samples_are_quarantined_with_their_reason(tmp_path, capsys):
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
        "bhb_sub-001_ses-1_run-1": (npy(good), "its key appears twice"),
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
    index = Manifest.load(tmp_path / "index")
    assert len(index.scans) + len(quarantine) == index.settings["scans_found"]
    assert all(index.read_volume(row).shape == GRID.shape for row in range(len(index.scans)))
    assert cli.run(["shards", "verify", str(tmp_path / "index")]) == 0


def test_the_affine_of_most_members_gives_the_grid_and_others_are_excluded(tmp_path):
    foreign(tmp_path / "tars", "nii.gz", participants=5)
    shifted = np.array(GRID.affine)
    shifted[0, 3] += 3
    write_tar(tmp_path / "tars" / "z.tar", [("bhb_sub-001_ses-1_run-2.nii", nii(blob(1, 30.0), shifted))])
    index = index_shards(str(tmp_path / "tars"), tmp_path / "index")
    assert index.grid == GRID.to_dict()
    reason = pd.read_csv(tmp_path / "index" / "quarantine.tsv", sep="\t")["reason"].item()
    assert reason.startswith("grid 14x16x12 of (6.0, 6.0, 6.0) mm at (-36, -60, -30), the data set's is 14x16x12 of")
    with pytest.raises(UserError, match=r"--spacing=2.0, but the members' affine has \(6.0, 6.0, 6.0\) mm"):
        index_shards(str(tmp_path / "tars"), tmp_path / "other", spacing=2.0)


def test_standard_shapes_give_modality_and_grid():
    for shape, box in ARRAY_BOXES.items():
        assert modality_and_grid((shape, None), None) == (box.modality, array_grid(shape), box.orientation)
    vbm, quasiraw = (modality_and_grid((shape, None), None)[1] for shape in ((121, 145, 121), (182, 218, 182)))
    assert (vbm.spacing, quasiraw.spacing) == ((1.5, 1.5, 1.5), (1.0, 1.0, 1.0))
    # The anterior commissure, world (0, 0, 0), lies inside both.
    for grid in (vbm, quasiraw):
        origin = np.linalg.inv(np.array(grid.affine))[:3, 3]
        assert np.all(origin > 0)
        assert np.all(origin < np.array(grid.shape))


@pytest.mark.parametrize("order", ["RAS", "LAS", "PIR"])
def test_arrays_of_any_orientation_are_read_as_the_same_brain(tmp_path, order):
    turn = nibabel.orientations.ornt_transform(*(nibabel.orientations.axcodes2ornt(o) for o in ("RAS", order)))
    brain = np.arange(4 * 5 * 6, dtype=np.float16).reshape(4, 5, 6)
    stored = io.BytesIO()
    np.save(stored, nibabel.orientations.apply_orientation(brain, turn))
    write_tar(tmp_path / "tars" / "0.tar", [("a_sub-1_ses-1.npy", stored.getvalue())])
    (tmp_path / "tars" / "participants.tsv").write_text("participant_id\tage\n1\t30\n")
    index = index_shards(str(tmp_path / "tars"), tmp_path / "index", spacing=6.0, orientation=order)
    assert index.grid["shape"] == [4, 5, 6]
    assert np.array_equal(index.read_volume(0), brain)


def test_a_quasi_raw_array_is_the_same_from_an_index_and_from_a_file(tmp_path):
    brain = np.zeros((182, 218, 182), dtype=np.float32)
    brain[10:60, 50:90, 20:40] = 1.0
    np.save(tmp_path / "scan.npy", brain)
    write_tar(tmp_path / "tars" / "0.tar", [("a_sub-1_ses-1.npy", (tmp_path / "scan.npy").read_bytes())])
    (tmp_path / "tars" / "participants.tsv").write_text("participant_id\tage\n1\t30\n")
    index = index_shards(str(tmp_path / "tars"), tmp_path / "index")
    grid = array_grid(brain.shape)
    assert index.grid == grid.to_dict()
    assert np.array_equal(index.read_volume(0), load_volume(tmp_path / "scan.npy", grid))


def test_a_sequential_reader_reads_indexed_shards_in_place(tmp_path):
    foreign(tmp_path / "tars", "npy.zst")
    index = index_shards(str(tmp_path / "tars"), tmp_path / "index", spacing=6.0, modality="t1w")
    rows = np.arange(len(index.scans))
    source = open_stream(
        index, rows, "stream", load_augmentation("none"), seed=0, batch=4, rank=0, world_size=1, buffer=4
    )
    for sample in source.samples(0, range(4)):
        assert not sample.bad
        assert np.array_equal(sample.arrays[0][..., 0], index.read_volume(sample.row))


def test_an_invalid_command_is_rejected_with_one_line(tmp_path, capsys):
    foreign(tmp_path / "tars", participants=3)
    (tmp_path / "empty").mkdir()
    for arguments, text in (
        ([str(tmp_path / "tars")], "members are arrays of shape 14x16x12, whose voxel size is unknown"),
        ([str(tmp_path / "none")], "is not a folder"),
        ([str(tmp_path / "empty")], "has no .tar file"),
        ([str(tmp_path / "tars"), "--spacing", "60"], "--spacing=60.0 is not in 0.1..20 mm"),
        ([str(tmp_path / "tars"), "--participants", str(tmp_path / "p.tsv")], "p.tsv is missing"),
        ([str(tmp_path / "tars"), "--key-pattern", "x"], "it needs (?P<participant_id>...)"),
    ):
        assert cli.run(["shards", "index", *arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_the_manifest_of_built_shards_is_never_overwritten(manifest, capsys):
    before = (manifest.root / "manifest.json").read_bytes()
    assert cli.run(["shards", "index", str(manifest.root), "--out", str(manifest.root)]) == 2
    assert re.search("holds shards built by yaware", capsys.readouterr().err)
    assert (manifest.root / "manifest.json").read_bytes() == before


def test_indexing_built_shards_gives_the_locations_that_the_build_wrote(manifest, cohort, tmp_path):
    index = index_shards(
        str(manifest.root), tmp_path / "index", participants=str(cohort / "participants.tsv"), spacing=6.0
    )
    assert not index.settings["quarantined"]
    columns = "key shard offset size crc32c participant_id session age sex site tiv"
    for column in columns.split():
        assert index.scans[column].tolist() == manifest.scans[column].tolist()
    for indexed, built in zip(index.shards, manifest.shards, strict=True):
        assert all(indexed[name] == built[name] for name in ("name", "bytes", "sha256"))


def test_a_tar_is_read_once_from_beginning_to_end(tmp_path):
    foreign(tmp_path / "tars", participants=2)
    path = next((tmp_path / "tars").rglob("*.tar"))
    shard = index_one(str(path), Access())
    assert (shard.size, shard.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(shard.members) == 4
