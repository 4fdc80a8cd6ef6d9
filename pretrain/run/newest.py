"""Which checkpoints a folder holds, and which of them is the newest."""

from __future__ import annotations

import re
from pathlib import Path

from infra.errors import UserError
from infra.files import read_text

PREFIX = "step-"  # of the folder of a checkpoint


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint: ``checkpoints/step-00000120``."""
    return checkpoints / f"{PREFIX}{step:08d}"


def newest_step(checkpoints: Path) -> int | None:
    """Return the step that ``latest`` names, unverified; None if there is none. Raises UserError if it names none."""
    pointer = checkpoints / "latest"
    if not pointer.exists():
        return None
    name = read_text(pointer, errors="replace").strip()
    if not re.fullmatch(rf"{PREFIX}[0-9]{{8,12}}", name):
        raise UserError(
            f"{pointer} names {name!r:.60}, not a checkpoint as {PREFIX}00000120; write the newest one's name"
        )
    return int(name.removeprefix(PREFIX))


def newest_first(checkpoints: Path) -> list[Path]:
    """Return the finished checkpoints: first the one that ``latest`` names, then older ones, then newer ones.

    A checkpoint newer than ``latest`` is complete, but its pointer was never moved.
    """
    folders = sorted(checkpoints.glob(f"{PREFIX}*"), reverse=True)
    newest = newest_step(checkpoints)
    if newest is None:
        return folders
    pointed = step_folder(checkpoints, newest)
    return [f for f in folders if f <= pointed] + [f for f in folders if f > pointed]
