"""Adds scans to built shards: new shards beside the old, which stay as they are, and a new manifest in one rename."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.cohort.pseudonyms import key_mark, read_key
from data_pipeline.cohort.read import is_simulated, name_of, read_cohort
from data_pipeline.cohort.scan import Scan
from data_pipeline.cohort.split import assign_splits, is_healthy
from data_pipeline.quality.rules import (
    Quality,
    check_quality,
    read_quarantine,
    read_scan,
    unlisted_removals,
    write_quarantine,
)
from data_pipeline.shards import unfinished as resume
from data_pipeline.shards.build import PLACES, _describe, _write_shards, rules_of
from data_pipeline.shards.damage import same_value
from data_pipeline.shards.tar import encode
from data_pipeline.storage.manifest import MANIFEST, Manifest, write_manifest
from data_pipeline.storage.manifest_file import read_content
from data_pipeline.volume.load import BadScan, Grid, Preparation
from infra import ray_cluster
from infra.errors import UserError
from infra.progress import Progress

COMPARED_AT_ONCE = 64  # scans a Ray task reads again to see whether they are those that the shards hold


def append_shards(
    cohort: str | Path,
    shards: str | Path,
    *,
    dataset: str | None = None,
    workers: int | None = None,
    reread: bool = True,
    layout: str | None = None,
    columns: str | Path | None = None,
    key_file: str | Path | None = None,
    **wanted: Any,
) -> Manifest:
    """Add the scans of a cohort to built shards and return the new manifest.

    No shard is rewritten, row numbers and splits of the scans that were there stay; a participant seen again (same data
    set and id) keeps the split, new ones are dealt out by the same shares. New scans are brought to the manifest's grid.

    Args:
        dataset: name of the scans' data set (default: the cohort folder's). The name of a data set that is there already
            adds newly arrived scans to it; scans whose key is there must be the same, and are skipped.
        reread: read the scans whose key is there, to compare their voxels; without it only their table rows are compared.
        wanted: settings that the caller believes the shards to have (``modality``, ``scaling``, ``codec``, ``grid``,
            ``seed``, ``splits`` and such); None is no belief.

    Raises UserError where a wanted setting is not the manifest's, a known scan differs, or a column is of another type.
    A killed append goes on where it was when called again; until it ends, readers see the data set as it was.
    """
    folder, root = Path(shards).resolve(), Path(cohort).resolve()
    _check_wanted(read_content(folder), wanted, folder)
    with resume.locked(folder):
        old = Manifest.load(folder)
        check_own(old)
        check_pseudonyms(old, key_file)
        scans, unknown = read_cohort(
            root, dataset, str(old.settings["modality"]), layout=layout, columns=columns, key_file=key_file
        )
        check_quality(rules_of(old.settings), scans)
        known = set(old.scans["key"])
        _check_same([scan for scan in scans if scan.key in known], old, workers, reread)
        new = [scan for scan in scans if scan.key not in known]
        if not new:
            resume.clear(folder)
            return old
        part = {
            "dataset": name_of(new, root), "simulated": is_simulated(root), "scans_found": len(scans) + len(unknown),
        }  # fmt: skip
        return _add(folder, old, new, unknown, part, workers)


def _add(
    folder: Path, old: Manifest, new: list[Scan], unknown: list[Scan], part: dict[str, Any], workers: int | None
) -> Manifest:
    """Write the new scans' shards and the manifest of the whole; ``part`` is what its history says of them."""
    grid, first = Grid.from_dict(old.grid), _next_number(folder, part["dataset"])
    copies = old.scans.get("voxels_sha256", pd.Series(dtype=str))
    added, rows, bad = _write_shards(
        folder, new, grid, {**old.settings, **part}, workers, first, dict(zip(copies, old.scans["key"], strict=False))
    )
    bad = [*unlisted_removals(unknown), *bad]
    write_quarantine(folder / "quarantine.tsv", [*read_quarantine(folder / "quarantine.tsv"), *bad])
    built = old
    if rows:
        table = _joined(old, rows, len(old.shards))
        part = {**part, "quarantined": len(bad), "scans": len(rows), "shards": [str(shard["name"]) for shard in added]}
        history = {**old.settings, "appended": [*old.settings.get("appended", []), part]}
        built = write_manifest(folder, grid, history, [*old.shards, *added], table, replaces=True)
    resume.clear(folder)
    return built


def _check_wanted(content: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    there = {**content["settings"], "grid": Grid.from_dict(content["grid"])}
    for name, value in wanted.items():
        if value is not None and value != there.get(name):
            raise UserError(
                f"{name}={value!r} is not that of {folder / MANIFEST}, which has {there.get(name)!r}; "
                "leave it out, or build into another folder"
            )


def _next_number(folder: Path, dataset: str) -> int:
    """The number after the last listed shard of a data set; an interrupted append's own are not listed and are redone."""
    pattern = re.compile(re.escape(dataset) + r"-(\d{6,})\.tar")
    found = [pattern.fullmatch(str(row["name"])) for row in read_content(folder)["shards"]]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _check_same(scans: list[Scan], old: Manifest, workers: int | None, reread: bool) -> None:
    """UserError where scans whose keys the shards hold are not the scans that the shards hold."""
    if not scans:
        return
    there = old.scans.set_index("key").loc[[scan.key for scan in scans]]
    for scan, row in zip(scans, there.to_dict("records"), strict=True):
        for name, value in _describe(scan).items():
            # A column that only one of the two tables has tells nothing.
            if name in row and name not in PLACES and not same_value(value, row[name]):
                raise UserError(
                    f"scan {scan.key} is in {old.root} with {name}={row[name]!r}, here it is {value!r}; "
                    "append rewrites nothing: give another --dataset, or build anew"
                )
    if not reread:
        return
    preparation, codec, quality = Preparation.of(old.grid, old.settings), old.settings["codec"], rules_of(old.settings)
    starts = range(0, len(scans), COMPARED_AT_ONCE)
    parts = [(scans[n : n + COMPARED_AT_ONCE], preparation, codec, quality) for n in starts]
    differ: list[str] = []
    with ray_cluster.session(workers), Progress(len(scans), "scans", "comparing known scans") as progress:
        for index, sums in ray_cluster.map_unordered(_sums, parts, in_flight=64):
            first = starts[index]
            rows = there.iloc[first : first + len(sums)]
            expected = zip(rows["size"], rows["crc32c"], strict=True)
            differ += [str(key) for key, a, b in zip(rows.index, sums, expected, strict=True) if a != b]
            progress.advance(len(sums))
    if differ:
        raise UserError(
            f"scan {min(differ)} is in {old.root} with other voxels ({len(differ)} such scans); "
            "append rewrites nothing: give another --dataset, or build anew"
        )


def _sums(scans: list[Scan], preparation: Preparation, codec: str, quality: Quality) -> list[tuple[int, int] | None]:
    """Size and crc32c that each scan's stored bytes would have; None for a scan that cannot be used any more."""
    import google_crc32c

    found: list[tuple[int, int] | None] = []
    for scan in scans:
        try:
            payload = encode(read_scan(scan, preparation, quality)[0], codec)
            found.append((len(payload), google_crc32c.value(payload)))
        except BadScan:
            found.append(None)
    return found


def _joined(old: Manifest, rows: list[dict[str, Any]], shards_before: int) -> pd.DataFrame:
    """The scan table with the new rows at its end: every column of both, the splits of known participants as they were."""
    before = old.scans
    new = pd.DataFrame(rows)
    new["age"], new["shard"] = pd.to_numeric(new["age"]), new["shard"] + shards_before
    people = (before["dataset"] + "/" + before["participant_id"]).to_numpy()
    splits = dict(zip(people, before["split"], strict=True))
    first = before.assign(participant=people).drop_duplicates("participant")
    dealt = sum(map(is_healthy, first["diagnosis"])) if "diagnosis" in first else len(first)
    arrived = new.assign(participant=new["dataset"] + "/" + new["participant_id"])
    arrived = arrived[~arrived["participant"].isin(splits)]
    if len(arrived):
        chosen = assign_splits(arrived, old.settings["splits"], int(old.settings["seed"]), dealt)
        splits |= dict(zip(arrived["participant"], chosen, strict=True))
    new["split"] = (new["dataset"] + "/" + new["participant_id"]).map(splits)
    for name in new.columns.intersection(before.columns):
        numbers = [pd.api.types.is_numeric_dtype(t[name].dropna().infer_objects()) for t in (before, new)]
        empty = [bool(t[name].isna().all()) for t in (before, new)]
        if not any(empty) and numbers[0] != numbers[1]:
            kinds = ["numbers" if number else "text" for number in numbers]
            raise UserError(
                f"column {name!r} holds {kinds[0]} in {old.root} and {kinds[1]} in the cohort's table "
                f"(as in {new[name].dropna().iloc[0]!r}); give both the same kind of values"
            )
    # A column that one of the two lacks, or has only missing values in, gets its type when the table is written.
    return pd.concat(
        [before, new[[*before.columns.intersection(new.columns), *new.columns.difference(before.columns, sort=False)]]],
        ignore_index=True,
    )


def check_own(manifest: Manifest) -> None:
    """UserError for shards made elsewhere: their build is not known, so nothing can be built like it."""
    if manifest.settings.get("indexed"):
        raise UserError(
            f"{manifest.root} is an index of shards made elsewhere; build the cohort into a folder of its own"
        )


def check_pseudonyms(manifest: Manifest, key_file: str | Path | None) -> None:
    """UserError where shards of pseudonyms are to get names, or the other way round, or pseudonyms of another key."""
    hidden = bool(manifest.settings.get("pseudonymised", False))
    if hidden != (key_file is not None):
        have, fix = (
            ("pseudonyms", "give the same key by --pseudonymise")
            if hidden
            else ("plain ids", "leave --pseudonymise out")
        )
        raise UserError(f"{manifest.root} holds {have}; {fix}")
    mark = manifest.settings.get("pseudonym_key")  # older builds have none
    if key_file is not None and mark is not None and mark != key_mark(read_key(Path(key_file))):
        # A known person would be another one under it, and could fall into another split.
        raise UserError(
            f"{manifest.root} holds pseudonyms of another key than --pseudonymise={key_file}; give that key"
        )
