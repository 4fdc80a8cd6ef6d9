"""Guards against leakage between pretraining and test scans, and between training and test folds.

The scans that an encoder was trained on are recorded beside its weights (``pretrain.weights.seen_scans``), so the guard
works after the shards of the pretraining are gone. An encoder without that record is checked by its manifest, if it was
trained on the shards that it is evaluated on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from evaluation.tasks.tasks import Task
from infra.errors import UserError
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder
from pretrain.weights.readouts import Readouts
from pretrain.weights.seen_scans import SeenScans, copies_in, participants_of, people_in, read, read_file, trained_on


def check_leakage(
    encoder: Encoder, path: str | Path, manifest: Manifest, rows: NDArray[Any], name: str
) -> dict[str, str]:
    """Refuse an encoder that was trained on participants, or on voxels, of the scans it is to be tested on.

    Args:
        encoder: the encoder at ``path``.
        path: a run folder, checkpoint or export.
        manifest: of the shards to evaluate on.
        rows: (N,) rows of the test scans in the manifest.
        name: of the encoder in messages.

    Returns:
        ``leakage.checked``: what was compared; ``leakage.watched``: number of test scans of participants on whom the
        pretraining's monitor was evaluated (left out if nothing was compared).

    Raises:
        UserError: if there is an overlap; the message names the participants.
    """
    if encoder.config.get("method") == "random":
        return {"leakage.checked": "untrained"}
    folder = find_encoder(path)
    trained = trained_on(folder, encoder.config, manifest)
    if trained is None:
        print(f"{name} has no record of the scans it was trained on; make sure that no test participant is among them")
        return {"leakage.checked": "nothing"}
    _refuse_overlap(trained, manifest, rows, name, "pretrained")
    watched = people_in([source for source in read(folder) or [] if source.role == "watched"], manifest, rows)
    if watched.any():
        print(
            f"{name}: {int(watched.sum())} test scans belong to participants on whom the pretraining's monitor "
            "was evaluated; do not choose among its checkpoints by the results on them"
        )
    no_voxels = "voxels_sha256" not in manifest.scans or any(source.voxels is None for source in trained)
    return {
        "leakage.checked": "participants" if no_voxels else "participants, voxels",
        "leakage.watched": str(int(watched.sum())),
    }


def check_seen(path: str | os.PathLike[str], manifest: Manifest, rows: NDArray[Any], name: str) -> dict[str, str]:
    """Refuse features whose encoder was trained on participants, or on voxels, of the scans that they are tested on.

    Args:
        path: file of ``yaware digests``, or a ``seen_scans.json``, of the people that the encoder was trained on.
        manifest: of the shards to evaluate on.
        rows: (N,) rows of the test scans in the manifest.
        name: of the features in messages.

    Returns:
        ``leakage.checked``: what was compared.

    Raises:
        UserError: if the file cannot be read or holds nobody, or if there is an overlap; the message names the participants.
    """
    sources = [source for source in read_file(Path(path)) if source.role in ("trained", "readouts")]
    if not any(source.participants for source in sources):
        raise UserError(
            f"seen={os.fspath(path)} names nobody that an encoder was trained on; write it with yaware digests"
        )
    _refuse_overlap(sources, manifest, rows, name, "pretrained")
    no_voxels = "voxels_sha256" not in manifest.scans or any(source.voxels is None for source in sources)
    return {"leakage.checked": "participants" if no_voxels else "participants, voxels"}


def check_readouts(readouts: Readouts, manifest: Manifest, rows: NDArray[Any], name: str) -> None:
    """Refuse readouts that were fitted to, or calibrated on, participants or voxels of the scans that they are tested on.

    Args:
        readouts: of an encoder.
        manifest: of the shards to evaluate on.
        rows: (N,) rows of the test scans in the manifest.
        name: of the encoder in messages.

    Raises:
        UserError: if there is an overlap; the message names the participants.
    """
    calibrated = [source for source in readouts.fitted_on if source.role == "calibration"]
    fitted = [source for source in readouts.fitted_on if source.role != "calibration"]
    _refuse_overlap(fitted, manifest, rows, name, "its readouts were fitted")
    _refuse_overlap(calibrated, manifest, rows, name, "its readouts were calibrated")


def _refuse_overlap(sources: Sequence[SeenScans], manifest: Manifest, rows: NDArray[Any], name: str, what: str) -> None:
    """Raise UserError if participants of ``rows``, or voxels of them, are in one of the sources; ``what`` was done on these."""
    seen_people = people_in(sources, manifest, rows)
    seen_voxels, copies = copies_in(sources, manifest, rows)
    if seen_people.any() or seen_voxels.any():
        overlap = _describe_overlap(manifest, rows, seen_people, seen_voxels, copies=copies, what=what)
        raise UserError(f"{name}: {overlap}; evaluate on other scans")


def check_copies(tasks: Iterable[Task], manifest: Manifest) -> None:
    """Refuse a task in which two groups share the voxels of a scan, which could then be in training and in test.

    Raises UserError naming the participants.
    """
    if "voxels_sha256" not in manifest.scans:
        return
    for task in tasks:
        digests = manifest.scans["voxels_sha256"].iloc[task.rows]
        table = pd.DataFrame({"digest": digests.to_numpy(), "group": task.groups, "name": task.participants})
        table = table[table["digest"].notna()]
        shared = table.groupby("digest")["group"].transform("nunique") > 1
        if shared.any():
            names = sorted(set(table.loc[shared, "name"]))
            raise UserError(
                f"task {task.name}: several participants have the same voxels ({_first_names(names)}); exclude all but "
                "one of them with the task's query"
            )


def _describe_overlap(
    manifest: Manifest,
    rows: NDArray[Any],
    seen_people: NDArray[np.bool_],
    seen_voxels: NDArray[np.bool_],
    *,
    copies: NDArray[Any],
    what: str,
) -> str:
    names = np.array(participants_of(manifest, rows), dtype=object)
    parts = []
    if seen_people.any():
        parts.append(f"{what} on participants of the test scans ({_first_names(sorted(set(names[seen_people])))})")
    renamed = sorted(set(names[seen_voxels & ~seen_people]))
    if renamed:
        keys = manifest.scans["key"].iloc[copies[np.isin(participants_of(manifest, copies), renamed)]].tolist()
        parts.append(
            f"{what}, under another name, on voxels of the test participants {_first_names(renamed)} "
            f"(scan {keys[0]}{' and others' if len(keys) > 1 else ''})"
        )
    return "; ".join(parts)


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
