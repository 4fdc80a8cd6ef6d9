"""Checks every byte of built shards against their manifest, and the scan table against the shards."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from data_pipeline.shards.contradictions import Member, contradictions, members_of, members_of_stream
from data_pipeline.shards.damage import Stored, find_damage
from data_pipeline.storage.hashing import HashingStream
from data_pipeline.storage.manifest import MANIFEST, Manifest
from data_pipeline.storage.manifest_file import SCANS
from data_pipeline.storage.remote import ReadFailed, is_remote, open_file
from infra.errors import UserError
from infra.files import other_kind, read_text, sha256_of
from infra.processes.allowance import usable_cores
from infra.progress import Progress

MAX_PLACES = 5  # damaged places that the message names per shard


def find_problems(manifest: Manifest, workers: int | None = None) -> dict[str, str]:
    """Return file name -> what is wrong with it. Every byte is read; times and sizes on disk are not trusted.

    A correct SHA-256 proves every byte of a shard; its rows of the scan table are then compared with the tar's headers and
    contents. In a shard with a wrong SHA-256 the damaged places are located. Threads suffice, because reading and checksums
    release the interpreter's lock.

    Args:
        manifest: the data set.
        workers: number of threads; None for one per core.
    """
    problems = _table_problems(manifest)
    listed = {str(row["name"]) for row in manifest.shards}
    for path in sorted(manifest.root.glob("*.tar")):
        if path.name not in listed:
            problems[path.name] = f"not in {MANIFEST}; remove it, or run the interrupted append again"
    total = sum(int(row["bytes"]) for row in manifest.shards)
    count = min(workers or usable_cores(), max(1, len(manifest.shards)))
    with Progress(total // 10**6, "MB", "verifying") as progress, ThreadPoolExecutor(count) as pool:
        numbers = {pool.submit(_problem, manifest, number): number for number in range(len(manifest.shards))}
        damaged: dict[int, str] = {}
        done = 0
        try:
            for future in as_completed(numbers):
                number = numbers[future]
                problem = future.result()
                if problem:
                    damaged[number] = problem
                done += int(manifest.shards[number]["bytes"])
                progress.advance(done // 10**6 - progress.done, problems=len(problems) + len(damaged))
        finally:
            pool.shutdown(cancel_futures=True)
    return {**problems, **{str(manifest.shards[n]["name"]): damaged[n] for n in sorted(damaged)}}


def load_problem(shards: str | Path) -> str | None:
    """Return in one line why the manifest itself cannot be trusted, None if it can. Raises UserError if there is none."""
    if is_remote(str(shards)) or not (Path(shards) / MANIFEST).exists():
        Manifest.load(shards)  # raises the error
    try:
        Manifest.load(shards)
    except UserError as error:
        return str(error)
    return None


def _table_problems(manifest: Manifest) -> dict[str, str]:
    """Find changes of manifest.json that its digest does not cover (spaces, a repeated key), and unlisted scan tables."""
    problems = {}
    text = read_text(manifest.root / MANIFEST)
    content = json.loads(text)
    if json.dumps(content, indent=1, sort_keys=True) + "\n" != text:
        problems[MANIFEST] = "was edited, although its digest matches its content; restore it from a copy"
    for path in sorted({manifest.root / SCANS, *manifest.root.glob("scans-*.parquet")}):
        if path.name != content["scans"]["name"] and path.exists():
            problems[path.name] = f"not in {MANIFEST}; remove it"
    return problems


def _problem(manifest: Manifest, number: int) -> str | None:
    """Return what is wrong with a shard, None if it is intact."""
    shard = manifest.shards[number]
    url = manifest.shard_url(str(shard["name"]))
    if is_remote(url):
        return _remote_problem(manifest, url, number)
    path = Path(url)
    if kind := other_kind(path):
        return f"{kind}, not a file"
    if not path.exists():
        return f"missing, with {shard['scans']} scans"
    try:
        if path.stat().st_size == shard["bytes"] and sha256_of(path) == shard["sha256"]:
            return _contradictions(manifest, number, *members_of(path))
        # For shards made elsewhere the location of headers and descriptions is unknown.
        scans = [] if "codec" in shard else stored_scans(manifest, number)
        places = find_damage(path, int(shard["bytes"]), scans, manifest.settings["codec"]) if scans else []
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return _listed(places or ["content differs from its checksum"], "damaged")


def _listed(places: list[str], what: str) -> str | None:
    """Return ``what`` with the first places; None if there are none."""
    more = f"; and {len(places) - MAX_PLACES} more" if len(places) > MAX_PLACES else ""
    return f"{what}: {'; '.join(places[:MAX_PLACES])}{more}" if places else None


def _remote_problem(manifest: Manifest, url: str, number: int) -> str | None:
    """Return what is wrong with a remote shard, which is read once, in blocks with retries; None if it is intact."""
    shard = manifest.shards[number]
    try:
        with open_file(url, manifest.access) as raw:
            stream = HashingStream(raw)
            members, fault = members_of_stream(stream)
    except ReadFailed as error:
        return "missing" if isinstance(error.__cause__, FileNotFoundError) else str(error)
    if stream.size != int(shard["bytes"]):
        return f"{stream.size} bytes, the manifest says {shard['bytes']}"
    if stream.digest.hexdigest() != shard["sha256"]:
        return "damaged: content differs from its checksum"
    return _contradictions(manifest, number, members, fault)


def _contradictions(manifest: Manifest, number: int, members: list[Member], fault: str) -> str | None:
    """Return where the rows of an intact shard differ from its tar; None if they agree.

    An index may list a tar that is cut, with the scans before the cut.
    """
    indexed = bool(manifest.settings.get("indexed"))
    faults = contradictions(members, stored_scans(manifest, number), indexed)
    faults += [fault] if fault and not indexed else []
    return _listed(faults, "the scan table contradicts it")


def stored_scans(manifest: Manifest, number: int) -> list[Stored]:
    """Return the scans of a shard in the order of its bytes."""
    rows = manifest.scans[manifest.scans["shard"] == number].sort_values("offset")
    records = ({str(name): value for name, value in row.items()} for row in rows.to_dict("records"))
    return [Stored(str(r["key"]), int(r["offset"]), int(r["size"]), int(r["crc32c"]), r) for r in records]
