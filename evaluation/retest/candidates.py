"""What the reliability of scans is measured on: features and readouts of checkpoints, tables, encoders of others, voxels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from evaluation.external.given import GivenFeatures
from evaluation.external.rows import few
from evaluation.external.sheet import PREDICTED
from evaluation.protocols.candidates import given_candidates, load_checkpoint
from evaluation.protocols.context import Candidate, EvaluationContext
from evaluation.protocols.features import cache_name, features_of
from evaluation.protocols.inputs import frozen_features
from evaluation.retest.measure import Measured
from evaluation.tasks.leakage import check_readouts
from infra import random_streams
from infra.errors import UserError
from infra.progress import Progress
from pretrain.weights.layers import OWN

LIMITS = ("_low", "_high")  # ends of columns with the limits of a prediction
VOXELS, SEEN_FOR_MASK, FAINT = 5_000, 20, 0.2  # drawn; scans whose mean makes the mask; part of the 99th percentile


@dataclass(frozen=True)
class Sources:
    """What was named on the command line or in the call: paths of checkpoints, given features, and whether voxels.

    ``checked`` are the tags of ``leakage.check_seen`` for the given features; None if nobody said whom they were trained on.
    """

    checkpoints: Sequence[Path]
    given: Sequence[GivenFeatures]
    voxels: bool
    checked: Mapping[str, str] | None = None


def candidates_of(sources: Sources, context: EvaluationContext) -> list[Candidate]:
    """Load and check the candidates; all are checked before anything is computed. Raises UserError."""
    loaded = [load_checkpoint(path, context) for path in sources.checkpoints]
    for candidate in loaded:
        assert candidate.encoder is not None
        if candidate.encoder.readouts is not None and candidate.encoder.readouts.readouts:
            check_readouts(candidate.encoder.readouts, context.manifest, context.rows, candidate.name)
    for given in sources.given:
        _check_given(given, context.manifest, context.rows)
    others = given_candidates(sources.given, loaded, join=False, checked=sources.checked)
    candidates = [*loaded, *others, *([Candidate("voxels", "voxels")] if sources.voxels else [])]
    named = [(candidate.name, candidate.step) for candidate in candidates]
    for name, step in named:
        if named.count((name, step)) > 1:
            raise UserError(
                f"two candidates are {name!r} of step {step}, and the tables would mix them; measure each in a call of its own"
            )
    return candidates


def unchecked(candidates: Sequence[Candidate]) -> list[str]:
    """Return a line about the candidates of which nobody knows whether they were trained on the measured people."""
    names = [candidate.name for candidate in candidates if candidate.tags.get("leakage.checked") == "nothing"]
    if not names:
        return []
    return [
        f"not known whether trained on these people: {', '.join(names)}; features repeat better in people of the training "
        "(--seen checks tables and encoders of others)"
    ]


def block_of(candidate: Candidate, context: EvaluationContext) -> tuple[str, str]:
    """Return the block inside the encoder and its pooling; empty for own features and for those without an encoder."""
    block, pooling = context.settings.block, context.settings.pooling
    if candidate.encoder is None or (block is None and pooling == OWN):
        return "", ""
    return block or "end", ",".join(pooling)


def measured_of(candidate: Candidate, context: EvaluationContext, seed: int) -> Measured:
    """Return features and predictions of the scans ``context.rows`` in their order."""
    if candidate.given is not None:
        return _of_table(candidate.given, context.rows)
    if candidate.encoder is None:
        values = sampled_voxels(context.manifest, context.rows, seed)
        return Measured(values, [f"voxel {number}" for number in range(values.shape[1])], {})
    features = frozen_features(context, candidate)
    return Measured(features, [f"feature {n}" for n in range(features.shape[1])], _readouts(candidate, context))


def _readouts(candidate: Candidate, context: EvaluationContext) -> dict[str, NDArray[np.float64]]:
    """Return name -> (N,) predictions of the encoder's readouts; none if it has none."""
    assert candidate.encoder is not None
    readouts = candidate.encoder.readouts
    if readouts is None or not readouts.readouts:
        return {}
    layer, pooling = readouts.layer, readouts.pooling
    cache = context.cache / cache_name(candidate.weights, context.manifest.digest, layer, pooling)
    title = f"readouts of {candidate.name} step {candidate.step}"
    features = features_of(
        candidate.encoder, context.manifest, context.rows, cache, title, layer=layer, pooling=pooling
    )
    return dict(zip(readouts.readouts, readouts.predict(features).T, strict=True))


def _of_table(given: GivenFeatures, rows: NDArray[np.int64]) -> Measured:
    values = given.values[rows]
    predicted = [name.startswith(PREDICTED) for name in given.columns]
    features = [number for number, is_prediction in enumerate(predicted) if not is_prediction]
    predictions = {
        name.removeprefix(PREDICTED): values[:, number]
        for number, name in enumerate(given.columns)
        if predicted[number] and not name.endswith(LIMITS)
    }
    return Measured(values[:, features], [given.columns[number] for number in features], predictions)


def _check_given(given: GivenFeatures, manifest: Manifest, rows: NDArray[np.int64]) -> None:
    """Raise UserError if a scan has no features, or a cell holds no number."""
    lacking = np.setdiff1d(rows, given.rows)
    if len(lacking):
        names = few([str(key) for key in manifest.scans["key"].iloc[lacking]])
        raise UserError(
            f"{given.name}: {given.source} has no features of {len(lacking)} of the {len(rows)} scans of people who were "
            f"scanned more than once ({names}); add them, or leave these scans out with --query"
        )
    wrong = np.argwhere(~np.isfinite(given.values[rows]))
    if len(wrong):
        row, column = wrong[0]
        raise UserError(
            f"{given.cell(int(rows[row]), int(column))} is no finite number (one of {len(wrong)} such cells); correct it, "
            "or remove its column"
        )


def sampled_voxels(manifest: Manifest, rows: NDArray[np.int64], seed: int) -> NDArray[np.float32]:
    """Return VOXELS voxels (N, V) of the scans, drawn from those that are bright in the mean of the first scans.

    Voxels are used as stored in the shards.
    """
    mean = np.mean([scan.astype(np.float32) for scan in _scans(manifest, rows[:SEEN_FOR_MASK], "mask")], axis=0)
    bright = np.flatnonzero(mean > FAINT * np.quantile(mean, 0.99))
    generator = random_streams.generator(seed, random_streams.RETEST_PEOPLE, (0, 1, 0, 0))
    chosen = np.sort(generator.permutation(bright)[:VOXELS])
    return np.stack([scan[chosen].astype(np.float32) for scan in _scans(manifest, rows, "voxels")])


def _scans(manifest: Manifest, rows: NDArray[np.int64], title: str) -> Iterator[NDArray[np.float16]]:
    """Yield the voxels (V,) of each scan."""
    reader = manifest.reader()
    with Progress(len(rows), "scans", title) as progress:
        for row in rows:
            yield np.asarray(reader.read(int(row))).reshape(-1)
            progress.advance()
