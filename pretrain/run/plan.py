"""The plan of a run: a recipe checked against its shards and the number of ranks, with everything that the checks built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.loading.augment import Augmentation, load_augmentation
from data_pipeline.loading.balance import build_order
from data_pipeline.loading.order import Order
from data_pipeline.loading.view_details import PATCHES, ViewDetails, masked_patches
from data_pipeline.storage.manifest import Manifest, check_shards
from data_pipeline.storage.remote import Access
from infra import distributed
from infra.errors import UserError, nearest
from infra.files import check_output
from infra.tracking.tracker import store_uri
from pretrain.config import ReadoutSection, Recipe, check_world_size
from pretrain.encoders import ENCODERS, TRAINING_ONLY, build_encoder, check_encoder
from pretrain.encoders.pooling import SPATIAL
from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.model import check_layer
from pretrain.readouts.calibration import CalibrationChoice, check_named_split
from pretrain.readouts.targets import check_columns
from pretrain.run import folder
from pretrain.run.objective import Objective, build_objective
from pretrain.run.online_probes import Watched, check_held_out, watched_scans
from pretrain.weights.layers import POOLINGS, intermediate_features, main_blocks


@dataclass
class Plan:
    """What a run needs, built and checked once.

    Attributes:
        recipe: the recipe.
        manifest: the manifest of its shards.
        rows: the training scans, as row numbers of the manifest.
        order: the order in which they are shown.
        total_steps: optimiser steps of the run.
        objective: the loss with its kernel.
        augmentation: the settings of the augmentation.
        watched: scans and tasks of the online monitor; None if it is off.
        deepspeed: DeepSpeed's configuration.
    """

    recipe: Recipe
    manifest: Manifest
    rows: NDArray[np.int64]
    order: Order
    total_steps: int
    objective: Objective
    augmentation: Augmentation
    watched: Watched | None
    deepspeed: dict[str, Any]

    @classmethod
    def build(
        cls, recipe: Recipe, manifest: Manifest, rows: NDArray[np.int64], order: Order, world_size: int = 1
    ) -> Plan:
        """Check the recipe against its scans and the number of ranks. Raises UserError for what cannot work."""
        check_held_out(recipe.monitor, manifest, rows)
        objective, augmentation = build_objective(recipe, manifest, rows), load_augmentation(recipe.augmentation)
        check_something_hidden(recipe, augmentation)
        check_encoder(recipe.encoder.name, recipe.encoder.options, grid=manifest.grid["shape"], training=True)
        _check_poolings(recipe, manifest.grid["shape"])
        _check_maps(recipe, manifest.grid["shape"])
        _check_readouts(recipe, manifest, rows)
        steps_per_epoch = order.length / recipe.batch.global_
        return cls(
            recipe=recipe, manifest=manifest, rows=rows, order=order, total_steps=total_steps(recipe, order.length),
            objective=objective, augmentation=augmentation,
            deepspeed=deepspeed_config(recipe, world_size),
            watched=watched_scans(recipe.monitor, manifest, steps_per_epoch, recipe.run.seed),
        )  # fmt: skip

    @property
    def loader_augmentation(self) -> Augmentation:
        """The augmentation of the training loader: without cutout if there is a reconstruction, whose model hides the box."""
        return self.augmentation if self.recipe.loss.reconstruction is None else self.augmentation.without("cutout")

    @property
    def view_details(self) -> ViewDetails | None:
        """What the loader adds to a batch for the further terms of the loss; None if there are none."""
        if not self.objective.weights:
            return None
        d, h, w = (int(side) for side in self.manifest.grid["shape"])
        masked = 0.0 if self.recipe.loss.reconstruction is None else self.recipe.loss.reconstruction.masked
        return ViewDetails(self.augmentation, (d, h, w), self.recipe.run.seed, masked)

    @property
    def calibration(self) -> CalibrationChoice:
        """The people on whom the readouts of the last checkpoint are calibrated."""
        return calibration_of(self.recipe)

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps per epoch; a fraction if the batch does not divide the scans."""
        return self.order.length / self.recipe.batch.global_


def check_something_hidden(recipe: Recipe, augmentation: Augmentation) -> None:
    """Raise UserError if there is a reconstruction, but nothing is ever hidden."""
    section = recipe.loss.reconstruction
    if section is not None and masked_patches(section.masked) == 0 and "cutout" not in augmentation.operators:
        raise UserError(
            f"loss.reconstruction.masked={section.masked:g} masks none of the {PATCHES**3} patches of a view and "
            f"augmentation has no cutout, so that nothing is hidden; give at least {1 / PATCHES**3:.3f}, or leave "
            "loss.reconstruction out"
        )


def _check_poolings(recipe: Recipe, sides: Sequence[int]) -> None:
    """Raise UserError if a pooling that keeps places does not fit the last map of scans of some sides in voxels."""
    options, watched = recipe.encoder.options, recipe.monitor.pooling if recipe.monitor.every_epochs else "mean"
    if watched not in POOLINGS:
        raise UserError(
            f"monitor.pooling={watched!r} is not known{nearest(watched, POOLINGS)}; allowed: {', '.join(POOLINGS)}"
        )
    defaults: dict[str, Any] = ENCODERS[recipe.encoder.name].__kwdefaults__ or {}
    grid = options.get("grid", defaults.get("grid")) or sides
    if options.get("pooling") == "none" and list(grid) != list(sides):
        raise UserError(
            f"encoder.options.grid={list(grid)} is not the grid of the scans, {list(sides)}, which pooling none "
            "needs; set it to theirs"
        )
    if {options.get("pooling"), watched} & set(SPATIAL):
        plain = {name: value for name, value in options.items() if name not in TRAINING_ONLY}
        encoder = build_encoder(recipe.encoder.name, plain)
        for pooling in (options.get("pooling"), watched):
            if pooling in SPATIAL:
                encoder.use_pooling(pooling, sides)  # type: ignore[operator]


def _check_maps(recipe: Recipe, sides: Sequence[int]) -> None:
    """Raise UserError if a further term of the loss has no map, or one of fewer than two positions along a side.

    ``sides`` are those of the scans in voxels.
    """
    terms = {"reconstruction": recipe.loss.reconstruction, "dense": recipe.loss.dense}
    layers = {f"loss.{term}": section.layer for term, section in terms.items() if section is not None}
    if not layers:
        return
    name = recipe.encoder.name
    options = {key: value for key, value in recipe.encoder.options.items() if key not in TRAINING_ONLY}
    encoder: Any = build_encoder(name, options)
    for term, layer in layers.items():
        check_layer(name, encoder, term, layer)
        positions = encoder.map_of(sides, layer)[1:]
        if min(positions) > 1:
            continue
        larger = [block for block in main_blocks(encoder) if min(encoder.map_of(sides, block)[1:]) > 1]
        fix = f"set {term}.layer to an earlier block, as {larger[-1]}" if larger else "use scans of a finer spacing"
        place = "last map" if layer is None else f"map of {layer}"
        raise UserError(
            f"{term}: the {place} of {name} has {'x'.join(map(str, positions))} positions for scans of "
            f"{'x'.join(map(str, sides))} voxels, and at least 2 along each side are needed; {fix}, or leave {term} out"
        )


def calibration_of(recipe: Recipe) -> CalibrationChoice:
    """Return the people on whom a recipe's readouts are calibrated."""
    return CalibrationChoice(recipe.readouts.calibration, recipe.monitor.split, recipe.data.query)


def _check_readouts(recipe: Recipe, manifest: Manifest, rows: NDArray[np.int64]) -> None:
    """Raise UserError if a column or split of ``readouts`` cannot be used, or its block or pooling is not the encoder's.

    ``rows``: the training scans.
    """
    settings = recipe.readouts
    if settings.fit is False:
        return
    check_columns(manifest, settings.columns, "readouts.columns")
    check_named_split(manifest, rows, calibration_of(recipe), "readouts.calibration")
    if settings.layer is not None or settings.pooling != ReadoutSection().pooling:
        encoder = build_encoder(recipe.encoder.name, recipe.encoder.options)
        intermediate_features(encoder, settings.layer, settings.pooling)
        if settings.layer is None:
            for pooling in sorted(set(settings.pooling) & set(SPATIAL)):
                encoder.use_pooling(pooling, manifest.grid["shape"])  # type: ignore[operator]


def make_plan(recipe: Recipe, world_size: int) -> Plan:
    """Check a recipe against its shards, its run folder and the number of ranks. Writes nothing.

    Raises UserError for whatever cannot work.
    """
    check_world_size(recipe.batch.global_, world_size)
    folder.check_same_recipe(recipe)
    data, output = recipe.data, Path(recipe.run.output)
    for name in ("cache", "cache_unpacked"):
        if getattr(data, name) is None and getattr(data, f"{name}_gb") is not None:
            raise UserError(f"data.{name}_gb limits data.{name}, which is not given; give it, or leave the limit out")
    access = Access(
        data.cache, data.cache_gb, data.retries, data.timeout, unpacked=data.cache_unpacked,
        unpacked_gb=data.cache_unpacked_gb,
    )  # fmt: skip
    manifest = Manifest.load(data.shards, access)
    folder.check_same_manifest(output, manifest)
    rows = manifest.rows(split=data.split, query=data.query)
    if distributed.is_main():
        store_uri(recipe.run.tracking_uri)
    if distributed.local_rank() == 0:  # all ranks of a host see the same files
        check_shards(manifest, rows)
        folder.check_writable(output)
        if data.cache_unpacked is not None:
            check_output(Path(data.cache_unpacked) / "scans", "data.cache_unpacked")
    order = build_order(
        manifest, rows, seed=recipe.run.seed, batch=recipe.batch.global_, by=data.balance.by, bins=data.balance.bins,
        one_session_per_subject=data.balance.one_session_per_subject,
    )  # fmt: skip
    check_epoch(
        recipe, order.length, f"data.split={data.split} has {order.length} scans an epoch,", "choose other splits"
    )
    return Plan.build(recipe, manifest, rows, order, world_size)


def check_epoch(recipe: Recipe, scans: int, told: str, fix: str) -> None:
    """Raise UserError, which begins with ``told`` and ends with ``fix``, if an epoch has fewer scans than a batch."""
    if scans < recipe.batch.global_:
        raise UserError(f"{told} fewer than batch.global={recipe.batch.global_}; lower batch.global or {fix}")


def total_steps(recipe: Recipe, scans: int) -> int:
    """Return the steps of the run: ``train.steps``, or those of ``train.epochs`` epochs of ``scans`` scans.

    Raises UserError if both are null.
    """
    if recipe.train.steps is not None:
        return recipe.train.steps
    if recipe.train.epochs is None:
        raise UserError("train.epochs and train.steps are both null; set one of them")
    return math.ceil(recipe.train.epochs * scans / recipe.batch.global_)
