"""``seen_scans.json``: digests of the scans that an encoder was trained on, beside its weights.

An encoder may be evaluated where its training shards are not available. With this file the evaluation still detects test
participants, and scans with identical voxels, that the encoder was trained on. The file holds digests, not names: with a
cohort one can check whether its participants are in the file; without one it reveals none. The digests are not secret:
someone who guesses a participant's id can test the guess (docs/evaluation_protocols.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from pretrain.weights.folder import find_encoder, read_json

NAME = "seen_scans.json"
# 64 bits: 10^4 training scans and 10^4 test scans share a digest by chance with a probability of about 10^-11.
DIGITS = 16


@dataclass(frozen=True)
class SeenScans:
    """Digests of the scans of one data set that an encoder has seen.

    Attributes:
        manifest_digest: digest of the data set's manifest.
        role: ``trained`` if the weights were fitted to the scans, ``watched`` if the monitor chose a checkpoint by them.
        participants: ``participant_digest`` of each participant, sorted.
        voxels: the first digits of each scan's ``voxels_sha256``, sorted; None if the manifest does not have them.
    """

    manifest_digest: str
    role: str
    participants: list[str] = field(default_factory=list)
    voxels: list[str] | None = None


def participant_digest(manifest_digest: str, participant: str) -> str:
    """Return the digest of ``dataset/participant_id``, salted with the manifest's so that no two data sets share one."""
    return hashlib.sha256(f"{manifest_digest}:{participant}".encode()).hexdigest()[:DIGITS]


def participants_of(manifest: Manifest, rows: NDArray[np.integer[Any]]) -> list[str]:
    """Return ``dataset/participant_id`` of the scans at ``rows`` (n,), in their order."""
    scans = manifest.scans.iloc[rows]
    return (scans["dataset"].astype(str) + "/" + scans["participant_id"].astype(str)).tolist()


def source_of(manifest: Manifest, rows: NDArray[np.integer[Any]], role: str = "trained") -> SeenScans:
    """Return the digests of the scans at ``rows`` (n,) of a manifest."""
    people = sorted({participant_digest(manifest.digest, name) for name in set(participants_of(manifest, rows))})
    voxels = None
    if "voxels_sha256" in manifest.scans and manifest.scans["voxels_sha256"].iloc[rows].notna().all():
        voxels = sorted({str(digest)[:DIGITS] for digest in manifest.scans["voxels_sha256"].iloc[rows]})
    return SeenScans(manifest.digest, role, people, voxels)


def read(folder: Path) -> list[SeenScans] | None:
    """Return the scans that an encoder has seen; None if its folder has no such file. Raises UserError if it is damaged."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        return TypeAdapter(list[SeenScans]).validate_python(read_json(path)["sources"])
    except (ValidationError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is damaged ({reason}); export the encoder again") from None


def seen_before(*paths: str | Path) -> list[SeenScans]:
    """Return the scans seen by the first encoder found at ``paths`` (runs or checkpoints); empty if there is none."""
    for path in paths:
        try:
            return read(find_encoder(path)) or []
        except UserError:
            continue
    return []


def to_json(sources: Iterable[SeenScans]) -> dict[str, Any]:
    """Return the content of the file; a source that occurs twice is written once."""
    entries: list[dict[str, Any]] = []
    for source in sources:
        if asdict(source) not in entries:
            entries.append(asdict(source))
    return {"sources": entries}
