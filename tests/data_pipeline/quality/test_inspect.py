"""The survey predicts what a build excludes, the page needs no other file, and the cohort is not changed."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import matplotlib.image
import nibabel
import numpy as np
import pandas as pd
import pytest

from data_pipeline.quality.page import slices, write_page
from data_pipeline.quality.rules import load_quality
from data_pipeline.quality.survey import survey_cohort, tables
from data_pipeline.shards.build import build_shards
from data_pipeline.volume.grid import Grid
from infra import cli
from tests.cohorts import GRID, blob, write_cohort
from tests.data_pipeline.shards.faults import PLANTED, write_faulty_cohort


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    return write_faulty_cohort(tmp_path_factory.mktemp("cohort") / "faulty")


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_the_command_prints_tables_and_writes_a_self_contained_page(faulty, tmp_path, capsys):
    before = snapshot(faulty)
    assert cli.run(["cohort", "inspect", str(faulty), "--out", str(tmp_path / "out")]) == 0
    assert snapshot(faulty) == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["inspect.html", "quarantine.tsv"]
    printed = capsys.readouterr().out
    assert "31 of 30 participants" in printed
    assert "22; 9 excluded" in printed
    assert re.search(r"outlier\s+│ robust z < -5, 0.05 below\s+│\s+3 │", printed)
    page = (tmp_path / "out" / "inspect.html").read_text()
    assert not re.search(r"(src|href)=.(?!data:image/png;base64,)", page)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    for scan, rule in PLANTED.items():
        if rule in ("outlier", "duplicate", "cat12", "nonfinite"):
            assert re.search(rf"<figure class='excluded'><img [^>]*><figcaption><strong>faulty_{scan}</strong>", page)
    # An unreadable scan has a thumbnail without a picture.
    assert "<figure class='excluded'><figcaption><strong>faulty_sub-002_ses-1" in page


def test_the_survey_and_the_build_exclude_the_same_scans_for_the_same_reasons(faulty, tmp_path):
    rules = ["--quality.outlier.robust_z=-1.2", "--quality.limits.tiv.max=1560"]
    arguments = ["cohort", "inspect", str(faulty), "--out", str(tmp_path / "inspected"), "--scaling", "tiv", *rules]
    assert cli.run(arguments) == 0
    built = build_shards(faulty, tmp_path / "built", scaling="tiv", quality=load_quality(None, rules))
    assert {"limits.tiv", "tiv", "outlier"} <= set(pd.read_csv(built.root / "quarantine.tsv", sep="\t")["rule"])
    inspected = (tmp_path / "inspected" / "quarantine.tsv").read_bytes()
    assert inspected == (built.root / "quarantine.tsv").read_bytes()
    survey = survey_cohort(
        faulty, parts=tmp_path / "parts", scaling="tiv", quality=load_quality(None, rules)
    ).scans.set_index("key")
    for column in ("quality_mean", "quality_std", "quality_zeros", "quality_correlation", "voxels_sha256"):
        kept = built.scans.set_index("key")[column]
        pd.testing.assert_series_equal(survey.loc[kept.index, column], kept)
    assert list((tmp_path / "parts").iterdir()) == []


def test_the_tables_of_a_small_cohort_state_that_outliers_are_not_judged(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", participants=5)
    table = (cohort / "participants.tsv").read_text().replace("site0", "<b>0</b>").replace("\tF\t", "\tn/a\t")
    (cohort / "participants.tsv").write_text("\n".join(table.splitlines()[:-1]) + "\n")
    survey = survey_cohort(cohort, parts=tmp_path / "parts")
    by_title = {table.title.split(":")[0]: table.rows for table in tables(survey)}
    assert ["outlier", "robust z < -5, 0.05 below; not judged, fewer than 20 scans", "0"] in by_title["Rules"]
    assert ["participant", "always", "1"] in by_title["Rules"]
    assert ["sex", "missing 3, M 2"] in by_title["Cohort"]
    assert survey.threshold is None
    page = write_page(survey, tmp_path / "page.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;0&lt;/b&gt;" in page


def far_away(tmp_path: Path) -> Path:
    """Two data sets with the same ids, without ages, heads 400 mm off the origin; the last image is an RGB image."""
    rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    affine = np.array(GRID.affine)
    affine[:3, 3] += 400
    for number, name in enumerate(("one", "two")):
        paths = sorted(write_cohort(tmp_path / name, participants=3).rglob("*.nii.gz"))
        for n, path in enumerate(paths):
            voxels = blob(10 * number + n, 40.0)
            nibabel.save(nibabel.Nifti1Image(np.where(voxels > 0.5, voxels, 0), affine), path)
        table = tmp_path / name / "participants.tsv"
        table.write_text(re.sub(r"(sub-\d+)\t[\d.]+\t", r"\1\tn/a\t", table.read_text()))
    nibabel.save(nibabel.Nifti1Image(np.zeros(GRID.shape, rgb), affine), paths[-1])
    (tmp_path / "all.yaml").write_text("datasets: [{path: one}, {path: two}]")
    (tmp_path / "key").write_bytes(b"0123456789abcdef")
    return tmp_path / "all.yaml"


def pictures(page: str) -> list[np.ndarray]:
    """The pictures of a page as RGB arrays."""
    return [
        matplotlib.image.imread(io.BytesIO(base64.b64decode(png)))[..., :3]
        for png in re.findall(r"src=\"data:image/png;base64,([^\"]+)", page)
    ]


@pytest.mark.parametrize("key", [None, "key"])
def test_participants_of_several_data_sets_are_counted_and_drawn_on_the_grid_of_the_build(tmp_path, key):
    grid = Grid.centred(GRID.shape, 6.0)
    key_file = key and tmp_path / key
    survey = survey_cohort(far_away(tmp_path), parts=tmp_path / "parts", grid=grid, crop="brain", key_file=key_file)
    by_title = {table.title.split(":")[0]: table.rows for table in tables(survey)}
    assert ["scans", "6 of 6 participants"] in by_title["Cohort"]  # both data sets have a sub-000
    assert ["data sets", "one 3, two 3"] in by_title["Cohort"]
    assert sum(int(row[2]) for row in by_title["Sites"]) == 6
    assert ["type", "always", "1"] in by_title["Rules"]
    assert sum(int(row[-1]) for row in by_title["Rules"]) == len(survey.removals) == 1
    page = write_page(survey, tmp_path / "page.html").read_text()
    assert ("sub-000" in page) == (key is None)
    ages, _, _, *cards = pictures(page)
    assert len(cards) == 6  # five scans, one of them also as the most typical; none of the RGB image
    assert all((card > 0.5).mean() > 0.05 for card in cards)  # the head is in the picture
    for colour in ((0xCC, 0x79, 0xA7), (0x56, 0xB4, 0xE9)):  # both sexes are drawn although no age is known
        assert (np.abs(ages - np.array(colour) / 255).max(axis=-1) < 0.01).sum() > 500


def test_a_page_inside_the_cohort_is_refused(faulty, capsys):
    assert cli.run(["cohort", "inspect", str(faulty), "--out", str(faulty / "report")]) == 2
    assert "is inside the cohort, which is never written to" in capsys.readouterr().err
    assert not (faulty / "report").exists()


def test_wrong_options_are_refused(faulty, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert cli.run(["cohort", "inspect", str(faulty), *out, "--quality.outlier.z=-4"]) == 2
    assert "unknown key 'quality.outlier.z'" in capsys.readouterr().err
    assert cli.run(["cohort", "inspect", str(faulty), *out, "--spacing", "0.1"]) == 2
    assert "is not in 0.5..20 mm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.run(["cohort", "inspect", str(faulty), *out, "--qality.grid=refuse"])
    assert "unrecognized arguments: --qality.grid=refuse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("corner", "panel", "right", "top"),
    [
        ((0, 8, 6), 2, False, None),  # left of the head: left in the axial slice
        ((0, 8, 6), 1, False, None),
        ((7, 15, 6), 2, None, True),  # front: at the top of the axial slice
        ((7, 8, 11), 1, None, True),  # up: at the top of the coronal slice
        ((8, 15, 6), 0, True, None),  # front: right in the sagittal slice, x = 14 / 2 + 14 // 12
    ],
)
def test_thumbnails_show_left_on_the_left_and_up_at_the_top(corner, panel, right, top):
    volume = np.zeros((14, 16, 12), np.float32)
    i, j, k = corner
    volume[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2, max(k - 1, 0) : k + 2] = 1.0
    picture = matplotlib.image.imread(io.BytesIO(slices(volume, (6.0, 6.0, 6.0))))[..., 0]
    # The width of each of the three panels is proportional to its columns / rows.
    widths = np.array([16 / 12, 14 / 12, 14 / 16])
    edges = np.round(np.concatenate([[0], np.cumsum(widths / widths.sum())]) * picture.shape[1]).astype(int)
    part = picture[:, edges[panel] : edges[panel + 1]]
    rows, columns = np.nonzero(part > 0.5)
    assert len(rows)
    if right is not None:
        assert (columns.mean() > part.shape[1] / 2) == right
    if top is not None:
        assert (rows.mean() < part.shape[0] / 2) == top
