"""What manifest.json must hold. It is checked by hand, with the standard library alone, so that `shards info` starts fast.

A manifest may come from somebody else. Its names are opened and its numbers become memory, so a name is a file beside it and
every number has limits. A violation is a UserError that names the key.
"""

from __future__ import annotations

import math
import re
from typing import Any

from data_pipeline.storage.settings_schema import (
    APPENDED,
    MAX_ROWS,
    NEEDED,
    PART,
    POSSIBLE,
    QUALITY,
    Check,
    unknown_rule,
    whole_number,
)  # fmt: skip
from data_pipeline.volume.limits import MAX_SIDE, MAX_VOXELS, affine_fault, is_too_large
from infra.errors import UserError

MAX_BYTES = 2**50  # of a shard
TABLE_NAME = re.compile(r"scans(-[0-9a-f]{8})?\.parquet")


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


SHA256: Check = (_is_sha256, "64 hexadecimal digits")
GRID: dict[str, Check] = {
    "shape": (_is_shape, f"three sides of 1 to {MAX_SIDE} voxels, {MAX_VOXELS} voxels together"),
    "spacing": (lambda value: _are_numbers(value, 3) and min(value) > 0, "three lengths in mm"),
    "affine": (
        lambda value: isinstance(value, list) and len(value) == 4 and all(_are_numbers(row, 4) for row in value),
        "4 rows of 4 numbers",
    ),
}
SCANS: dict[str, Check] = {
    "name": (
        lambda value: isinstance(value, str) and TABLE_NAME.fullmatch(value) is not None,
        "scans.parquet, or scans-1234abcd.parquet",
    ),
    "rows": whole_number(0, MAX_ROWS),
    "sha256": SHA256,
}
SHARD: dict[str, Check] = {"bytes": whole_number(0, MAX_BYTES), "sha256": SHA256, "scans": whole_number(0, MAX_ROWS)}


def check_manifest(content: dict[str, Any], name: str) -> None:
    """Check the content of a manifest.json. Raises UserError: the file ``name``, the key, its value and what is allowed."""
    _check(content, "", {"digest": SHA256}, name)
    for key, checks in (("grid", GRID), ("settings", NEEDED), ("scans", SCANS)):
        _check(_part(content, key, dict, name), f"{key}.", checks, name)
    if fault := affine_fault(content["grid"]["affine"], content["grid"]["spacing"]):
        raise _error(name, "grid.affine", content["grid"]["affine"], fault)
    _check_settings(content["settings"], name)
    _check_shards(_part(content, "shards", list, name), content["settings"].get("indexed") is True, name)


def _check_settings(settings: dict[str, Any], name: str) -> None:
    """Check what the settings may hold beside what they must hold."""
    indexed = settings.get("indexed") is True
    if "root" in settings and not (indexed and _is_root(settings["root"])):
        raise _error(
            name, "settings.root", settings["root"], "the folder or URL of an index made by `yaware shards index`"
        )
    appended = settings.get("appended", [])
    if not isinstance(appended, list) or not all(isinstance(addition, dict) for addition in appended):
        raise _error(name, "settings.appended", appended, "a list of objects")
    for number, addition in enumerate(appended):
        _check(addition, f"settings.appended[{number}].", APPENDED, name)
        _check_present(addition, f"settings.appended[{number}].", PART, name)
    _check_present(settings, "settings.", POSSIBLE, name)
    if "quality" in settings:
        quality = _part(settings, "quality", dict, name, "settings.")
        if (unknown := unknown_rule(quality)) is not None:
            raise _error(name, "settings.quality", unknown, f"a rule of {', '.join(QUALITY)}")
        _check_present(quality, "settings.quality.", QUALITY, name)


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
            _check(shard, f"{key}.", {"codec": NEEDED["codec"]}, name)


def _part(content: dict[str, Any], key: str, kind: type, name: str, prefix: str = "") -> Any:
    value = content.get(key)
    if not isinstance(value, kind):
        raise _error(name, f"{prefix}{key}", value, "an object" if kind is dict else "a list")
    return value


def _check(values: dict[str, Any], prefix: str, checks: dict[str, Check], name: str) -> None:
    for key, (is_allowed, allowed) in checks.items():
        if key not in values:
            raise UserError(f"{name}: {prefix}{key} is missing; allowed: {allowed}; build the shards again")
        if not is_allowed(values[key]):
            raise _error(name, f"{prefix}{key}", values[key], allowed)


def _check_present(values: dict[str, Any], prefix: str, checks: dict[str, Check], name: str) -> None:
    """As ``_check``, for keys that may be missing."""
    _check(values, prefix, {key: check for key, check in checks.items() if key in values}, name)


def _error(name: str, key: str, value: Any, allowed: str) -> UserError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return UserError(f"{name}: {key}={shown} is not {allowed}; build the shards again, or do not use them")
