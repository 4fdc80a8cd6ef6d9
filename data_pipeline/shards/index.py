"""A manifest for WebDataset shards made elsewhere: the tars are read once and left as they are."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from data_pipeline.cohort.declarations import check_orientation
from data_pipeline.cohort.scan import safe_name
from data_pipeline.cohort.split import DEFAULT_SPLITS
from data_pipeline.quality.rules import Removal, write_quarantine
from data_pipeline.shards.index_table import OWN, People, check_pattern, parse_key, read_people
from data_pipeline.shards.scan_table import scan_table
from data_pipeline.storage.manifest import MANIFEST, Manifest, write_manifest
from data_pipeline.storage.remote import Access, is_remote, join, list_tars, open_file
from data_pipeline.volume.decoders import DECODERS, ENDINGS
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import ARRAY_BOXES, Grid, array_grid, array_orientation
from data_pipeline.volume.resample import reorient
from infra import ray_cluster
from infra.errors import UserError
from infra.progress import Progress

Place = tuple[tuple[int, ...], tuple[tuple[float, ...], ...] | None]  # shape and, where the format has one, the affine


@dataclass(frozen=True)
class Member:
    """One sample of a foreign shard: where its bytes lie, and the grid that they tell."""

    key: str
    offset: int
    size: int
    crc32c: int
    place: Place


@dataclass
class IndexedShard:
    """What one tar holds. ``bad`` has the keys and reasons of what cannot be used."""

    size: int
    sha256: str
    codec: str | None
    members: list[Member]
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
    orientation: str = "",
    splits: dict[str, float] | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Manifest:
    """Write manifest.json and scans.parquet in ``out`` for the tars below ``shards`` (a folder or URL); return it.

    Args:
        participants: the table; default participants.tsv beside the tars or one folder up. It may have a row per session.
        modality: a name; default by shape (``vbm`` 121x145x121 at 1.5 mm, ``quasiraw`` 182x218x182 at 1 mm).
        dataset: of scans whose key and table name none; default the folder's name.
        spacing: edge of a voxel in mm, for .npy members of another shape; the volume is then centred on the origin.
        orientation: order of the axes of .npy members, as in ``LAS``; default what ``grid.ARRAY_BOXES`` has for the shape.

    Members are ``.npy``, ``.npy.gz``, ``.npy.zst``, ``.nii`` or ``.nii.gz``; each read turns them to RAS. The commonest
    grid is the data set's. A scan of another one, unreadable, without a row in the table, or there twice goes to
    ``quarantine.tsv`` with its reason.
    """
    folder, access = Path(out).resolve(), Access()
    if not is_remote(shards):
        shards = str(Path(shards).resolve())  # Ray's workers have a working directory of their own
    check_pattern(key_pattern)
    orientation = check_orientation(orientation, "--orientation")
    _check_free(folder)
    if spacing is not None and not 0.1 <= spacing <= 20:
        raise UserError(f"--spacing={spacing} is not in 0.1..20 mm")
    names = _tars(shards, access)
    people = _people(shards, participants, access)
    dataset = safe_name(dataset or shards.rstrip("/").rpartition("/")[2] or "shards")
    found = _index_all(shards, names, access, workers)
    shape_and_affine, bad = _common_place(names, found)
    shape_name, grid, orientation = _grid(shape_and_affine, spacing, orientation)
    rows = _rows(names, found, shape_and_affine, people, dataset, key_pattern, bad)
    folder.mkdir(parents=True, exist_ok=True)
    write_quarantine(
        folder / "quarantine.tsv", (Removal(key, name, "index", None, None, why) for key, name, why in bad)
    )
    if not rows:
        raise UserError(f"{shards}: no scan could be used; the reasons are in {folder / 'quarantine.tsv'}")
    codecs = sorted({shard.codec for shard in found if shard.codec})
    settings: dict[str, Any] = {
        "dataset": dataset, "modality": modality or shape_name, "scaling": "none", "simulated": False, "indexed": True,
        "codec": codecs[0] if len(codecs) == 1 else "mixed", "seed": seed, "splits": splits or DEFAULT_SPLITS,
        "orientation": orientation, "scans_found": len(rows) + len(bad), "quarantined": len(bad),
        "root": shards if is_remote(shards) else os.path.relpath(shards, folder),
    }  # fmt: skip
    shard_rows = [
        {"name": name, "bytes": shard.size, "sha256": shard.sha256, "codec": shard.codec or "none", "scans": 0}
        for name, shard in zip(names, found, strict=True)
    ]
    for row in rows:
        shard_rows[row["shard"]]["scans"] += 1
    return write_manifest(folder, grid, settings, shard_rows, scan_table(rows, settings))


def index_one(place: str, access: Access) -> IndexedShard:
    """Read a tar once, from its beginning to its end: every member's place, checksum and grid, and the tar's SHA-256.

    Runs in a Ray worker, with one volume in memory at a time.
    """
    with open_file(place, access) as raw:
        stream = _Hashing(raw)
        shard = IndexedShard(0, "", None, [], [])
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
                for member in tar:
                    if member.isreg():
                        _take(shard, member, tar)
            if not shard.members and not shard.bad:
                shard.bad.append(("", f"no member ends in .{', .'.join(ENDINGS)}"))
        except (tarfile.TarError, EOFError) as error:
            last = shard.members[-1].key if shard.members else "its beginning"
            shard.bad.append(("", f"the tar cannot be read beyond {last}: {error}"))
        while stream.read(1 << 20):
            pass
    shard.size, shard.sha256 = stream.size, stream.digest.hexdigest()
    return shard


class _Hashing:
    """A file that is read forward, and its SHA-256."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.digest, self.size = raw, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        block = self.raw.read(size)
        self.digest.update(block)
        self.size += len(block)
        return block


def _take(shard: IndexedShard, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    """Add a member to its shard where it is a volume, or to those that cannot be used."""
    # WebDataset's rule: the key is the path up to the first dot of the file's name.
    match = re.match(r"((?:.*/)?[^./]+)\.([^/]*)$", member.name)
    key, ending = match.groups() if match else (member.name, "")
    codec = ENDINGS.get(ending.lower())
    if codec is None:
        if ending.lower().endswith(tuple(f".{known}" for known in ENDINGS)):
            shard.bad.append((key, f"member ends in .{ending}; one of .{', .'.join(ENDINGS)} is read"))
        return
    if shard.codec not in (None, codec):
        if all(key != known.key for known in shard.members[-1:]):  # else a second form of the same sample
            shard.bad.append((key, f"member .{ending} in a tar of codec {shard.codec}"))
        return
    shard.codec = codec
    stream = tar.extractfile(member)
    assert stream is not None
    payload = stream.read()
    if len(payload) != member.size:
        raise EOFError("unexpected end of data")
    try:
        place = _inspect(payload, codec)
    except BadScan as error:
        shard.bad.append((key, str(error)))
        return
    shard.members.append(Member(key, member.offset_data, member.size, google_crc32c.value(payload), place))


def _inspect(payload: bytes, codec: str) -> Place:
    """Shape (and affine) of a volume that can be used; BadScan for one that cannot."""
    try:
        array, affine = DECODERS[codec](payload)
        wide = array.astype(np.float32)
    except Exception as error:  # each library raises many kinds for damaged bytes
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
    return tuple(shape), None if affine is None else _rounded(shape, affine)


def _rounded(shape: tuple[int, ...], affine: NDArray[Any]) -> tuple[tuple[float, ...], ...]:
    return Grid.of(shape, affine).affine


def _check_free(folder: Path) -> None:
    if (folder / MANIFEST).is_file() and not Manifest.load(folder).settings.get("indexed"):
        raise UserError(f"{folder} holds shards that yaware built, with their own manifest.json; choose another --out")


def _tars(shards: str, access: Access) -> list[str]:
    if not is_remote(shards) and not Path(shards).is_dir():
        raise UserError(f"shards {shards} is not a folder; give the one that holds the .tar files, or its URL")
    names = list_tars(shards, access)
    if not names:
        raise UserError(f"{shards} has no .tar file; compressed tars (.tar.gz) cannot be read at random: unpack them")
    return names


def _people(shards: str, participants: str | None, access: Access) -> People:
    candidates = (
        [participants] if participants else [join(shards, "participants.tsv"), join(shards, "../participants.tsv")]
    )
    for place in candidates:
        try:
            with open_file(place, access) as stream:
                return read_people(stream.read(), place)
        except FileNotFoundError:
            continue
        except OSError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    raise UserError(f"{' and '.join(candidates)} are missing; name the table with --participants" if not participants
                    else f"--participants={participants} is missing; give a tab-separated table")  # fmt: skip


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


def _common_place(names: list[str], found: list[IndexedShard]) -> tuple[Place, list[tuple[str, str, str]]]:
    """The grid that most members share, and a row for quarantine.tsv of each that could not be read."""
    bad = [(key, name, reason) for name, shard in zip(names, found, strict=True) for key, reason in shard.bad]
    counts = Counter(member.place for shard in found for member in shard.members)
    if not counts:
        raise UserError(f"no scan could be used; the first of {len(bad)}: {bad[0][1]} {bad[0][0]}: {bad[0][2]}")
    return counts.most_common(1)[0][0], bad


def _grid(place: Place, spacing: float | None, declared: str = "") -> tuple[str, Grid, str]:
    """The modality that the shape tells, the grid, and the orientation in which arrays are stored."""
    shape, affine = place
    box = ARRAY_BOXES.get((shape[0], shape[1], shape[2]))
    name = box.modality if box else "vbm"
    if affine is not None:
        grid = Grid((shape[0], shape[1], shape[2]), affine)
        if spacing is not None and not np.allclose(grid.spacing, spacing, atol=1e-3):
            raise UserError(f"--spacing={spacing}, but the members' affine says {grid.spacing} mm; leave --spacing out")
        if declared:
            raise UserError(f"--orientation={declared}, but the members' headers tell theirs; leave --orientation out")
        return name, grid, "RAS"
    stored = array_orientation(shape, declared)
    known, turned_shape = array_grid(shape), reorient(np.empty(shape, np.bool_), stored).shape
    if known is not None and known.shape == turned_shape and spacing in (None, known.spacing[0]):
        return name, known, stored
    if spacing is None:
        size = "x".join(map(str, shape))
        raise UserError(f"members are arrays of shape {size}, which tells no voxel size; give it with --spacing")
    return name, Grid.centred(turned_shape, spacing), stored


def _rows(
    names: list[str], found: list[IndexedShard], place: Place, people: People, dataset: str, pattern: str | None,
    bad: list[tuple[str, str, str]],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row of scans.parquet for each member that can be used; the others are added to ``bad``."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, shard in enumerate(found):
        for member in shard.members:
            try:
                if member.place != place:
                    raise BadScan(f"grid {_show(member.place)}, the data set's is {_show(place)}")
                if member.key in seen:
                    raise BadScan("its key is there twice")
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
    known = {
        "participant_id": entities["participant_id"], "session": entities.get("session", "1"),
        "run": entities.get("run", ""), "dataset": entities.get("dataset") or values.get("dataset") or dataset,
        "site": values.get("site") or "", "age": values.get("age"), "sex": values.get("sex") or "",
    }  # fmt: skip
    return {**{name: value for name, value in values.items() if name not in OWN}, **known}


def _show(place: Place) -> str:
    shape, affine = place
    size = "x".join(map(str, shape))
    if affine is None:
        return size
    origin = ", ".join(f"{row[3]:g}" for row in affine[:3])
    return f"{size} of {Grid((0, 0, 0), affine).spacing} mm at ({origin})"
