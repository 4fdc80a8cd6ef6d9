"""Guards: nobody in the test was in pretraining, by name or by voxels; no scan is on both sides of a fold under two names.

What an encoder has seen is read from beside its weights (``pretrain.weights.seen_scans``), so that the guard works where the
shards that it was trained on are gone; encoders of before that file are judged by the manifest, where it is this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.storage.manifest import Manifest
from evaluation.tasks.tasks import Task
from infra.errors import UserError
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder
from pretrain.weights.seen_scans import DIGITS, Source, participant_digest, participants_of, read, source_of

Array = np.ndarray[Any, np.dtype[Any]]


def check_leakage(encoder: Encoder, given: str | Path, manifest: Manifest, rows: Array, name: str) -> dict[str, str]:
    """UserError, naming participants, where scans ``rows`` are of people, or hold voxels, that the encoder was trained on.

    Returned for the record: what was compared (``leakage.checked``), and how many scans the monitor watched while the
    encoder was trained (``leakage.watched``).
    """
    if encoder.config.get("method") == "random":
        return {"leakage.checked": "untrained"}
    sources = read(find_encoder(given))
    if sources is None:
        sources = _by_manifest(encoder, manifest)
    if sources is None:
        print(f"evaluate: {name} does not tell whom it was trained on; see to it that no participant is in both")
        return {"leakage.checked": "nothing"}
    trained = [source for source in sources if source.role == "trained"]
    people = _people_in(trained, manifest, rows)
    # Whoever has one scan among those seen has been seen, in every session, whether that scan is tested on or not.
    every = np.flatnonzero(np.isin(participants_of(manifest, _all(manifest)), participants_of(manifest, rows)))
    copies = every[_voxels_in(trained, manifest, every)]
    voxels = np.isin(participants_of(manifest, rows), participants_of(manifest, copies))
    if people.any() or voxels.any():
        raise UserError(f"{name}: {_refusal(manifest, rows, people, voxels, copies)}; evaluate on other scans")
    watched = _people_in([source for source in sources if source.role == "watched"], manifest, rows)
    if watched.any():
        print(f"evaluate: {name}: {int(watched.sum())} test scans are of participants that pretraining watched (monitor); "
              "do not choose among its checkpoints by them")  # fmt: skip
    unknown = "voxels_sha256" not in manifest.scans or any(source.voxels is None for source in trained)
    return {
        "leakage.checked": "participants" if unknown else "participants, voxels",
        "leakage.watched": str(int(watched.sum())),
    }


def check_copies(tasks: Iterable[Task], manifest: Manifest) -> None:
    """UserError where two groups of a task share a scan's voxels: one would be fitted to, the other asked about."""
    if "voxels_sha256" not in manifest.scans:
        return
    for task in tasks:
        digests = manifest.scans["voxels_sha256"].iloc[task.rows]
        table = pd.DataFrame({"digest": digests.to_numpy(), "group": task.groups, "name": task.participants})
        table = table[table["digest"].notna()]
        several = table.groupby("digest")["group"].transform("nunique") > 1
        if several.any():
            names = sorted(set(table.loc[several, "name"]))
            raise UserError(
                f"task {task.name}: the same voxels stand under several participants ({_shown(names)}); "
                "leave all but one out, with the task's query"
            )


def _by_manifest(encoder: Encoder, manifest: Manifest) -> list[Source] | None:
    if encoder.config.get("manifest_digest") != manifest.digest:
        return None
    return [source_of(manifest, np.flatnonzero(manifest.scans["split"].isin(encoder.config["split"])))]


def _people_in(sources: Sequence[Source], manifest: Manifest, rows: Array) -> Array:
    """(len(rows),) bool: whether a scan's participant is in one of the sources."""
    names = np.array(participants_of(manifest, rows), dtype=object)
    found = np.zeros(len(rows), dtype=bool)
    for source in sources:
        known = set(source.participants)
        seen = {name for name in set(names) if participant_digest(source.manifest_digest, name) in known}
        found |= np.isin(names, list(seen))
    return found


def _voxels_in(sources: Sequence[Source], manifest: Manifest, rows: Array) -> Array:
    if "voxels_sha256" not in manifest.scans:
        return np.zeros(len(rows), dtype=bool)
    known = {digest for source in sources for digest in source.voxels or ()}
    digests = manifest.scans["voxels_sha256"].iloc[rows].astype("string").fillna("").str[:DIGITS]
    return digests.isin(known).to_numpy(dtype=bool)


def _all(manifest: Manifest) -> Array:
    return np.arange(len(manifest.scans))


def _refusal(manifest: Manifest, rows: Array, people: Array, voxels: Array, copies: Array) -> str:
    names = np.array(participants_of(manifest, rows), dtype=object)
    parts = []
    if people.any():
        parts.append(f"pretrained on participants of the test scans ({_shown(sorted(set(names[people])))})")
    renamed = sorted(set(names[voxels & ~people]))
    if renamed:
        keys = manifest.scans["key"].iloc[copies[np.isin(participants_of(manifest, copies), renamed)]].tolist()
        parts.append(
            f"pretrained, under another name, on voxels of {_shown(renamed)}, who are tested on "
            f"(scan {keys[0]}{' and others' if len(keys) > 1 else ''})"
        )
    return "; ".join(parts)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
