"""The manifest's two files on disk, read and checked with the standard library alone, so that `shards info` starts fast.

``manifest.json`` names the scan table and its SHA-256, so this one file decides which table is read. A build writes
``scans.parquet``; an append writes a table named after its own content. Both then replace ``manifest.json`` with one rename,
so a reader sees the data set before or after the change, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from data_pipeline.storage.manifest_schema import check_manifest
from infra.errors import UserError
from infra.files import open_file, read_bytes

FORMAT = 1
MANIFEST, SCANS = "manifest.json", "scans.parquet"
MAX_MANIFEST_BYTES = 2**26  # 400,000 shards


def read_content(root: str | Path) -> dict[str, Any]:
    """Return the content of ``manifest.json`` in a folder of shards.

    Raises UserError if it is missing, is not JSON, has another format, or was edited.
    """
    path = Path(root) / MANIFEST
    try:
        with open_file(path) as stream:
            return check_content(stream.read(MAX_MANIFEST_BYTES + 1), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing; give a folder made by `yaware shards build`") from None


def check_content(text: bytes, name: str) -> dict[str, Any]:
    """Parse the text of a ``manifest.json``.

    Raises UserError, naming the file ``name``, if it is not a manifest or was edited, or the key whose value is not possible.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise UserError(f"{name} has more than {MAX_MANIFEST_BYTES} bytes, the most that is read; use larger shards")
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON ({error}); build the shards again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        newer = isinstance(found, int) and found > FORMAT
        fix = "update yaware, or build the shards with this version" if newer else "build the shards again"
        raise UserError(f"{name} has format {repr(found)[:60]}, this version reads {FORMAT}; {fix}")
    if content.get("digest") != digest_of(content):
        raise UserError(f"{name} was edited: its digest does not match its content; build the shards again")
    check_manifest(content, name)
    return content


def read_checked(root: str | Path) -> tuple[dict[str, Any], bytes]:
    """Return the content of ``manifest.json`` and the bytes of its scan table, verified with the table's checksum.

    An append that replaces the manifest between the two reads removes the old table; then both are read again.
    Raises UserError if a file is missing or its content is wrong.
    """
    content = read_content(root)
    while True:
        path = table_path(root, content)
        table = read_bytes(path) if path.exists() else b""
        if hashlib.sha256(table).hexdigest() == content["scans"]["sha256"]:
            return content, table
        again = read_content(root)
        if again["digest"] == content["digest"]:
            raise UserError(f"{path} is missing or differs from manifest.json; build the shards again")
        content = again


def table_path(root: str | Path, content: dict[str, Any]) -> Path:
    """Return the path of the scan table that a manifest names."""
    return Path(root) / str(content["scans"]["name"])


def is_simulated(settings: dict[str, Any]) -> bool:
    """Return whether scans of the build, or of anything appended to it, come from the simulator."""
    return any(bool(build.get("simulated", False)) for build in (settings, *settings.get("appended", [])))


def digest_of(content: dict[str, Any]) -> str:
    """Return the SHA-256 of the manifest's content without its ``digest``, as canonical JSON."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
