"""A cohort with planted faults, one for each rule."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd

from tests.cohorts import GRID, blob, write_cohort

# The rule that must exclude each scan; every other scan must be kept.
PLANTED = {
    "sub-000_ses-1": "nonfinite",
    "sub-001_ses-1": "constant",
    "sub-002_ses-1": "unreadable",
    "sub-003_ses-1": "outlier",  # left and right exchanged
    "sub-004_ses-1": "outlier",  # noise
    "sub-005_ses-1": "outlier",  # shifted by a quarter of the field of view
    "sub-007_ses-1": "duplicate",  # same voxels as another participant, sub-006
    "sub-008_ses-2": "duplicate",  # same voxels as the participant's first session
    "sub-009_ses-1": "cat12",
    "sub-010_ses-1": "tiv",  # only with --scaling tiv
}


def find(cohort: Path, scan: str) -> Path:
    """The file of ``sub-X_ses-Y``."""
    return next((cohort / scan.split("_")[0] / scan.split("_")[1] / "anat").glob("*.nii.gz"))


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels, np.array(GRID.affine) if affine is None else affine), path)


def write_faulty_cohort(root: Path, participants: int = 30) -> Path:
    """Write thirty participants with one session (sub-008 with two); ten scans have a fault."""
    cohort = write_cohort(root, participants=participants)
    noise = np.random.default_rng(1)
    save(find(cohort, "sub-000_ses-1"), with_nan(blob(0, 50.0), 7))
    save(find(cohort, "sub-001_ses-1"), np.full(GRID.shape, 0.25, np.float32))
    cut = find(cohort, "sub-002_ses-1")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    save(find(cohort, "sub-003_ses-1"), blob(3, 50.0)[::-1])
    save(find(cohort, "sub-004_ses-1"), noise.random(GRID.shape).astype(np.float32))
    save(find(cohort, "sub-005_ses-1"), np.roll(blob(5, 50.0), GRID.shape[1] // 4, axis=1))
    # Another file, other header, the same voxels.
    voxels = np.array(nibabel.load(find(cohort, "sub-006_ses-1")).dataobj)
    image = nibabel.Nifti1Image(voxels, np.array(GRID.affine))
    image.header["descrip"] = b"exported again"
    nibabel.save(image, find(cohort, "sub-007_ses-1"))
    second = cohort / "sub-008" / "ses-2" / "anat"
    second.mkdir(parents=True)
    first = find(cohort, "sub-008_ses-1")
    shutil.copy(first, second / first.name.replace("ses-1", "ses-2"))
    table = pd.read_csv(cohort / "participants.tsv", sep="\t", dtype=str)
    table["cat12_iqr"] = [f"{1.5 + 0.05 * number:.2f}" for number in range(participants)]
    table.loc[9, "cat12_iqr"] = "4.20"
    table.loc[11, "cat12_iqr"] = "n/a"
    table.loc[10, "tiv"] = "n/a"
    table.to_csv(cohort / "participants.tsv", sep="\t", index=False)
    return cohort


def with_nan(voxels: np.ndarray, count: int) -> np.ndarray:
    voxels = voxels.copy()
    voxels.flat[:count] = np.nan
    return voxels
