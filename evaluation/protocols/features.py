"""Frozen features of scans: those of the encoder or of a block inside it, computed once per checkpoint and cached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.loading.loader import volumes
from data_pipeline.storage.manifest import Manifest
from infra.files import atomic_write
from infra.progress import Progress
from pretrain.weights.encoder import Encoder
from pretrain.weights.layers import intermediate_features

BATCH = 16


def features_of(
    encoder: Encoder, manifest: Manifest, rows: NDArray[Any], cache: Path, title: str, layer: str | None = None,
    pooling: Sequence[str] = ("mean",),
) -> NDArray[np.float32]:  # fmt: skip
    """Return features (len(rows), F) of scans; those that are missing in the cache are computed, on a GPU if there is one.

    Args:
        encoder: in evaluation mode afterwards, on the device that computed.
        manifest: of the shards.
        rows: rows of the scans in the manifest.
        cache: .npz file that keeps the features; see ``cache_name``.
        title: of the progress bar.
        layer: block to take the features from; None: the encoder's own.
        pooling: of the block's output over its voxels; see ``pretrain.weights.layers.POOLINGS``.

    Raises:
        UserError: if the encoder has no such block or the pooling is unknown.
    """
    compute = intermediate_features(encoder.network, layer, pooling)
    features_of_row = _read(cache)
    missing = np.array([row for row in rows if int(row) not in features_of_row], dtype=np.int64)
    if len(missing):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder.eval().to(device)
        with torch.no_grad(), Progress(len(missing), "scans", title) as progress:
            for batch_rows, batch in volumes(manifest, missing, BATCH):
                for row, features in zip(batch_rows, compute(batch.to(device)).float().cpu().numpy(), strict=True):
                    features_of_row[int(row)] = features
                progress.advance(len(batch_rows))
        with atomic_write(cache) as stream:
            stored_rows = np.array(list(features_of_row), dtype=np.int64)
            np.savez(stream, rows=stored_rows, features=np.stack(list(features_of_row.values())))
    return np.stack([features_of_row[int(row)] for row in rows])


def cache_name(weights: str, digest: str, layer: str | None, pooling: Sequence[str]) -> str:
    """Return the name of the cache file for weights (SHA-256), a manifest digest, a layer and its pooling."""
    tail = "" if layer is None else f"-{layer}-{'+'.join(pooling)}"
    return f"{weights[:16]}-{digest[:16]}{tail}.npz"


def _read(cache: Path) -> dict[int, NDArray[np.float32]]:
    if not cache.is_file():
        return {}
    with np.load(cache) as stored:
        return dict(zip(stored["rows"].tolist(), stored["features"], strict=True))
