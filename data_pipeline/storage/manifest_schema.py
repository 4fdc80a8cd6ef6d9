"""What manifest.json must hold. It is checked by hand, with the standard library alone, so that `shards info` starts fast.

A manifest may come from somebody else. Its names are opened and its numbers become memory, so a name is a file beside it and
every number has limits. A violation is a UserError that names the key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from data_pipeline.volume.limits import MAX_SIDE, MAX_VOXELS, is_too_large
from infra.errors import UserError

MAX_BYTES = 2**50  # of a shard
MAX_ROWS = 2**27
TABLE_NAME = re.compile(r"scans(-[0-9a-f]{8})?\.parquet")
CODECS = ("zst", "npy", "npy.gz", "nii.gz", "nii", "mixed", "none")

Check = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what is allowed in words


def _is_number(low: float, high: float) -> Check:
    return (lambda value: type(value) is int and low <= value <= high), f"a whole number from {low} to {high}"


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable()


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_shape(value: Any) -> bool:
    sides = isinstance(value, list) and len(value) == 3 and all(type(side) is int and side > 0 for side in value)
    return sides and not is_too_large(value)


def _are_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(type(n) in (int, float) and abs(n) < 1e6 and math.isfinite(n) for n in value)
    )


def _is_root(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable()


def is_shard_name(value: Any, folders: bool = False) -> bool:
    """Return whether a value is the plain name of a tar; with ``folders`` it may have folders before it, but none above."""
    if not isinstance(value, str) or not value.endswith(".tar") or not value.isprintable() or len(value) > 1024:
        return False
    parts = value.split("/")
    allowed = all(0 < len(part.encode()) <= 255 and part not in (".", "..") and "\\" not in part for part in parts)
    return allowed and ":" not in parts[0] and (folders or len(parts) == 1)


WORD: Check = (_is_word, "a word of 1 to 4096 letters")
SHA256: Check = (_is_sha256, "64 hexadecimal digits")
GRID: dict[str, Check] = {
    "shape": (_is_shape, f"three sides of 1 to {MAX_SIDE} voxels, {MAX_VOXELS} voxels together"),
    "spacing": (lambda value: _are_numbers(value, 3) and min(value) > 0, "three lengths in mm"),
    "affine": (
        lambda value: isinstance(value, list) and len(value) == 4 and all(_are_numbers(row, 4) for row in value),
        "4 rows of 4 numbers",
    ),
}
SETTINGS: dict[str, Check] = {
    "dataset": WORD,
    "modality": WORD,
    "scaling": WORD,
    "codec": (lambda value: value in CODECS, f"one of {', '.join(CODECS)}"),
}
SCANS: dict[str, Check] = {
    "name": (
        lambda value: isinstance(value, str) and TABLE_NAME.fullmatch(value) is not None,
        "scans.parquet, or scans-1234abcd.parquet",
    ),
    "rows": _is_number(0, MAX_ROWS),
    "sha256": SHA256,
}
SHARD: dict[str, Check] = {"bytes": _is_number(0, MAX_BYTES), "sha256": SHA256, "scans": _is_number(0, MAX_ROWS)}


def check_manifest(content: dict[str, Any], name: str) -> None:
    """Check the content of a manifest.json. Raises UserError: the file ``name``, the key, its value and what is allowed."""
    _check(content, "", {"digest": SHA256}, name)
    for key, checks in (("grid", GRID), ("settings", SETTINGS), ("scans", SCANS)):
        _check(_part(content, key, dict, name), f"{key}.", checks, name)
    settings = content["settings"]
    indexed = settings.get("indexed") is True
    if "root" in settings and not (indexed and _is_root(settings["root"])):
        raise _error(
            name, "settings.root", settings["root"], "the folder or URL of an index made by `yaware shards index`"
        )
    appended = settings.get("appended", [])
    if not isinstance(appended, list) or not all(isinstance(addition, dict) for addition in appended):
        raise _error(name, "settings.appended", appended, "a list of objects")
    for number, addition in enumerate(appended):
        _check(addition, f"settings.appended[{number}].", {"dataset": WORD, "scans": _is_number(0, MAX_ROWS)}, name)
    for addition in (settings, *appended):
        if "quarantined" in addition:
            _check(addition, "settings.", {"quarantined": _is_number(0, MAX_ROWS)}, name)
    _check_shards(_part(content, "shards", list, name), indexed, name)


def _check_shards(shards: list[Any], indexed: bool, name: str) -> None:
    """Check the rows of the shards; their names are files below the folder of the shards, each once."""
    names = set()
    allowed = "the plain name of a .tar" + (" below the index's root" if indexed else "")
    for number, shard in enumerate(shards):
        key = f"shards[{number}]"
        if not isinstance(shard, dict):
            raise _error(name, key, shard, "an object")
        if not is_shard_name(shard.get("name"), folders=indexed):
            raise _error(name, f"{key}.name", shard.get("name"), allowed)
        if shard["name"] in names:
            raise _error(name, f"{key}.name", shard["name"], "a name that no other shard has")
        names.add(shard["name"])
        _check(shard, f"{key}.", SHARD, name)
        if "codec" in shard:
            _check(shard, f"{key}.", {"codec": SETTINGS["codec"]}, name)


def _part(content: dict[str, Any], key: str, kind: type, name: str) -> Any:
    value = content.get(key)
    if not isinstance(value, kind):
        raise _error(name, key, value, "an object" if kind is dict else "a list")
    return value


def _check(values: dict[str, Any], prefix: str, checks: dict[str, Check], name: str) -> None:
    for key, (is_allowed, allowed) in checks.items():
        if key not in values:
            raise UserError(f"{name}: {prefix}{key} is missing; allowed: {allowed}; build the shards again")
        if not is_allowed(values[key]):
            raise _error(name, f"{prefix}{key}", values[key], allowed)


def _error(name: str, key: str, value: Any, allowed: str) -> UserError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return UserError(f"{name}: {key}={shown} is not {allowed}; build the shards again, or do not use them")
