"""Privacy of shards: they hold the voxels and the declared columns, no text of headers, and with a key no ids."""

from __future__ import annotations

import gzip
import hashlib
import hmac
import io
import json
import tarfile
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import zstandard

from data_pipeline.cohort.pseudonyms import pseudonym
from data_pipeline.cohort.read import read_cohort
from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.load import load_volume
from infra import cli
from infra.errors import UserError
from tests.cohorts import GRID, blob, write_cohort

PLANTED = "DOEJOHN"


def every_byte(folder: Path) -> list[tuple[str, bytes]]:
    """Every file of a built folder and every member of its shards, as stored and decompressed: (name, bytes)."""
    content = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content.append((path.name, path.read_bytes()))
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    content.append((member.name, member.name.encode()))
                    content.append((member.name, tar.extractfile(member).read()))
        if path.suffix == ".parquet":
            content.append((path.name, pd.read_parquet(path).to_csv().encode()))
    content += [
        (name, zstandard.ZstdDecompressor().decompress(b))
        for name, b in content
        if name.endswith(".zst") and b[:2] == b"(\xb5"
    ]
    return content


def planted_image() -> nibabel.Nifti1Image:
    image = nibabel.Nifti1Image(blob(1, 40.0), np.array(GRID.affine))
    image.header["descrip"] = f"{PLANTED} descrip"
    image.header["db_name"] = PLANTED
    image.header["aux_file"] = f"{PLANTED}.aux"
    image.header["intent_name"] = PLANTED
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", f"patient {PLANTED}".encode()))
    return image


@pytest.mark.parametrize("codec", ["zst", "npy"])
def test_texts_of_headers_are_not_in_the_shards(tmp_path, codec):
    cohort = write_cohort(tmp_path / "cohort", participants=6)
    paths = sorted(cohort.glob("sub-*/**/*.nii.gz"))
    for path in paths:
        nibabel.save(planted_image(), path)
        assert gzip.decompress(path.read_bytes()).count(PLANTED.encode()) == 5
    paths[0].write_bytes(gzip.compress(gzip.decompress(paths[0].read_bytes())[:-5000]))  # its error is reported
    build_shards(cohort, tmp_path / "out", codec=codec)
    content = every_byte(tmp_path / "out")
    assert any(
        len(b) > np.prod(GRID.shape) * 2 and b[1:6] == b"NUMPY" for _, b in content
    )  # the search covered the decompressed voxels
    assert [name for name, b in content if PLANTED.lower().encode() in b.lower()] == []


def test_only_declared_columns_are_in_the_shards(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", participants=5)
    rows = (cohort / "participants.tsv").read_text().splitlines()
    named = [rows[0] + "\tfull_name", *(f"{row}\t{PLANTED}{n}" for n, row in enumerate(rows[1:]))]
    (cohort / "participants.tsv").write_text("\n".join(named) + "\n")
    (tmp_path / "columns.yaml").write_text("columns: {age: age, sex: sex, diagnosis: diagnosis}")
    command = ["shards", "build", str(cohort), str(tmp_path / "out"), "--columns", str(tmp_path / "columns.yaml")]
    assert cli.run(command) == 0
    scans = Manifest.load(tmp_path / "out").scans
    assert not {"full_name", "tiv"} & set(scans.columns)
    assert set(scans["site"]) == {""}
    assert {"age", "sex", "diagnosis"} <= set(scans.columns)
    assert [name for name, b in every_byte(tmp_path / "out") if PLANTED.encode() in b] == []


def secret(tmp_path: Path, content: bytes = b"0123456789abcdef") -> Path:
    path = tmp_path / "key"
    path.write_bytes(content)
    return path


def named_cohort(root: Path) -> Path:
    """A cohort whose ids are names, in folders, files and another column; a scan is damaged, a participant unlisted."""
    write_cohort(root, participants=6, sessions=2)
    rows = (root / "participants.tsv").read_text().splitlines()
    lines = [rows[0] + "\tother_name\tmrn"]
    for n, row in enumerate(rows[1:]):
        lines.append(row.replace(f"sub-{n:03d}", f"sub-{PLANTED}{n}") + f"\told {PLANTED}{n}\t{n}")
        for path in sorted((root / f"sub-{n:03d}").rglob("*.nii.gz")):
            path.rename(path.with_name(path.name.replace(f"sub-{n:03d}", f"sub-{PLANTED}{n}")))
        (root / f"sub-{n:03d}").rename(root / f"sub-{PLANTED}{n}")
    (root / "participants.tsv").write_text("\n".join(lines[:-1]) + "\n")
    cut = next((root / f"sub-{PLANTED}1" / "ses-2").rglob("*.nii.gz"))
    cut.write_bytes(cut.read_bytes()[:400])
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((4, 4, 4, 2)), np.eye(4)), next((root / f"sub-{PLANTED}2" / "ses-1").rglob("*.gz"))
    )
    return root


def test_with_a_key_no_id_and_no_path_is_in_any_output(tmp_path, capsys):
    cohort = named_cohort(tmp_path / "study")
    command = ["shards", "build", str(cohort), str(tmp_path / "out"), "--pseudonymise", str(secret(tmp_path))]
    assert cli.run(command) == 0
    content = every_byte(tmp_path / "out")
    for text in (PLANTED.encode(), str(tmp_path).encode(), b"0123456789abcdef"):
        assert [name for name, b in content if text in b] == []
    assert PLANTED not in "".join(capsys.readouterr())
    manifest = Manifest.load(tmp_path / "out")
    expected = {
        hmac.new(b"0123456789abcdef", f"study/{PLANTED}{n}".encode(), hashlib.sha256).hexdigest()[:12]: n
        for n in range(6)
    }
    scans = manifest.scans
    assert set(scans["participant_id"]) == set(list(expected)[:5])
    assert (
        scans.groupby("participant_id")["session"]
        .apply(list)
        .map(sorted)
        .map(tuple)
        .isin([("1", "2"), ("1",), ("2",)])
        .all()
    )
    for row in range(len(scans)):  # each pseudonym has the right row
        number = expected[scans.at[row, "participant_id"]]
        assert scans.at[row, "age"] == 20 + 60 * number / 5
        assert scans.at[row, "other_name"] == f"old {scans.at[row, 'participant_id']}"
        path = next((cohort / f"sub-{PLANTED}{number}" / f"ses-{scans.at[row, 'session']}").rglob("*.nii.gz"))
        np.testing.assert_array_equal(manifest.read_volume(row), np.asarray(nibabel.load(path).dataobj, np.float16))
    quarantine = pd.read_csv(tmp_path / "out" / "quarantine.tsv", sep="\t")
    assert len(quarantine) == 4
    assert (quarantine["path"] == quarantine["key"] + ".nii.gz").all()
    assert manifest.settings["pseudonymised"] is True


def test_pseudonyms_are_reproducible_and_differ_by_key_and_data_set(tmp_path):
    cohort = write_cohort(tmp_path / "a", participants=8, sessions=2)
    first, again = (read_cohort(cohort, key_file=secret(tmp_path))[0] for _ in range(2))
    assert first == again
    assert [scan.key for scan in first] == sorted(scan.key for scan in first)
    plain = {scan.path: scan.participant_id for scan in read_cohort(cohort)[0]}
    assert {(plain[s.path], s.participant_id) for s in first} == {
        (number, pseudonym(b"0123456789abcdef", "a", number)) for number in set(plain.values())
    }
    ids = {scan.participant_id for scan in first}
    renamed = {s.participant_id for s in read_cohort(cohort, "b", key_file=secret(tmp_path))[0]}
    other_key = {s.participant_id for s in read_cohort(cohort, key_file=secret(tmp_path, b"another key here"))[0]}
    assert len(ids) == len(ids - renamed - other_key) == len(renamed - other_key) == 8


def test_another_key_is_refused_and_the_same_key_keeps_participants_together(tmp_path, capsys):
    cohort, out = write_cohort(tmp_path / "a", participants=6), tmp_path / "out"
    (tmp_path / "other").write_bytes(b"another key here")
    build, append = ["shards", "build", str(cohort), str(out)], ["shards", "append", str(cohort), str(out)]
    key, other = ["--pseudonymise", str(secret(tmp_path))], ["--pseudonymise", str(tmp_path / "other")]
    assert cli.run([*build, *key]) == 0
    before = Manifest.load(out)
    assert cli.run([*build, *other]) == 2
    assert "holds shards built with other settings (pseudonym_key was" in capsys.readouterr().err
    for path in sorted(cohort.rglob("*.nii.gz")):
        second = Path(str(path).replace("ses-1", "ses-2"))
        second.parent.mkdir(parents=True)
        nibabel.save(
            nibabel.Nifti1Image(blob(len(str(path)) + int(path.name[4:7]), 40.0), np.array(GRID.affine)), second
        )
    repair = ["shards", "verify", str(out), "--repair", str(cohort)]
    next(out.glob("*.tar")).rename(tmp_path / "kept.tar")
    for command, text in ((append, "holds pseudonyms of another key than --pseudonymise="), (repair, "of another key")):
        capsys.readouterr()
        assert cli.run([*command, *other]) == 2
        assert text in capsys.readouterr().err
    (tmp_path / "kept.tar").rename(out / before.shards[0]["name"])
    assert cli.run([*append, *key]) == 0
    scans = Manifest.load(out).scans
    assert len(scans) == 2 * len(before.scans) == 12
    assert (scans.groupby("participant_id")["split"].agg(["size", "nunique"]) == [2, 1]).all(axis=None)
    assert key[1] not in json.dumps(Manifest.load(out).settings)


def test_a_numeric_column_that_copies_the_ids_is_dropped(tmp_path):
    cohort = write_cohort(tmp_path / "a", participants=4)
    rows = (cohort / "participants.tsv").read_text().splitlines()
    lines = [rows[0] + "\tnumber\tscore", *(f"{row}\t{n}\t{7 - n}" for n, row in enumerate(rows[1:]))]
    (cohort / "participants.tsv").write_text("\n".join(lines) + "\n")
    scans, _ = read_cohort(cohort, key_file=secret(tmp_path))
    assert {frozenset(scan.extra) for scan in scans} == {frozenset({"diagnosis", "tiv", "score"})}
    assert "number" in read_cohort(cohort)[0][0].extra


@pytest.mark.parametrize("content", [None, b"", b"fifteen bytes !"])
def test_a_missing_or_short_key_is_one_clear_line(tmp_path, content):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_cohort(tmp_path, key_file=path)
    wanted = (
        "cannot be read (No such file" if content is None else f"holds {len(content)} bytes; at least 16 are needed"
    )
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


def test_a_build_of_several_data_sets_records_its_options(tmp_path, capsys):
    write_cohort(tmp_path / "one", participants=3)
    turned = nibabel.as_closest_canonical(planted_image()).as_reoriented([[1, -1], [2, 1], [0, -1]])
    nibabel.save(nibabel.MGHImage(np.asarray(turned.dataobj), turned.affine), tmp_path / "turned.mgz")
    (tmp_path / "list.csv").write_text("path,participant_id,age,sex\nturned.mgz,9,33,1\n")
    (tmp_path / "all.yaml").write_text(
        "datasets:\n- {path: one}\n- {path: list.csv, name: two, values: {sex: {0: M, 1: F}, site: kiel}}\n"
    )
    options = ["--shape", "10,12,10", "--spacing", "7", "--crop", "brain", "--intensity", "robust"]
    command = ["shards", "build", str(tmp_path / "all.yaml"), str(tmp_path / "out"), *options]
    assert cli.run(command) == 0
    manifest = Manifest.load(tmp_path / "out")
    grid = Grid.centred((10, 12, 10), 7.0)
    assert manifest.grid == grid.to_dict()
    assert {k: manifest.settings[k] for k in ("dataset", "crop", "intensity")} == {
        "dataset": "all", "crop": "brain", "intensity": "robust",
    }  # fmt: skip
    assert [row["name"] for row in manifest.shards] == ["all-000000.tar"]
    (row,) = manifest.scans.index[manifest.scans["key"] == "two_sub-9_ses-1"]
    assert manifest.scans.loc[row, ["age", "sex", "site", "dataset"]].tolist() == [33, "F", "kiel", "two"]
    nibabel.save(planted_image(), tmp_path / "plain.nii")
    expected = load_volume(tmp_path / "plain.nii", grid, crop="brain", intensity="robust")
    np.testing.assert_array_equal(manifest.read_volume(row), expected)
    with tarfile.open(tmp_path / "out" / "all-000000.tar") as tar:
        described = json.load(io.TextIOWrapper(tar.extractfile("two_sub-9_ses-1.json")))
    assert (described["sex"], "path" in described) == ("F", False)
    assert cli.run(command) == 0
    assert "already built" in capsys.readouterr().out
    assert cli.run([*command[:-1], "none"]) == 2
    assert "intensity was 'robust', now 'none'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--shape", "10,12"], "--shape=10,12 must be three numbers of voxels in 1..1024, for example 128,160,128"),
        (["--shape", "10,12,x", "--spacing", "2"], "--shape=10,12,x must be three numbers"),
        (["--shape", "10,12,10"], "--shape=10,12,10 also needs the edge of a voxel in mm, for example --spacing 1.5"),
        (["--spacing", "0.1"], "--spacing=0.1 is not in 0.5..20 mm"),
        (["--crop", "head"], "crop='head' is not known; allowed: world, brain"),
        (["--intensity", "robus"], "intensity='robus' is not known (did you mean 'robust'?)"),
        (["--layout", "bid"], "layout='bid' is not known (did you mean 'bids'?)"),
        (["--columns", "none.yaml"], "none.yaml not found; give a YAML file"),
        (["--pseudonymise", "none.key"], "--pseudonymise=none.key cannot be read"),
    ],
)
def test_a_wrong_option_is_one_clear_line(cohort, tmp_path, capsys, options, text):
    assert cli.run(["shards", "build", str(cohort), str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr().err
    assert text in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()
