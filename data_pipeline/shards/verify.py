"""Checks built shards against their manifest, byte by byte, and builds damaged ones again."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from data_pipeline.shards.damage import Stored, find_damage
from data_pipeline.storage.manifest import MANIFEST, Manifest
from data_pipeline.storage.manifest_file import SCANS
from data_pipeline.storage.remote import ReadFailed, is_remote, remote_sum
from infra.errors import UserError
from infra.files import sha256_of
from infra.progress import Progress

MOST_NAMED = 5  # damaged places named of one shard


def verify_shards(manifest: Manifest, workers: int | None = None) -> list[str]:
    """One line for each file that is wrong: damaged, cut short, missing, or one too many; it names the scans concerned."""
    return [f"{name}: {problem}" for name, problem in find_problems(manifest, workers).items()]


def find_problems(manifest: Manifest, workers: int | None = None) -> dict[str, str]:
    """What is wrong with which file. Every byte is read; times and sizes on disk are not trusted.

    Threads suffice: reading and SHA-256 both leave the interpreter's lock, and a shard's SHA-256 that fits proves every
    byte of it. Only in a shard where it does not fit is the place looked for.
    """
    problems = _wrong_tables(manifest)
    listed = {str(row["name"]) for row in manifest.shards}
    for path in sorted(manifest.root.glob("*.tar")):
        if path.name not in listed:
            problems[path.name] = f"not in {MANIFEST}; remove it, or run the interrupted append again"
    total = sum(int(row["bytes"]) for row in manifest.shards)
    count = min(workers or len(os.sched_getaffinity(0)), max(1, len(manifest.shards)))
    with Progress(total // 10**6, "MB", "verifying") as progress, ThreadPoolExecutor(count) as pool:
        numbers = {pool.submit(_problem, manifest, number): number for number in range(len(manifest.shards))}
        found: dict[int, str] = {}
        done = 0
        try:
            for future in as_completed(numbers):
                number = numbers[future]
                problem = future.result()
                if problem:
                    found[number] = problem
                done += int(manifest.shards[number]["bytes"])
                progress.advance(done // 10**6 - progress.done, problems=len(problems) + len(found))
        finally:
            pool.shutdown(cancel_futures=True)
    return {**problems, **{str(manifest.shards[n]["name"]): found[n] for n in sorted(found)}}


def load_problem(shards: str | Path) -> str | None:
    """Why the manifest itself cannot be trusted, in one line; None where it can be loaded. UserError where there is none."""
    if is_remote(str(shards)) or not (Path(shards) / MANIFEST).is_file():
        Manifest.load(shards)  # says so
    try:
        Manifest.load(shards)
    except UserError as error:
        return str(error)
    return None


def _wrong_tables(manifest: Manifest) -> dict[str, str]:
    """Bytes of manifest.json that its digest does not cover (spaces, a key given twice), and tables that it does not name."""
    problems = {}
    text = (manifest.root / MANIFEST).read_text(encoding="utf-8")
    content = json.loads(text)
    if json.dumps(content, indent=1, sort_keys=True) + "\n" != text:
        problems[MANIFEST] = "was edited, though its digest fits its content; restore it from a copy"
    for path in sorted({manifest.root / SCANS, *manifest.root.glob("scans-*.parquet")}):
        if path.name != content["scans"]["name"] and path.exists():
            problems[path.name] = f"not in {MANIFEST}; remove it"
    return problems


def _problem(manifest: Manifest, number: int) -> str | None:
    """What is wrong with a shard."""
    shard = manifest.shards[number]
    place = manifest.shard_url(str(shard["name"]))
    if is_remote(place):
        return _remote_problem(manifest, place, shard)
    path = Path(place)
    if not path.is_file():
        return f"missing, with {shard['scans']} scans"
    try:
        if path.stat().st_size == shard["bytes"] and sha256_of(path) == shard["sha256"]:
            return None
        # Of shards made elsewhere only voxels are in the table; where their headers lie is not known.
        known = [] if "codec" in shard else stored_scans(manifest, number)
        places = find_damage(path, int(shard["bytes"]), known, manifest.settings["codec"]) if known else []
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    more = f"; and {len(places) - MOST_NAMED} more" if len(places) > MOST_NAMED else ""
    return f"damaged: {'; '.join(places[:MOST_NAMED]) or 'content differs from its checksum'}{more}"


def _remote_problem(manifest: Manifest, place: str, shard: dict[str, Any]) -> str | None:
    """The same of a shard behind a URL, read by blocks, each of them retried."""
    try:
        size, sha256 = remote_sum(place, manifest.access)
    except ReadFailed as error:
        return "missing" if isinstance(error.__cause__, FileNotFoundError) else str(error)
    if size != int(shard["bytes"]):
        return f"{size} bytes, the manifest says {shard['bytes']}"
    return None if sha256 == shard["sha256"] else "damaged: content differs from its checksum"


def stored_scans(manifest: Manifest, number: int) -> list[Stored]:
    """The scans of one shard in the order of its bytes."""
    rows = manifest.scans[manifest.scans["shard"] == number].sort_values("offset")
    records = ({str(name): value for name, value in row.items()} for row in rows.to_dict("records"))
    return [Stored(str(r["key"]), int(r["offset"]), int(r["size"]), int(r["crc32c"]), r) for r in records]
