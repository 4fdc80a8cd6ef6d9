"""Write an encoder to a folder that needs nothing else: safetensors, JSON and a model card, no pickle."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_pipeline.cohort.declarations import licence_text
from data_pipeline.prepare.reuse.record import training_preparation
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.preparation import DEFAULT_PREPARATION, file_rules
from infra.errors import OPTIONAL_TEXT, PATH, Kind, UserError, check_arguments
from infra.files import sha256_of, write_json
from infra.processes.scratch import scratch_folder
from pretrain.hub.card import hub_card, model_card
from pretrain.weights import likeness, seen_scans
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import FILES, OPTIONAL, find_encoder, read_json
from pretrain.weights.readouts import FOLDER, readouts_folder

CHECKSUMS = "checksums.json"
PRIVATE = (
    "run_id",
    "experiment",
    "model_id",
)  # of config.json: they name entries of an MLflow store that others do not have
MACHINE_PATH = re.compile(r"^file:|(?:^|[\s=:'\"(])(?:~|(?:/[\w.-]+)+)/[\w.-]+")


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


def export(
    checkpoint: str | Path, out: str | Path, *, hub_layout: bool = False, licence: str | None = None
) -> Path:  # fmt: skip
    """Copy a checkpoint's encoder, with its readouts, to the folder ``out``, completely or not at all, and return ``out``.

    Args:
        checkpoint: a run folder (its latest checkpoint), a checkpoint, another exported encoder, or ``hf://owner/name@revision``.
        out: the folder to make.
        hub_layout: make a folder to publish at the Hugging Face hub: the card begins with the metadata that the hub reads and
            names each data set with its licence, and no file holds a path, the experiment or the MLflow run.
        licence: with ``hub_layout``: that of the weights, such as ``cc-by-nc-4.0``; None says in the card that it is unknown.

    If ``out`` holds the same files already, it stays: the command may have been killed after its last step, and is repeated.

    Raises:
        UserError: if ``out`` exists and is not this export, if there is no complete encoder at ``checkpoint``, or if a file to
            be published would hold a path of this machine.
    """
    if isinstance(checkpoint, Encoder):
        if checkpoint.folder is None:
            raise UserError("this encoder was made in memory and has no folder to export; give a run or a checkpoint")
        checkpoint = checkpoint.folder
    check_arguments(Kind((str, os.PathLike), "a path, a Run or an Encoder"), checkpoint=checkpoint)
    check_arguments(PATH, out=out)
    check_arguments(OPTIONAL_TEXT, licence=licence)
    if licence is not None and not hub_layout:
        raise UserError(f"licence={licence!r:.80} is for the card of the hub's layout; add hub_layout (--hub-layout)")
    licence = None if licence is None else licence_text(licence, "licence")
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
        if hub_layout:
            _to_hub_layout(temporary / "encoder", licence or "")
        if not out.exists():
            (temporary / "encoder").rename(out)
        elif not _same_files(temporary / "encoder", out):
            raise UserError(f"{out} exists already and is not this encoder's export; choose a new folder")
    return out


def _to_hub_layout(folder: Path, licence: str) -> None:
    """Make an export a folder to publish: other files than an encoder's go, and so does what tells of this machine."""
    kept = {*read_json(folder / CHECKSUMS), CHECKSUMS, *OPTIONAL}
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in kept:
            path.unlink()
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    config, preprocessing = read_json(folder / "config.json"), read_json(folder / "preprocessing.json")
    config = {key: value for key, value in config.items() if key not in PRIVATE}
    config["run_name"] = Path(config["run_name"]).name or config["method"]
    write_json(folder / "config.json", config)
    (folder / "README.md").write_text(hub_card(config, preprocessing, licence), encoding="utf-8")
    checksums = {name: sha256_of(folder / name) for name in read_json(folder / CHECKSUMS)}
    write_json(folder / CHECKSUMS, checksums)
    for path in sorted(folder.rglob("*.json")):
        if found := next(_machine_paths(read_json(path)), None):
            raise UserError(
                f"{path.relative_to(folder)}: {found[0]}={found[1]!r:.200} is a path of this machine, which would be "
                "published; give it another name and make the encoder again"
            )


def _machine_paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key and the text of every absolute path in the content of a JSON file; the base64 of an image is none."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _machine_paths(str(name), f"a key of {key}" if key else "a key")
            yield from _machine_paths(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for part in value:
            yield from _machine_paths(part, key)
    elif isinstance(value, str) and key != "likeness.volume" and MACHINE_PATH.search(value):
        yield key, value


def _same_files(one: Path, other: Path) -> bool:
    """Return whether two exports hold the same files; the checksums come first, since ``other`` may be anything."""
    if sha256_of(one / "checksums.json") != sha256_of(other / "checksums.json"):
        return False
    first, second = (
        {path.relative_to(folder): sha256_of(path) for path in folder.rglob("*") if path.is_file()}
        for folder in (one, other)
    )
    return first == second
