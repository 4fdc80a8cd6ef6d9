"""Which scans an encoder has seen, kept beside its weights as digests: ``seen_scans.json``.

The shards that an encoder was trained on may be elsewhere, or gone, when it is evaluated. With this file the evaluation
still finds out whether a participant, or a scan's very voxels, were among them. It holds digests, no names: whoever
holds a cohort can ask whether its people are in the file, and who does not can read nothing off it. A digest is no
secret, though: someone who guesses a name can test the guess (docs/evaluation_protocols.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from pretrain.weights.folder import find_encoder

NAME = "seen_scans.json"
# 64 bits: among 10^4 scans seen and 10^4 asked about, two digests meet by chance once in 10^11 times.
DIGITS = 16


@dataclass(frozen=True)
class Source:
    """The scans of one data set that weights were fitted to (``role`` trained) or chosen by (watched: the monitor's)."""

    manifest_digest: str
    role: str
    participants: list[str] = field(default_factory=list)
    voxels: list[str] | None = None  # None: the shards have no digests of voxels


def participant_digest(manifest_digest: str, participant: str) -> str:
    """The digest of ``dataset/participant_id``; salted by the manifest's, so that files of two data sets share none."""
    return hashlib.sha256(f"{manifest_digest}:{participant}".encode()).hexdigest()[:DIGITS]


def participants_of(manifest: Manifest, rows: np.ndarray[Any, np.dtype[Any]]) -> list[str]:
    """``dataset/participant_id`` of scans, in the order of ``rows``."""
    scans = manifest.scans.iloc[rows]
    return (scans["dataset"].astype(str) + "/" + scans["participant_id"].astype(str)).tolist()


def source_of(manifest: Manifest, rows: np.ndarray[Any, np.dtype[Any]], role: str = "trained") -> Source:
    """The digests of some scans of a manifest."""
    people = sorted({participant_digest(manifest.digest, name) for name in set(participants_of(manifest, rows))})
    voxels = None
    if "voxels_sha256" in manifest.scans and manifest.scans["voxels_sha256"].iloc[rows].notna().all():
        voxels = sorted({str(digest)[:DIGITS] for digest in manifest.scans["voxels_sha256"].iloc[rows]})
    return Source(manifest.digest, role, people, voxels)


def read(folder: Path) -> list[Source] | None:
    """What is kept beside an encoder; None where nothing is. UserError where the file is damaged."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        return [Source(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["sources"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); export the encoder again") from None


def seen_before(*places: str | Path) -> list[Source]:
    """What the encoder at the first of some places (runs, checkpoints) has seen; empty if none of them has an encoder."""
    for place in places:
        try:
            return read(find_encoder(place)) or []
        except UserError:
            continue
    return []


def to_json(sources: Iterable[Source]) -> dict[str, Any]:
    """The content of the file; a source that is there already is written once."""
    entries: list[dict[str, Any]] = []
    for source in sources:
        if asdict(source) not in entries:
            entries.append(asdict(source))
    return {"sources": entries}
