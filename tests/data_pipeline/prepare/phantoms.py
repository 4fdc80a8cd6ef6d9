"""Small brains for the tests: simulated T1-like ones, and the template in other places."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from scipy.spatial.transform import Rotation

from data_pipeline.prepare.resampling import resample
from data_pipeline.prepare.settings import PrepareRecipe, load_prepare_recipe
from data_pipeline.prepare.template import load_template
from data_pipeline.volume.grid import Grid

# Brains of 5 mm without skull, prepared in two seconds each: no network, few iterations.
SMALL = (
    "brain.method=given", "limits.voxel_mm=6", "spacing=6", "bias.head_iterations=2", "bias.iterations=4", "bias.spacing=8",
    "linear.spacing=4", "linear.iterations=[20,10,0]", "linear.angles=[0]",
)  # fmt: skip
SMALL_OPTIONS = [f"--prepare.{setting}" for setting in SMALL]


def small_recipe(*settings: str) -> PrepareRecipe:
    """The recipe of small brains, with other settings ``key=value``."""
    return load_prepare_recipe(None, [*SMALL_OPTIONS, *(f"--prepare.{setting}" for setting in settings)])


def turned(rotation, shift, scale: float = 1.0) -> np.ndarray:
    """The map that turns (degrees about x, y, z), scales and shifts (mm)."""
    found = np.eye(4)
    found[:3, :3] = scale * Rotation.from_euler("xyz", rotation, degrees=True).as_matrix()
    found[:3, 3] = shift
    return found


def small_brain(number: int) -> nibabel.Nifti1Image:
    """The template's brain at 5 mm, a little turned, larger with its number, with noise, at another place."""
    box = Grid.centred((45, 50, 45), 5.0)
    place = turned((3.0 * number, -2.0, 4.0), (12.0, -8.0, 5.0), 0.92 + 0.01 * number)
    fine = load_template(Grid.vbm(2.5))
    voxels = resample(fine.t1, fine.affine, box, np.linalg.inv(place))
    noise = np.random.default_rng(number).normal(0, 0.01, voxels.shape)
    voxels = np.where(voxels > 0.05, voxels + noise, 0.0) * 700
    return nibabel.Nifti1Image(voxels.astype(np.float32), np.array(box.affine))


def write_small_cohort(root: Path, participants: int = 3) -> Path:
    """Write a BIDS folder of small raw brains: the first has two sessions, the last two runs."""
    lines = ["participant_id\tage\tsex\tsite\ttiv\tnote"]
    for number in range(participants):
        name = f"sub-{number:02d}"
        scans = [f"ses-{session}/anat/{name}_ses-{session}" for session in ((1, 2) if number == 0 else (1,))]
        if number == participants - 1:
            scans = [f"{scan}_run-{run}" for scan in scans for run in (1, 2)]
        for offset, scan in enumerate(scans):
            path = root / name / f"{scan}_T1w.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(small_brain(number + 4 * offset), path)
        lines.append(
            f"{name}\t{30.5 + number}\t{'FM'[number % 2]}\tsite{number}\t1500\t{'n/a' if number else 'a note'}"
        )
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a derivative but the timings."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "timings.tsv")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
