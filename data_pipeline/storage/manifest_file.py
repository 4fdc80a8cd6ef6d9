"""The manifest's two files on disk, read and checked with the standard library alone, so that `shards info` starts at once.

``manifest.json`` names the scan table and its SHA-256, so it alone decides which table is read: a build writes
``scans.parquet``, an append a table named after its own content, and both then replace ``manifest.json`` in one rename.
A reader sees the data set before or after, never a mix.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from infra.errors import UserError

FORMAT = 1
MANIFEST, SCANS = "manifest.json", "scans.parquet"


def read_content(root: str | Path) -> dict[str, Any]:
    """``manifest.json`` of a folder of shards. UserError where it is missing, no JSON, of another format, or edited."""
    path = Path(root) / MANIFEST
    try:
        return check_content(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give a folder made by `yaware shards build`") from None


def check_content(text: bytes, name: str) -> dict[str, Any]:
    """What the text of ``manifest.json`` says; UserError naming ``name`` where it is none of ours, or was edited."""
    try:
        content = json.loads(text.decode())
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON ({error}); build the shards again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise UserError(f"{name} has format {found!r}, this version reads {FORMAT}; build again")
    if content.get("digest") != digest_of(content):
        raise UserError(f"{name} was edited: its digest does not fit its content; build the shards again")
    return content


def read_checked(root: str | Path) -> tuple[dict[str, Any], bytes]:
    """The content of ``manifest.json`` and the bytes of the scan table that it names, which have its checksum.

    An append that replaces the manifest between the two reads removes the old table; then both are read again.
    """
    content = read_content(root)
    while True:
        path = Path(root) / str(content["scans"]["name"])
        table = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(table).hexdigest() == content["scans"]["sha256"]:
            return content, table
        again = read_content(root)
        if again["digest"] == content["digest"]:
            raise UserError(f"{path} is missing or differs from manifest.json; build the shards again")
        content = again


def is_simulated(settings: dict[str, Any]) -> bool:
    """Whether scans of the build, or of anything appended to it, come from the simulator."""
    return any(bool(part.get("simulated", False)) for part in (settings, *settings.get("appended", [])))


def digest_of(content: dict[str, Any]) -> str:
    """SHA-256 of the manifest's content without its own digest, as canonical JSON."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
