"""The folder of an exported encoder: its files, and where it lies in a run or a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infra.errors import UserError

# The files that every exported encoder has; checksums.json lists their digests.
FILES = ("model.safetensors", "config.json", "preprocessing.json")


def find_encoder(path: str | Path) -> Path:
    """Return the folder of the exported encoder that ``path`` stands for.

    Args:
        path: an exported encoder, a checkpoint ``step-XXXXXXXX/``, a run folder or its ``checkpoints/`` (the latest
            checkpoint), or one of the files ``checkpoints/best`` and ``checkpoints/latest``, which name a step.

    Raises:
        UserError: if there is no encoder.
    """
    path = Path(path)
    candidates = [path, path / "encoder"]
    pointers = [path] if path.name in ("best", "latest") else []
    for pointer in (*pointers, path / "checkpoints" / "latest", path / "latest"):
        if pointer.is_file():
            candidates.append(pointer.parent / pointer.read_text().strip() / "encoder")
    for candidate in candidates:
        if (candidate / "model.safetensors").is_file():
            return candidate
    raise UserError(
        f"no encoder in {path}; give a run folder, one of its checkpoints/step-*, its checkpoints/best, or an exported "
        "encoder"
    )


def list_checkpoints(run: str | Path) -> list[Path]:
    """Return the finished checkpoints of a run folder in the order of their steps. Raises UserError if there is none."""
    folders = sorted(path for path in (Path(run) / "checkpoints").glob("step-*") if (path / "encoder").is_dir())
    if not folders:
        raise UserError(f"{run} has no checkpoints/step-*; give a run folder, or leave --all-steps out")
    return folders


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of an exported encoder. Raises UserError if it is missing or damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; export the encoder again") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); export the encoder again") from None
    return content
