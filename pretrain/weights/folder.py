"""The folder of an exported encoder: its files, and where it lies in a run or a checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from infra.errors import PATH, UserError, check_arguments
from infra.files import read_object, read_text
from pretrain.hub.download import fetch_encoder, is_address

WEIGHTS = "model.safetensors"
# The files that every exported encoder has; checksums.json lists their digests.
FILES = (WEIGHTS, "config.json", "preprocessing.json")
# checksums.json may list these; an encoder that has seen nobody lacks the last.
LISTED = (*FILES, "seen_scans.json")
# What an encoder at the hub may have beside them; the readouts have digests of their own.
OPTIONAL = ("README.md", "readouts/checksums.json", "readouts/readouts.json", "readouts/readouts.safetensors")


def find_encoder(path: str | Path) -> Path:
    """Return the folder of the exported encoder that ``path`` stands for.

    Args:
        path: an exported encoder, a checkpoint ``step-XXXXXXXX/``, a run folder or its ``checkpoints/`` (the latest
            checkpoint), one of the files ``checkpoints/best`` and ``checkpoints/latest``, which name a step, or
            ``hf://owner/name@revision``, an encoder at the Hugging Face hub.

    Raises:
        UserError: if there is no encoder.
    """
    check_arguments(PATH, encoder=path)
    path = local_path(path)
    candidates = [path, path / "encoder"]
    pointers = [path] if path.name in ("best", "latest") else []
    for pointer in (*pointers, path / "checkpoints" / "latest", path / "latest"):
        if pointer.exists():
            name = read_text(pointer, errors="replace").strip()
            if re.fullmatch(r"step-[0-9]{1,12}", name):
                candidates.append(pointer.parent / name / "encoder")
    for candidate in candidates:
        if (candidate / "model.safetensors").exists():
            return candidate
    raise UserError(
        f"no encoder in {path}; give a run folder, one of its checkpoints/step-*, its checkpoints/best, or an exported "
        "encoder"
    )


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a path, and for ``hf://owner/name@revision`` the folder of the local cache with the files of that encoder.

    Raises UserError if they cannot be had.
    """
    return fetch_encoder(path, WEIGHTS, OPTIONAL, LISTED) if is_address(path) else Path(path)


def list_checkpoints(run: str | Path) -> list[Path]:
    """Return the finished checkpoints of a run folder in the order of their steps. Raises UserError if there is none."""
    folders = sorted(path for path in (Path(run) / "checkpoints").glob("step-*") if (path / "encoder").is_dir())
    if not folders:
        raise UserError(f"{run} has no checkpoints/step-*; give a run folder, or leave --all-steps out")
    return folders


def first_config(*paths: str | Path) -> dict[str, Any]:
    """Return config.json of the first encoder found at ``paths`` (runs or checkpoints); empty if there is none.

    Raises UserError if it is damaged.
    """
    for path in paths:
        try:
            folder = find_encoder(path)
        except UserError:
            continue
        return read_json(folder / "config.json")
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of an exported encoder. Raises UserError if it is missing, damaged, or something else."""
    if not path.exists():
        raise UserError(f"{path} is missing; export the encoder again")
    return read_object(path, "export the encoder again")
