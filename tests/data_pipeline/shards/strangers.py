"""Writes data sets as a stranger could: every digest fits, and any value can be wrong."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pandas as pd
import pytest

from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.manifest_file import digest_of, read_content
from infra.errors import UserError
from infra.files import sha256_of, write_json


def copy_of(shards: Path, out: Path) -> Path:
    """Copy a data set and return the copy."""
    shutil.copytree(shards, out)
    return out


def write_content(folder: Path, content: dict[str, Any]) -> None:
    """Write manifest.json with the digest of its content."""
    write_json(folder / "manifest.json", {**content, "digest": digest_of(content)})


def change_table(folder: Path, table: pd.DataFrame, **listed: Any) -> None:
    """Replace the scan table and the manifest's checksum of it; ``listed`` replaces entries of ``scans``."""
    content = read_content(folder)
    stream = io.BytesIO()
    table.to_parquet(stream, index=False)
    (folder / "scans.parquet").write_bytes(stream.getvalue())
    sha256 = hashlib.sha256(stream.getvalue()).hexdigest()
    write_content(folder, {**content, "scans": {**content["scans"], "sha256": sha256, **listed}})


def replace_members(folder: Path, members: dict[str, tuple[bytes, int]]) -> None:
    """Replace members of the first shard: name -> content, and the size that the header claims. Rows and digests fit.

    A member that claims more than it holds must be the last one; everything after it is left out.
    """
    content = read_content(folder)
    path = folder / content["shards"][0]["name"]
    with tarfile.open(path) as tar:
        kept = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with path.open("wb") as stream:
        for member, payload in kept:
            payload, claimed = members.get(member.name, (payload, len(payload)))
            info = tarfile.TarInfo(member.name)
            info.size, info.uname, info.gname = claimed, "root", "root"
            stream.write(info.tobuf())
            stream.write(payload + bytes(-len(payload) % 512))
        stream.write(bytes(1024))
    content["shards"][0] |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    table = pd.read_parquet(folder / "scans.parquet")
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, ending = member.name.partition(".")
            if ending == "npy.zst":
                payload = members.get(member.name, (tar.extractfile(member).read(), 0))[0]  # type: ignore[union-attr]
                row = table["key"] == key
                table.loc[row, ["offset", "size", "crc32c"]] = (
                    member.offset_data, len(payload), google_crc32c.value(payload),
                )  # fmt: skip
    write_content(folder, content)
    change_table(folder, table)


def refused(folder: Path, words: list[str], command: Callable[[Path], Any] = Manifest.load) -> None:
    """Check that a data set is refused in one line, in which these words stand."""
    with pytest.raises(UserError) as caught:
        command(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert "\0" not in message
    for word in words:
        assert word in message, message
