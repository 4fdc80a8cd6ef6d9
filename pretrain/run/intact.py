"""Whether a checkpoint can be read: whose it is, whether it is whole, and that it holds no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.files import read_text, sha256_of
from infra.trust.owners import foreign_owner
from pretrain.engine.safe_load import find_code


def verify_checkpoint(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Compare files with their checksums; return the first problem, or None.

    Of several ranks, each checks every ``ranks``-th file, starting with number ``rank``.
    """
    try:
        checksums = json.loads(read_text(folder / "checksums.json"))
    except (OSError, ValueError, RecursionError) as error:
        return f"checksums.json: {error}"
    if not isinstance(checksums, dict) or not checksums:
        return "checksums.json names no files"
    for name in sorted(checksums)[rank::ranks]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"checksums.json names {name!r:.100}, which is not a file of the checkpoint"
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name) != checksums[name]:
            return f"{name} differs from its checksum"
    return None


def refusal(folder: Path, trust: bool, rank: int = 0, ranks: int = 1) -> str:
    """Return why a checkpoint must not be read; empty if it may be.

    Args:
        folder: the checkpoint.
        trust: whether files of other users may be read. Code in a file is never run, whoever wrote it.
        rank: this rank looks at every ``ranks``-th file, starting with number ``rank``.
        ranks: number of ranks.
    """
    owner = None if trust else foreign_owner(folder)
    if owner:
        return (
            f"{owner}; a checkpoint of another user may be made to mislead: if you know that user, give --trust "
            "(run.trust=true), or copy the run's folder and look at it"
        )
    code = find_code(folder, rank, ranks)
    return (
        f"{code}; such code is never run, so this checkpoint cannot be used: take one from a source you know"
        if code
        else ""
    )


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json. Raises UserError, naming the key, if a value is not possible."""
    path = folder / "state.json"
    try:
        state = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); take another checkpoint") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not an object; take another checkpoint")
    for key, least, most in (("step", 0, None), ("world_size", 1, None), ("zero_stage", 0, 3)):
        value = state.get(key, least if key == "zero_stage" else None)
        if type(value) is not int or value < least or (most is not None and value > most):
            limits = f"a number from {least}" + ("" if most is None else f" to {most}")
            raise UserError(f"{path}: {key}={value!r:.60} is not {limits}; take another checkpoint")
    return state
