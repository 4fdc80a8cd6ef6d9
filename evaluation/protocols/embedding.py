"""Two axes for thousands of features: a map of the scans."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.cohort.split import is_healthy
from data_pipeline.storage.manifest import Manifest

Array = np.ndarray[Any, np.dtype[Any]]
COLUMNS = ("age", "sex", "site", "diagnosis", "split")
COMPONENTS = 50  # that UMAP is given


def embedding_table(manifest: Manifest, rows: Array, features: Array) -> pd.DataFrame:
    """x, y: the first two principal components of the features, and what a reader wants to colour them by.

    Components are those of the healthy scans, so that patients do not turn the map. Where umap-learn is installed also
    umap_x and umap_y.
    """
    scans = manifest.scans.loc[rows]
    healthy = np.ones(len(rows), dtype=bool)
    if "diagnosis" in scans:
        healthy = scans["diagnosis"].map(is_healthy).to_numpy(bool)
    basis = features[healthy] if healthy.sum() > 2 else features
    mean, deviation = basis.mean(0), basis.std(0) + 1e-8
    axes = np.linalg.svd((basis - mean) / deviation, full_matrices=False)[2][:COMPONENTS]
    points = ((features - mean) / deviation) @ axes.T
    # The sign of a principal axis is arbitrary; older to the right makes maps of several checkpoints comparable.
    age = scans["age"].to_numpy(float)
    known = np.isfinite(age)
    for axis in range(2):
        if known.sum() > 2 and np.corrcoef(points[known, axis], age[known])[0, 1] < 0:
            points[:, axis] *= -1
    table = {"x": points[:, 0], "y": points[:, 1]}
    if find_spec("umap") is not None and len(rows) > 15:
        table["umap_x"], table["umap_y"] = umap_of(points).T
    return pd.DataFrame({**table, **{c: scans[c].to_numpy() for c in COLUMNS if c in scans}})


def umap_of(points: Array) -> Array:
    """(N, 2) coordinates by UMAP with its defaults and a fixed seed."""
    from umap import UMAP

    return np.asarray(UMAP(random_state=0).fit_transform(points))
