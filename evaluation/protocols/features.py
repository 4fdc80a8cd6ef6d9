"""Frozen features of scans: those of the encoder or of a block inside it, computed once per checkpoint and cached."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.loading.loader import volumes
from data_pipeline.storage.manifest import Manifest
from infra.files import atomic_write, regular_file
from infra.progress import Progress
from pretrain.encoders.cpu_speed import fast_layout, scans_of_a_batch
from pretrain.weights.encoder import Encoder
from pretrain.weights.layers import OWN, Block, features_of_blocks

BATCH = 16  # scans, at most


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
    block = layer, tuple(pooling)
    return features_of_each(encoder, manifest, rows, {block: cache}, title)[block]


def features_of_each(
    encoder: Encoder, manifest: Manifest, rows: NDArray[Any], caches: dict[Block, Path], title: str
) -> dict[Block, NDArray[np.float32]]:
    """Return features (len(rows), F) of several blocks and poolings; missing ones are computed in one pass over the scans.

    ``caches`` gives the .npz file of each block; other arguments and errors as ``features_of``.
    """
    blocks = list(caches)
    compute = features_of_blocks(encoder.network, blocks)
    stored = {block: _read(cache) for block, cache in caches.items()}
    missing = np.array([row for row in rows if any(int(row) not in kept for kept in stored.values())], dtype=np.int64)
    if len(missing):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder.eval().to(device)
        size = scans_of_a_batch(device, prod(manifest.grid["shape"]), BATCH)
        layout = fast_layout(encoder.network, device)
        with torch.no_grad(), layout, Progress(len(missing), "scans", title) as progress:
            for batch_rows, batch in volumes(manifest, missing, size):
                for block, values in zip(blocks, compute(batch.to(device)), strict=True):
                    stored[block] |= zip(map(int, batch_rows), values.float().cpu().numpy(), strict=True)
                progress.advance(len(batch_rows))
        for block, cache in caches.items():
            _write(cache, stored[block])
    features = {}
    for block in blocks:  # one block's rows at a time are in memory twice
        kept = stored.pop(block)
        features[block] = np.stack([kept[int(row)] for row in rows])
    return features


def cache_name(weights: str, digest: str, layer: str | None, pooling: Sequence[str]) -> str:
    """Return the name of the cache file for weights (SHA-256), a manifest digest, a layer and its pooling."""
    own = layer is None and tuple(pooling) in ((), OWN)
    tail = "" if own else f"-{layer or 'end'}-{'+'.join(pooling)}"
    return f"{weights[:16]}-{digest[:16]}{tail}.npz"


def _write(cache: Path, features_of_row: dict[int, NDArray[np.float32]]) -> None:
    with atomic_write(cache) as stream:
        rows = np.array(list(features_of_row), dtype=np.int64)
        np.savez(stream, rows=rows, features=np.stack(list(features_of_row.values())))


def _read(cache: Path) -> dict[int, NDArray[np.float32]]:
    if not cache.exists():
        return {}
    with np.load(regular_file(cache)) as stored:
        return dict(zip(stored["rows"].tolist(), stored["features"], strict=True))
