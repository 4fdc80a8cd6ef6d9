"""Checks built shards against their manifest, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.manifest import Manifest
from data_pipeline.remote import ReadFailed, is_remote, remote_sum
from infra.files import sha256_of
from infra.progress import Progress


def verify_shards(manifest: Manifest) -> list[str]:
    """One line for each thing that is wrong: a shard missing, of another size or content, or one too many."""
    problems = []
    listed = {str(row["name"]) for row in manifest.shards}
    for path in sorted(manifest.root.glob("*.tar")):
        if path.name not in listed:
            problems.append(f"{path.name}: not in manifest.json")
    with Progress(len(manifest.shards), "shards", "verifying") as progress:
        for row in manifest.shards:
            problem = _problem(manifest, row)
            if problem:
                problems.append(f"{row['name']}: {problem}")
            progress.advance(problems=len(problems))
    return problems


def _problem(manifest: Manifest, row: dict[str, Any]) -> str | None:
    place, size = manifest.shard_place(row["name"]), int(row["bytes"])
    try:
        # Remote shards are read by blocks, each retried.
        found, sha256 = (Path(place).stat().st_size, "") if not is_remote(place) else remote_sum(place, manifest.access)
    except FileNotFoundError:
        return "missing"
    except ReadFailed as error:
        return "missing" if isinstance(error.__cause__, FileNotFoundError) else str(error)
    if found != size:
        return f"{found} bytes, the manifest says {size}"
    return None if (sha256 or sha256_of(place)) == row["sha256"] else "content differs from its checksum"
