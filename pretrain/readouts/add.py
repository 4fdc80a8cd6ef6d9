"""Add readouts to a checkpoint or an exported encoder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_pipeline.storage.manifest import Manifest, check_shards
from infra.errors import UserError
from infra.files import regular_file
from pretrain.hub.download import is_address
from pretrain.losses.proxies import proxy_columns
from pretrain.readouts.calibration import AUTO, MONITOR, CalibrationChoice, check_named_split
from pretrain.readouts.fit import ReadoutSettings, fit_readouts
from pretrain.readouts.targets import check_columns
from pretrain.weights.encoder import Encoder
from pretrain.weights.readouts import Readouts, readouts_folder, write_readouts

WORK = ".readouts-unfinished"  # folder of features beside the readouts, until they are written


def add_readouts(
    encoder: str | Path, shards: str | Path | Manifest, *, columns: Sequence[str] | None = None,
    split: Sequence[str] | None = None, query: str | None = None, calibration: str = AUTO, layer: str | None = None,
    pooling: str | Sequence[str] = ("mean",), seed: int = 0, batch_size: int | None = None, device: str | None = None,
    workers: int | None = None, replace: bool = False, progress: bool = True,
) -> Readouts:  # fmt: skip
    """Fit readouts of an encoder to scans of shards, store them beside it and return them. A killed call is continued.

    Args:
        encoder: a run folder (its latest checkpoint), a checkpoint or an exported encoder.
        shards: folder or URL of shards, or their manifest. The people in them cannot be tested on with these readouts.
        columns: columns of the scan table to predict: numbers, or texts with two values; None is the proxies of the run that
            the encoder is a checkpoint of, and ``age`` for other encoders.
        split: splits of the shards to fit to; None is those of the pretraining, with its ``data.query`` if these are its
            shards.
        query: only scans that fulfil this pandas query, for the fit and for the calibration.
        calibration: people who choose the penalty, and whose errors give the interval: a split, whose people must not be
            trained on; ``none`` is the people of the fit, out of fold; ``auto``: if the encoder was trained on people of the
            fit, the split of the monitor, if it has at least 50 other people, and otherwise as ``none``.
        layer: a block inside the network; None is its end.
        pooling: of that block.
        seed: of the folds of people.
        batch_size: scans per forward pass; None is 8, and on a CPU fewer if they are large.
        device: None is the GPU if there is one.
        workers: threads that read ahead; None is one per core, at most 8.
        replace: whether readouts that are there are replaced.
        progress: show progress on stderr.

    Raises:
        UserError: if there are readouts already, a column or split does not exist, no column can be predicted, the split of the
            calibration has fewer than 20 people who are not trained on, or the shards do not fit the encoder.
    """
    if is_address(encoder):
        raise UserError(
            f"{encoder} is in a cache, which holds no readouts of yours; export it first: yaware export {encoder} OUT"
        )
    loaded = Encoder.from_pretrained(encoder)
    assert loaded.folder is not None
    folder = readouts_folder(loaded.folder)
    if folder.is_dir() and not replace:
        raise UserError(f"{folder} exists already; replace=True (--replace) fits the readouts again")
    manifest = shards if isinstance(shards, Manifest) else Manifest.load(shards)
    recipe = _recipe_of(loaded.folder)
    chosen = (
        list(columns) if columns is not None else proxy_columns(OmegaConf.select(recipe, "loss.proxies") or {"age": {}})
    )
    check_columns(manifest, chosen, "columns")
    if split is None and query is None and loaded.config.get("manifest_digest") == manifest.digest:
        query = OmegaConf.select(recipe, "data.query")
    rows = manifest.rows(split=list(split) if split is not None else loaded.config["split"], query=query)
    if not len(rows):
        raise UserError(f"query={query!r} leaves no scan of {manifest.url}")
    choice = CalibrationChoice(calibration, OmegaConf.select(recipe, "monitor.split") or MONITOR, query)
    check_named_split(manifest, rows, choice, "calibration")
    check_shards(manifest, rows)
    settings = ReadoutSettings(
        columns=chosen, layer=layer, pooling=(pooling,) if isinstance(pooling, str) else tuple(pooling), calibration=choice,
        seed=seed, batch_size=batch_size, device=device, workers=workers, progress=progress,
    )  # fmt: skip
    work = folder.parent / WORK
    fitted = fit_readouts(loaded, manifest, rows, settings, work)
    if not fitted.readouts:
        raise UserError(f"{manifest.url}: {'; '.join(fitted.lines())}")
    write_readouts(folder, fitted)
    shutil.rmtree(work, ignore_errors=True)
    return fitted


def _recipe_of(encoder: Path) -> Any:
    """Return the recipe of the run that an encoder is a checkpoint of; empty for an exported encoder."""
    path = encoder.parent.parent.parent / "recipe.yaml"
    return OmegaConf.load(regular_file(path)) if path.exists() else OmegaConf.create({})
