"""A map of the scans: two coordinates in place of thousands of features."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.cohort.split import is_healthy
from data_pipeline.storage.manifest import Manifest

COLUMNS = ("age", "sex", "site", "diagnosis", "split")
COMPONENTS = 50  # principal components that UMAP works on


def embedding_table(manifest: Manifest, rows: NDArray[Any], features: NDArray[Any]) -> pd.DataFrame:
    """Return the first two principal components (x, y) of features (N, F), with the columns to colour a map by.

    The components are fitted to healthy scans, so that patients do not rotate the map. Their signs are chosen so that x and y
    rise with age, which makes the maps of several checkpoints comparable. With umap-learn installed and more than 15 scans
    there are also umap_x and umap_y.
    """
    scans = manifest.scans.loc[rows]
    healthy = np.ones(len(rows), dtype=bool)
    if "diagnosis" in scans:
        healthy = scans["diagnosis"].map(is_healthy).to_numpy(bool)
    basis = features[healthy] if healthy.sum() > 2 else features
    mean, deviation = basis.mean(0), basis.std(0) + 1e-8
    axes = np.linalg.svd((basis - mean) / deviation, full_matrices=False)[2][:COMPONENTS]
    points = ((features - mean) / deviation) @ axes.T
    age = scans["age"].to_numpy(float)
    known = np.isfinite(age)
    for axis in range(2):
        if known.sum() > 2 and np.corrcoef(points[known, axis], age[known])[0, 1] < 0:
            points[:, axis] *= -1
    table = {"x": points[:, 0], "y": points[:, 1]}
    if find_spec("umap") is not None and len(rows) > 15:
        table["umap_x"], table["umap_y"] = umap_coordinates(points).T
    return pd.DataFrame({**table, **{c: scans[c].to_numpy() for c in COLUMNS if c in scans}})


def umap_coordinates(points: NDArray[Any]) -> NDArray[Any]:
    """Return the UMAP coordinates (N, 2) of points (N, F), with the library's defaults and seed 0."""
    from umap import UMAP

    return np.asarray(UMAP(random_state=0).fit_transform(points))
