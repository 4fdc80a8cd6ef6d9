"""Frozen features of scans, computed once a checkpoint and kept: of the encoder's end, or of any block inside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.loading.loader import volumes
from data_pipeline.storage.manifest import Manifest
from infra.files import atomic_write
from infra.progress import Progress
from pretrain.weights.encoder import Encoder
from pretrain.weights.layers import intermediate_features

Array = np.ndarray[Any, np.dtype[Any]]
BATCH = 16


def features_of(
    encoder: Encoder, manifest: Manifest, rows: Array, cache: Path, title: str, layer: str | None = None,
    pooling: Sequence[str] = ("mean",),
) -> Array:  # fmt: skip
    """(len(rows), F) float32 features of scans, read from ``cache`` (an .npz) where it holds all of them."""
    compute = intermediate_features(encoder.network, layer, pooling)
    known = _read(cache)
    missing = np.array([row for row in rows if int(row) not in known], dtype=np.int64)
    if len(missing):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder.eval().to(device)
        with torch.no_grad(), Progress(len(missing), "scans", title) as progress:
            for part, batch in volumes(manifest, missing, BATCH):
                for row, vector in zip(part, compute(batch.to(device)).float().cpu().numpy(), strict=True):
                    known[int(row)] = vector
                progress.advance(len(part))
        with atomic_write(cache) as stream:
            np.savez(stream, rows=np.array(list(known), dtype=np.int64), features=np.stack(list(known.values())))
    return np.stack([known[int(row)] for row in rows])


def cache_name(weights: str, digest: str, layer: str | None, pooling: Sequence[str]) -> str:
    """The cache file of an encoder's features on a manifest."""
    tail = "" if layer is None else f"-{layer}-{'+'.join(pooling)}"
    return f"{weights[:16]}-{digest[:16]}{tail}.npz"


def _read(cache: Path) -> dict[int, Array]:
    if not cache.is_file():
        return {}
    with np.load(cache) as stored:
        return dict(zip(stored["rows"].tolist(), stored["features"], strict=True))
