"""Continuing an interrupted build: which leftovers are kept, and which are built again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_pipeline.cohort.scan import Scan
from data_pipeline.quality.rules import Quality
from data_pipeline.shards import unfinished, writing
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.verify import find_problems
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.preparation import Preparation
from infra import cli, ray_cluster
from infra.errors import UserError
from tests.cohorts import GRID, blob, write_cohort

PER_SHARD = 4


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_cluster.session(2):
        yield


@pytest.fixture
def people(tmp_path):
    return write_cohort(tmp_path / "people", participants=24)


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, cohort: Path, out: Path, after: int = 3, **options) -> dict[str, int]:
    """Interrupt a build after ``after`` shards; return the inodes of the finished shards."""
    real, seen = writing.Progress.advance, []

    def advance(self, n=1, **counts):
        real(self, n, **counts)
        seen.append(n)
        if len(seen) == after:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(writing.Progress, "advance", advance)
        with pytest.raises(Interrupted):
            build_shards(cohort, out, **{"scans_per_shard": PER_SHARD, **options})
    assert not (out / "manifest.json").exists()
    names = [path.name.removeprefix(".unfinished-").removesuffix(".json") for path in out.glob(".unfinished-*.json")]
    # A worker may have been stopped after writing a record and before renaming its shard.
    finished = {name: (out / name).stat().st_ino for name in names if (out / name).exists()}
    assert len(finished) >= after
    return finished


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kept(out: Path, before: dict[str, int]) -> list[str]:
    return sorted(name for name, inode in before.items() if (out / name).stat().st_ino == inode)


def scan_in(out: Path, people: Path, name: str) -> Path:
    """The NIfTI file of a scan in a finished shard of an unfinished build."""
    key = unfinished.record_path(out, name).read_text().partition('"key": "')[2].partition('"')[0]
    return next((people / key.split("_")[1]).rglob("*.nii.gz"))


def test_finished_shards_are_kept_and_the_result_is_byte_identical(people, tmp_path, monkeypatch):
    out = tmp_path / "out"
    before = interrupt(monkeypatch, people, out)
    build_shards(people, out, scans_per_shard=PER_SHARD)
    assert kept(out, before) == sorted(before)
    build_shards(people, tmp_path / "whole", scans_per_shard=PER_SHARD)
    assert files(out) == files(tmp_path / "whole")
    assert not list(out.glob(".*"))


def test_a_file_that_changed_meanwhile_is_read_again(people, tmp_path, monkeypatch):
    out = tmp_path / "out"
    before = interrupt(monkeypatch, people, out)
    name = sorted(before)[1]
    path = scan_in(out, people, name)
    stamps = path.stat()
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(blob(99, 50.0), image.affine), path)
    os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))  # like a copy that preserves times
    build_shards(people, out, scans_per_shard=PER_SHARD)
    assert kept(out, before) == [n for n in sorted(before) if n != name]
    build_shards(people, tmp_path / "whole", scans_per_shard=PER_SHARD)
    assert files(out) == files(tmp_path / "whole")


def test_a_row_that_changed_meanwhile_is_written_again(people, tmp_path, monkeypatch):
    out = tmp_path / "out"
    before = interrupt(monkeypatch, people, out)
    name = sorted(before)[0]
    participant = scan_in(out, people, name).parents[2].name
    lines = (people / "participants.tsv").read_text().splitlines()
    edited = [
        line.replace("\tF\t", "\tO\t").replace("\tM\t", "\tO\t") if participant in line else line for line in lines
    ]
    (people / "participants.tsv").write_text("\n".join(edited) + "\n")
    built = build_shards(people, out, scans_per_shard=PER_SHARD)
    assert kept(out, before) == sorted(before)[1:]
    assert (built.scans.loc[built.scans["participant_id"] == participant[4:], "sex"] == "O").all()
    assert files(out) == files(build_shards(people, tmp_path / "whole", scans_per_shard=PER_SHARD).root)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"scans_per_shard": 10},
        {"codec": "npy"},
        {"scaling": "tiv"},
        {"dataset": "other"},
        {"grid": "coarse"},
    ],
    ids=str,
)
def test_other_settings_start_over_and_leave_nothing_of_the_first_build(people, tmp_path, monkeypatch, options):
    if "grid" in options:
        options = {"grid": Grid.of((7, 8, 6), np.array(GRID.affine) * np.array([[2.0, 2, 2, 1]] * 4))}
    out = tmp_path / "out"
    before = interrupt(monkeypatch, people, out)
    arguments = {"scans_per_shard": PER_SHARD, **options}
    build_shards(people, out, **arguments)
    assert not [name for name in before if (out / name).exists() and (out / name).stat().st_ino == before[name]]
    assert files(out) == files(build_shards(people, tmp_path / "whole", **arguments).root)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "record"])
def test_a_damaged_leftover_is_built_again(people, tmp_path, monkeypatch, damage):
    out = tmp_path / "out"
    before = interrupt(monkeypatch, people, out)
    name = sorted(before)[0]
    path = out / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[700] ^= 1
        path.write_bytes(bytes(content))
    elif damage == "truncate":
        path.write_bytes(bytes(content[:-1]))
    elif damage == "remove":
        path.unlink()
    else:
        unfinished.record_path(out, name).write_text("{")
    build_shards(people, out, scans_per_shard=PER_SHARD)
    assert files(out) == files(build_shards(people, tmp_path / "whole", scans_per_shard=PER_SHARD).root)


def test_a_cohort_without_usable_scans_is_rejected_and_leaves_no_shard(people, tmp_path, monkeypatch):
    for path in people.rglob("*.nii.gz"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="no scan could be used"):
        build_shards(people, tmp_path / "out", scans_per_shard=PER_SHARD)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_build_killed_before_its_clean_up_counts_as_finished(people, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "remove_leftovers", lambda folder, keep=(): None)
        build_shards(people, out)
    assert list(out.glob(".unfinished-*.json"))
    assert cli.run(["shards", "build", str(people), str(out)]) == 0
    assert "already built" in capsys.readouterr().out
    assert not list(out.glob(".unfinished-*"))
    assert find_problems(Manifest.load(out)) == {}


def test_a_second_build_in_the_same_folder_is_rejected(people, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with unfinished.locked(out):
        assert cli.run(["shards", "build", str(people), str(out)]) == 2
    assert "is being written by another yaware command" in capsys.readouterr().err
    assert cli.run(["shards", "build", str(people), str(out)]) == 0


def test_a_worker_that_outlives_its_driver_cannot_replace_a_shard(people, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    scans = [Scan(path, "d", path.name[4:7]) for path in sorted(people.rglob("*.nii.gz"))[:2]]
    with unfinished.build_folder(out, ["d-000000.tar"]) as old:
        task = writing.ShardTask(
            scans=scans,
            out=str(out),
            temporary=str(old),
            name="d-000000.tar",
            preparation=Preparation(GRID),
            codec="zst",
            quality=Quality(),
        )
        (out / "d-000000.tar").write_bytes(b"of the new driver")
        shutil.rmtree(old)  # the first action of the new driver
        with pytest.raises(FileNotFoundError):
            writing.build_one(task)
    assert (out / "d-000000.tar").read_bytes() == b"of the new driver"
    assert not list(out.glob(".unfinished-*"))


def test_what_a_build_left_that_was_killed_in_its_last_second_is_removed_and_told(tmp_path, capfd):
    from data_pipeline.shards import unfinished

    names = ["a-000000.tar", "a-000001.tar"]
    gone = [".coarse-a-000000.tar.npy", ".coarse-a-000001.tar.npy", "..coarse-a-000000.tar.npy.x1.tmp",
            "..coarse-a-000001.tar.npy.x2.new", ".coarse-a-000007.tar.npy", ".unfinished-a-000001.tar.json"]  # fmt: skip
    kept = [".unfinished-a-000002.tar.json", ".coarse-a-000002.tar.npy", "a-000000.tar", "manifest.json"]
    for name in (*gone, *kept):
        (tmp_path / name).write_bytes(b"x")
    with unfinished.locked(tmp_path):  # another command works here: only what the manifest lists is surely left over
        unfinished.remove_records(tmp_path, names)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, *gone[2:5]}
    unfinished.remove_records(tmp_path, names)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
    assert f"removed 3 files that a killed build left in {tmp_path}" in capfd.readouterr().err
    unfinished.remove_records(tmp_path, names)
    assert capfd.readouterr().err == ""


def test_the_next_build_removes_files_of_one_that_was_killed_before_it_locked_them(tmp_path):
    from data_pipeline.shards import unfinished

    half_written = ["..coarse-a-000000.tar.npy.x2.new", ".manifest.json.x3.new", ".scans-1.parquet.x4.new"]
    for name in (*half_written, ".manifest.json.bak", "notes.new"):
        (tmp_path / name).write_bytes(b"")
    unfinished.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".manifest.json.bak", "notes.new"}
