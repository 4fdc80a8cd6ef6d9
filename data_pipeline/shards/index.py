"""Writes a manifest for WebDataset shards made elsewhere. The tars are read once and not changed."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from data_pipeline.cohort.declarations import check_orientation
from data_pipeline.cohort.scan import safe_name
from data_pipeline.cohort.split import DEFAULT_SPLITS
from data_pipeline.quality.rules import Removal, write_quarantine
from data_pipeline.shards.index_table import RESERVED, People, check_pattern, declared_licences, parse_key, read_people
from data_pipeline.shards.scan_table import scan_table
from data_pipeline.storage.hashing import HashingStream
from data_pipeline.storage.manifest import MANIFEST, Manifest, write_manifest
from data_pipeline.storage.remote import Access, is_remote, join, list_tars, open_file
from data_pipeline.volume.decoders import DECODERS, ENDINGS
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import ARRAY_BOXES, Grid, array_grid, array_orientation
from data_pipeline.volume.limits import MAX_VOXELS, largest_member
from data_pipeline.volume.resample import reorient
from infra import ray_cluster
from infra.errors import UserError
from infra.progress import Progress

Geometry = tuple[tuple[int, ...], tuple[tuple[float, ...], ...] | None]  # shape, and affine if the format has one


@dataclass(frozen=True)
class IndexedMember:
    """One sample of a foreign shard: the location of its payload, and the geometry of its volume."""

    key: str
    offset: int
    size: int
    crc32c: int
    geometry: Geometry


@dataclass
class IndexedShard:
    """The content of one tar. ``bad`` holds key and reason of each sample that cannot be used."""

    size: int
    sha256: str
    codec: str | None
    members: list[IndexedMember]
    bad: list[tuple[str, str]]


def index_shards(
    shards: str,
    out: str | Path,
    *,
    participants: str | None = None,
    modality: str | None = None,
    dataset: str | None = None,
    spacing: float | None = None,
    key_pattern: str | None = None,
    columns: str | Path | None = None,
    orientation: str = "",
    splits: dict[str, float] | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Manifest:
    """Write manifest.json and scans.parquet for existing tars, and return the manifest.

    Members are ``.npy``, ``.npy.gz``, ``.npy.zst``, ``.nii`` or ``.nii.gz``; each read reorients them to RAS. The most common
    grid becomes the data set's. A scan with another grid, an unreadable or repeated scan, and one without a row in the table
    are listed in ``quarantine.tsv`` with the reason.

    Args:
        shards: folder or URL; all tars below it are indexed.
        out: folder for the manifest.
        participants: the table; None looks for participants.tsv beside the tars and one folder up. It may have a row per
            session.
        modality: a name; None derives it from the shape (``vbm`` 121x145x121 at 1.5 mm, ``quasiraw`` 182x218x182 at 1 mm).
        dataset: name for scans whose key and table name no data set; None uses the folder's name.
        spacing: edge of a voxel in mm, for .npy members with another shape; the volume is then centred on the origin.
        key_pattern: regular expression with named groups for keys of another form, see ``index_table.parse_key``.
        columns: a YAML file that declares the table's columns and the rules for their values, as for a cohort.
        orientation: orientation of .npy members, as in ``LAS``; empty uses the one of ``grid.ARRAY_BOXES`` for the shape.
        splits: shares of the healthy participants.
        seed: of the splits.
        workers: Ray workers; None for one per core.

    Raises:
        UserError: if an argument is invalid, there are no tars or no table, or no scan can be used.
    """
    folder, access = Path(out).resolve(), Access()
    if not is_remote(shards):
        shards = str(Path(shards).resolve())  # absolute: Ray workers run in another directory
    check_pattern(key_pattern)
    orientation = check_orientation(orientation, "--orientation")
    _check_free(folder)
    if spacing is not None and not 0.1 <= spacing <= 20:
        raise UserError(f"--spacing={spacing} is not in 0.1..20 mm")
    names = _list_tars(shards, access)
    people = _find_people(shards, participants, access, None if columns is None else Path(columns))
    dataset = safe_name(dataset or shards.rstrip("/").rpartition("/")[2] or "shards")
    indexed = _index_all(shards, names, access, workers)
    geometry, bad = _common_geometry(names, indexed)
    default_modality, grid, orientation = modality_and_grid(geometry, spacing, orientation)
    rows = _scan_rows(names, indexed, geometry, people, bad, dataset=dataset, pattern=key_pattern)
    folder.mkdir(parents=True, exist_ok=True)
    write_quarantine(
        folder / "quarantine.tsv", (Removal(key, name, "index", None, None, why) for key, name, why in bad)
    )
    if not rows:
        raise UserError(f"{shards}: no scan could be used; the reasons are in {folder / 'quarantine.tsv'}")
    codecs = sorted({shard.codec for shard in indexed if shard.codec})
    settings: dict[str, Any] = {
        "dataset": dataset, "modality": modality or default_modality, "scaling": "none", "simulated": False, "indexed": True,
        "codec": codecs[0] if len(codecs) == 1 else "mixed", "seed": seed, "splits": splits or DEFAULT_SPLITS,
        "orientation": orientation, "arrays": geometry[1] is None, "scans_found": len(rows) + len(bad), "quarantined": len(bad),
        "root": shards if is_remote(shards) else os.path.relpath(shards, folder), **declared_licences(columns, rows),
    }  # fmt: skip
    shard_rows = [
        {"name": name, "bytes": shard.size, "sha256": shard.sha256, "codec": shard.codec or "none", "scans": 0}
        for name, shard in zip(names, indexed, strict=True)
    ]
    for row in rows:
        shard_rows[row["shard"]]["scans"] += 1
    return write_manifest(folder, grid, settings, shard_rows, scan_table(rows, settings))


def index_one(url: str, access: Access) -> IndexedShard:
    """Read a tar once, from beginning to end; return each member's location, checksum and geometry, and the tar's SHA-256.

    Runs in a Ray worker with one volume in memory at a time.
    """
    with open_file(url, access) as raw:
        stream = HashingStream(raw)
        shard = IndexedShard(0, "", None, [], [])
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
                for member in tar:
                    if member.isreg():
                        _add_member(shard, member, tar)
            if not shard.members and not shard.bad:
                shard.bad.append(("", f"no member ends in .{', .'.join(ENDINGS)}"))
        except (tarfile.TarError, EOFError) as error:
            last = shard.members[-1].key if shard.members else "its beginning"
            shard.bad.append(("", f"the tar cannot be read beyond {last}: {error}"))
        while stream.read(1 << 20):
            pass
    shard.size, shard.sha256 = stream.size, stream.digest.hexdigest()
    return shard


def _add_member(shard: IndexedShard, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    """Add a member to ``shard.members`` if it is a usable volume, or to ``shard.bad`` with the reason if it is not."""
    # WebDataset's rule: the key is the path up to the first dot of the file's name.
    match = re.match(r"((?:.*/)?[^./]+)\.([^/]*)$", member.name)
    key, ending = match.groups() if match else (member.name, "")
    codec = ENDINGS.get(ending.lower())
    if codec is None:
        if ending.lower().endswith(tuple(f".{allowed}" for allowed in ENDINGS)):
            shard.bad.append((key, f"member ends in .{ending}; allowed: .{', .'.join(ENDINGS)}"))
        return
    if shard.codec not in (None, codec):
        if all(key != last.key for last in shard.members[-1:]):  # otherwise it is a second format of the same sample
            shard.bad.append((key, f"member .{ending} in a tar of codec {shard.codec}"))
        return
    if member.issparse() or member.size > largest_member():
        shard.bad.append((key, f"{member.size} bytes are claimed, a volume takes at most {largest_member()}"))
        return
    shard.codec = codec
    stream = tar.extractfile(member)
    assert stream is not None
    payload = stream.read()
    if len(payload) != member.size:
        raise EOFError("unexpected end of data")
    try:
        geometry = _geometry(payload, codec)
    except BadScan as error:
        shard.bad.append((key, str(error)))
        return
    shard.members.append(IndexedMember(key, member.offset_data, member.size, google_crc32c.value(payload), geometry))


def _geometry(payload: bytes, codec: str) -> Geometry:
    """Return shape and affine of a volume. Raises BadScan if it cannot be used."""
    try:
        array, affine = DECODERS[codec](payload, MAX_VOXELS)
        wide = array.astype(np.float32)
    except Exception as error:  # damaged bytes give many kinds of exceptions
        raise BadScan(f"unreadable: {type(error).__name__}: {' '.join(str(error).split())[:120]}") from None
    shape = array.shape
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 3 or wide.size == 0:
        raise BadScan(f"shape {array.shape} is not one 3D volume")
    if not np.isfinite(wide).all():
        raise BadScan(f"{int((~np.isfinite(wide)).sum())} voxels are NaN or infinite")
    if wide.min() == wide.max():
        raise BadScan(f"every voxel is {float(wide.flat[0]):g}")
    return tuple(shape), None if affine is None else Grid.of(shape, affine).affine


def _check_free(folder: Path) -> None:
    if (folder / MANIFEST).exists() and not Manifest.load(folder).settings.get("indexed"):
        raise UserError(f"{folder} holds shards built by yaware, which have a manifest.json; choose another --out")


def _list_tars(shards: str, access: Access) -> list[str]:
    if not is_remote(shards) and not Path(shards).is_dir():
        raise UserError(f"shards {shards} is not a folder; give the folder with the .tar files, or its URL")
    names = list_tars(shards, access)
    if not names:
        raise UserError(
            f"{shards} has no .tar file; compressed tars (.tar.gz) cannot be read at an offset: decompress them"
        )
    return names


def _find_people(shards: str, participants: str | None, access: Access, rules: Path | None) -> People:
    candidates = (
        [participants] if participants else [join(shards, "participants.tsv"), join(shards, "../participants.tsv")]
    )
    for url in candidates:
        try:
            with open_file(url, access) as stream:
                return read_people(stream.read(), url, _sidecar(url, access), rules)
        except FileNotFoundError:
            continue
        except OSError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    raise UserError(f"{' and '.join(candidates)} are missing; give the table with --participants" if not participants
                    else f"--participants={participants} is missing; give a tab-separated table")  # fmt: skip


def _sidecar(url: str, access: Access) -> bytes | None:
    """The JSON file beside a table, None if there is none."""
    try:
        with open_file(f"{url.rpartition('.')[0]}.json", access) as stream:
            return stream.read()
    except OSError:
        return None


def _index_all(shards: str, names: list[str], access: Access, workers: int | None) -> list[IndexedShard]:
    results: list[Any] = [None] * len(names)
    scans = quarantined = 0
    with ray_cluster.session(workers), Progress(len(names), "shards", "indexing") as progress:
        tasks = [(join(shards, name), access) for name in names]
        for index, result in ray_cluster.map_unordered(index_one, tasks, in_flight=64):
            results[index] = result
            scans, quarantined = scans + len(result.members), quarantined + len(result.bad)
            progress.advance(scans=scans, quarantined=quarantined)
    return results


def _common_geometry(names: list[str], indexed: list[IndexedShard]) -> tuple[Geometry, list[tuple[str, str, str]]]:
    """Return the geometry that most members share, and (key, tar, reason) of each unusable member."""
    bad = [(key, name, reason) for name, shard in zip(names, indexed, strict=True) for key, reason in shard.bad]
    counts = Counter(member.geometry for shard in indexed for member in shard.members)
    if not counts:
        raise UserError(f"no scan could be used; the first of {len(bad)}: {bad[0][1]} {bad[0][0]}: {bad[0][2]}")
    return counts.most_common(1)[0][0], bad


def modality_and_grid(geometry: Geometry, spacing: float | None, declared: str = "") -> tuple[str, Grid, str]:
    """Return the modality of a shape, the grid, and the orientation in which arrays are stored.

    Args:
        geometry: the members' shape and affine.
        spacing: --spacing, in mm.
        declared: --orientation.

    Raises:
        UserError: if an option contradicts the members, or the voxel size is unknown.
    """
    shape, affine = geometry
    box = ARRAY_BOXES.get((shape[0], shape[1], shape[2]))
    name = box.modality if box else "vbm"
    if affine is not None:
        grid = Grid((shape[0], shape[1], shape[2]), affine)
        if spacing is not None and not np.allclose(grid.spacing, spacing, atol=1e-3):
            raise UserError(f"--spacing={spacing}, but the members' affine has {grid.spacing} mm; leave --spacing out")
        if declared:
            raise UserError(
                f"--orientation={declared}, but the members' headers have their own; leave --orientation out"
            )
        return name, grid, "RAS"
    stored = array_orientation(shape, declared)
    standard, ras_shape = array_grid(shape), reorient(np.empty(shape, np.bool_), stored).shape
    if standard is not None and standard.shape == ras_shape and spacing in (None, standard.spacing[0]):
        return name, standard, stored
    if spacing is None:
        size = "x".join(map(str, shape))
        raise UserError(f"members are arrays of shape {size}, whose voxel size is unknown; give it with --spacing")
    return name, Grid.centred(ras_shape, spacing), stored


def _scan_rows(
    names: list[str], indexed: list[IndexedShard], geometry: Geometry, people: People,
    bad: list[tuple[str, str, str]], *, dataset: str, pattern: str | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row of scans.parquet for each usable member; the others are added to ``bad`` with their tar and reason."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, shard in enumerate(indexed):
        for member in shard.members:
            try:
                if member.geometry != geometry:
                    raise BadScan(f"grid {_text(member.geometry)}, the data set's is {_text(geometry)}")
                if member.key in seen:
                    raise BadScan("its key appears twice")
                described = _describe(member.key, people, dataset, pattern)
            except BadScan as error:
                bad.append((member.key, names[number], str(error)))
                continue
            seen.add(member.key)
            where = {"key": member.key, "shard": number, "offset": member.offset, "size": member.size}
            rows.append({**described, **where, "crc32c": member.crc32c})
    return rows


def _describe(key: str, people: People, dataset: str, pattern: str | None) -> dict[str, Any]:
    entities = parse_key(key, pattern)
    values = people.find(entities)
    standard = {
        "participant_id": entities["participant_id"], "session": entities.get("session", "1"),
        "run": entities.get("run", ""), "dataset": entities.get("dataset") or values.get("dataset") or dataset,
        "site": values.get("site") or "", "age": values.get("age"), "sex": values.get("sex") or "",
    }  # fmt: skip
    return {**{name: value for name, value in values.items() if name not in RESERVED}, **standard}


def _text(geometry: Geometry) -> str:
    shape, affine = geometry
    size = "x".join(map(str, shape))
    if affine is None:
        return size
    origin = ", ".join(f"{row[3]:g}" for row in affine[:3])
    return f"{size} of {Grid((0, 0, 0), affine).spacing} mm at ({origin})"
