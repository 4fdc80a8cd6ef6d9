"""Fit the readouts of an encoder: features of all scans once, sums over all ranks, errors of people not fitted to, intervals.

n = scans of the fit and of the calibration, F = features, P = targets of a group, K = folds, G = entries of the grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from infra.files import sha256_of
from pretrain.encoders.cpu_speed import scans_of_a_batch
from pretrain.readouts.calibration import Calibration, CalibrationChoice, choose_calibration
from pretrain.readouts.errors import error_rows, summarise
from pretrain.readouts.features import FeatureStore, embed_scans
from pretrain.readouts.solve import (
    BLOCK,
    FOLDS,
    GRID,
    Fits,
    Floats,
    Moments,
    NestedRidge,
    Samples,
    calibrated_ridge,
    nested_ridge,
)
from pretrain.readouts.targets import TargetGroup, Targets, read_targets
from pretrain.weights.embedding import BATCH_SIZE, choose_device
from pretrain.weights.encoder import Encoder
from pretrain.weights.readouts import Readout, Readouts
from pretrain.weights.scan_source import ShardSource
from pretrain.weights.seen_scans import SeenScans, source_of

# Most features, or scans if these are fewer: the sums over 8192 features take 2.7 GB.
LARGEST = 8192
FITTED, CALIBRATED = "readouts", "calibration"  # roles of the scans in Readouts.fitted_on


@dataclass(frozen=True)
class Ranks:
    """The processes that share the scans: number of this one, how many, their group and the device of its collectives."""

    rank: int = 0
    size: int = 1
    group: Any = None
    device: str | torch.device = "cpu"

    def add(self, values: Floats) -> None:
        """Add the arrays of all ranks in place. Collective."""
        if self.size > 1:
            tensor = torch.from_numpy(values).to(self.device)
            dist.all_reduce(tensor, group=self.group)
            values[...] = tensor.cpu().numpy()

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, ordered by rank. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def join(self, own: NDArray[Any], count: int) -> NDArray[Any]:
        """Return the rows (count, ...) of all ranks in the order of the scans; rank r has every ``size``-th from r."""
        rows_of_ranks = self.gather(np.asarray(own))
        joined = np.empty((count, *own.shape[1:]), own.dtype)
        for rank, rows_of_rank in enumerate(rows_of_ranks):
            joined[rank :: self.size] = rows_of_rank
        return joined


@dataclass(frozen=True)
class ReadoutSettings:
    """What is fitted, and how features are computed.

    Attributes:
        columns: columns of the scan table to predict.
        layer: a block of the encoder; None is its end.
        pooling: of that block.
        calibration: on whom scale and penalty are chosen and errors are measured.
        seed: of the folds of people.
        largest: most features, or scans if these are fewer.
        batch_size: scans per forward pass; None is 8, and on a CPU fewer if they are large.
        workers: threads that read ahead; None is one per core, at most 8.
        device: to compute features on; None is the GPU if there is one.
        progress: whether to show progress on stderr, or the stream to show it on.
    """

    columns: Sequence[str]
    layer: str | None = None
    pooling: tuple[str, ...] = ("mean",)
    calibration: CalibrationChoice = field(default_factory=CalibrationChoice)
    seed: int = 0
    largest: int = LARGEST
    batch_size: int | None = None
    workers: int | None = None
    device: str | torch.device | None = None
    progress: bool | TextIO = True


@dataclass(frozen=True)
class OwnFeatures:
    """The features of this rank's scans, and which scans of all ranks could be read.

    Attributes:
        features: (own scans, F); NaN for a scan that cannot be read.
        readable: (n,) of all ranks.
        ranks: the processes.
    """

    features: NDArray[np.float32]
    readable: NDArray[np.bool_]
    ranks: Ranks

    @property
    def scans(self) -> NDArray[np.int64]:
        """The positions of this rank's scans among all."""
        return np.arange(len(self.readable))[self.ranks.rank :: self.ranks.size]


def fit_readouts(
    encoder: Encoder, manifest: Manifest, rows: NDArray[np.integer[Any]], settings: ReadoutSettings, work: Path,
    *, ranks: Ranks | None = None, beat: Callable[[], None] = lambda: None,
) -> Readouts:  # fmt: skip
    """Fit the readouts of an encoder that was read from a folder, and return them on every rank. Collective.

    Each scan is embedded once, by one rank, without augmentation. The result does not depend on the number of ranks, up to
    rounding.

    Args:
        encoder: the encoder.
        manifest: of the shards.
        rows: the scans to fit to, as rows of the manifest.
        settings: what is fitted.
        work: folder for the features; with it the next call continues after a kill. The caller removes it.
        ranks: the processes that share the scans; None is this one alone.
        beat: called after every batch and every fit, for a watchdog.

    Raises:
        UserError: if the shards were prepared otherwise than the encoder's, a block or pooling does not exist, no scan can be
            read, or a split that is named for the calibration has too few people.
    """
    ranks = ranks or Ranks()
    assert encoder.folder is not None
    weights = sha256_of(encoder.folder / "model.safetensors")
    fit_rows = np.asarray(rows, np.int64)
    calibration = choose_calibration(encoder, manifest, fit_rows, settings.calibration)
    targets = read_targets(manifest, fit_rows, settings.columns, settings.seed, calibration)
    left_out, readouts = dict(targets.left_out), dict[str, Readout]()
    if targets.groups:
        about = {"weights": weights, "manifest": manifest.digest}
        voxels, device = prod(manifest.grid["shape"]), choose_device(settings.device)
        batch = settings.batch_size or scans_of_a_batch(device, voxels, BATCH_SIZE)
        settings = replace(settings, batch_size=batch)  # a continued fit makes the same batches, or begins anew
        own = _embed_share(encoder, manifest, targets.rows, settings,
                           _store(work, about, targets.rows, settings, ranks=ranks), ranks=ranks, beat=beat)  # fmt: skip
        for group in targets.groups:
            result = fit_group(own, group, settings.largest, beat)
            if isinstance(result, str):
                left_out |= {target.name: result for target in group.targets}
                continue
            predicted = _held_out(own, group, result)
            for number, target in enumerate(group.targets):
                readouts[target.name] = _readout(number, group, result, predicted[:, number], manifest=manifest,
                                                 targets=targets, calibration=calibration, readable=own.readable)  # fmt: skip
    return Readouts(
        {column: readouts[column] for column in dict.fromkeys(settings.columns) if column in readouts}, weights, settings.layer,
        settings.pooling, left_out, _sources(manifest, targets) if readouts else [],
    )  # fmt: skip


def _sources(manifest: Manifest, targets: Targets) -> list[SeenScans]:
    """Return the digests of the scans of the fit and of the calibration, if there is one."""
    parts = [(targets.rows[: targets.fit], FITTED), (targets.calibration, CALIBRATED)]
    return [source_of(manifest, rows, role) for rows, role in parts if len(rows)]


def _store(
    work: Path, about: dict[str, str], rows: NDArray[np.integer[Any]], settings: ReadoutSettings, *, ranks: Ranks
) -> FeatureStore:
    """Return the store of this rank's features; its header holds all that they depend on."""
    header = {
        **about, "rows": hashlib.sha256(np.ascontiguousarray(rows, np.int64).tobytes()).hexdigest(),
        "layer": settings.layer, "pooling": list(settings.pooling), "batch": settings.batch_size, "rank": ranks.rank,
        "ranks": ranks.size,
    }  # fmt: skip
    return FeatureStore(work / f"features-{ranks.rank}-of-{ranks.size}.f32", header)


def _embed_share(
    encoder: Encoder, manifest: Manifest, rows: NDArray[np.integer[Any]], settings: ReadoutSettings, store: FeatureStore,
    *, ranks: Ranks, beat: Callable[[], None],
) -> OwnFeatures:  # fmt: skip
    """Embed this rank's scans. Collective. Raises UserError if no scan of any rank can be read."""
    source = ShardSource(manifest, rows[ranks.rank :: ranks.size], encoder.preprocessing)
    embed_scans(
        encoder.network, source, store, beat, layer=settings.layer, pooling=settings.pooling, device=settings.device,
        batch_size=settings.batch_size, workers=settings.workers, progress=settings.progress,
    )  # fmt: skip
    width = max(ranks.gather(store.width))
    if not width:
        raise UserError(f"readouts: none of the {len(rows)} scans of {manifest.url} can be read; yaware shards verify")
    features = store.read()
    if len(features) < len(source.names):  # the last scans, or all, cannot be read
        padded = np.full((len(source.names), width), np.nan, np.float32)
        padded[: len(features)] = features.reshape(len(features), width)
        features = padded
    blocks = [np.isfinite(features[start : start + BLOCK]).all(1) for start in range(0, len(features), BLOCK)]
    own_readable = np.concatenate(blocks) if blocks else np.empty(0, bool)
    return OwnFeatures(features, ranks.join(own_readable, len(rows)), ranks)


def fit_group(
    own: OwnFeatures, group: TargetGroup, largest: int = LARGEST, beat: Callable[[], None] = lambda: None
) -> NestedRidge | str:
    """Fit the targets of a group to the scans of all ranks; return the fits, or why there are none. Collective.

    With F <= n the ranks add their sums of products (``Moments``), F x F for each fold. With fewer scans than features they
    exchange the features, and the dual problem is solved in n x n (``Samples``). Every rank solves, so that none waits for
    another, and the solution of rank 0 counts.
    """
    usable = group.has_value & own.readable
    fitted, measured = usable & group.fitted, usable & (group.folds >= 0)
    count, width = int(fitted.sum()), own.features.shape[1]
    if count < FOLDS or len(np.unique(group.folds[measured])) < FOLDS:
        return "too few scans can be read"
    if min(count, width) > largest:
        return f"{count} scans and {width} features, both more than {largest}; choose a coarser pooling or fewer scans"
    if group.calibration is None:
        solved = nested_ridge(_data(own, group.values, fitted, group.folds, FOLDS), beat=beat)
    else:
        data = _data(own, group.values, fitted, np.zeros_like(group.folds), 1)
        solved = calibrated_ridge(data, lambda fits: _squared_errors(own, group, fits), beat)
    first: NestedRidge = own.ranks.gather(solved if own.ranks.rank == 0 else None)[0]
    return first


def _data(
    own: OwnFeatures, values: Floats, fitted: NDArray[np.bool_], folds: NDArray[np.int64], count: int
) -> Moments | Samples:
    """Return the scans ``fitted`` (n,) of all ranks, in ``count`` folds, as sums or as they are. Collective."""
    if own.features.shape[1] > int(fitted.sum()):
        return Samples(own.ranks.join(own.features, len(fitted))[fitted], values[fitted], folds[fitted])
    positions = np.flatnonzero(fitted[own.scans])
    shift = own.ranks.gather(_mean(own.features[positions[:BLOCK]]))
    sums = Moments.empty(next(mean for mean in shift if mean is not None), values[fitted].mean(0), count)
    for start in range(0, len(positions), BLOCK):
        block = positions[start : start + BLOCK]
        sums.add(own.features[block], values[own.scans[block]], folds[own.scans[block]])
    sums.reduce(own.ranks.add)
    return sums


def _mean(features: NDArray[np.float32]) -> Floats | None:
    return np.asarray(features, np.float64).mean(0) if len(features) else None


def _measured(own: OwnFeatures, group: TargetGroup) -> Iterator[tuple[int, NDArray[np.int64], Floats]]:
    """Yield this rank's scans whose errors are measured, block by block: fold, positions (b,) and features (b, F)."""
    folds = np.where(group.has_value & own.readable, group.folds, -1)[own.scans]
    for fold in range(FOLDS):
        positions = np.flatnonzero(folds == fold)
        for start in range(0, len(positions), BLOCK):
            block = positions[start : start + BLOCK]
            yield fold, block, np.asarray(own.features[block], np.float64)


def _squared_errors(own: OwnFeatures, group: TargetGroup, fits: Fits) -> Floats:
    """Return the summed squared errors (K, G, P) of all ranks' scans in each fold under every entry. Collective."""
    entries, features, targets = fits.coefficients.shape
    flat = fits.coefficients.transpose(1, 0, 2).reshape(features, entries * targets)
    values, errors = group.values, np.zeros((FOLDS, entries, targets))
    for fold, block, x in _measured(own, group):
        predicted = (x @ flat).reshape(len(block), entries, targets) + fits.intercepts
        errors[fold] += np.square(predicted - values[own.scans[block], None]).sum(0)
    own.ranks.add(errors)
    return errors


def _held_out(own: OwnFeatures, group: TargetGroup, fits: NestedRidge) -> Floats:
    """Return the predictions (n, P) of all ranks' scans, each by the fit of its person's fold; NaN for others. Collective."""
    predicted = np.full((len(own.scans), len(group.targets)), np.nan)
    for fold, block, x in _measured(own, group):
        predicted[block] = x @ fits.fold_coefficients[fold] + fits.fold_intercepts[fold]
    return own.ranks.join(predicted, len(group.has_value))


def _readout(
    number: int, group: TargetGroup, fits: NestedRidge, predicted: Floats, *, manifest: Manifest, targets: Targets,
    calibration: Calibration, readable: NDArray[np.bool_],
) -> Readout:  # fmt: skip
    """Return the readout of one target of a group, with the errors and residuals of the people who are not fitted to.

    Residuals are sorted within folds: their order does not tell whose they are.
    """
    target, subjects = group.targets[number], manifest.subjects()[targets.rows]
    fitted, used = group.fitted & readable, group.has_value & readable & (group.folds >= 0)
    true, folds, people = target.values[used], group.folds[used], subjects[used]
    error = predicted[used] - true
    scans_of = np.unique(people, return_inverse=True, return_counts=True)
    weights = 1.0 / scans_of[2][scans_of[1].reshape(-1)]
    order = np.lexsort((weights, np.abs(error), folds))
    scale, penalty = GRID[int(fits.entries[number])]
    scans = manifest.scans.iloc[targets.rows[used]]
    columns = {name: scans[name] for name in ("age", "site") if name in scans}
    calibrated = group.calibration is not None
    summary = {
        "scale": scale, "penalty": penalty, "people": len(np.unique(subjects[fitted])), "scans": int(fitted.sum()),
        "missing": int(np.isnan(target.values[: targets.fit]).sum()), "unreadable": int((group.fitted & ~readable).sum()),
        **summarise(true, predicted[used], is_number=not target.classes),
        "calibrated_on": {
            "split": calibration.split if calibrated else None, "people": len(scans_of[0]), "scans": int(used.sum()),
            "excluded": calibration.excluded if calibrated else 0,
            "seen": calibration.seen and not calibrated, "reason": target.reason,
        },
    }  # fmt: skip
    return Readout(
        target.name, target.classes, float(fits.intercepts[number]), fits.coefficients[:, number].copy(),
        fits.fold_coefficients[:, :, number].copy(), fits.fold_intercepts[:, number].copy(),
        residuals=np.abs(error)[order], residual_folds=folds[order], residual_weights=weights[order], summary=summary,
        errors=error_rows(error, people, columns),
    )  # fmt: skip
