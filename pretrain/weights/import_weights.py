"""Weights that others published, brought into an export folder: ``yaware import-weights FILE --arch ... --out FOLDER``."""

from __future__ import annotations

import re
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.grid import Grid
from infra.errors import UserError, nearest
from infra.files import sha256_of
from pretrain.encoders import build_encoder, check_encoder
from pretrain.weights.write import write_encoder

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """A published layout: the encoder that it belongs to, and the name that each of its keys has there."""

    encoder: str
    rename: Callable[[str], str]
    method: str


def densenet_key(key: str) -> str:
    """``module.features.denseblock1.denselayer1.norm1.weight`` -> ``trunk.denseblock1.denselayer1.layers.norm1.weight``.

    torchvision's names, without or with the dot of its oldest versions (``norm.1``); MONAI has a level ``layers`` more.
    """
    key = re.sub(r"^(module\.)?features\.", "trunk.", key)
    return re.sub(r"(\.denselayer\d+)\.(norm|conv)\.?([12])\.", r"\1.layers.\2\3.", key)


# The checkpoints of Dufumier et al. 2021 (BHB-10K): {epoch, model, optimizer}, trained on CAT12 grey-matter maps.
ARCHITECTURES: dict[str, Architecture] = {
    "densenet121-yaware": Architecture("densenet121", densenet_key, "y-aware"),
}


@dataclass
class Match:
    """How a published state fits an encoder's: ours by our names, and what is over on either side."""

    matched: State
    missing: list[str]  # the encoder's names that no key of the file gives
    unexpected: list[str]  # the file's names that the encoder has no place for

    def report(self) -> str:
        """Counts and every name, wrapped."""
        rows = {"matched": sorted(self.matched), "missing": self.missing, "unexpected": self.unexpected}
        lines = []
        for word, names in rows.items():
            lines.append(f"{word}: {len(names)}")
            shown = ", ".join(names)
            lines += textwrap.wrap(shown, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(lines)


def import_weights(
    file: Path, arch: str, out: Path, *, grid: Grid | None = None, modality: str = "vbm", scaling: str = "none",
    allow_missing: bool = False,
) -> tuple[Path, Match]:  # fmt: skip
    """Write the export folder ``out`` from a published checkpoint, whole or not at all.

    ``grid``, ``modality`` and ``scaling`` are those of the scans that the weights were trained on (default: CAT12's grey
    matter at 1.5 mm); the file does not say. UserError for a file that is not a plain dictionary of tensors, for no
    match at all, for another shape, and for a missing weight unless ``allow_missing`` (it then stays as initialised).
    """
    if arch not in ARCHITECTURES:
        raise UserError(
            f"--arch={arch} is not known{nearest(arch, ARCHITECTURES)}; allowed: {', '.join(ARCHITECTURES)}"
        )
    if out.exists():
        raise UserError(f"{out} is there already; choose a folder that does not exist")
    architecture, grid = ARCHITECTURES[arch], grid or Grid.vbm(1.5)
    check_encoder(architecture.encoder, {}, grid=grid.shape)
    state, epoch = read_published(file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_encoder(architecture.encoder, {})
    match = match_keys(state, encoder.state_dict(), architecture.rename, file)
    if match.missing and not allow_missing:
        shown = ", ".join(match.missing[:3]) + (f" and {len(match.missing) - 3} more" if len(match.missing) > 3 else "")
        raise UserError(
            f"{file} has no weights for {shown} of {architecture.encoder}; look for a whole file, or give --allow-missing "
            "to leave them as initialised"
        )
    encoder.load_state_dict({**encoder.state_dict(), **match.matched})
    config = {
        "encoder": {"name": architecture.encoder, "options": {}}, "feature_size": int(encoder.feature_size),  # type: ignore[arg-type]
        "step": 0, "epoch": epoch, "run_id": None, "run_name": file.stem, "method": architecture.method,
        "manifest_digest": None, "split": [], "version": version("yaware"), "simulated": False, "experiment": "imported",
        "source": {"file": file.name, "sha256": sha256_of(file), "arch": arch},
    }  # fmt: skip
    preprocessing = {
        "grid": grid.to_dict(), "normalisation": "zscore", "modality": modality, "scaling": scaling,
    }  # fmt: skip
    _write(out, encoder.state_dict(), config, preprocessing)
    return out, match


def scans_of(given: str | None) -> dict[str, Any]:
    """Keywords of ``import_weights`` from ``--grid``: a voxel's edge in mm of the VBM box, or shards to take after."""
    if given is None:
        return {}
    try:
        spacing = float(given)
    except ValueError:
        manifest = Manifest.load(given)
        settings = manifest.settings
        return {
            "grid": Grid.from_dict(manifest.grid), "modality": settings["modality"], "scaling": settings["scaling"],
        }  # fmt: skip
    if not 0.5 <= spacing <= 20:
        raise UserError(f"--grid={given} is not in 0.5..20 mm, and no folder of shards")
    return {"grid": Grid.vbm(spacing)}


def read_published(file: Path) -> tuple[State, int | None]:
    """Tensors and epoch of a torch file: ``{epoch, model, optimizer}``, or the bare state. No code in it is run."""
    if not file.is_file():
        raise UserError(f"{file} is not there; give the file of the published checkpoint")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is damaged or no checkpoint
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise UserError(
                f"{file} holds {found[1]}, which only code in the file could make, and that is never run; "
                "ask for a file of plain tensors (a state_dict)"
            ) from None
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{file} is no checkpoint that torch can read ({reason}); download it again") from None
    epoch = content.get("epoch") if isinstance(content, dict) else None
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(
            f"{file} holds no weights under 'model', and is no dictionary of tensors itself; "
            "expected {epoch, model, optimizer}"
        )
    return state, epoch if isinstance(epoch, int) else None


def match_keys(published: State, ours: State, rename: Callable[[str], str], file: Path) -> Match:
    """Pair the tensors by name; UserError where none fits, or one fits by name and not by shape.

    ``num_batches_tracked`` may be missing: files of before torch 0.4.1 have none, and no feature depends on it.
    """
    matched: State = {}
    unexpected = []
    for key, tensor in published.items():
        name = rename(key)
        if name not in ours:
            unexpected.append(key)
        elif tensor.shape != ours[name].shape:
            raise UserError(
                f"{file}: {key} has shape {list(tensor.shape)}, the encoder's {name} {list(ours[name].shape)}; "
                "the weights are of another architecture"
            )
        else:
            matched[name] = tensor.to(ours[name].dtype)
    if not matched:
        raise UserError(
            f"{file}: none of its {len(published)} keys fits (such as {next(iter(published))}); is --arch right?"
        )
    missing = [name for name in ours if name not in matched and not name.endswith("num_batches_tracked")]
    return Match(matched, missing, unexpected)


def _write(out: Path, state: State, config: dict[str, Any], preprocessing: dict[str, Any]) -> None:
    source = config["source"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "encoder"
        write_encoder(folder, {name: tensor.contiguous() for name, tensor in state.items()}, config, preprocessing)
        with (folder / "README.md").open("a", encoding="utf-8") as card:
            card.write(
                f"\nImported from `{source['file']}` (SHA-256 {source['sha256']}, layout {source['arch']}, epoch "
                f"{config['epoch']}). Step, manifest and MLflow run above are unknown; the grid is what was given at import.\n"
            )
        folder.rename(out)
