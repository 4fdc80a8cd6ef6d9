"""An encoder in a folder of its own: safetensors, no pickle, nothing else needed to use it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from infra.errors import UserError
from infra.files import sha256_of, write_json
from pretrain.encoders import TRAINING_ONLY, build_encoder
from pretrain.weights import seen_scans

FILES = ("model.safetensors", "config.json", "preprocessing.json")


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
        from pretrain.weights.embed import embed_files

        return np.stack([features for _, features in embed_files(self, [Path(scan) for scan in scans], tiv)])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Encoder:
        """Load an export folder, a checkpoint or a run folder; every file is checked against its checksum.

        Returned in evaluation mode. Raises UserError where a file is missing or differs from what was written.
        """
        path = find_encoder(folder)
        checksums = _read_json(path / "checksums.json")
        for name in [*FILES, *(other for other in checksums if other not in FILES)]:
            if not (path / name).is_file() or sha256_of(path / name) != checksums.get(name):
                raise UserError(f"{path / name} is missing or differs from checksums.json; export the encoder again")
        config = _read_json(path / "config.json")
        options = {k: v for k, v in config["encoder"]["options"].items() if k not in TRAINING_ONLY}
        network = build_encoder(config["encoder"]["name"], options)
        try:
            network.load_state_dict(load_file(path / "model.safetensors"))
        except (SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{path}: weights do not fit {config['encoder']['name']}: {' '.join(str(error).split())[:200]}"
            ) from None
        if (path / "mlflow.json").is_file():
            config["model_id"] = _read_json(path / "mlflow.json").get("model_id")
        return cls(network, config, _read_json(path / "preprocessing.json")).eval()


def write_encoder(
    folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any], preprocessing: dict[str, Any],
    seen: Sequence[seen_scans.Source] = (),
) -> str:  # fmt: skip
    """Write an export folder (which must not be there yet) and return the SHA-256 of its weights.

    ``seen``: the scans that the weights were fitted to, by which an evaluation on them is refused.
    """
    folder.mkdir(parents=True)
    try:
        save_file(state, folder / "model.safetensors")
    except SafetensorError as error:  # of a full disk
        raise OSError(f"{folder / 'model.safetensors'}: {error}") from error
    write_json(folder / "config.json", config)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # which safetensors makes private
    write_json(folder / "preprocessing.json", preprocessing)
    (folder / "README.md").write_text(_card(config, preprocessing), encoding="utf-8")
    if seen:
        write_json(folder / seen_scans.NAME, seen_scans.to_json(seen))
    checksums = {name: sha256_of(folder / name) for name in [*FILES, *[seen_scans.NAME] * bool(seen)]}
    write_json(folder / "checksums.json", checksums)
    return checksums["model.safetensors"]


def export_encoder(source: str | Path, out: Path) -> Path:
    """Copy a checkpoint's encoder to ``out``, whole or not at all."""
    if out.exists():
        raise UserError(f"{out} is there already; choose a folder that does not exist")
    Encoder.from_pretrained(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        shutil.copytree(find_encoder(source), Path(temporary) / "encoder")
        (Path(temporary) / "encoder").rename(out)
    return out


def find_encoder(path: str | Path) -> Path:
    """The export folder meant by ``path``: itself, a step folder's, or that of a run folder's latest checkpoint.

    A run's ``checkpoints/best`` and ``checkpoints/latest``, files that name a step, mean the encoder of that step.
    """
    given = Path(path)
    candidates = [given, given / "encoder"]
    named = [given] if given.name in ("best", "latest") else []
    for pointer in (*named, given / "checkpoints" / "latest", given / "latest"):
        if pointer.is_file():
            candidates.append(pointer.parent / pointer.read_text().strip() / "encoder")
    for candidate in candidates:
        if (candidate / "model.safetensors").is_file():
            return candidate
    raise UserError(
        f"no encoder in {given}; give a run folder, one of its checkpoints/step-*, its checkpoints/best, or an exported "
        "encoder"
    )


def all_steps(run: str | Path) -> list[Path]:
    """Every finished checkpoint of a run folder, by step; UserError where there is none."""
    found = sorted(path for path in (Path(run) / "checkpoints").glob("step-*") if (path / "encoder").is_dir())
    if not found:
        raise UserError(f"{run} has no checkpoints/step-*; give a run folder, or leave --all-steps out")
    return found


def seen_before(*places: str | Path) -> list[seen_scans.Source]:
    """What the encoder at the first of some places (runs, checkpoints) has seen; empty where there is none."""
    for place in places:
        try:
            return seen_scans.read(find_encoder(place)) or []
        except UserError:
            continue
    return []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; export the encoder again") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); export the encoder again") from None
    return content


def _card(config: dict[str, Any], preprocessing: dict[str, Any]) -> str:
    grid = preprocessing.get("grid", {})
    simulated = "\nPretrained on **simulated** scans: of no use on real ones.\n" if config.get("simulated") else ""
    # Millilitres of the scan's own; 1450 is about the mean of adults.
    tiv, option = (", tiv=[1450.0]", " --tiv 1450") if preprocessing.get("scaling") == "tiv" else ("", "")
    return f"""# {config["run_name"]}: {config["encoder"]["name"]}, step {config["step"]}
{simulated}
- method: {config["method"]}
- features: {config["feature_size"]}, encoder options {config["encoder"]["options"] or "as by default"}
- input: (B, 1, {", ".join(map(str, grid.get("shape", [])))}) float32 at {grid.get("spacing")} mm, RAS,
  z-scored per scan, modality {preprocessing.get("modality")}, scaling {preprocessing.get("scaling")},
  crop {preprocessing.get("crop", "world")}, intensity {preprocessing.get("intensity", "none")}
- data: manifest {config["manifest_digest"]}, split {config["split"]}
- made by yaware {config["version"]}, MLflow run {config["run_id"]}

    from pretrain import Encoder
    encoder = Encoder.from_pretrained("path/to/this/folder")
    features = encoder.embed(["scan.nii.gz"]{tiv})        # (1, {config["feature_size"]}) float32

`yaware embed path/to/this/folder scan.nii.gz{option}` does the same; `encoder(volumes)` takes prepared volumes.
"""
