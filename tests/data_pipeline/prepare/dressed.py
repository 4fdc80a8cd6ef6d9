"""Simulated T1-like brains as raw scans: extracted, or in a head with fluid, skull, scalp and neck, turned and shifted."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from data_pipeline.simulation.cohort import simulate_cohort
from tests.data_pipeline.prepare.phantoms import turned

# Intensities are shares of white matter's.
BRAIN = 0.15  # above it is brain, and the fluid in it; below noise
# Layers around the brain: outer border in mm, and intensity: fluid as bright as that in the brain, skull, scalp.
LAYERS = ((2.0, 0.25), (8.0, 0.05), (14.0, 0.9))
NECK = 50.0  # mm, radius
MARGIN, BELOW = 24.0, 72.0  # mm around the brain's box, and below it


def extracted(image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    """The brain alone: 0 around it."""
    voxels = np.asarray(image.dataobj, np.float32)
    return nibabel.Nifti1Image(np.where(_brain(voxels, _white(image)), voxels, 0.0).astype(np.float32), image.affine)


def brain_ml(image: nibabel.Nifti1Image) -> float:
    """The volume of the brain in ml."""
    voxel = abs(float(np.linalg.det(image.affine[:3, :3])))
    return float(_brain(np.asarray(image.dataobj, np.float32), _white(image)).sum()) * voxel / 1000.0


def with_skull_and_neck(image: nibabel.Nifti1Image, seed: int) -> nibabel.Nifti1Image:
    """The brain in a head: a thin layer of fluid, dark skull, bright scalp, and a neck; with noise everywhere."""
    spacing = float(np.linalg.norm(image.affine[:3, 0]))
    margin, below = (round(length / spacing) for length in (MARGIN, BELOW))
    pad = ((margin, margin), (margin, margin), (below, margin))
    voxels = np.pad(np.asarray(image.dataobj, np.float32), pad)
    white = _white(image)
    brain = _brain(voxels, white)
    head = np.zeros_like(voxels)
    distance = ndimage.distance_transform_edt(~brain) * spacing
    for border, share in reversed(LAYERS):
        head[distance <= border] = share * white
    x, y, z = np.ogrid[tuple(slice(0, n) for n in voxels.shape)]
    centre = ndimage.center_of_mass(brain)
    radius = np.hypot(x - centre[0], y - centre[1]) * spacing
    low = z < centre[2] - 45.0 / spacing
    outside = distance > LAYERS[-1][0]
    head[outside & low & (radius < NECK)] = 0.5 * white
    head[outside & low & (radius >= NECK - 6.0) & (radius < NECK)] = 0.9 * white
    head = ndimage.gaussian_filter(np.where(brain, voxels, head), 0.4)
    real, imaginary = np.random.default_rng(seed).normal(0, 0.012 * white, (2, *head.shape)).astype(np.float32)
    affine = image.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.array([margin, margin, below])
    return nibabel.Nifti1Image(np.hypot(head + real, imaginary).astype(np.float32), affine)


def write_raw_heads(root: Path, participants: int, spacing: float, *, skull: bool, seed: int = 5) -> list[Path]:
    """Simulate raw T1-like heads, each turned and shifted; return their files.

    Args:
        root: the BIDS folder to write.
        participants: people; some have two scans.
        spacing: voxel size in mm.
        skull: dress the brains in skull and neck; else they are extracted.
        seed: of the simulator.
    """
    simulate_cohort(root, participants=participants, spacing=spacing, modality="t1w", seed=seed)
    paths = sorted(root.rglob("*_T1w.nii.gz"))
    generator = np.random.default_rng(seed)
    for number, path in enumerate(paths):
        image = nibabel.load(path)
        image = with_skull_and_neck(image, number) if skull else extracted(image)
        place = turned(generator.uniform(-8, 8, 3), generator.uniform(-25, 25, 3))
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), place @ image.affine), path)
    return paths


def _brain(voxels: np.ndarray, white: float) -> np.ndarray:
    """(D, H, W) the largest part that is brighter than noise, without holes."""
    parts, count = ndimage.label(voxels > BRAIN * white)
    largest = 1 + int(np.argmax(ndimage.sum_labels(np.ones_like(parts), parts, range(1, count + 1))))
    return ndimage.binary_fill_holes(parts == largest)


def _white(image: nibabel.Nifti1Image) -> float:
    """The intensity of white matter, which is the brightest tenth of a brain; a brain is about a quarter of its box."""
    return float(np.percentile(np.asarray(image.dataobj, np.float32), 97.5))
