"""Adds scans to built shards: writes new shards beside the old ones and replaces the manifest in one rename."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.cohort.pseudonyms import key_fingerprint, read_key
from data_pipeline.cohort.read import is_simulated, name_of, origins_of, read_with_changes
from data_pipeline.cohort.scan import Scan, array_orientations, bytes_of
from data_pipeline.cohort.split import SPLIT, assign_splits, is_healthy
from data_pipeline.quality.columns import column_tables, warn_of_unmatched, write_columns
from data_pipeline.quality.outliers import StoredScan
from data_pipeline.quality.rules import (
    Quality,
    check_quality,
    read_quarantine,
    read_scan,
    unlisted_removals,
    write_quarantine,
)
from data_pipeline.shards import unfinished
from data_pipeline.shards.damage import same_value
from data_pipeline.shards.scan_table import LOCATION_COLUMNS, describe, number_columns, text_columns
from data_pipeline.shards.tar import encode
from data_pipeline.shards.writing import quality_rules, write_shards
from data_pipeline.storage.manifest import MANIFEST, Manifest, write_manifest
from data_pipeline.storage.manifest_file import read_content
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.preparation import Preparation
from infra import ray_cluster
from infra.errors import UserError
from infra.progress import Progress

SCANS_PER_COMPARISON = 64  # scans that one Ray task reads again and compares with the shards


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
    **expected: Any,
) -> Manifest:
    """Add the scans of a cohort to built shards and return the new manifest.

    Existing shards are not rewritten, and existing scans keep their row numbers and splits. New scans are resampled to the
    manifest's grid. A new session of a participant (same data set and id) gets the participant's split; new participants
    are split by the same shares. After a killed append, the same call continues where it stopped; until it ends, readers
    see the data set as it was.

    Args:
        cohort: the cohort's folder or table.
        shards: the folder of the shards.
        dataset: the data set of the scans; None uses the cohort folder's name. If the shards hold this data set already,
            only scans with new keys are added. Scans whose keys are present must be unchanged; they are skipped.
        workers: Ray workers; None for one per core.
        reread: read the scans whose keys are present and compare their voxels; False compares their table rows only.
        layout: how the cohort's folder is organised.
        columns: file that declares columns.
        key_file: key with which participants are pseudonymised.
        expected: settings that the shards must have (``modality``, ``scaling``, ``codec``, ``grid``, ``seed``, ``splits``
            and so on); None accepts any value.

    Raises:
        UserError: if an expected setting differs from the manifest's, a present scan differs from the stored one, or a
            column's type differs.
    """
    folder, root = Path(shards).resolve(), Path(cohort).resolve()
    _check_settings(read_content(folder), expected, folder)
    with unfinished.locked(folder):
        old = Manifest.load(folder)
        check_not_indexed(old)
        _check_complete(old)
        check_pseudonyms(old, key_file)
        scans, unlisted, changes, without_scan = read_with_changes(
            root,
            dataset,
            str(old.settings["modality"]),
            layout=layout,
            columns=columns,
            key_file=key_file,
            text=text_columns(old.scans),
            number=number_columns(old.scans),
        )
        _check_splits(scans, old)
        check_quality(quality_rules(old.settings), scans, str(folder))
        stored_keys = set(old.scans["key"])
        _check_unchanged([scan for scan in scans if scan.key in stored_keys], old, workers, reread)
        new = [scan for scan in scans if scan.key not in stored_keys]
        if not new:
            unfinished.remove_leftovers(folder)
            return old
        history = {
            "dataset": name_of(new, root), "simulated": is_simulated(root), "scans_found": len(scans) + len(unlisted),
            "array_orientations": array_orientations(new),
        }  # fmt: skip
        history |= origins_of(root, str(history["dataset"]), dataset, columns)
        added = _add(folder, old, new, unlisted, history, workers)
        name = str(history["dataset"])
        tables = column_tables(new, changes, without_scan, len(unlisted))
        write_columns(folder / f"columns-{name}.html", name, tables)
        warn_of_unmatched(without_scan)
        return added


def _add(
    folder: Path, old: Manifest, new: list[Scan], unlisted: list[Scan], history: dict[str, Any], workers: int | None
) -> Manifest:
    """Write the new scans' shards and the manifest of all scans, with ``history`` as a new entry of ``appended``."""
    grid, quarantine = Grid.from_dict(old.grid), folder / "quarantine.tsv"
    digests = old.scans.get("voxels_sha256", pd.Series(dtype=str))
    added, rows, refused = write_shards(
        folder, new, grid, {**old.settings, **history}, workers=workers,
        first_number=_next_number(folder, history["dataset"]),
        stored=dict(zip(digests, map(StoredScan, old.scans["key"], old.scans["split"]), strict=False)),
    )  # fmt: skip
    refused = [*unlisted_removals(unlisted), *refused]
    write_quarantine(quarantine, [*read_quarantine(quarantine), *refused])
    manifest = old
    if rows:
        table = _joined_table(old, rows, len(old.shards))
        names = [str(shard["name"]) for shard in added]
        history = {**history, "quarantined": len(refused), "scans": len(rows), "shards": names}
        settings = {**old.settings, "appended": [*old.settings.get("appended", []), history]}
        manifest = write_manifest(folder, grid, settings, [*old.shards, *added], table, replaces=True)
    unfinished.remove_leftovers(folder)
    return manifest


def _check_splits(scans: list[Scan], old: Manifest) -> None:
    """Raise UserError if a table declares another split for a participant than the shards hold."""
    people = old.scans["dataset"] + "/" + old.scans["participant_id"]
    stored = dict(zip(people, old.scans["split"], strict=True))
    for scan in scans:
        declared, participant = scan.extra.get(SPLIT), f"{scan.dataset}/{scan.participant_id}"
        if declared is not None and stored.get(participant, declared) != declared:
            raise UserError(
                f"participant {participant}: split is {declared!r} in the cohort's table, but {stored[participant]!r} in "
                f"{old.root}, where the participant may have been trained on already; build the shards again"
            )


def _check_settings(content: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    actual = {**content["settings"], "grid": Grid.from_dict(content["grid"])}
    for name, value in expected.items():
        if value is not None and value != actual.get(name):
            raise UserError(
                f"{name}={value!r} differs from {folder / MANIFEST}, which has {actual.get(name)!r}; "
                "leave it out, or build into another folder"
            )


def _next_number(folder: Path, dataset: str) -> int:
    """Return the number after the data set's last listed shard; unlisted shards of a killed append are written again."""
    pattern = re.compile(re.escape(dataset) + r"-(\d{6,})\.tar")
    matches = [pattern.fullmatch(str(row["name"])) for row in read_content(folder)["shards"]]
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _check_unchanged(scans: list[Scan], old: Manifest, workers: int | None, reread: bool) -> None:
    """Raise UserError if a scan of the cohort differs from the stored scan with its key."""
    if not scans:
        return
    stored = old.scans.set_index("key").loc[[scan.key for scan in scans]]
    for scan, row in zip(scans, stored.to_dict("records"), strict=True):
        for name, value in describe(scan).items():
            # A column that only one of the two tables has does not count as a difference.
            if name in row and name not in LOCATION_COLUMNS and not same_value(value, row[name]):
                raise UserError(
                    f"scan {scan.key} is in {old.root} with {name}={row[name]!r}, in the cohort it has {value!r}; "
                    "append never rewrites a scan: give another --dataset, or build the shards again"
                )
    if not reread:
        return
    preparation, codec = Preparation.of(old.grid, old.settings), old.settings["codec"]
    quality = quality_rules(old.settings)
    starts = range(0, len(scans), SCANS_PER_COMPARISON)
    tasks = [(scans[n : n + SCANS_PER_COMPARISON], preparation, codec, quality) for n in starts]
    changed: list[str] = []
    small = ray_cluster.is_small(bytes_of(scans), workers)
    with ray_cluster.session_on_demand(workers), Progress(len(scans), "scans", "comparing known scans") as progress:
        for index, checksums in ray_cluster.map_unordered(_checksums, tasks, in_flight=64, in_process=small):
            first = starts[index]
            rows = stored.iloc[first : first + len(checksums)]
            expected = zip(rows["size"], rows["crc32c"], strict=True)
            changed += [str(key) for key, a, b in zip(rows.index, checksums, expected, strict=True) if a != b]
            progress.advance(len(checksums))
    if changed:
        raise UserError(
            f"scan {min(changed)} is in {old.root} with other voxels (scans that differ: {len(changed)}); "
            "append never rewrites a scan: give another --dataset, or build the shards again"
        )


def _checksums(
    scans: list[Scan], preparation: Preparation, codec: str, quality: Quality
) -> list[tuple[int, int] | None]:
    """Return the size and crc32c that each scan's payload would have; None if the scan can no longer be used."""
    import google_crc32c

    checksums: list[tuple[int, int] | None] = []
    for scan in scans:
        try:
            payload = encode(read_scan(scan, preparation, quality)[0], codec)
            checksums.append((len(payload), google_crc32c.value(payload)))
        except BadScan:
            checksums.append(None)
    return checksums


def _joined_table(old: Manifest, rows: list[dict[str, Any]], shards_before: int) -> pd.DataFrame:
    """Return the old scan table followed by the new rows, with the columns of both; known participants keep their split."""
    before = old.scans
    new = pd.DataFrame(rows)
    new["age"], new["shard"] = pd.to_numeric(new["age"]), new["shard"] + shards_before
    people = (before["dataset"] + "/" + before["participant_id"]).to_numpy()
    splits = dict(zip(people, before["split"], strict=True))
    known_people = before.assign(participant=people).drop_duplicates("participant")
    assigned = sum(map(is_healthy, known_people["diagnosis"])) if "diagnosis" in known_people else len(known_people)
    new_people = new.assign(participant=new["dataset"] + "/" + new["participant_id"])
    new_people = new_people[~new_people["participant"].isin(splits)]
    if len(new_people):
        chosen = assign_splits(new_people, old.settings["splits"], int(old.settings["seed"]), assigned)
        splits |= dict(zip(new_people["participant"], chosen, strict=True))
    new["split"] = (new["dataset"] + "/" + new["participant_id"]).map(splits)
    for name in new.columns.intersection(before.columns):
        _check_column_type(name, before[name], new[name], old.root)
    # A column that one table lacks or has only missing values in gets its type when the table is written.
    return pd.concat(
        [before, new[[*before.columns.intersection(new.columns), *new.columns.difference(before.columns, sort=False)]]],
        ignore_index=True,
    )


def _check_column_type(name: str, before: pd.Series[Any], new: pd.Series[Any], root: Path) -> None:
    """Raise UserError if one of a column's two parts holds numbers and the other text."""
    if before.isna().all() or new.isna().all():
        return
    kinds = [
        "numbers" if pd.api.types.is_numeric_dtype(part.dropna().infer_objects()) else "text" for part in (before, new)
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"column {name!r} holds {kinds[0]} in {root} and {kinds[1]} in the cohort's table "
            f"(for example {new.dropna().iloc[0]!r}); give both the same type of values"
        )


def _check_complete(manifest: Manifest) -> None:
    """Raise UserError if the manifest lacks a setting by which new scans are shuffled, split and written."""
    missing = [name for name in ("seed", "scans_per_shard", "splits") if name not in manifest.settings]
    if missing:
        raise UserError(
            f"{manifest.root / MANIFEST}: settings.{missing[0]} is missing, which new scans need; build the shards again"
        )


def check_not_indexed(manifest: Manifest) -> None:
    """Raise UserError for an index of foreign shards: nothing can be added to or rebuilt in shards of another program."""
    if manifest.settings.get("indexed"):
        raise UserError(
            f"{manifest.root} is an index of shards made elsewhere; build the cohort into a folder of its own"
        )


def check_pseudonyms(manifest: Manifest, key_file: str | Path | None) -> None:
    """Raise UserError if ids would be of another kind than the stored ones: plain, or pseudonyms of another key."""
    pseudonymised = bool(manifest.settings.get("pseudonymised", False))
    if pseudonymised != (key_file is not None):
        stored, fix = (
            ("pseudonyms", "give the same key with --pseudonymise")
            if pseudonymised
            else ("plain ids", "leave --pseudonymise out")
        )
        raise UserError(f"{manifest.root} holds {stored}; {fix}")
    mark = manifest.settings.get("pseudonym_key")  # absent from older builds
    if key_file is not None and mark is not None and mark != key_fingerprint(read_key(Path(key_file))):
        # Another key would give a known person another pseudonym, which could fall into another split.
        raise UserError(
            f"{manifest.root} holds pseudonyms of another key than --pseudonymise={key_file}; give that key"
        )
