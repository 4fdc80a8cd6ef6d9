"""Fit the readouts of an encoder: features of all scans once, sums over all ranks, out-of-fold errors, intervals.

n = scans, F = features, P = targets of a group, K = folds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from infra.files import sha256_of
from pretrain.readouts.errors import error_rows, summarise
from pretrain.readouts.features import FeatureStore, embed_scans
from pretrain.readouts.solve import BLOCK, FOLDS, GRID, Floats, Moments, NestedRidge, Samples, nested_ridge
from pretrain.readouts.targets import Target, TargetGroup, read_targets
from pretrain.weights.embedding import BATCH_SIZE
from pretrain.weights.encoder import Encoder
from pretrain.weights.readouts import Readout, Readouts
from pretrain.weights.scan_source import ShardSource
from pretrain.weights.seen_scans import source_of

# Most features, or scans if these are fewer: the sums over 8192 features take 2.7 GB.
LARGEST = 8192
ROLE = "readouts"  # of the scans in Readouts.fitted_on


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
        seed: of the folds of people.
        largest: most features, or scans if these are fewer.
        batch_size: scans per forward pass.
        workers: threads that read ahead; None is one per core, at most 8.
        device: to compute features on; None is the GPU if there is one.
        progress: whether to show progress on stderr, or the stream to show it on.
    """

    columns: Sequence[str]
    layer: str | None = None
    pooling: tuple[str, ...] = ("mean",)
    seed: int = 0
    largest: int = LARGEST
    batch_size: int = BATCH_SIZE
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
        rows: (n,) the scans, as rows of the manifest.
        settings: what is fitted.
        work: folder for the features; with it the next call continues after a kill. The caller removes it.
        ranks: the processes that share the scans; None is this one alone.
        beat: called after every batch and every fit, for a watchdog.

    Raises:
        UserError: if the shards were prepared otherwise than the encoder's, a block or pooling does not exist, or no scan can
            be read.
    """
    ranks = ranks or Ranks()
    assert encoder.folder is not None
    weights = sha256_of(encoder.folder / "model.safetensors")
    targets = read_targets(manifest, rows, settings.columns, settings.seed)
    left_out, readouts = dict(targets.left_out), dict[str, Readout]()
    if targets.groups:
        about = {"weights": weights, "manifest": manifest.digest}
        own = _embed_share(encoder, manifest, rows, settings, _store(work, about, rows, settings, ranks=ranks),
                           ranks=ranks, beat=beat)  # fmt: skip
        for group in targets.groups:
            result = fit_group(own, group, settings.largest, beat)
            if isinstance(result, str):
                left_out |= {target.name: result for target in group.targets}
                continue
            predicted = _out_of_fold(own, group, result)
            for number, target in enumerate(group.targets):
                readouts[target.name] = _readout(target, number, group, result, predicted, manifest=manifest, rows=rows,
                                              readable=own.readable)  # fmt: skip
    return Readouts(
        {column: readouts[column] for column in dict.fromkeys(settings.columns) if column in readouts}, weights, settings.layer,
        settings.pooling, left_out, [source_of(manifest, rows, ROLE)] if readouts else [],
    )  # fmt: skip


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
    count, width = int(usable.sum()), own.features.shape[1]
    if len(np.unique(group.folds[usable])) < FOLDS:
        return "too few scans can be read"
    if min(count, width) > largest:
        return f"{count} scans and {width} features, both more than {largest}; choose a coarser pooling or fewer scans"
    values = group.values
    mine = usable[own.scans]
    positions = np.flatnonzero(mine)
    if width <= count:
        shift = own.ranks.gather(_mean(own.features[positions[:BLOCK]]))
        data: Any = Moments.empty(next(mean for mean in shift if mean is not None), values[usable].mean(0))
        for start in range(0, len(positions), BLOCK):
            block = positions[start : start + BLOCK]
            data.add(own.features[block], values[own.scans[block]], group.folds[own.scans[block]])
        data.reduce(own.ranks.add)
    else:
        features = own.ranks.join(own.features, len(usable))[usable]
        data = Samples(features, values[usable], group.folds[usable])
    solved = nested_ridge(data, beat=beat)
    first: NestedRidge = own.ranks.gather(solved if own.ranks.rank == 0 else None)[0]
    return first


def _mean(features: NDArray[np.float32]) -> Floats | None:
    return np.asarray(features, np.float64).mean(0) if len(features) else None


def _out_of_fold(own: OwnFeatures, group: TargetGroup, fits: NestedRidge) -> Floats:
    """Return the predictions (n, P) of all ranks' scans, each without its person's fold; NaN for others. Collective."""
    predicted = np.full((len(own.scans), len(group.targets)), np.nan)
    folds = np.where(group.has_value & own.readable, group.folds, -1)[own.scans]
    for fold in range(FOLDS):
        positions = np.flatnonzero(folds == fold)
        for start in range(0, len(positions), BLOCK):
            block = positions[start : start + BLOCK]
            without_intercept = np.asarray(own.features[block], np.float64) @ fits.fold_coefficients[fold]
            predicted[block] = without_intercept + fits.fold_intercepts[fold]
    return own.ranks.join(predicted, len(group.has_value))


def _readout(
    target: Target, number: int, group: TargetGroup, fits: NestedRidge, predicted: Floats, *, manifest: Manifest,
    rows: NDArray[np.integer[Any]], readable: NDArray[np.bool_],
) -> Readout:  # fmt: skip
    """Return the readout of one target, with out-of-fold errors and residuals.

    Residuals are sorted within folds: their order does not tell whose they are.
    """
    used = group.has_value & readable
    true, folds, people = target.values[used], group.folds[used], manifest.subjects()[rows][used]
    error = predicted[used, number] - true
    scans_of = np.unique(people, return_inverse=True, return_counts=True)
    weights = 1.0 / scans_of[2][scans_of[1].reshape(-1)]
    order = np.lexsort((weights, np.abs(error), folds))
    scale, penalty = GRID[int(fits.entries[number])]
    scans = manifest.scans.iloc[rows[used]]
    columns = {name: scans[name] for name in ("age", "site") if name in scans}
    summary = {
        "scale": scale, "penalty": penalty, "people": len(scans_of[0]), "scans": int(used.sum()),
        "missing": int((~group.has_value).sum()), "unreadable": int((group.has_value & ~readable).sum()),
        **summarise(true, predicted[used, number], is_number=not target.classes),
    }  # fmt: skip
    return Readout(
        target.name, target.classes, float(fits.intercepts[number]), fits.coefficients[:, number].copy(),
        fits.fold_coefficients[:, :, number].copy(), fits.fold_intercepts[:, number].copy(),
        residuals=np.abs(error)[order], residual_folds=folds[order], residual_weights=weights[order], summary=summary,
        errors=error_rows(error, people, columns),
    )  # fmt: skip
