"""A small exported encoder with random weights, and NIfTI scans for it."""

from __future__ import annotations

import nibabel
import numpy as np
import torch

from data_pipeline.volume.grid import Grid
from pretrain.encoders import build_encoder
from pretrain.weights.seen_scans import source_of
from pretrain.weights.write import write_encoder
from tests.cohorts import GRID, blob

OPTIONS = {"width": 0.25, "norm": "group"}
CONFIG = {
    "encoder": {"name": "resnet18", "options": OPTIONS}, "feature_size": 128, "step": 5, "run_id": None,
    "run_name": "y-aware", "method": "y-aware", "manifest_digest": "0" * 64, "split": ["pretrain"],
    "version": "0.1.0", "simulated": True, "experiment": "test",
}  # fmt: skip
PREPROCESSING = {"normalisation": "zscore", "modality": "t1w", "scaling": "none"}


def write_small_encoder(folder, grid=GRID, **preprocessing):
    """Write an exported encoder and return its network."""
    grid = grid.to_dict() if isinstance(grid, Grid) else grid
    torch.manual_seed(0)
    network = build_encoder("resnet18", OPTIONS).eval()
    write_encoder(folder, network.state_dict(), CONFIG, {**PREPROCESSING, "grid": grid, **preprocessing})
    return network


def write_encoders_of(manifest, *folders, width=0.125, seed=0, **more):
    """Write an exported encoder to some folders, as one that was trained on the split ``pretrain`` of a data set.

    ``more`` is for its config.json.
    """
    torch.manual_seed(seed)
    options = {**OPTIONS, "width": width}
    network = build_encoder("resnet18", options)
    config = {
        **CONFIG, "encoder": {"name": "resnet18", "options": options}, "feature_size": int(network.feature_size),
        "run_name": "first", "manifest_digest": manifest.digest, "simulated": False,
        **more,
    }  # fmt: skip
    preprocessing = {**PREPROCESSING, "modality": "vbm", "grid": manifest.grid}
    seen = [source_of(manifest, manifest.rows(split="pretrain"))]
    for folder in folders:
        write_encoder(folder, network.state_dict(), config, preprocessing, seen)


def write_scans(folder, count, first=0):
    """Write ``count`` NIfTI files, each of another blob, and return their paths in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"sub-{number:03d}_T1w.nii.gz" for number in range(first, first + count)]
    for number, path in enumerate(paths, first):
        image = nibabel.Nifti1Image(blob(number, 20.0 + number), np.array(GRID.affine))
        nibabel.save(image, path)
    return paths
