"""A linear model on the voxels, the strong classical baseline, in the dual: scans' inner products are all it needs.

With K = X Xᵀ over all scans of the evaluation, coordinates Z with Z Zᵀ = K have the same inner products as the scans, so a
model with an L2 penalty, centred by its training scans, gives on the rows of Z the very answers that it gives on the voxels.
Z is N x N where X would be N x 2.1 million. No label and no fold enters it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.storage.manifest import Manifest
from infra.files import atomic_write
from infra.progress import Progress

Array = np.ndarray[Any, np.dtype[Any]]
SLAB = 65_536  # voxels multiplied at a time


def voxel_coordinates(manifest: Manifest, rows: Array, cache: Path) -> Array:
    """(len(rows), len(rows)) float64 coordinates of scans as they lie in the shards: not z-scored, TIV-scaled if they are.

    Their Gram matrix is read from ``cache`` (an .npz) where it is there for these rows.
    """
    gram = _read(cache, rows)
    if gram is None:
        gram = gram_matrix(manifest, rows)
        with atomic_write(cache) as stream:
            np.savez(stream, rows=rows, gram=gram)
    values, vectors = np.linalg.eigh(gram)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def gram_matrix(manifest: Manifest, rows: Array) -> Array:
    """(N, N) float64 inner products of scans less their mean scan; each is read once.

    The scans lie in a temporary file as float16 meanwhile, 4.2 MB each at 1.5 mm. Less the mean, products are small
    numbers whose rounding does not drown what tells scans apart.
    """
    reader = manifest.reader()
    voxels = int(np.prod([int(side) for side in manifest.grid["shape"]]))
    gram = np.zeros((len(rows), len(rows)))
    with tempfile.TemporaryDirectory(prefix="yaware-voxels-") as folder:
        stack = np.lib.format.open_memmap(
            Path(folder) / "scans.npy", mode="w+", dtype=np.float16, shape=(len(rows), voxels)
        )
        with Progress(len(rows), "scans", "voxels") as progress:
            for place, row in enumerate(rows):
                stack[place] = reader.read(int(row)).reshape(-1)
                progress.advance()
        for first in range(0, voxels, SLAB):
            slab = stack[:, first : first + SLAB].astype(np.float32)
            slab -= slab.mean(axis=0, dtype=np.float64).astype(np.float32)
            gram += slab @ slab.T
        del stack
    return gram


def _read(cache: Path, rows: Array) -> Array | None:
    if not cache.is_file():
        return None
    with np.load(cache) as stored:
        known = {int(row): place for place, row in enumerate(stored["rows"])}
        if not all(int(row) in known for row in rows):
            return None
        places = [known[int(row)] for row in rows]
        # Less another mean scan: the same for every model that is centred by its training scans.
        return np.asarray(stored["gram"][np.ix_(places, places)])
