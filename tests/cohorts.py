"""Small cohorts of NIfTI files for tests: smooth asymmetric blobs that fade with age."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from data_pipeline.volume.grid import Grid

DIAGNOSES = ("control", "control", "AD")
GRID = Grid.of((14, 16, 12), np.array([[6.0, 0, 0, -39], [0, 6, 0, -60], [0, 0, 6, -30], [0, 0, 0, 1]]))


def blob(seed: int, age: float, shape=GRID.shape) -> np.ndarray:
    """(D, H, W) float32: a bright ellipsoid off the midline that fades with age, on a smooth background drawn from ``seed``."""
    generator = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = sum(((a - c) / s) ** 2 for a, c, s in zip(axes, (0.25, -0.1, 0.1), (0.6, 0.8, 0.7), strict=True))
    waves = sum(
        np.cos(a * k + p) for a, k, p in zip(axes, generator.uniform(1, 4, 3), generator.uniform(0, 6, 3), strict=True)
    )
    return (np.exp(-2 * radius) * (1.2 - age / 150) + 0.05 * waves + 0.2).astype(np.float32)


def write_cohort(
    root: Path, participants: int = 24, sessions: int = 1, seed: int = 0, diagnosis: Sequence[str] = DIAGNOSES
) -> Path:
    """Write a BIDS folder: ages 20 to 80, three sites, and the diagnoses repeated in turn."""
    generator = np.random.default_rng(seed)
    lines = ["participant_id\tage\tsex\tsite\tdiagnosis\ttiv"]
    for number in range(participants):
        age = 20 + 60 * number / max(1, participants - 1)
        sex, site = "FM"[number % 2], f"site{number % 3}"
        label, tiv = diagnosis[number % len(diagnosis)], 1400 + 10 * (number % 20)
        lines.append(f"sub-{number:03d}\t{age:.1f}\t{sex}\t{site}\t{label}\t{tiv}")
        for session in range(1, sessions + 1):
            folder = root / f"sub-{number:03d}" / f"ses-{session}" / "anat"
            folder.mkdir(parents=True)
            voxels = blob(int(generator.integers(2**31)), age)
            name = f"sub-{number:03d}_ses-{session}_space-MNI152_desc-mwp1_probseg.nii.gz"
            nibabel.save(nibabel.Nifti1Image(voxels, np.array(GRID.affine)), folder / name)
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")
    return root


def add_openbhb_split(cohort: Path) -> Path:
    """Add OpenBHB's column of splits to a cohort's table; return the file that declares it as a column like others."""
    table, declared = cohort / "participants.tsv", cohort.parent / "columns.yaml"
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{head}\topenbhb_split", *(f"{row}\ttrain" for row in rows)]) + "\n")
    read = [name for name in [*head.split("\t"), "openbhb_split"] if name != "participant_id"]
    declared.write_text(f"columns: {{{', '.join(f'{name}: {name}' for name in read)}}}\n")
    return declared
