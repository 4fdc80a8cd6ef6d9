"""Variants of a real head come out alike, also to an encoder; another contrast is refused; Ray gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from data_pipeline.prepare.driver import prepare_cohort
from data_pipeline.prepare.settings import load_prepare_recipe
from tests.benchmarks.studies import prepare_variants
from tests.data_pipeline.prepare.heads import CH2, VARIANTS, needs_mricron, t2_head, write_raw

# At 1.5 mm, the voxels of the encoders: noise and thick slices are differences of the scans themselves.
QUICK = ["--prepare.spacing=1.5"]


def prepares_heads(test):
    """Mark a test that needs the real head, and minutes."""
    return needs_mricron(pytest.mark.slow(test))


def image(folder: Path, name: str, kind: str) -> np.ndarray:
    """A volume of a participant (D, H, W)."""
    stem = f"sub-{name}/ses-1/anat/sub-{name}_ses-1_space-MNI152NLin2009"
    return np.asarray(nibabel.load(folder / f"{stem}_{kind}.nii.gz").dataobj, dtype=np.float64)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    raw = write_raw(root / "raw", {"ch2": CH2, "t2": t2_head(), **{name: make() for name, make in VARIANTS.items()}})
    prepare_cohort(raw, root / "out", load_prepare_recipe(None, QUICK), workers=2)
    return root


@pytest.fixture(scope="module")
def encoder():
    return prepare_variants.load_encoder(None)


@prepares_heads
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_the_head_comes_out_as_the_head(prepared, encoder, name):
    masks = [image(prepared / "out", scan, "desc-brain_mask") > 0 for scan in ("ch2", name)]
    inside = masks[0] & masks[1]
    assert 2 * inside.sum() >= 0.98 * (masks[0].sum() + masks[1].sum())
    own, other = (image(prepared / "out", scan, "desc-preproc_T1w") for scan in ("ch2", name))
    assert np.corrcoef(own[inside], other[inside])[0, 1] >= prepare_variants.LEAST_CORRELATION
    features = [prepare_variants.features_of(encoder, voxels) for voxels in (own, other)]
    assert prepare_variants.cosine(*features) >= prepare_variants.LEAST_COSINE
    table = pd.read_csv(prepared / "out" / "participants.tsv", sep="\t").set_index("participant_id")
    for column in ("tiv", "brain_ml"):
        assert table.loc[f"sub-{name}", column] == pytest.approx(table.loc["sub-ch2", column], rel=0.03)


@prepares_heads
def test_a_scan_with_the_contrast_of_t2_is_refused(prepared):
    quarantine = pd.read_csv(prepared / "out" / "quarantine.tsv", sep="\t")
    assert list(quarantine["key"]) == ["raw_sub-t2_ses-1"]
    assert list(quarantine["rule"]) == ["contrast"]
    assert (quarantine["measured"] < 0).all()


@prepares_heads
def test_one_process_and_two_ray_workers_write_the_same_bytes(prepared, tmp_path):
    raw = write_raw(tmp_path / "raw", {"ch2": CH2})
    prepare_cohort(raw, tmp_path / "out", load_prepare_recipe(None, QUICK), workers=1)
    files = [path for path in (tmp_path / "out" / "sub-ch2").rglob("*") if path.is_file()]
    assert len(files) == 5
    for path in files:
        assert path.read_bytes() == (prepared / "out" / path.relative_to(tmp_path / "out")).read_bytes(), path.name


def test_metrics_outside_the_limits_are_named():
    good = {"variant": "turned", "correlation": 0.99, "tiv %": -2.9, "cosine": 1.0, "refused": np.nan}
    other = {**good, "variant": "thick", "correlation": 0.97, "tiv %": -3.1, "cosine": np.nan}
    refused = {"variant": "top", "refused": "yes"}
    assert prepare_variants.misses("variants-vbm", pd.DataFrame([good, other, refused])) == [
        "variants-vbm, thick: correlation is 0.97, allowed is 0.98 to inf",
        "variants-vbm, thick: tiv % is -3.1, allowed is -3 to 3",
        "variants-vbm, thick: cosine is nan, allowed is 0.99 to inf",
        "variants-vbm, top: is refused",
    ]
    people = pd.DataFrame([{"people": 40, "refused": 0, "r of grey matter": 0.89, "ratio": 1.2}])
    assert prepare_variants.misses("people", people) == [
        "people: r of grey matter is 0.89, allowed is 0.9 to inf",
        "people: ratio is 1.2, allowed is 0 to 1.15",
    ]
    assert prepare_variants.misses("people", people.assign(**{"r of grey matter": 0.97, "ratio": 0.75})) == []


@pytest.mark.parametrize(("value", "status"), [(0.99, 0), (0.5, 1)])
def test_the_study_ends_with_status_1_if_a_metric_is_outside(monkeypatch, tmp_path, capsys, value, status):
    table = pd.DataFrame([{"people": 40, "refused": 0, "r of grey matter": value, "ratio": 1.0}])
    monkeypatch.setattr(prepare_variants, "people_table", lambda out, people, workers: table)
    monkeypatch.setattr("sys.argv", ["prepare_variants", str(tmp_path), "--variants", "none"])
    assert prepare_variants.main() == status
    assert ("people: r of grey matter is 0.5, " in capsys.readouterr().out) == bool(status)
