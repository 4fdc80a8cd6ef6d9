"""``seen_scans.json``: digests of the scans that an encoder was trained on, beside its weights.

An encoder may be evaluated where its training shards are not available. With this file the evaluation still detects test
participants, and scans with identical voxels, that the encoder was trained on. The file holds digests, not names: with a
cohort one can check whether its participants are in the file; without one it reveals none. The digests are not secret:
someone who guesses a participant's id can test the guess (docs/evaluation_protocols.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from infra.files import read_object
from pretrain.weights.folder import find_encoder

NAME = "seen_scans.json"
# 64 bits: 10^4 training scans and 10^4 test scans share a digest by chance with a probability of about 10^-11.
DIGITS = 16
# What was done with the scans. The first two are of encoders, the others of their readouts.
ROLES = {
    "trained": "the weights were fitted to them",
    "watched": "the monitor chose a checkpoint by them",
    "readouts": "the coefficients of readouts were fitted to them",
    "calibration": "the penalty of readouts was chosen, and their errors were measured, on them",
}


@dataclass(frozen=True)
class SeenScans:
    """Digests of the scans of one data set that an encoder has seen.

    Attributes:
        manifest_digest: digest of the data set's manifest.
        role: a key of ``ROLES``.
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
    return read_file(path, "export the encoder again") if path.exists() else None


def read_file(path: Path, fix: str = "write it again with yaware digests") -> list[SeenScans]:
    """Return the scans whose digests are in a file. Raises UserError, which ends with ``fix``, if it is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path} is missing; {fix}")
    try:
        return TypeAdapter(list[SeenScans]).validate_python(read_object(path, fix)["sources"])
    except (ValidationError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is damaged ({reason}); {fix}") from None


def trained_on(folder: Path, config: Mapping[str, Any], manifest: Manifest) -> list[SeenScans] | None:
    """Return the scans that an encoder was trained on; empty if it is untrained, None if that is not known.

    Without a file ``seen_scans.json`` it is known of the shards that the encoder was trained on.

    Args:
        folder: of the exported encoder.
        config: its config.json.
        manifest: of the shards that it is used on.
    """
    if config.get("method") == "random":
        return []
    sources = read(folder)
    if sources is not None:
        return [source for source in sources if source.role == "trained"]
    if config.get("manifest_digest") != manifest.digest:
        return None
    return [source_of(manifest, np.flatnonzero(manifest.scans["split"].isin(config["split"])))]


def people_in(sources: Sequence[SeenScans], manifest: Manifest, rows: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Return (n,) whether a scan's participant is in one of the sources."""
    names = np.array(participants_of(manifest, rows), dtype=object)
    result = np.zeros(len(rows), dtype=bool)
    for source in sources:
        digests = set(source.participants)
        seen = {name for name in set(names) if participant_digest(source.manifest_digest, name) in digests}
        result |= np.isin(names, list(seen))
    return result


def copies_in(
    sources: Sequence[SeenScans], manifest: Manifest, rows: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return (n,) whether any scan of a scan's participant has voxels that are in one of the sources, and these scans' rows.

    Without digests of voxels there are none.
    """
    none = np.zeros(len(rows), dtype=bool), np.empty(0, np.int64)
    digests = {digest for source in sources for digest in source.voxels or ()}
    if "voxels_sha256" not in manifest.scans or not digests:
        return none
    subjects = manifest.subjects()
    # A participant with one seen scan counts as seen in every session.
    candidates = np.flatnonzero(np.isin(subjects, subjects[rows]))
    voxels = manifest.scans["voxels_sha256"].iloc[candidates].astype("string").fillna("").str[:DIGITS]
    copies = candidates[voxels.isin(digests).to_numpy(dtype=bool)]
    return np.isin(subjects[rows], subjects[copies]), copies


def seen_in(sources: Sequence[SeenScans], manifest: Manifest, rows: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Return (n,) whether a scan's participant is in one of the sources, by name or by the voxels of any scan."""
    return people_in(sources, manifest, rows) | copies_in(sources, manifest, rows)[0]


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
