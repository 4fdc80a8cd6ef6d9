"""Variants of a real head come out alike; a scan with another contrast is refused; a run in Ray gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from data_pipeline.prepare.driver import prepare_cohort
from data_pipeline.prepare.settings import load_prepare_recipe
from tests.data_pipeline.prepare.heads import CH2, VARIANTS, needs_mricron, t2_head, write_raw

pytestmark = [needs_mricron, pytest.mark.slow]
# At 1.5 mm, the voxels of the encoders: noise and thick slices are differences of the scans themselves.
QUICK = ["--prepare.spacing=1.5"]


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


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_the_head_comes_out_as_the_head(prepared, name):
    masks = [image(prepared / "out", scan, "desc-brain_mask") > 0 for scan in ("ch2", name)]
    inside = masks[0] & masks[1]
    assert 2 * inside.sum() >= 0.98 * (masks[0].sum() + masks[1].sum())
    own, other = (image(prepared / "out", scan, "desc-preproc_T1w")[inside] for scan in ("ch2", name))
    assert np.corrcoef(own, other)[0, 1] >= 0.98
    table = pd.read_csv(prepared / "out" / "participants.tsv", sep="\t").set_index("participant_id")
    for column in ("tiv", "brain_ml"):
        assert table.loc[f"sub-{name}", column] == pytest.approx(table.loc["sub-ch2", column], rel=0.03)


def test_a_scan_with_the_contrast_of_t2_is_refused(prepared):
    quarantine = pd.read_csv(prepared / "out" / "quarantine.tsv", sep="\t")
    assert list(quarantine["key"]) == ["raw_sub-t2_ses-1"]
    assert list(quarantine["rule"]) == ["contrast"]
    assert (quarantine["measured"] < 0).all()


def test_one_process_and_two_ray_workers_write_the_same_bytes(prepared, tmp_path):
    raw = write_raw(tmp_path / "raw", {"ch2": CH2})
    prepare_cohort(raw, tmp_path / "out", load_prepare_recipe(None, QUICK), workers=1)
    files = [path for path in (tmp_path / "out" / "sub-ch2").rglob("*") if path.is_file()]
    assert len(files) == 5
    for path in files:
        assert path.read_bytes() == (prepared / "out" / path.relative_to(tmp_path / "out")).read_bytes(), path.name
