"""Published weights, brought into an export folder: ``yaware import-weights FILE --arch ... --out FOLDER``."""

from __future__ import annotations

import re
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
from infra.files import regular_file, sha256_of
from infra.processes.scratch import scratch_folder
from pretrain.encoders import build_encoder, check_encoder
from pretrain.weights.write import preprocessing_of, write_encoder

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """A published architecture: the encoder that takes its weights, and how to rename them.

    Attributes:
        encoder: key of ``pretrain.encoders.ENCODERS``.
        rename: the encoder's name for a key of the file.
        method: how the weights were trained.
        ignored: the beginnings, without ``module.``, of keys that an encoder has no weights for: the projector.
    """

    encoder: str
    rename: Callable[[str], str]
    method: str
    ignored: tuple[str, ...] = ()


def densenet_key(key: str) -> str:
    """Return the encoder's name for a key of torchvision's DenseNet.

    ``module.features.denseblock1.denselayer1.norm1.weight`` -> ``trunk.denseblock1.denselayer1.layers.norm1.weight``;
    torchvision's oldest versions write ``norm.1``.
    """
    key = re.sub(r"^(module\.)?features\.", "trunk.", key)
    return re.sub(r"(\.denselayer\d+)\.(norm|conv)\.?([12])\.", r"\1.layers.\2\3.", key)


# The checkpoints of Dufumier et al. 2021 (BHB-10K): {epoch, model, optimizer}, trained on CAT12 grey-matter maps.
ARCHITECTURES: dict[str, Architecture] = {
    "densenet121-yaware": Architecture(
        "densenet121", densenet_key, "y-aware", ("hidden_representation.", "head_projection.")
    ),
}


@dataclass
class WeightMatch:
    """How a published state fits an encoder."""

    matched: State  # by the encoder's names
    missing: list[str]  # the encoder's names that no key of the file has
    unexpected: list[str]  # keys of the file that the encoder does not use

    def report(self) -> str:
        """Return the counts and every name, wrapped."""
        rows = {"matched": sorted(self.matched), "missing": self.missing, "unexpected": self.unexpected}
        lines = []
        for word, names in rows.items():
            lines.append(f"{word}: {len(names)}")
            text = ", ".join(names)
            lines += textwrap.wrap(text, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(lines)


def import_weights(
    file: Path, arch: str, out: Path, *, preprocessing: dict[str, Any] | None = None, allow_missing: bool = False
) -> tuple[Path, WeightMatch]:
    """Write the export folder ``out`` from a published checkpoint, completely or not at all.

    Args:
        file: the published file: ``{epoch, model, optimizer}`` or a bare state.
        arch: key of ``ARCHITECTURES``.
        out: the folder to make.
        preprocessing: how the scans that the weights were trained on were prepared, which the file does not say; see
            ``preprocessing_from``. Default: CAT12's grey matter at 1.5 mm.
        allow_missing: leave weights that the file lacks as initialised.

    Returns:
        ``out``, and how the file's keys fit the encoder.

    Raises:
        UserError: if ``out`` exists, the file is not a plain dictionary of tensors, no key fits, a key is of an unknown
            layout, a shape differs, or a weight is missing and ``allow_missing`` is not set.
    """
    if arch not in ARCHITECTURES:
        raise UserError(
            f"--arch={arch} is not known{nearest(arch, ARCHITECTURES)}; allowed: {', '.join(ARCHITECTURES)}"
        )
    if out.exists():
        raise UserError(f"{out} exists already; choose a new folder")
    architecture, preprocessing = ARCHITECTURES[arch], preprocessing or preprocessing_from(None)
    check_encoder(architecture.encoder, {}, grid=preprocessing["grid"]["shape"])
    state, epoch = read_published(file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_encoder(architecture.encoder, {})
    match = match_keys(state, encoder.state_dict(), architecture, file)
    if match.missing and not allow_missing:
        raise UserError(
            f"{file} has no weights for {_first(match.missing)} of {architecture.encoder}; look for a complete file, or "
            "give --allow-missing to leave them as initialised"
        )
    encoder.load_state_dict({**encoder.state_dict(), **match.matched})
    config = {
        "encoder": {"name": architecture.encoder, "options": {}}, "feature_size": int(encoder.feature_size),  # type: ignore[arg-type]
        "step": 0, "epoch": epoch, "run_id": None, "run_name": file.stem, "method": architecture.method,
        "manifest_digest": None, "split": [], "version": version("yaware"), "simulated": False, "experiment": "imported",
        "source": {"file": file.name, "sha256": sha256_of(file), "arch": arch},
    }  # fmt: skip
    _write(out, encoder.state_dict(), config, preprocessing)
    return out, match


def preprocessing_from(grid: str | None) -> dict[str, Any]:
    """Return preprocessing.json for ``--grid``: the voxel size in mm of CAT12's VBM box, or a folder of shards.

    None is CAT12's 1.5 mm. Shards give grid, modality, scaling, crop and intensity. Raises UserError for anything else.
    """
    spacing = 1.5
    if grid is not None:
        try:
            spacing = float(grid)
        except ValueError:
            return preprocessing_of(Manifest.load(grid))
    if not 0.5 <= spacing <= 20:
        raise UserError(f"--grid={grid} is neither a voxel size of 0.5..20 mm nor a folder of shards")
    return {"grid": Grid.vbm(spacing).to_dict(), "normalisation": "zscore", "modality": "vbm", "scaling": "none"}


def read_published(file: Path) -> tuple[State, int | None]:
    """Read tensors and epoch of a torch file: ``{epoch, model, optimizer}`` or the bare state. Code in it is never run.

    Raises UserError if the file is missing or damaged, needs code, or holds something else than tensors.
    """
    if not file.exists():
        raise UserError(f"{file} is missing; give the path of the published checkpoint")
    try:
        content = torch.load(regular_file(file), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of exceptions for damaged files
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(
                f"{file} holds a {code[1]}, which only code in the file could create, and such code is never run; "
                "ask for a file of plain tensors (a state_dict)"
            ) from None
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{file} cannot be read by torch ({reason}); download it again") from None
    epoch = content.get("epoch") if isinstance(content, dict) else None
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(
            f"{file} is neither {{epoch, model, optimizer}} with a dictionary of tensors under 'model', nor a dictionary of "
            "tensors"
        )
    return state, epoch if isinstance(epoch, int) else None


def match_keys(published: State, encoder: State, architecture: Architecture, file: Path) -> WeightMatch:
    """Pair the tensors of a published state with those of an encoder, by name.

    ``num_batches_tracked`` may be missing: files from before torch 0.4.1 have none, and no feature depends on it.

    Raises:
        UserError: if no key fits, two keys mean the same weight, a shape differs, or a key is neither a weight of the
            encoder nor one of the architecture's ``ignored``.
    """
    matched: State = {}
    unexpected = []
    for key, tensor in published.items():
        name = architecture.rename(key)
        if name not in encoder:
            unexpected.append(key)
            continue
        if tensor.shape != encoder[name].shape:
            raise UserError(
                f"{file}: {key} has shape {list(tensor.shape)}, the encoder's {name} {list(encoder[name].shape)}; "
                "the weights are of another architecture"
            )
        if name in matched:
            raise UserError(f"{file}: two keys mean {name}, one of them {key}; give a file with one network")
        matched[name] = tensor.to(encoder[name].dtype)
    if not matched:
        raise UserError(
            f"{file}: none of its {len(published)} keys fits (such as {next(iter(published))}); is --arch right?"
        )
    unknown = [key for key in unexpected if not key.removeprefix("module.").startswith(architecture.ignored)]
    if unknown:
        raise UserError(
            f"{file}: {_first(unknown)} are not weights of {architecture.encoder} and none of its projector; the file is of "
            "another architecture"
        )
    missing = [name for name in encoder if name not in matched and not name.endswith("num_batches_tracked")]
    return WeightMatch(matched, missing, unexpected)


def _first(names: list[str]) -> str:
    """The first three names and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _write(out: Path, state: State, config: dict[str, Any], preprocessing: dict[str, Any]) -> None:
    source = config["source"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder("import", beside=out) as temporary:
        folder = temporary / "encoder"
        write_encoder(folder, {name: tensor.contiguous() for name, tensor in state.items()}, config, preprocessing)
        with (folder / "README.md").open("a", encoding="utf-8") as card:
            card.write(
                f"\nImported from `{source['file']}` (SHA-256 {source['sha256']}, layout {source['arch']}, epoch "
                f"{config['epoch']}). Step, manifest and MLflow run are unknown; the grid was given at the import.\n"
            )
        folder.rename(out)
