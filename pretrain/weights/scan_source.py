"""The scans to embed: files, rows of a table, or scans of shards, each read as the encoder's training scans were."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import zstandard
from numpy.typing import NDArray

from data_pipeline.cohort.declarations import check_orientation
from data_pipeline.prepare.reuse.files import FilesOfRecipe
from data_pipeline.prepare.reuse.record import difference, training_preparation, unusual
from data_pipeline.quality.rules import voxels_digest
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.reader import VolumeReader
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.intensity import to_float16, zscore
from data_pipeline.volume.load import read_voxels
from data_pipeline.volume.preparation import DEFAULT_PREPARATION, FilePreparation, scale_factor
from infra.errors import UserError
from pretrain.weights.likeness import Likeness
from pretrain.weights.seen_scans import DIGITS, SeenScans, seen_in

# What Encoder.embed takes: paths, a manifest, a table of paths or of a manifest's scans, or row numbers of a manifest.
EmbeddableScans = Sequence[str | os.PathLike[str]] | Manifest | pd.DataFrame | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class RawScans:
    """What happens to raw scans: prepared as the training scans were, or read as they are; and where prepared scans stay."""

    prepare: bool = True
    folder: str | os.PathLike[str] | None = None


class ScanSource(Protocol):
    """Scans by position 0..n-1."""

    names: list[str]  # the scan's path or key
    index: str  # what the names are: "path" or "key"
    unlike: dict[str, str]  # name of a scan -> how it differs from the training scans
    unusual: dict[str, str]  # name of a scan -> the figure of its preparation that no training scan has
    prepared: int  # raw scans that are prepared when they are read
    identify: bool  # whether to note digests of the voxels that are read, if nothing else tells whose they are
    voxels: dict[str, str]  # name of a scan -> this digest

    def read(self, position: int) -> NDArray[np.float32]:
        """Return z-scored voxels (D, H, W). Raises BadScan, with the reason, if the scan cannot be used."""

    def stamp(self, position: int) -> list[Any]:
        """Return values that change when the scan's features would change."""

    def seen(self, sources: Sequence[SeenScans]) -> NDArray[np.bool_]:
        """Return (n,) whether each scan, or another one of its participant, is in one of the sources."""


class FileSource:
    """Image files, brought to the encoder's grid, scaled and z-scored as preprocessing.json says.

    Raw scans are prepared first, if preprocessing.json says how the training scans were.

    Args:
        paths: the files.
        preprocessing: the encoder's preprocessing.json.
        tiv: total intracranial volumes in ml, one per path, if the encoder's scans were scaled by them. It goes before the
            volume that the scan's preparation measured, which counts where none is given (NaN).
        orientation: of .npy arrays; empty for that of the training scans.
        raw: what happens to raw scans.
    """

    index = "path"

    def __init__(
        self, paths: Sequence[str], preprocessing: Mapping[str, Any], tiv: Sequence[float] | None = None,
        orientation: str = "", raw: RawScans = RawScans(),
    ) -> None:  # fmt: skip
        if not paths:
            raise UserError("there are no scans to embed")
        if tiv is not None and len(tiv) != len(paths):
            raise UserError(
                f"tiv (--tiv) has {len(tiv)} values for {len(paths)} scans: {len(paths)} values in ml are needed, one for "
                "each scan, in their order"
            )
        if tiv is not None and preprocessing.get("scaling") != "tiv":
            scaling = preprocessing.get("scaling")
            raise UserError(f"tiv (--tiv) would not be used: the encoder's scans have scaling {scaling}; leave it out")
        self.names = list(paths)
        self.unlike, self.unusual = dict[str, str](), dict[str, str]()
        self.identify, self.voxels = False, dict[str, str]()
        self._file = FilePreparation.of(preprocessing)
        self._likeness, self._tiv = Likeness(preprocessing), tiv
        arrays = any(name.lower().endswith(".npy") for name in self.names)
        self._orientation = orientation or (self._file.orientation() if arrays else "")
        self._recipe, self._figures, self._raw = (
            _recipe(preprocessing, raw),
            dict[str, Mapping[str, float]](),
            set[str](),
        )
        self._faults = dict[str, str]()  # name of a scan -> why it cannot be read
        self._ranges = (preprocessing.get("preparation") or {}).get("figures", {})
        if self._recipe is not None:
            self._find_raw(self._recipe)
        self.prepared = len(self._raw)
        own = {name for name, figures in self._figures.items() if "tiv" in figures} | self._raw | set(self._faults)
        if self._file.preparation.scaling == "tiv" and tiv is None and not own.issuperset(self.names):
            nan = ", with nan for a scan whose preparation measures its own" if own else ""
            raise UserError(
                f"the encoder's training scans were scaled by total intracranial volume (scaling: tiv): {len(paths)} values "
                f"in ml are needed, found none; give tiv=[...] (--tiv){nan}, or a table with a column tiv"
            )

    def _find_raw(self, recipe: FilesOfRecipe) -> None:
        """Find the raw scans, the figures of those that are prepared, and the scans whose description cannot be read."""
        for name in self.names:
            try:
                figures = recipe.figures(Path(name))
            except BadScan as error:
                self._faults[name] = str(error)
                continue
            if figures is not None:
                self._figures[name] = figures
            elif recipe.is_raw(Path(name)):
                self._raw.add(name)

    def read(self, position: int) -> NDArray[np.float32]:
        """Return z-scored voxels (D, H, W). Raises BadScan if the file cannot be read, fails a check, or is refused."""
        name = self.names[position]
        if name in self._faults:
            raise BadScan(self._faults[name])
        if self._recipe is None or name not in self._raw:
            return self._read(position, Path(name), self._figures.get(name, {}))
        with self._recipe.prepared(Path(name)) as made:
            return self._read(position, made.path, made.figures)

    def _read(self, position: int, path: Path, figures: Mapping[str, float]) -> NDArray[np.float32]:
        """The voxels of a file that is prepared; ``figures`` are those of its preparation."""
        preparation, name = self._file.preparation, self.names[position]
        factor = scale_factor(preparation.scaling, {"tiv": self._head_size(position, figures)})
        voxels = read_voxels(
            path, preparation.grid, self._file.checks, crop=preparation.crop, intensity=preparation.intensity,
            orientation=self._orientation, arrays_on=preparation.grid if self._file.arrays_on_grid else None,
        )  # fmt: skip
        if self.identify:  # as a build takes the digest: before scaling
            self.voxels[name] = voxels_digest(to_float16(voxels.copy()))[:DIGITS]
        stored = to_float16(voxels, factor)  # as in the shards
        if fault := self._likeness.fault(stored):
            self.unlike[name] = fault
        if figures and (outside := unusual(figures, self._ranges)):
            self.unusual[name] = outside
        return zscore(stored)

    def _head_size(self, position: int, figures: Mapping[str, float]) -> float | None:
        """The TIV in ml that the user gives for a scan, else that of its preparation."""
        given = self._tiv[position] if self._tiv is not None else None
        return figures.get("tiv", given) if given is None or given != given else given

    def stamp(self, position: int) -> list[Any]:
        """Return the file's size, time of change, TIV, orientation, and whether it is raw; empty if there is no file."""
        name = self.names[position]
        try:
            status = Path(name).stat()
        except (OSError, ValueError):  # ValueError: a name with a null byte
            return []
        tiv = self._head_size(position, self._figures.get(name, {}))
        more = [self._orientation] if self._orientation else []
        return [status.st_size, status.st_mtime_ns, tiv, *more, *(["raw"] if name in self._raw else [])]

    def seen(self, sources: Sequence[SeenScans]) -> NDArray[np.bool_]:
        """Return (n,) whether the voxels of each file are in one of the sources; False for files not read with ``identify``.

        A file does not say whose scan it is, so other scans of the same people are not recognised.
        """
        digests = {digest for source in sources for digest in source.voxels or ()}
        return np.array([self.voxels.get(name) in digests for name in self.names], dtype=bool)


class ShardSource:
    """Scans of shards. Threads may read at the same time: each has its own reader."""

    index = "key"

    def __init__(self, manifest: Manifest, rows: NDArray[np.integer[Any]], preprocessing: Mapping[str, Any]) -> None:
        check_preprocessing(preprocessing, manifest, "the encoder")
        self.names = manifest.scans["key"].iloc[rows].astype(str).tolist()
        self.unlike, self.unusual, self.prepared = dict[str, str](), dict[str, str](), 0
        self.identify, self.voxels = False, dict[str, str]()
        self._manifest, self._rows = manifest, rows
        self._readers = threading.local()

    def read(self, position: int) -> NDArray[np.float32]:
        """Return z-scored voxels (D, H, W). Raises BadScan if the shard is damaged."""
        if not hasattr(self._readers, "reader"):
            self._readers.reader = self._manifest.reader()
        reader: VolumeReader = self._readers.reader
        try:
            return zscore(reader.read(int(self._rows[position])))
        except (OSError, ValueError, zstandard.ZstdError) as error:
            raise BadScan(" ".join(str(error).split())) from None

    def stamp(self, position: int) -> list[Any]:
        """Return the checksum of the scan's bytes."""
        return [int(self._manifest.scans["crc32c"].iloc[int(self._rows[position])])]

    def seen(self, sources: Sequence[SeenScans]) -> NDArray[np.bool_]:
        """Return (n,) whether each scan's participant is in one of the sources, by name or by the voxels of any scan."""
        return seen_in(sources, self._manifest, self._rows)


def scan_source(
    scans: EmbeddableScans, preprocessing: Mapping[str, Any], manifest: Manifest | str | Path | None = None,
    tiv: Sequence[float] | None = None, orientation: str = "", raw: RawScans = RawScans(),
) -> ScanSource:  # fmt: skip
    """Return the source of the scans to embed.

    Args:
        scans: paths; a manifest (all its scans); a DataFrame with a column ``path``, and ``tiv`` if the encoder's scans
            were scaled by it; or, with ``manifest``, rows of its table ``scans`` or row numbers (n,).
        preprocessing: the encoder's preprocessing.json.
        manifest: the data set, or its folder or URL, that ``scans`` are rows of.
        tiv: total intracranial volumes in ml, one per path, only if the encoder's scans were scaled by them.
        orientation: of .npy files, for example ``LAS``; empty for that of the training scans.
        raw: what happens to raw scans.

    Raises:
        UserError: if a column or a TIV is missing, TIVs would not be used, a row is not in the manifest, or the shards were
            prepared otherwise than the encoder's.
    """
    orientation = check_orientation(orientation, "orientation")
    if tiv is not None and (manifest is not None or isinstance(scans, Manifest)):
        raise UserError("tiv (--tiv) is for files: scans of shards were scaled by the build; leave it out")
    if isinstance(scans, Manifest):
        return ShardSource(scans, np.arange(len(scans.scans)), preprocessing)
    if manifest is not None:
        manifest = manifest if isinstance(manifest, Manifest) else Manifest.load(manifest)
        return ShardSource(manifest, _rows_of(scans, manifest), preprocessing)
    if isinstance(scans, pd.DataFrame):
        return _table_source(scans, preprocessing, tiv, orientation, raw)
    if isinstance(scans, str | os.PathLike):
        raise UserError(f"scans={str(scans)!r} is one path; give a list of paths: [{str(scans)!r}]")
    if not isinstance(scans, Iterable):
        raise UserError(
            f"scans={scans!r:.80} is of type {type(scans).__name__}; allowed: paths, a manifest, a table of paths, or, "
            "with manifest=..., rows of its table or row numbers"
        )
    for scan in scans:
        if not isinstance(scan, str | os.PathLike):
            raise UserError(
                f"scans has {scan!r}, which is not a path; row numbers and keys of shards need manifest=..."
            )
    return FileSource([os.fspath(scan) for scan in scans], preprocessing, tiv, orientation, raw)


def warning_lines(source: ScanSource, preprocessing: Mapping[str, Any]) -> list[str]:
    """Return a line about the scans that were read and do not look like the training scans, and one about their figures."""
    lines = []
    if source.unlike:
        name = next(name for name in source.names if name in source.unlike)  # threads find them in any order
        lines.append(
            f"{len(source.unlike)} of {len(source.names)} scans do not look like the encoder's training scans (modality "
            f"{preprocessing.get('modality')}), so their features mean little; for example {name}: {source.unlike[name]}; "
            "give scans that were processed as the training scans were"
        )
    if source.unusual:
        name = next(name for name in source.names if name in source.unusual)
        lines.append(
            f"the preparation of {len(source.unusual)} of {len(source.names)} scans is unlike that of the encoder's training "
            f"scans, so their features may mean little; for example {name}: {source.unusual[name]}"
        )
    if source.prepared and (libraries := FilesOfRecipe(preprocessing["preparation"]).other_libraries()):
        lines.append(f"raw scans were prepared by other versions than the training scans: {libraries}")
    return lines


def _recipe(preprocessing: Mapping[str, Any], raw: RawScans) -> FilesOfRecipe | None:
    """The preparation of the training scans; None if it is not known, or not wanted."""
    if not raw.prepare or not preprocessing.get("preparation"):
        return None
    return FilesOfRecipe(preprocessing["preparation"], None if raw.folder is None else Path(raw.folder))


def check_preprocessing(preprocessing: Mapping[str, Any], manifest: Manifest, name: str) -> None:
    """Raise UserError if shards differ from an encoder's preprocessing in grid, modality, scaling, crop or intensity."""
    expected, found = (
        {**DEFAULT_PREPARATION, **preprocessing},
        {**DEFAULT_PREPARATION, "grid": manifest.grid, **manifest.settings},
    )
    for key in ("grid", "modality", "scaling", *DEFAULT_PREPARATION):
        if expected.get(key) is not None and expected[key] != found.get(key):
            raise UserError(
                f"{name}: the encoder was trained on {key} {expected[key]!r}, {manifest.root} has {found.get(key)!r}; "
                f"build shards with {key} {expected[key]!r}"
            )
    own, other = preprocessing.get("preparation"), training_preparation(manifest)
    if own and other and (fault := difference(other["recipe"], own["recipe"])):
        raise UserError(
            f"{name}: {manifest.root} was prepared otherwise than the encoder's training scans: {fault}; prepare its raw "
            "scans as they were"
        )


def _table_source(
    scans: pd.DataFrame, preprocessing: Mapping[str, Any], tiv: Sequence[float] | None, orientation: str,
    raw: RawScans,
) -> FileSource:  # fmt: skip
    if "path" not in scans:
        hint = "; rows of a manifest need manifest=..." if "key" in scans and "shard" in scans else ""
        raise UserError(f"the table of scans has no column 'path'; its columns: {', '.join(map(str, scans))}{hint}")
    for number, path in enumerate(scans["path"], 1):
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise UserError(f"the table of scans, row {number}: path is {path!r}; every row needs a path")
    if tiv is None and "tiv" in scans and preprocessing.get("scaling") == "tiv":
        numbers = pd.to_numeric(scans["tiv"], errors="coerce")
        for number, (text, value) in enumerate(zip(scans["tiv"], numbers, strict=True), 1):
            if np.isnan(value) and not pd.isna(text):
                raise UserError(
                    f"the table of scans, row {number}: tiv is {text!r}; write a number of ml, or leave it empty"
                )
        tiv = [float(value) for value in numbers]
    return FileSource([os.fspath(path) for path in scans["path"]], preprocessing, tiv, orientation, raw)


def _rows_of(scans: Any, manifest: Manifest) -> NDArray[np.int64]:
    """Row numbers in a manifest: those given, or those of a table's keys."""
    if not isinstance(scans, pd.DataFrame):
        rows, count = np.asarray(scans), len(manifest.scans)
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or ((rows < 0) | (rows >= count)).any():
            raise UserError(f"scans must be rows of the scans of {manifest.url}, or row numbers from 0 to {count - 1}")
        return rows.astype(np.int64)
    if "key" not in scans:
        raise UserError(f"the table of scans has no column 'key'; its columns: {', '.join(map(str, scans))}")
    rows_by_key = pd.Series(np.arange(len(manifest.scans)), index=manifest.scans["key"].astype(str))
    keys = scans["key"].astype(str)
    unknown = keys[~keys.isin(rows_by_key.index)]
    if len(unknown):
        raise UserError(f"{len(unknown)} of {len(keys)} scans are not in {manifest.url}, such as {unknown.iloc[0]}")
    return rows_by_key.loc[keys].to_numpy(dtype=np.int64)
