"""Checks built shards against their manifest, byte by byte."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.manifest import Manifest
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
            problem = _problem(manifest.root / row["name"], int(row["bytes"]), str(row["sha256"]))
            if problem:
                problems.append(f"{row['name']}: {problem}")
            progress.advance(problems=len(problems))
    return problems


def _problem(path: Path, size: int, sha256: str) -> str | None:
    if not path.is_file():
        return "missing"
    if path.stat().st_size != size:
        return f"{path.stat().st_size} bytes, the manifest says {size}"
    return None if sha256_of(path) == sha256 else "content differs from its checksum"
