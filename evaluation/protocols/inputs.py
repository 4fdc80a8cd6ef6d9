"""What the models of a protocol are given: features of an encoder or of a block, joint features, readouts, voxels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.features.candidates import FeatureChoice, candidate_blocks, joined, joint_table, spatial_block
from evaluation.features.tables import SCALES, FeatureTable, reduced, table_of
from evaluation.features.voxels import voxel_coordinates
from evaluation.protocols.context import Candidate, EvaluationContext
from evaluation.protocols.features import cache_name, features_of, features_of_each
from evaluation.protocols.nested_cv import PreparedTask
from evaluation.protocols.variant import BY_DEFAULT
from pretrain.weights.layers import OWN, Block

Inputs = Callable[[EvaluationContext, Candidate], NDArray[Any]]


def frozen_features(context: EvaluationContext, candidate: Candidate) -> NDArray[Any]:
    """Return the features (N, F) of the candidate's encoder, or of the named block, from the cache if they are there.

    Of a candidate without an encoder: the features that were given.
    """
    if candidate.encoder is None and candidate.given is not None:
        return candidate.given.of(context.rows)
    assert candidate.encoder is not None
    layer, pooling = context.settings.block, context.settings.pooling
    cache = context.cache / cache_name(candidate.weights, context.manifest.digest, layer, pooling)
    title = f"features of {candidate.name} step {candidate.step}"
    return features_of(candidate.encoder, context.manifest, context.rows, cache, title, layer=layer, pooling=pooling)


def spatial_block_of(context: EvaluationContext, candidate: Candidate) -> Block | None:
    """Return the block and pooling of the candidate's spatial features; None if it has none."""
    assert candidate.encoder is not None
    return spatial_block(candidate.encoder.network, context.manifest.grid["shape"])


def joint_tables(context: EvaluationContext, candidate: Candidate) -> dict[str, FeatureTable]:
    """Return the table of each task, by name, with the encoder's own features and its spatial ones.

    An encoder without spatial features gives its own features alone, and so does every encoder for a multiclass task:
    regression on K classes takes minutes with that many features.
    """
    assert candidate.encoder is not None
    own: Block = (None, OWN)
    spatial = spatial_block_of(context, candidate)
    blocks = [own] if spatial is None else [own, spatial]
    caches = {block: context.cache / cache_name(candidate.weights, context.manifest.digest, *block) for block in blocks}
    title = f"features of {candidate.name} step {candidate.step}"
    features = features_of_each(candidate.encoder, context.manifest, context.rows, caches, title)
    columns, described = joined(features[own], None if spatial is None else features[spatial])
    tables = {}
    for task in context.tasks:
        places = context.positions_of(task)
        tables[task.name] = (
            table_of(task, features[own][places], "each") if task.kind == "multiclass"
            else joint_table(task, columns[places], described)
        )  # fmt: skip
    return tables


def candidate_features(context: EvaluationContext, candidate: Candidate) -> dict[Block, NDArray[np.float32]]:
    """Return the features (N, F) of every block and pooling that ``--layer auto`` chooses from, computed in one pass."""
    assert candidate.encoder is not None
    network, manifest = candidate.encoder.network, context.manifest
    caches = {
        block: context.cache / cache_name(candidate.weights, manifest.digest, *block)
        for block in candidate_blocks(network, manifest.grid["shape"])
    }
    title = f"features of {len(caches)} candidates of {candidate.name} step {candidate.step}"
    return features_of_each(candidate.encoder, manifest, context.rows, caches, title)


def candidate_tables(context: EvaluationContext, candidate: Candidate) -> dict[str, list[FeatureChoice]]:
    """Return the features that ``--layer auto`` chooses from, for each task by name; the tasks share the arrays."""
    choices: dict[str, list[FeatureChoice]] = {task.name: [] for task in context.tasks}
    for (layer, pooling), features in candidate_features(context, candidate).items():
        for scale in SCALES:
            columns, count = reduced(features, scale)
            params = {"layer": layer or "encoder", "pooling": "+".join(pooling), "scale": scale}
            for task in context.tasks:
                places = context.positions_of(task)
                choices[task.name].append(FeatureChoice(params, table_of(task, columns, scale, places, count)))
    return choices


def add_readouts(
    context: EvaluationContext, candidate: Candidate, prepared: dict[str, PreparedTask]
) -> dict[str, PreparedTask]:
    """Return the tasks with the proxies that the candidate's readouts predict for their scans.

    By default multiclass tasks get none: with columns that are hardly penalised, scikit-learn's regression on K classes takes
    several times as long.
    """
    assert candidate.encoder is not None
    readouts = candidate.encoder.need_readouts()
    layer, pooling = readouts.layer, readouts.pooling
    cache = context.cache / cache_name(candidate.weights, context.manifest.digest, layer, pooling)
    title = f"readouts of {candidate.name} step {candidate.step}"
    features = features_of(
        candidate.encoder, context.manifest, context.rows, cache, title, layer=layer, pooling=pooling
    )
    values = readouts.predict(features)
    added = dict(prepared)
    for task in context.tasks:
        if task.kind == "multiclass" and context.settings.readouts == BY_DEFAULT:
            continue
        entry, own = prepared[task.name], values[context.positions_of(task)]
        candidates = [choice._replace(table=replace(choice.table, readouts=own)) for choice in entry.candidates]
        added[task.name] = replace(entry, table=replace(entry.table, readouts=own), candidates=candidates)
    return added


def voxel_features(context: EvaluationContext, candidate: Candidate) -> NDArray[np.float64]:
    """Return coordinates (N, N) of the scans with the inner products of their voxels."""
    cache = context.cache / f"voxels-{context.manifest.digest[:16]}.npz"
    return voxel_coordinates(context.manifest, context.rows, cache)


def no_features(context: EvaluationContext, candidate: Candidate) -> NDArray[np.float32]:
    """Return an empty matrix (N, 0), for models that read the scans themselves."""
    return np.empty((len(context.rows), 0), dtype=np.float32)
