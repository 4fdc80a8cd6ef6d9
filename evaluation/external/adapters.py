"""Encoders of others: Python objects that a user names, with their own preprocessing, applied to the files of a cohort.

An adapter has ``prepare(path)``, which returns a tensor (1, D, H, W), and ``embed(batch)``, which returns features (N, F) of a
batch (N, 1, D, H, W). Its code runs only because the user named it; no checkpoint or manifest can name one.
"""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.cohort.read import read_cohort
from data_pipeline.storage.manifest import Manifest
from evaluation.external.given import GivenFeatures, Part
from infra.errors import UserError
from infra.files import atomic_write, regular_file
from infra.progress import Progress

BATCH = 8  # scans, if the adapter has no ``batch_size``
PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class CohortFiles:
    """Where an adapter finds its files: a cohort as ``read_cohort`` takes it, and how to read it."""

    cohort: str | os.PathLike[str] | None = None
    modality: str | None = None
    columns: str | os.PathLike[str] | None = None


@dataclass(frozen=True)
class Adapter:
    """An encoder of others: its object, the name of its code, and its name in the results."""

    code: Any
    spec: str
    name: str

    @property
    def fingerprint(self) -> str:
        """What the features are cached by: a text that changes with weights and code; empty: they are computed anew."""
        return str(getattr(self.code, "fingerprint", "") or "")


def load_adapters(encoders: Any) -> list[Adapter]:
    """Load adapters from their names ``package.module:factory``, or take objects as they are.

    Modules are also looked for in the current folder. Raises UserError if one cannot be imported or lacks a method.
    """
    single = isinstance(encoders, str) or not isinstance(encoders, Sequence)
    return [_load(encoder) for encoder in ([encoders] if single else encoders) if encoder is not None]


def _load(encoder: Any) -> Adapter:
    if isinstance(encoder, str):
        code, spec = _made(encoder), encoder
    else:
        code, spec = encoder, type(encoder).__name__
    for method in ("prepare", "embed"):
        if not callable(getattr(code, method, None)):
            raise UserError(
                f"encoder {spec}: {type(code).__name__} has no method {method}; an adapter has prepare(path) -> (1, D, H, W) "
                "and embed(batch) -> (N, F)"
            )
    batch_size = getattr(code, "batch_size", BATCH)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"encoder {spec}: batch_size={batch_size!r} is not a whole number above 0")
    name = getattr(code, "name", None)
    return Adapter(code, spec, name if isinstance(name, str) and name else spec.rpartition(":")[2])


def _made(spec: str) -> Any:
    """Return what the factory of ``package.module:factory`` returns."""
    module, colon, factory = spec.partition(":")
    if not (colon and all(part.isidentifier() for part in (*module.split("."), *factory.split(".")))):
        raise UserError(f"encoder {spec!r} is not of the form package.module:factory")
    with _current_folder():
        try:
            found = pkgutil.resolve_name(spec)
        except (Exception, SystemExit) as error:
            raise UserError(f"encoder {spec}: it cannot be imported: {_reason(error)}") from None
        if not callable(found):
            raise UserError(
                f"encoder {spec}: {factory} is of type {type(found).__name__}; name a function that returns an adapter"
            )
        try:
            return found()
        except (Exception, SystemExit) as error:
            raise UserError(f"encoder {spec}: {factory}() failed: {_reason(error)}") from None


@contextmanager
def _current_folder() -> Iterator[None]:
    """Look for modules in the current folder too, as ``python -m`` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _reason(error: BaseException) -> str:
    """Return an exception as one line, with the last line of the user's own code in its traceback."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200].removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_library(frame.filename)]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text} ({Path(error.filename).name} line {error.lineno})"
    if not own:
        return text
    return f"{text} ({Path(own[-1].filename).name} line {own[-1].lineno}: {own[-1].line})"


def _is_library(filename: str) -> bool:
    """Whether a file belongs to Python, an installed package or this project's packages."""
    path = Path(filename)
    if (
        filename.startswith("<")
        or "site-packages" in path.parts
        or path.is_relative_to(Path(traceback.__file__).parent)
    ):
        return True
    inside = path.is_relative_to(PROJECT) and path.relative_to(PROJECT).parts[0]
    return inside in ("infra", "data_pipeline", "pretrain", "evaluation")


def adapter_files(adapters: Sequence[Adapter], files: CohortFiles, manifest: Manifest) -> list[GivenFeatures]:
    """Return adapters as candidates whose features are not computed yet; ``parts`` has the file of each scan.

    Raises UserError if there is no cohort, or it holds no scan of the shards.
    """
    if not adapters:
        if files.cohort is not None:
            raise UserError(f"cohort={files.cohort}: only adapters read files; name one with encoder")
        return []
    if files.cohort is None:
        raise UserError(
            f"encoder {adapters[0].spec} reads the cohort's files, which the shards do not name; give their folder with cohort"
        )
    names = sorted(set(manifest.scans["dataset"].astype(str)))
    lists = Path(files.cohort).suffix.lower() in (".yaml", ".yml")
    dataset = names[0] if len(names) == 1 and not lists else None
    modality = files.modality or str(manifest.settings.get("modality", "vbm"))
    declared = None if files.columns is None else Path(files.columns)
    scans, _ = read_cohort(Path(files.cohort), dataset, modality, columns=declared)
    row_of = {str(key): row for row, key in enumerate(manifest.scans["key"])}
    paths = {row_of[scan.key]: str(scan.path) for scan in scans if scan.key in row_of}
    if not paths:
        found = f"; it holds {scans[0].key}, the shards hold {next(iter(row_of))}" if scans else ""
        raise UserError(f"cohort {files.cohort} holds no scan of the shards ({modality}){found}")
    part = {f"the cohort {files.cohort}": Part(paths, 0)}
    empty = np.empty((len(row_of), 0))
    return [
        GivenFeatures(
            name=adapter.name, kind="adapter", source=adapter.spec, digest="", columns=[], values=empty, parts=part,
            adapter=adapter,
        )
        for adapter in adapters
    ]  # fmt: skip


def computed(
    given: Sequence[GivenFeatures], manifest: Manifest, rows: NDArray[np.int64], cache: Path
) -> list[GivenFeatures]:
    """Return the candidates with the features of all adapters for some rows of the manifest.

    Features of an adapter with a ``fingerprint`` are kept in the folder ``cache``. Raises UserError with one line if the
    adapter's code fails or returns something else than it should.
    """
    return [_computed(features, manifest, rows, cache) if features.adapter else features for features in given]


def _computed(features: GivenFeatures, manifest: Manifest, rows: NDArray[np.int64], cache: Path) -> GivenFeatures:
    adapter: Adapter = features.adapter
    (paths,) = (part.where for part in features.parts.values())
    stamps = {int(row): _stamp(paths[int(row)]) for row in rows}
    stored = _read(_cache_file(adapter, manifest, cache), stamps) if adapter.fingerprint else {}
    missing = [int(row) for row in rows if int(row) not in stored]
    if missing:
        stored |= _embed(adapter, [(row, paths[row]) for row in missing], stored)
        if adapter.fingerprint:
            _write(_cache_file(adapter, manifest, cache), stored, stamps)
    matrix = np.stack([stored[int(row)] for row in rows])
    values = np.full((len(features.values), matrix.shape[1]), np.nan)
    values[rows] = matrix
    digest = hashlib.sha256(np.ascontiguousarray(matrix).tobytes()).hexdigest()
    columns = [f"f{number}" for number in range(matrix.shape[1])]
    parts = {title: Part(part.where, len(columns)) for title, part in features.parts.items()}
    return replace(features, values=values, digest=digest, columns=columns, parts=parts)


def _embed(
    adapter: Adapter, files: Sequence[tuple[int, str]], known: dict[int, NDArray[np.float32]]
) -> dict[int, NDArray[np.float32]]:
    """Return row -> features (F,) of files; all must have as many features as the ``known`` ones."""
    size = getattr(adapter.code, "batch_size", BATCH)
    result: dict[int, NDArray[np.float32]] = {}
    count = next((len(features) for features in known.values()), None)
    shape: tuple[int, ...] | None = None
    with torch.no_grad(), Progress(len(files), "scans", f"features of {adapter.name}") as progress:
        for first in range(0, len(files), size):
            batch = files[first : first + size]
            volumes = [_prepared(adapter, path) for _, path in batch]
            for volume, (_, path) in zip(volumes, batch, strict=True):
                shape = shape or tuple(volume.shape)
                if tuple(volume.shape) != shape:
                    found = f"returns shape {tuple(volume.shape)}, for earlier files {shape}"
                    raise UserError(f"encoder {adapter.spec}: prepare({path!r}) {found}; all scans must have one shape")
            embedded = _embedded(adapter, torch.stack(volumes), [path for _, path in batch])
            if count is not None and embedded.shape[1] != count:
                raise UserError(
                    f"encoder {adapter.spec}: embed returns {embedded.shape[1]} features, for earlier files {count}; "
                    "the number must not change"
                )
            count = embedded.shape[1]
            result |= {row: features for (row, _), features in zip(batch, embedded, strict=True)}
            progress.advance(len(batch))
    return result


def _prepared(adapter: Adapter, path: str) -> torch.Tensor:
    """Return ``prepare(path)`` after checking it."""
    what = f"encoder {adapter.spec}: prepare({path!r})"
    try:
        volume = adapter.code.prepare(path)
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} failed: {_reason(error)}") from None
    if not isinstance(volume, torch.Tensor) or volume.ndim != 4 or volume.shape[0] != 1 or not volume.numel():
        raise UserError(f"{what} returns {_described(volume)}; it must return a tensor (1, D, H, W)")
    wrong = int((~torch.isfinite(volume)).sum())
    if wrong:
        raise UserError(f"{what} returns {wrong} of {volume.numel()} voxels that are NaN or infinite; replace them")
    return volume.detach().cpu()


def _embedded(adapter: Adapter, batch_N1DHW: torch.Tensor, paths: Sequence[str]) -> NDArray[np.float32]:
    """Return ``embed(batch)`` (N, F) float32 after checking it."""
    what = f"encoder {adapter.spec}: embed(batch of {len(paths)} scans from {paths[0]!r})"
    try:
        features = adapter.code.embed(batch_N1DHW)
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} failed: {_reason(error)}") from None
    is_array = isinstance(features, torch.Tensor | np.ndarray)
    if not is_array or features.ndim != 2 or features.shape[0] != len(paths) or not features.shape[1]:
        raise UserError(f"{what} returns {_described(features)}; it must return ({len(paths)}, F), a row per scan")
    values = torch.as_tensor(features).detach().float().cpu().numpy()
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        raise UserError(f"{what} returns NaN or infinite features for {len(wrong)} scans, such as {paths[wrong[0]]!r}")
    return values


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")


def _cache_file(adapter: Adapter, manifest: Manifest, cache: Path) -> Path:
    digest = hashlib.sha256(json.dumps([adapter.spec, adapter.fingerprint]).encode()).hexdigest()
    return cache / f"adapter-{digest[:16]}-{manifest.digest[:16]}.npz"


def _stamp(path: str) -> tuple[int, int]:
    """Return size and time of change of a file; zeros if it is not there, which prepare will say."""
    try:
        status = Path(path).stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _read(file: Path, stamps: dict[int, tuple[int, int]]) -> dict[int, NDArray[np.float32]]:
    """Return row -> features (F,) of the cached scans whose files have not changed."""
    if not file.exists():
        return {}
    with np.load(regular_file(file)) as stored:
        rows = zip(stored["rows"].tolist(), stored["stamps"].tolist(), stored["features"], strict=True)
        return {row: features for row, stamp, features in rows if stamps.get(row) == tuple(stamp)}


def _write(file: Path, features: dict[int, NDArray[np.float32]], stamps: dict[int, tuple[int, int]]) -> None:
    with atomic_write(file) as stream:
        rows = list(features)
        np.savez(
            stream, rows=np.array(rows), stamps=np.array([stamps[row] for row in rows], dtype=np.int64),
            features=np.stack([features[row] for row in rows]),
        )  # fmt: skip
