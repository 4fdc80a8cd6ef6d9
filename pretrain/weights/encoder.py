"""A pretrained encoder: read from an exported folder, applied to volumes or to scans."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from data_pipeline.storage.manifest import Manifest
from infra.errors import OPTIONAL_TEXT, OPTIONAL_WHOLE, UserError, check_arguments
from infra.files import regular_file, sha256_of
from pretrain.encoders import TRAINING_ONLY, build_encoder
from pretrain.hub.download import is_address
from pretrain.weights import seen_scans
from pretrain.weights.embedding import embed_table
from pretrain.weights.folder import FILES, find_encoder, read_json
from pretrain.weights.readouts import Readouts, read_readouts
from pretrain.weights.scan_source import EmbeddableScans, RawScans, ScanSource, scan_source, warning_lines
from pretrain.weights.schema import check_config, check_preprocessing_file
from pretrain.weights.weight_shapes import check_shapes, check_values

ON_ERROR = ("raise", "skip")
# Role of scans (seen_scans.ROLES) -> the words for their people in a warning.
KNOWN_BY = {
    "trained": "whom the encoder was trained on",
    "readouts": "to whom its readouts were fitted",
    "calibration": "on whom its readouts were calibrated",
}


class Encoder(nn.Module):
    """A pretrained encoder: (B, 1, D, H, W) float32, z-scored, on the grid of ``preprocessing`` -> (B, feature_size).

    Attributes:
        network: the network itself.
        config: content of config.json: encoder and options, feature size, step, run.
        preprocessing: content of preprocessing.json: all that happens to a scan between its file and the network.
        feature_size: number of features.
        folder: the exported folder that the encoder was read from; None if it was made in memory.
        readouts: predictions of the proxies from the features (``yaware readouts``); None if it has none.
    """

    def __init__(self, network: nn.Module, config: dict[str, Any], preprocessing: dict[str, Any]) -> None:
        super().__init__()
        self.folder: Path | None = None
        self.readouts: Readouts | None = None
        self.network = network
        self.config = config
        self.preprocessing = preprocessing
        self.feature_size = int(config["feature_size"])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Encoder:
        """Load an exported encoder, a checkpoint or a run folder (its latest checkpoint), in evaluation mode.

        ``folder`` may be ``hf://owner/name`` or ``hf://owner/name@revision``, an encoder of ``yaware export --hub-layout`` that
        was published at the Hugging Face hub. Its files are kept in the hub's local cache, from which it is loaded without a
        connection.

        Raises UserError if a file is missing or differs from its checksum, if a value in it is not possible, or if the weights
        do not fit. The files are checked before memory is taken for the network.
        """
        path = find_encoder(folder)
        _check_files(path, _repair(folder, path))
        config, preprocessing = read_json(path / "config.json"), read_json(path / "preprocessing.json")
        check_config(config, path / "config.json")
        check_preprocessing_file(preprocessing, path / "preprocessing.json")
        name = config["encoder"]["name"]
        options = {k: v for k, v in config["encoder"]["options"].items() if k not in TRAINING_ONLY}
        check_shapes(path / "model.safetensors", name, options)
        network = build_encoder(name, options)
        try:
            state = load_file(regular_file(path / "model.safetensors"))
            check_values(path / "model.safetensors", state)
            network.load_state_dict(state)
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{path}: weights do not fit {name}: {' '.join(str(error).split())[:200]}") from None
        if network.feature_size != config["feature_size"]:
            raise UserError(
                f"{path / 'config.json'}: feature_size={config['feature_size']}, {name} has {network.feature_size}"
            )
        if (path / "mlflow.json").exists():
            config["model_id"] = read_json(path / "mlflow.json").get("model_id")
        encoder = cls(network, config, preprocessing).eval()
        encoder.folder = path
        encoder.readouts = read_readouts(path, sha256_of(path / "model.safetensors"))
        return encoder

    def forward(self, volumes_B1DHW: torch.Tensor) -> torch.Tensor:
        """Return features (B, feature_size) of prepared volumes."""
        features: torch.Tensor = self.network(volumes_B1DHW)
        return features

    def need_readouts(self) -> Readouts:
        """Return the readouts. Raises UserError if the encoder has none."""
        if self.readouts is None or not self.readouts.readouts:
            reasons = [] if self.readouts is None else self.readouts.lines()
            raise UserError(
                f"{self.folder or 'the encoder'} has no readouts ({'; '.join(reasons) or 'none were fitted'}); fit them on the "
                "scans of its pretraining: yaware readouts CHECKPOINT --shards SHARDS"
            )
        return self.readouts

    def known_scans_line(self, source: ScanSource) -> str:
        """Return one line about scans whose people the encoder or its readouts know; empty if there are none.

        They are recognised by the digests beside the weights and in the readouts.

        Args:
            source: the scans, after they were read with ``identify``.
        """
        recorded = list((seen_scans.read(self.folder) if self.folder else None) or [])
        recorded += self.readouts.fitted_on if self.readouts else []
        counts = {
            told: source.seen([scans for scans in recorded if scans.role == role]) for role, told in KNOWN_BY.items()
        }
        count = int(np.any(list(counts.values()), axis=0).sum())
        if not count:
            return ""
        told = ", ".join(f"{told} ({int(known.sum())})" for told, known in counts.items() if known.any())
        return (
            f"{count} of {len(source.names)} scans are of people {told}; their predictions may be closer to the truth than "
            "those of new people: do not judge the readouts, and do not compare groups, by them"
        )

    def embed(
        self, scans: EmbeddableScans, *, manifest: Manifest | str | Path | None = None,
        tiv: Sequence[float] | None = None, batch_size: int | None = None,
        device: str | torch.device | None = None, workers: int | None = None,
        layer: str | None = None, pooling: str | Sequence[str] = "mean", orientation: str = "",
        on_error: Literal["raise", "skip"] = "raise", progress: bool = True, readouts: bool = False,
        prepare: bool = True, prepared: str | Path | None = None,
    ) -> pd.DataFrame:  # fmt: skip
        """Return the features of scans, each brought to the encoder's grid as its training scans were.

        Threads read and decode in the background while the network works on batches. A scan's features do not depend on
        ``batch_size`` or ``workers`` (up to rounding, 1e-6 of the largest feature); a training file's equal its shard's.

        Args:
            scans: paths of NIfTI files; a manifest (all its scans); a DataFrame with a column ``path`` (and ``tiv``); or,
                with ``manifest``, rows of its table ``scans`` or row numbers (n,).
            manifest: the data set, or its folder or URL, that ``scans`` are rows of.
            tiv: total intracranial volumes in ml, one per path, if the training scans were scaled by them.
            batch_size: scans per forward pass; None is 8, and on a CPU fewer if they are large.
            device: ``cpu``, ``cuda``, ...; None is the GPU if there is one. The encoder is moved back afterwards.
            workers: threads that read ahead; 0 reads in the calling thread; None is one per core, at most 8.
            layer: a block of the network (``pretrain.weights.layers.block_names``); None is the encoder's end.
            pooling: of the block's voxels: ``mean``, ``max``, ``std``, ``grid2`` to ``grid8`` (means over cells), ``none``,
                or several, concatenated. Without a layer ``mean`` means the encoder's own features.
            orientation: of .npy files, for example ``LAS``; empty for that of the training scans.
            on_error: what an unreadable scan does: ``raise``, or ``skip`` it with a warning.
            progress: show progress on stderr.
            readouts: add the readouts and the limits of their 95 % intervals as columns, such as ``predicted_age``,
                ``predicted_age_low`` and ``predicted_age_high``. Scans of people whom the encoder or the readouts know are
                counted in a warning.
            prepare: prepare raw scans as the training scans were, if ``cohort prepare`` made those; a scan whose JSON says
                that it is prepared, or that lies on the grid of prepared ones, is taken as it is. Takes 27 to 130 CPU
                seconds for each; prepare many scans by ``yaware cohort prepare`` first.
            prepared: a folder in which prepared scans stay, to be found again; None keeps none.

        Returns:
            A row per scan in the order given, columns ``f0``, ``f1``, ... (float32), then those of the readouts. The index is
            the path of a file (named ``path``) or the key of a scan of shards (``key``).

        Raises:
            UserError: if there are no scans, an argument is wrong, the encoder has no readouts that are asked for, shards or
                a prepared scan were prepared otherwise, or, with ``on_error="raise"``, a scan cannot be read.
        """
        check_arguments(OPTIONAL_WHOLE, batch_size=batch_size, workers=workers)
        check_arguments(OPTIONAL_TEXT, layer=layer)
        if on_error not in ON_ERROR:
            raise UserError(f"on_error={on_error!r} is not known; allowed: {', '.join(ON_ERROR)}")
        raw = RawScans(prepare, prepared)
        source = scan_source(scans, self.preprocessing, manifest, tiv, orientation, raw)
        if not source.names:
            raise UserError("there are no scans to embed")
        source.identify = readouts
        table, unreadable = embed_table(
            self.network, source, stop_at_unreadable=on_error == "raise", layer=layer, pooling=pooling, device=device,
            batch_size=batch_size, workers=workers, progress=progress, readouts=self.need_readouts() if readouts else None,
        )  # fmt: skip
        if unreadable:
            listed = "; ".join(f"{name}: {reason}" for name, reason in unreadable.items())
            warnings.warn(f"{len(unreadable)} scans cannot be read and are left out: {listed}", stacklevel=2)
        for line in warning_lines(source, self.preprocessing):
            warnings.warn(line, stacklevel=2)
        if readouts and (known := self.known_scans_line(source)):
            warnings.warn(known, stacklevel=2)
        return table


def _repair(given: str | Path, folder: Path) -> str:
    """Return what to do if a file of an encoder was changed: the last words of a message."""
    if not is_address(given):
        return "export the encoder again"
    return f"remove {folder.parent.parent} and load it again; if this line stays, the file was changed after its export"


def _check_files(folder: Path, fix: str) -> None:
    """Raise UserError, which ends with ``fix``, if a file of an exported encoder is missing or differs from checksums.json."""
    checksums = read_json(folder / "checksums.json")
    for name in [*FILES, *(other for other in checksums if other not in FILES)]:
        if not name or Path(name).name != name or not name.isprintable():
            raise UserError(
                f"{folder / 'checksums.json'} names {name!r:.80}, not a file beside it; export the encoder again"
            )
        if not (folder / name).exists() or sha256_of(folder / name) != checksums.get(name):
            raise UserError(f"{folder / name} is missing or differs from checksums.json; {fix}")


def embed(
    encoder: Encoder | str | Path, scans: EmbeddableScans, *, manifest: Manifest | str | Path | None = None,
    tiv: Sequence[float] | None = None, batch_size: int | None = None, device: str | torch.device | None = None,
    workers: int | None = None, layer: str | None = None, pooling: str | Sequence[str] = "mean", orientation: str = "",
    on_error: Literal["raise", "skip"] = "raise", progress: bool = True, readouts: bool = False,
    prepare: bool = True, prepared: str | Path | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Return the features of scans from an encoder, or from a folder that ``Encoder.from_pretrained`` takes.

    Args:
        encoder: an encoder, the folder of an export, of a checkpoint or of a run, or ``hf://owner/name@revision``.
        scans: paths of NIfTI files; a manifest (all its scans); a DataFrame with a column ``path`` (and ``tiv``); or,
            with ``manifest``, rows of its table ``scans`` or row numbers (n,).
        manifest: the data set, or its folder or URL, that ``scans`` are rows of.
        tiv: total intracranial volumes in ml, one per path, if the training scans were scaled by them.
        batch_size: scans per forward pass; None is 8, and on a CPU fewer if they are large.
        device: ``cpu``, ``cuda``, ...; None is the GPU if there is one.
        workers: threads that read ahead; 0 reads in the calling thread; None is one per core, at most 8.
        layer: a block of the network (``pretrain.weights.layers.block_names``); None is the encoder's end.
        pooling: of the block's voxels: ``mean``, ``max``, ``std``, ``grid2`` to ``grid8`` (means over cells), ``none``, or
            several, concatenated. Without a layer ``mean`` means the encoder's own features.
        orientation: of .npy files, for example ``LAS``; empty for that of the training scans.
        on_error: what an unreadable scan does: ``raise``, or ``skip`` it with a warning.
        progress: show progress on stderr.
        readouts: add the readouts and the limits of their 95 % intervals as columns, such as ``predicted_age``.
        prepare: prepare raw scans as the training scans were, if ``cohort prepare`` made those.
        prepared: a folder in which prepared scans stay, to be found again; None keeps none.

    Returns:
        A row per scan in the order given, columns ``f0``, ``f1``, ... (float32), as from ``Encoder.embed``.

    Raises:
        UserError: if the folder has no intact encoder, there are no scans, an argument is wrong, the shards were prepared
            otherwise, or, with ``on_error="raise"``, a scan cannot be read.
    """
    loaded = encoder if isinstance(encoder, Encoder) else Encoder.from_pretrained(encoder)
    return loaded.embed(
        scans, manifest=manifest, tiv=tiv, batch_size=batch_size, device=device, workers=workers, layer=layer,
        pooling=pooling, orientation=orientation, on_error=on_error, progress=progress, readouts=readouts,
        prepare=prepare, prepared=prepared,
    )  # fmt: skip
