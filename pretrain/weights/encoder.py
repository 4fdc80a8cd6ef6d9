"""A pretrained encoder: read from an exported folder, applied to volumes or to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from infra.errors import UserError
from infra.files import sha256_of
from pretrain.encoders import TRAINING_ONLY, build_encoder
from pretrain.weights.embedding import embed_files
from pretrain.weights.folder import FILES, find_encoder, read_json


class Encoder(nn.Module):
    """A pretrained encoder: (B, 1, D, H, W) float32, z-scored, on ``preprocessing``'s grid -> (B, feature_size)."""

    def __init__(self, network: nn.Module, config: dict[str, Any], preprocessing: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.preprocessing = preprocessing
        self.feature_size = int(config["feature_size"])

    def forward(self, volumes_B1DHW: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(volumes_B1DHW)
        return features

    def embed(self, scans: Sequence[str | Path], tiv: Sequence[float] | None = None) -> np.ndarray[Any, np.dtype[Any]]:
        """Features (n, feature_size) float32 of NIfTI files, brought to the encoder's grid as its training scans were.

        ``tiv``: total intracranial volumes in ml, one a scan, where the training scans were scaled by them.
        """
        rows = embed_files(self, self.preprocessing, [Path(scan) for scan in scans], tiv)
        return np.stack([features for _, features in rows])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Encoder:
        """Load an export folder, a checkpoint or a run folder; every file is checked against its checksum.

        Returned in evaluation mode. Raises UserError where a file is missing or differs from what was written.
        """
        path = find_encoder(folder)
        checksums = read_json(path / "checksums.json")
        for name in [*FILES, *(other for other in checksums if other not in FILES)]:
            if not (path / name).is_file() or sha256_of(path / name) != checksums.get(name):
                raise UserError(f"{path / name} is missing or differs from checksums.json; export the encoder again")
        config = read_json(path / "config.json")
        options = {k: v for k, v in config["encoder"]["options"].items() if k not in TRAINING_ONLY}
        network = build_encoder(config["encoder"]["name"], options)
        try:
            network.load_state_dict(load_file(path / "model.safetensors"))
        except (SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{path}: weights do not fit {config['encoder']['name']}: {' '.join(str(error).split())[:200]}"
            ) from None
        if (path / "mlflow.json").is_file():
            config["model_id"] = read_json(path / "mlflow.json").get("model_id")
        return cls(network, config, read_json(path / "preprocessing.json")).eval()
