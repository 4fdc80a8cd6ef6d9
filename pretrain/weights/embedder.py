"""A frozen encoder as a scikit-learn transformer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from data_pipeline.storage.manifest import Manifest
from pretrain.weights.encoder import Encoder
from pretrain.weights.layers import OWN, intermediate_features
from pretrain.weights.scan_source import EmbeddableScans


class Embedder(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """Turn scans into the features of a pretrained encoder, as a step of a scikit-learn ``Pipeline``.

    >>> model = make_pipeline(Embedder("runs/y-aware"), StandardScaler(), RidgeCV())
    >>> model.fit(["sub-01_T1w.nii.gz", "sub-02_T1w.nii.gz", ...], ages)

    Nothing is learned from the scans: ``fit`` only loads the encoder. ``X`` is a list of paths, a DataFrame with a column
    ``path`` (and ``tiv``), or, with ``manifest``, rows of its table ``scans`` or row numbers (n,).

    Args:
        encoder: an ``Encoder``, the path of an exported encoder, a checkpoint or a run folder, or ``hf://owner/name@revision``.
        manifest: the data set, or its folder or URL, that ``X`` are rows of.
        layer: a block inside the network; None is its end.
        pooling: of the block's voxels: ``mean``, ``max``, ``std``, ``grid2`` to ``grid8``, ``none``, or several. Without a
            layer ``mean`` means the encoder's own features.
        batch_size: scans per forward pass; None is 8, and on a CPU fewer if they are large.
        device: None is the GPU if there is one.
        workers: threads that read ahead; None is one per core, at most 8.
        orientation: of .npy files, for example ``LAS``; empty for that of the training scans.
        prepare: prepare raw scans as the training scans were, see ``Encoder.embed``.
        prepared: a folder in which prepared scans stay; None keeps none.

    Attributes:
        encoder_: the loaded ``Encoder``.
        n_features_out_: number of features.
    """

    def __init__(
        self,
        encoder: Encoder | str | Path,
        *,
        manifest: Manifest | str | Path | None = None,
        layer: str | None = None,
        pooling: str | Sequence[str] = "mean",
        batch_size: int | None = None,
        device: str | None = None,
        workers: int | None = None,
        orientation: str = "",
        prepare: bool = True,
        prepared: str | Path | None = None,
    ) -> None:
        self.encoder = encoder
        self.manifest = manifest
        self.layer = layer
        self.pooling = pooling
        self.batch_size = batch_size
        self.device = device
        self.workers = workers
        self.orientation = orientation
        self.prepare = prepare
        self.prepared = prepared

    def fit(self, X: EmbeddableScans, y: Any = None) -> Embedder:
        """Load the encoder; ``X`` and ``y`` are not used. Raises UserError if the encoder or the block does not exist."""
        self.encoder_ = self.encoder if isinstance(self.encoder, Encoder) else Encoder.from_pretrained(self.encoder)
        self.n_features_out_ = self.encoder_.feature_size
        pooling = [self.pooling] if isinstance(self.pooling, str) else self.pooling
        if self.layer is not None or tuple(pooling) != OWN:
            features = intermediate_features(self.encoder_.network, self.layer, pooling)
            shape, device = self.encoder_.preprocessing["grid"]["shape"], next(self.encoder_.parameters()).device
            with torch.no_grad():
                self.n_features_out_ = features(torch.zeros(1, 1, *shape, device=device)).shape[1]
        return self

    def transform(self, X: EmbeddableScans) -> NDArray[np.float32]:
        """Return features (n, F) float32 of scans. Raises UserError if a scan cannot be read."""
        check_is_fitted(self)
        table = self.encoder_.embed(
            X, manifest=self.manifest, layer=self.layer, pooling=self.pooling, batch_size=self.batch_size,
            device=self.device, workers=self.workers, orientation=self.orientation, progress=False,
            prepare=self.prepare, prepared=self.prepared,
        )  # fmt: skip
        features: NDArray[np.float32] = table.to_numpy()
        return features

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Return ``f0``, ``f1``, ...; ``input_features`` is not used. Raises NotFittedError before ``fit``."""
        check_is_fitted(self)
        return np.array([f"f{number}" for number in range(self.n_features_out_)], dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False  # paths, row numbers or a table of scans
        tags.input_tags.string = True
        tags.no_validation = True
        return tags
