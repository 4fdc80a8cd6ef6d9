"""Write an encoder to a folder that needs nothing else: safetensors, JSON and a model card, no pickle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_pipeline.prepare.reuse.record import training_preparation
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.preparation import DEFAULT_PREPARATION, file_rules
from infra.errors import PATH, Kind, UserError, check_arguments
from infra.files import sha256_of, write_json
from infra.processes.scratch import scratch_folder
from pretrain.hub.card import model_card
from pretrain.weights import likeness, seen_scans
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import FILES, find_encoder
from pretrain.weights.readouts import FOLDER, readouts_folder


def preprocessing_of(manifest: Manifest, rows: NDArray[np.integer[Any]] | None = None) -> dict[str, Any]:
    """Return the content of preprocessing.json for an encoder trained on some rows of a manifest; None is all of them.

    It holds everything that changes voxels between a scan's file and the network, so that ``Encoder.embed`` prepares a
    file as the build of the shards did, and what the training scans look like. A few of them are read for that. If
    ``cohort prepare`` made the scans, ``preparation`` holds how.
    """
    settings = manifest.settings
    rows = manifest.rows() if rows is None else rows
    preparation = training_preparation(manifest, rows)
    return {
        "grid": manifest.grid, "normalisation": "zscore",
        "modality": settings.get("modality"), "scaling": settings.get("scaling"),
        **{name: settings.get(name, default) for name, default in DEFAULT_PREPARATION.items()},
        **file_rules(settings),
        "likeness": likeness.measure(manifest, rows),
        **({"preparation": preparation} if preparation else {}),
    }  # fmt: skip


def write_encoder(
    folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any], preprocessing: dict[str, Any],
    seen: Sequence[seen_scans.SeenScans] = (),
) -> str:  # fmt: skip
    """Write an export folder and return the SHA-256 of its weights.

    Args:
        folder: the folder to make; it must not exist.
        state: the encoder's weights.
        config: content of config.json: encoder, feature size, run.
        preprocessing: content of preprocessing.json, see ``preprocessing_of``.
        seen: the scans that the weights were fitted to or chosen by; an evaluation refuses to test on them.

    Raises:
        OSError: if the weights cannot be written, for instance because the disk is full.
    """
    folder.mkdir(parents=True)
    try:
        save_file(state, folder / "model.safetensors")
    except SafetensorError as error:
        raise OSError(f"{folder / 'model.safetensors'}: {error}") from error
    write_json(folder / "config.json", config)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes the file private
    write_json(folder / "preprocessing.json", preprocessing)
    (folder / "README.md").write_text(model_card(config, preprocessing), encoding="utf-8")
    names = list(FILES)
    if seen:
        write_json(folder / seen_scans.NAME, seen_scans.to_json(seen))
        names.append(seen_scans.NAME)
    checksums = {name: sha256_of(folder / name) for name in names}
    write_json(folder / "checksums.json", checksums)
    return checksums["model.safetensors"]


def export(checkpoint: str | Path, out: str | Path) -> Path:
    """Copy a checkpoint's encoder, with its readouts, to the folder ``out``, completely or not at all, and return ``out``.

    Args:
        checkpoint: a run folder (its latest checkpoint), a checkpoint, or another exported encoder.
        out: the folder to make.

    If ``out`` holds the same files already, it stays: the command may have been killed after its last step, and is repeated.

    Raises:
        UserError: if ``out`` exists and is not this export, or if there is no complete encoder at ``checkpoint``.
    """
    if isinstance(checkpoint, Encoder):
        if checkpoint.folder is None:
            raise UserError("this encoder was made in memory and has no folder to export; give a run or a checkpoint")
        checkpoint = checkpoint.folder
    check_arguments(Kind((str, os.PathLike), "a path, a Run or an Encoder"), checkpoint=checkpoint)
    check_arguments(PATH, out=out)
    out = Path(out)
    if out.exists() and not (out / "checksums.json").is_file():
        raise UserError(f"{out} exists already; choose a new folder")
    Encoder.from_pretrained(checkpoint)  # checks every file
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder("export", beside=out) as temporary:
        encoder = find_encoder(checkpoint)
        shutil.copytree(encoder, temporary / "encoder")
        readouts = readouts_folder(encoder)
        if readouts.is_dir() and readouts.parent != encoder:
            shutil.copytree(readouts, temporary / "encoder" / FOLDER)
        if not out.exists():
            (temporary / "encoder").rename(out)
        elif not _same_files(temporary / "encoder", out):
            raise UserError(f"{out} exists already and is not this encoder's export; choose a new folder")
    return out


def _same_files(one: Path, other: Path) -> bool:
    """Return whether two exports hold the same files; the checksums come first, since ``other`` may be anything."""
    if sha256_of(one / "checksums.json") != sha256_of(other / "checksums.json"):
        return False
    first, second = (
        {path.relative_to(folder): sha256_of(path) for path in folder.rglob("*") if path.is_file()}
        for folder in (one, other)
    )
    return first == second
