"""Frozen features of scans, computed once a checkpoint and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.loader import volumes
from data_pipeline.manifest import Manifest
from data_pipeline.volume import PREPARED
from infra.errors import UserError
from infra.files import atomic_write
from infra.progress import Progress
from pretrain.export import Encoder

Array = np.ndarray[Any, np.dtype[Any]]
BATCH = 16


def check_preprocessing(encoder: Encoder, manifest: Manifest, name: str) -> None:
    """UserError where the shards are not on the encoder's grid, or of another modality, scaling, crop or intensity."""
    wanted, found = {**PREPARED, **encoder.preprocessing}, {**PREPARED, "grid": manifest.grid, **manifest.settings}
    for key in ("grid", "modality", "scaling", *PREPARED):
        if wanted.get(key) is not None and wanted[key] != found.get(key):
            raise UserError(
                f"{name}: the encoder was trained on {key} {wanted[key]!r}, {manifest.root} has {found.get(key)!r}; "
                "build shards with the encoder's own"
            )


def check_leakage(encoder: Encoder, manifest: Manifest, rows: Array, name: str) -> None:
    """UserError where a participant of ``rows`` is among those that the encoder was pretrained on."""
    if encoder.config.get("method") == "random":
        return
    if encoder.config.get("manifest_digest") != manifest.digest:
        print(f"evaluate: {name} was pretrained on other shards; see to it that no participant is in both")
        return
    people = manifest.scans["dataset"] + "/" + manifest.scans["participant_id"]
    trained = set(people[manifest.scans["split"].isin(encoder.config["split"])])
    both = sorted(trained & set(people.iloc[rows]))
    if both:
        shown = ", ".join(both[:5]) + (f" and {len(both) - 5} more" if len(both) > 5 else "")
        raise UserError(f"{name}: pretrained on participants of the test scans ({shown}); evaluate on other splits")


def features_of(encoder: Encoder, manifest: Manifest, rows: Array, cache: Path, title: str) -> Array:
    """(len(rows), F) float32 features of scans, read from ``cache`` (an .npz) where it holds all of them."""
    known = _read(cache)
    missing = np.array([row for row in rows if int(row) not in known], dtype=np.int64)
    if len(missing):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder = encoder.eval().to(device)
        with torch.no_grad(), Progress(len(missing), "scans", title) as progress:
            for part, batch in volumes(manifest, missing, BATCH):
                for row, vector in zip(part, encoder(batch.to(device)).float().cpu().numpy(), strict=True):
                    known[int(row)] = vector
                progress.advance(len(part))
        with atomic_write(cache) as stream:
            np.savez(stream, rows=np.array(list(known), dtype=np.int64), features=np.stack(list(known.values())))
    return np.stack([known[int(row)] for row in rows])


def _read(cache: Path) -> dict[int, Array]:
    if not cache.is_file():
        return {}
    with np.load(cache) as stored:
        return dict(zip(stored["rows"].tolist(), stored["features"], strict=True))
