"""A linear model on voxels, a strong classical baseline, computed in the dual from inner products of scans.

Let K = X Xᵀ over all scans of the evaluation. Coordinates Z with Z Zᵀ = K have the same inner products as the scans X, so an
L2-penalised model whose features are centred by the training scans makes the same predictions from Z as from the voxels. Z is
N x N, where X is N x 2.1 million at 1.5 mm. Neither labels nor folds enter Z.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from evaluation.features.tables import coordinates_of
from infra.files import atomic_write, regular_file
from infra.processes.scratch import scratch_folder
from infra.progress import Progress

SLAB = 65_536  # voxels multiplied at a time


def voxel_coordinates(manifest: Manifest, rows: NDArray[Any], cache: Path) -> NDArray[np.float64]:
    """Return coordinates (N, N) of N scans whose inner products are those of the voxels, in columns of rising variance.

    Voxels are used as stored in the shards: not z-scored, and scaled by TIV only if the shards are. The Gram matrix is read
    from ``cache`` (.npz) if it holds all rows, and written there otherwise.
    """
    gram = _read(cache, rows)
    if gram is None:
        gram = gram_matrix(manifest, rows)
        with atomic_write(cache) as stream:
            np.savez(stream, rows=rows, gram=gram)
    return coordinates_of(gram)


def gram_matrix(manifest: Manifest, rows: NDArray[Any]) -> NDArray[np.float64]:
    """Return the inner products (N, N) of scans minus their mean scan; every scan is read once.

    Meanwhile the scans are kept in a temporary file as float16, 4.2 MB each at 1.5 mm. The mean is subtracted because
    rounding errors of the large raw products would hide the differences between scans.
    """
    reader = manifest.reader()
    voxels = int(np.prod([int(side) for side in manifest.grid["shape"]]))
    gram = np.zeros((len(rows), len(rows)))
    with scratch_folder("voxels") as folder:
        stack = np.lib.format.open_memmap(folder / "scans.npy", mode="w+", dtype=np.float16, shape=(len(rows), voxels))
        with Progress(len(rows), "scans", "voxels") as progress:
            for position, row in enumerate(rows):
                stack[position] = reader.read(int(row)).reshape(-1)
                progress.advance()
        for first in range(0, voxels, SLAB):
            slab = stack[:, first : first + SLAB].astype(np.float32)
            slab -= slab.mean(axis=0, dtype=np.float64).astype(np.float32)
            gram += slab @ slab.T
        del stack
    return gram


def _read(cache: Path, rows: NDArray[Any]) -> NDArray[np.float64] | None:
    """Return the Gram matrix of ``rows`` from the cache, or None if it lacks some of them."""
    if not cache.exists():
        return None
    with np.load(regular_file(cache)) as stored:
        position_of = {int(row): position for position, row in enumerate(stored["rows"])}
        if not all(int(row) in position_of for row in rows):
            return None
        positions = [position_of[int(row)] for row in rows]
        # The cached scans may have another mean; a model that is centred by its training scans does not depend on it.
        return np.asarray(stored["gram"][np.ix_(positions, positions)])
