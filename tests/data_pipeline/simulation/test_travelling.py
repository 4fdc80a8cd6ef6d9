"""Travelling heads: the same people on every scanner, with one true brain, and other cohorts unchanged."""

from __future__ import annotations

import hashlib
import json

import nibabel
import numpy as np
import pandas as pd
import pytest

from data_pipeline.cohort.read import read_cohort
from data_pipeline.simulation.cohort import simulate_cohort
from infra import cli
from infra.errors import UserError

COARSE = {"spacing": 10.0, "workers": 1, "shares": {"SCZ": 0.25}}
PLAIN_TABLES = "38eb856f41a37d48a9c57abbacaa768f06edcb82081c5cae1c51a498b8b4368c"  # SHA-256 of the names and bytes


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    out = tmp_path_factory.mktemp("travel") / "cohort"
    return simulate_cohort(out, participants=8, travelling=3, scanners=3, repeats=2, **COARSE)


def grey_matter(root, person, session):
    folder = root / person / session / "anat"
    image = nibabel.load(folder / f"{person}_{session}_space-MNI152_desc-mwp1_probseg.nii.gz")
    return np.asarray(image.dataobj)


def test_every_travelling_person_is_scanned_on_every_scanner_and_the_others_at_their_site(cohort):
    scans, unlisted = read_cohort(cohort, layout="bids")
    assert not unlisted
    table = pd.DataFrame([(s.participant_id, s.session, s.site, s.extra["diagnosis"]) for s in scans],
                         columns=["person", "session", "site", "diagnosis"])  # fmt: skip
    travelling = table[table["session"].str.startswith("site")]
    assert travelling["person"].nunique() == 3
    assert set(travelling["diagnosis"]) == {"control"}
    assert (travelling.groupby(["person", "site"]).size() == 2).all()
    assert set(travelling["site"]) == {"site00", "site01", "site02"}
    others = table[~table["person"].isin(travelling["person"])]
    assert (others.groupby("person")["site"].nunique() == 1).all()
    assert set(others["session"]) <= {"1", "2", "3"}


def test_the_truth_is_one_value_a_person_and_the_scans_scatter_around_it(cohort):
    truth = pd.read_csv(cohort / "truth.tsv", sep="\t")
    travelling = truth[truth["session_id"].str.startswith("ses-site")]
    columns = ["age", "grey_matter_ml", "hippocampus", "ventricle_ml", "true_tiv"]
    assert (travelling.groupby("participant_id")[columns].nunique() == 1).all().all()
    for person, rows in travelling.groupby("participant_id"):
        measured = [grey_matter(cohort, person, session).sum(dtype=float) for session in rows["session_id"]]
        assert len(set(measured)) == 6
        np.testing.assert_allclose(measured, rows["grey_matter_ml"], rtol=0.15)  # voxels of 1 ml


def test_without_scanner_effects_a_scan_shows_the_true_grey_matter(tmp_path):
    root = simulate_cohort(
        tmp_path / "c",
        participants=2,
        travelling=2,
        scanners=2,
        repeats=1,
        site_effects=0.0,
        **{**COARSE, "shares": {}},
    )
    for row in pd.read_csv(root / "truth.tsv", sep="\t").itertuples():
        volume = grey_matter(root, row.participant_id, row.session_id)
        assert volume.sum(dtype=float) == pytest.approx(row.grey_matter_ml, rel=1e-5)


def test_more_scanners_and_repeats_leave_the_earlier_scans_and_the_other_people_unchanged(cohort, tmp_path):
    less = simulate_cohort(tmp_path / "less", participants=8, travelling=2, scanners=2, repeats=1, **COARSE)
    plain = simulate_cohort(tmp_path / "plain", participants=8, **COARSE)
    shared = list(less.rglob("*site0*.nii.gz"))
    assert len(shared) == 4
    for path in shared:
        assert path.read_bytes() == (cohort / path.relative_to(less)).read_bytes()
    travelling = {path.name for path in cohort.glob("sub-*") if list(path.glob("ses-site*"))}
    assert len(travelling) == 3
    for path in plain.rglob("*.nii.gz"):
        if path.relative_to(plain).parts[0] not in travelling:
            assert path.read_bytes() == (cohort / path.relative_to(plain)).read_bytes()


def test_the_tables_of_a_cohort_without_travelling_heads_are_as_before(tmp_path):
    root = simulate_cohort(tmp_path / "c", participants=12, **COARSE)
    files = sorted(path for path in root.rglob("*") if path.suffix in (".tsv", ".json"))
    assert len(files) > 3
    content = b"".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in files)
    assert hashlib.sha256(content).hexdigest() == PLAIN_TABLES


def test_travelling_heads_are_part_of_the_recorded_settings(tmp_path, capsys):
    command = [
        "cohort",
        "simulate",
        str(tmp_path / "c"),
        "--participants",
        "2",
        "--shares",
        "",
        "--spacing",
        "12",
        "--workers",
        "1",
    ]
    travel = ["--travelling", "1", "--scanners", "2", "--repeats", "1"]
    assert cli.run([*command, *travel]) == 0
    assert json.loads((tmp_path / "c" / "simulation.json").read_text())["travelling"] == 1
    assert cli.run([*command, *travel]) == 0
    assert cli.run([*command, *travel[:-1], "2"]) == 2
    assert "holds another simulation (repeats was 1, now 2)" in capsys.readouterr().err
    assert cli.run(command) == 2
    assert "holds another simulation (travelling was 1, now 0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"travelling": -1}, "travelling=-1 is not in 0..8, the number of participants"),
        ({"travelling": 9}, "travelling=9 is not in 0..8, the number of participants"),
        ({"travelling": 7}, "travelling=7: only 6 of 8 participants are healthy"),
        ({"travelling": 2, "scanners": 13}, "scanners=13 is not in 1..12, the number of sites; raise sites"),
        ({"scanners": 0}, "scanners=0 is not in 1..12"),
        ({"repeats": 0}, "repeats=0 is not in 1..100"),
    ],
)
def test_wrong_settings_are_named_and_nothing_is_written(tmp_path, change, text):
    with pytest.raises(UserError, match=text):
        simulate_cohort(tmp_path / "x", participants=8, **{**COARSE, **change})
    assert not (tmp_path / "x").exists()
