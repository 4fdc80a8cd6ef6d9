"""Published weights, brought into an export folder: ``yaware import-weights FILE --arch ... --out FOLDER``."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
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
BRAINIAC_LICENCE = "CC BY-NC 4.0 (the repository's; see that of the files)"


@dataclass(frozen=True)
class Architecture:
    """A published architecture: the encoder that takes its weights, and how to rename them.

    Attributes:
        encoder: key of ``pretrain.encoders.ENCODERS``.
        rename: the encoder's name for a key of the file.
        method: how the weights were trained.
        ignored: the beginnings, without ``module.``, of keys that an encoder has no weights for: the projector.
        options: of the encoder.
        zeros: ends of the encoder's weights that the published network does not have, which is as if they were 0.
        within: the beginning of the keys of the encoder, without ``module.``; all other keys are of parts that are left out.
        licence: of the published weights.
        data: what they were trained on.
        vbm: whether that are CAT12's maps at 1.5 mm, so that no grid need be given.
    """

    encoder: str
    rename: Callable[[str], str]
    method: str
    ignored: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    within: str = ""
    licence: str = ""
    data: str = ""
    vbm: bool = False


def densenet_key(key: str) -> str:
    """Return the encoder's name for a key of torchvision's DenseNet.

    ``module.features.denseblock1.denselayer1.norm1.weight`` -> ``trunk.denseblock1.denselayer1.layers.norm1.weight``;
    torchvision's oldest versions write ``norm.1``.
    """
    key = re.sub(r"^(module\.)?(encoder\.)?features\.", "trunk.", key)
    return re.sub(r"(\.denselayer\d+)\.(norm|conv)\.?([12])\.", r"\1.layers.\2\3.", key)


def resnet_key(key: str) -> str:
    """Return the encoder's name for a key of a 3D ResNet, as MONAI and MedicalNet name its layers.

    ``module.encoder.layer1.0.conv1.weight`` -> ``trunk.layer1.0.conv1.weight``.
    """
    return "trunk." + re.sub(r"^(module\.)?(encoder\.|backbone\.|f\.)?", "", key)


def vit_key(key: str) -> str:
    """Return the encoder's name for a key of MONAI's ViT.

    ``backbone.patch_embedding.position_embeddings`` -> ``trunk.position``; its blocks keep their names.
    """
    key = re.sub(r"^(module\.)?(backbone\.)?", "trunk.", key)
    return key.replace(".patch_embedding.patch_embeddings.", ".patches.").replace(
        ".patch_embedding.position_embeddings", ".position"
    )


def resenc_key(key: str) -> str:
    """Return the encoder's name for a key of nnU-Net's residual encoder (dynamic-network-architectures).

    ``encoder.stages.1.blocks.0.conv1.conv.weight`` -> ``trunk.stage2.0.conv1.weight``; its projection is ``skip.1`` behind the
    pooling of a stage, ``skip.0`` without one.
    """
    key = re.sub(r"^(module\.|_orig_mod\.)*(encoder\.)?", "", key)
    key = re.sub(r"^stem\.convs\.0\.", "trunk.stem.", key)
    key = re.sub(r"^stages\.(\d+)\.blocks\.", lambda found: f"trunk.stage{int(found[1]) + 1}.", key)
    key = re.sub(r"\.skip\.[01]\.", ".skip.", key)
    return re.sub(r"\.(conv|norm)([12])\.(conv|norm)\.", lambda found: f".{found[3]}{found[2]}.", key)


def swin_key(key: str) -> str:
    """Return the encoder's name for a key of the Swin transformer in MONAI's self-supervised SwinUNETR.

    ``module.layers1.0.blocks.0.mlp.fc1.weight`` -> ``trunk.transformer.layers1.0.blocks.0.mlp.linear1.weight``.
    """
    key = re.sub(r"^(module\.)?(swinViT\.|swin_vit\.)?", "trunk.transformer.", key)
    return re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", key)


def _medicalnet(depth: int) -> Architecture:
    """Return MedicalNet's ResNet of a depth: {state_dict}: module.*; the segmentation head is not in its own files."""
    padded = {"shortcut": "padding"} if depth in (18, 34) else {}
    return Architecture(
        f"resnet{depth}", resnet_key, "MedicalNet", ("conv_seg.", "fc."), {"dilated": True, **padded},
        ("downsample.0.bias",), licence="MIT",
        data="segmentation of 8 or 23 data sets of CT and MR, most of them not of the brain (Chen et al. 2019)",
    )  # fmt: skip


ARCHITECTURES: dict[str, Architecture] = {
    # {epoch, model, optimizer}
    "densenet121-yaware": Architecture(
        "densenet121", densenet_key, "y-aware", ("hidden_representation.", "head_projection."), licence="not stated",
        data="BHB-10K: CAT12 grey matter of 10,000 healthy people (Dufumier et al. 2021)", vbm=True,
    ),
    # A Lightning checkpoint, {state_dict, ...}: encoder.features.* and encoder.embedding.*, a linear layer that is left out
    "densenet121-nidl": Architecture(
        "densenet121", densenet_key, "nidl", ("encoder.embedding.", "embedding.", "projection_head.", "projector."),
        licence="that of the estimator's author", data="what the estimator's author says",
    ),
    # {epoch, model_state_dict, optimizer_state_dict}: encoder.* and projector.*
    "resnet18-neuro-simclr": Architecture(
        "resnet18", resnet_key, "SimCLR", ("projector.", "encoder.fc."), {"first_stride": 1}, licence="not stated",
        data="T1-weighted scans of several cohorts, skull-stripped by TurboPrep (Kaczmarek et al. 2025)",
    ),
    **{f"resnet{depth}-medicalnet": _medicalnet(depth) for depth in (10, 18, 34, 50, 101, 152, 200)},
    # A Lightning checkpoint, {state_dict, ...}: backbone.*; of the older release, MONAI's ResNet50
    "resnet50-brainiac": Architecture(
        "resnet50", resnet_key, "BrainIAC", within="backbone.", licence=BRAINIAC_LICENCE,
        data="32,000 skull-stripped brain MR scans of several sequences (Tak et al. 2024)",
    ),
    # The same, of the newer release: MONAI's ViT without qkv biases, of whose tokens the first one is used
    "vit-base-brainiac": Architecture(
        "vit-base", vit_key, "BrainIAC", (), {"pooling": "first", "grid": [96, 96, 96]}, ("attn.qkv.bias",),
        within="backbone.", licence=BRAINIAC_LICENCE,
        data="32,000 skull-stripped brain MR scans of several sequences, resized to 96 x 96 x 96 (Tak et al. 2024)",
    ),
    # {network_weights}: encoder.* and decoder.*; each convolution appears twice, also under all_modules
    "resenc-l-nnssl": Architecture(
        "resenc-l", resenc_key, "nnssl", ("decoder.",), licence="see the model's card",
        data="OpenMind: 114,000 head MR volumes (Wald et al. 2024)",
    ),
    # {state_dict}: module.*
    "swin-unetr-monai": Architecture(
        "swin-unetr", swin_key, "SwinUNETR",
        ("norm.", "mask_token", "rotation_", "contrastive_", "conv"), {"merging": "published"}, licence="Apache-2.0",
        data="5,050 CT volumes of the body, no MR (Tang et al. 2022)",
    ),
}  # fmt: skip
# Where published files keep their tensors.
CONTAINERS = ("model", "model_state_dict", "state_dict", "network_weights")
# Second names of the same tensors, and MONAI's layers for cross-attention, which its ViT does not use.
UNUSED = (".all_modules.", ".norm_cross_attn.", ".cross_attn.")


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
            ``preprocessing_from``. Default: CAT12's grey matter at 1.5 mm, for layouts that were trained on it.
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
    architecture = ARCHITECTURES[arch]
    if preprocessing is None and not architecture.vbm:
        raise UserError(
            f"--arch={arch} was not trained on CAT12's maps ({architecture.data}); give --grid: a folder of shards that were "
            "prepared as its training scans"
        )
    preprocessing = preprocessing or preprocessing_from(None)
    check_encoder(architecture.encoder, architecture.options, grid=preprocessing["grid"]["shape"])
    state, epoch = read_published(file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_encoder(architecture.encoder, architecture.options)
    match = match_keys(state, encoder.state_dict(), architecture, file)
    if match.missing and not allow_missing:
        raise UserError(
            f"{file} has no weights for {_first(match.missing)} of {architecture.encoder}; look for a complete file, or "
            "give --allow-missing to leave them as initialised"
        )
    encoder.load_state_dict({**encoder.state_dict(), **match.matched})
    config = {
        "encoder": {"name": architecture.encoder, "options": architecture.options}, "feature_size": int(encoder.feature_size),  # type: ignore[arg-type]
        "step": 0, "epoch": epoch, "run_id": None, "run_name": file.stem, "method": architecture.method,
        "manifest_digest": None, "split": [], "version": version("yaware"), "simulated": False, "experiment": "imported",
        "source": {"file": file.name, "sha256": sha256_of(file), "arch": arch, "data": architecture.data,
                   "licence": architecture.licence},
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
    """Read tensors and epoch of a torch file: one of CONTAINERS in it, or the bare state. Code in it is never run.

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
    holder = next((key for key in CONTAINERS if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
    state = content if holder is None else content[holder]
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(
            f"{file} is neither {{epoch, model, optimizer}} with a dictionary of tensors under 'model' (or "
            f"{', '.join(CONTAINERS[1:])}), nor a dictionary of tensors"
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
        within = key.removeprefix("module.").startswith(architecture.within)
        name = architecture.rename(key) if within else ""
        if any(part in key for part in UNUSED):
            continue
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
    parts = [key.removeprefix("module.") for key in unexpected]
    unknown = [
        key for key, part in zip(unexpected, parts, strict=True)
        if part.startswith(architecture.within) and not part.startswith(architecture.ignored)
    ]  # fmt: skip
    if unknown:
        raise UserError(
            f"{file}: {_first(unknown)} are not weights of {architecture.encoder} and none of its projector; the file is of "
            "another architecture"
        )
    if architecture.zeros:
        absent = [name for name in encoder if name not in matched and name.endswith(architecture.zeros)]
        matched |= {name: torch.zeros_like(encoder[name]) for name in absent}
    missing = [name for name in encoder if name not in matched and not name.endswith("num_batches_tracked")]
    return WeightMatch(matched, missing, unexpected)


def _first(names: list[str]) -> str:
    """The first three names and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _write(out: Path, state: State, config: dict[str, Any], preprocessing: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder("import", beside=out) as temporary:
        folder = temporary / "encoder"
        write_encoder(folder, {name: tensor.contiguous() for name, tensor in state.items()}, config, preprocessing)
        folder.rename(out)
