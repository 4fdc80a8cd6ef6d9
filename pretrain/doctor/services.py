"""What a node must reach for a recipe: the shards, and how fast they are read; and the tracking store."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.storage.manifest import Manifest, check_shards
from data_pipeline.storage.remote import Access, is_remote
from infra.errors import UserError
from infra.files import check_output, open_descriptor
from infra.tracking.faults import hide_password
from infra.tracking.mlflow_store import is_server, query_errors, tag_experiment
from infra.tracking.tracker import store_uri
from pretrain.config import Recipe, load_recipe
from pretrain.doctor.row import FAIL, OK, WARN, Found, Request, Row

READ_SECONDS, MOST_READ = 2.0, 64
SLOW = 0.25  # of the fastest node's rate, below which a node is called slow
EXPERIMENT = "yaware-doctor"


def _recipe(request: Request) -> Recipe:
    return load_recipe(request.recipe[0], request.recipe[1:])


def look_shards(request: Request) -> dict[str, Any]:
    """Read training scans of the recipe for two seconds at most; return their number, bytes and seconds."""
    data = _recipe(request).data
    manifest = Manifest.load(data.shards, Access(data.cache, data.cache_gb, data.retries, data.timeout))
    rows = manifest.rows(split=data.split, query=data.query)
    check_shards(manifest, rows)
    if not is_remote(manifest.shards_root):
        for shard in manifest.shards:
            _forget_pages(Path(manifest.shard_url(str(shard["name"]))))
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, MOST_READ).astype(np.int64))] if len(rows) else rows
    sizes, read, size, started = manifest.scans["size"].to_numpy(), 0, 0, time.monotonic()
    for row in chosen:
        manifest.read_volume(int(row))
        read, size = read + 1, size + int(sizes[row])
        if time.monotonic() - started > READ_SECONDS:
            break
    return {"shards": data.shards, "digest": manifest.digest[:12], "scans": len(rows), "read": read, "bytes": size,
            "seconds": max(time.monotonic() - started, 1e-6)}  # fmt: skip


def _forget_pages(path: Path) -> None:
    """Ask the kernel to forget a file's pages, so that it is read from the disk."""
    with suppress(OSError):
        handle = open_descriptor(path)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def judge_shards(found: Found, request: Request) -> list[Row]:
    """Fail if a node sees other shards than the first, warn if it reads them much slower than the fastest."""
    first = next(iter(found))
    rates = {node: value["bytes"] / value["seconds"] for node, value in found.items()}
    rows = []
    for node, value in found.items():
        text = (
            f"{rates[node] / 1e6:,.0f} MB/s, {value['read'] / value['seconds']:,.0f} scans/s by one process, "
            f"{value['scans']:,} scans, digest {value['digest']}"
        )
        state, fix = OK, ""
        if value["digest"] != found[first]["digest"]:
            state, fix = FAIL, f"{first} has digest {found[first]['digest']}: give every node the same shards"
        elif rates[node] < SLOW * max(rates.values()):
            state, fix = WARN, "much slower than the fastest node: look at its disk or its mount"
        rows.append(Row("", state, text, fix, node if len(found) > 1 else ""))
    return rows


def look_tracking(request: Request) -> dict[str, str]:
    """Write to the tracking store as a run would; return what is wrong with it."""
    try:
        uri = store_uri(_recipe(request).run.tracking_uri)
        kind = uri.partition("://")[0].partition("+")[0]
        if is_server(uri):
            tag_experiment(uri, EXPERIMENT, "yaware.doctor", str(time.time()))
        elif kind == "sqlite":
            with query_errors(uri):
                _write_to_file(uri)
        else:
            return {"uri": kind, "problem": "", "unknown": "only files (sqlite) and servers (http) are tried"}
    except UserError as error:
        return {"uri": "", "problem": str(error), "unknown": ""}
    return {"uri": hide_password(uri), "problem": "", "unknown": ""}


def _write_to_file(uri: str) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    if not path.exists():
        check_output(path, "run.tracking_uri")
        return
    with closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=5)) as connection:
        connection.isolation_level = None
        connection.execute("BEGIN IMMEDIATE")
        # A statement that writes, though it is undone: a lock alone can be had on a file that cannot be written.
        connection.execute("CREATE TABLE yaware_doctor (written INTEGER)")
        connection.execute("ROLLBACK")


def judge_tracking(value: dict[str, str]) -> tuple[str, str, str]:
    """Fail if the store does not answer or cannot be written."""
    if value["problem"]:
        return FAIL, value["problem"], ""
    if value["unknown"]:
        return WARN, f"{value['uri']} was not tried: {value['unknown']}", ""
    return OK, f"{value['uri']} answers and can be written", ""
