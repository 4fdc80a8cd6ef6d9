"""What an evaluation judges: checkpoints, features that were given, both beside each other, and baselines."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.external.given import GivenFeatures
from evaluation.protocols.context import Candidate, EvaluationContext
from evaluation.protocols.finetune import check_head_pooling
from evaluation.protocols.protocols import PROTOCOLS, variant_of
from evaluation.protocols.settings import AUTO, OWN_LAYER, EvaluationSettings
from evaluation.protocols.variant import ProtocolVariant
from evaluation.tasks.leakage import check_leakage, check_readouts, check_seen
from infra.errors import UserError
from infra.files import sha256_of
from pretrain.hub.download import is_address, shown
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder, list_checkpoints, local_path
from pretrain.weights.layers import OWN, intermediate_features
from pretrain.weights.scan_source import check_preprocessing


def checkpoint_paths(checkpoints: Any, *, all_steps: bool = False) -> list[Path]:
    """Return the paths of one checkpoint or several, given as paths, addresses ``hf://...`` or objects with a ``folder``.

    The encoders at addresses are fetched into the local cache.

    Raises UserError if one is none of these, an encoder cannot be fetched, or if ``all_steps`` and a path is not a run folder
    with checkpoints.
    """
    single = isinstance(checkpoints, (str, os.PathLike)) or not isinstance(checkpoints, Iterable)
    paths = []
    for checkpoint in [checkpoints] if single else checkpoints:
        folder = checkpoint if isinstance(checkpoint, (str, os.PathLike)) else getattr(checkpoint, "folder", None)
        if folder is None:
            raise UserError(
                f"checkpoints: {type(checkpoint).__name__} is neither a path nor an object with a folder; give a run folder, a "
                "checkpoint or an export"
            )
        if all_steps and is_address(folder):
            raise UserError(f"{shown(folder)} is one encoder without earlier steps; leave --all-steps out")
        local_path(folder)  # fetches it before any work
        paths += list_checkpoints(Path(folder)) if all_steps else [Path(folder)]
    if not paths:
        raise UserError(f"checkpoints={checkpoints!r:.80} names none; give one or more")
    return paths


def load_checkpoint(path: Path, context: EvaluationContext) -> Candidate:
    """Load a checkpoint and check it against the shards: preprocessing, leakage, layer."""
    folder, encoder, place = find_encoder(path), Encoder.from_pretrained(path), shown(path)
    check_preprocessing(encoder.preprocessing, context.manifest, place)
    tags = check_leakage(encoder, path, context.manifest, context.rows, place)
    if context.settings.layer != AUTO and any(PROTOCOLS[name].uses_layer for name in context.settings.protocols):
        intermediate_features(encoder.network, context.settings.block, context.settings.pooling)
    if any(PROTOCOLS[name].model == "network" for name in context.settings.protocols):
        check_head_pooling(encoder.network, context.settings.finetune.pooling, context.manifest.grid["shape"])
    if any(PROTOCOLS[name].gives_readouts(context.settings) for name in context.settings.protocols):
        check_readouts(encoder.need_readouts(), context.manifest, context.rows, place)
    config = encoder.config
    return Candidate(
        name=config["run_name"], method=config["method"], step=int(config["step"]),
        weights=sha256_of(folder / "model.safetensors"), encoder=encoder, folder=folder.resolve(), tags=tags,
    )  # fmt: skip


def given_candidates(
    given: Sequence[GivenFeatures], checkpoints: Sequence[Candidate], *, join: bool,
    checked: Mapping[str, str] | None = None,
) -> list[Candidate]:  # fmt: skip
    """Return a candidate for each table or adapter, and with ``join`` each checkpoint with each of them beside it.

    ``checked`` are the tags of ``leakage.check_seen`` for the given features. Raises UserError if two candidates would have
    one name.
    """
    names = {checkpoint.name for checkpoint in checkpoints} | set(PROTOCOLS)
    for features in given:
        if features.name in names:
            raise UserError(f"{features.name!r} names two candidates; give the table another --name")
        names.add(features.name)
    # Without digests nobody knows which people the encoder of others, or a normative model behind a table, was fitted to.
    tags = dict(checked or {"leakage.checked": "nothing"})
    alone = [Candidate(features.name, features.kind, given=features, tags=tags) for features in given]
    return alone + [_beside(checkpoint, features) for features in given if join for checkpoint in checkpoints]


def check_digests(
    seen: str | os.PathLike[str] | None, given: Sequence[GivenFeatures], context: EvaluationContext
) -> dict[str, str] | None:
    """Check the given features by a file of digests of their encoder's training people; None without such a file.

    Raises UserError if there are no given features, or some of the test people are in the file.
    """
    if seen is None:
        return None
    if not given:
        raise UserError(f"seen={os.fspath(seen)} is about encoders of others; give features or an encoder with it")
    return check_seen(seen, context.manifest, context.rows, ", ".join(features.name for features in given))


def _beside(checkpoint: Candidate, features: GivenFeatures) -> Candidate:
    name, method = f"{checkpoint.name} + {features.name}", f"{checkpoint.method} + {features.kind}"
    return replace(checkpoint, name=name, method=method, given=features)


def check_join(settings: EvaluationSettings, *, given: int, checkpoints: int, join: bool) -> None:
    """Raise UserError if ``join`` has nothing to put beside each other, or the features are to be chosen."""
    if join and not (given and checkpoints):
        raise UserError("join puts tables of features beside checkpoints' features; give at least one of each")
    if join and settings.layer == AUTO:
        raise UserError(
            f"join does not go with layer={AUTO}, which chooses among an encoder's blocks; leave one of them out"
        )
    for name in settings.protocols:
        if not checkpoints and (PROTOCOLS[name].model == "network" or PROTOCOLS[name].evaluates == "architecture"):
            raise UserError(f"protocol {name} trains the network of a checkpoint, but there is none; leave it out")


def candidates_by_protocol(
    checkpoints: Sequence[Candidate], given: Sequence[Candidate], settings: EvaluationSettings
) -> Iterator[tuple[str, Candidate]]:  # fmt: skip
    """Yield every protocol with each candidate that it evaluates; features that were given have no network to train."""
    for name in settings.protocols:
        evaluates = PROTOCOLS[name].evaluates
        if evaluates == "checkpoint":
            yield from ((name, checkpoint) for checkpoint in checkpoints)
            if PROTOCOLS[name].model == "network" and given:
                print(f"evaluate: {name} trains networks and does not evaluate {', '.join(c.name for c in given)}")
            else:
                yield from ((name, candidate) for candidate in given)
        elif evaluates == "shards":
            yield name, Candidate(name, name)
        else:
            architectures: list[dict[str, Any]] = []
            for checkpoint in checkpoints:
                assert checkpoint.encoder is not None
                architecture = checkpoint.encoder.config["encoder"]
                if architecture not in architectures:
                    architectures.append(architecture)
                    number = f" {len(architectures)}" if len(architectures) > 1 else ""
                    yield name, Candidate(f"{name} {architecture['name']}{number}", name, encoder=checkpoint.encoder)


def context_of(context: EvaluationContext, candidate: Candidate) -> EvaluationContext:
    """Return the context with the settings that apply to a candidate: given features have no layers, scales or readouts.

    Columns of a table have units of their own, so each is scaled by itself.
    """
    if candidate.given is None or candidate.encoder is not None:
        return context
    settings = replace(context.settings, layer=OWN_LAYER, pooling=OWN, scale="each", readouts="no")
    return replace(context, settings=settings)


def variants_of(context: EvaluationContext, candidates: Sequence[Candidate]) -> list[ProtocolVariant]:
    """Return the variant of each protocol of frozen features or fine-tuning with each candidate; baselines have none."""
    names = [name for name in context.settings.protocols if PROTOCOLS[name].evaluates == "checkpoint"]
    return [variant_for(name, context_of(context, candidate), candidate) for name in names for candidate in candidates]


def variant_for(name: str, context: EvaluationContext, candidate: Candidate) -> ProtocolVariant:
    """Return a protocol with the options that apply to it, for a candidate of ``context_of``."""
    variant = variant_of(name, context.settings)
    if candidate.given is None or candidate.encoder is not None:
        return variant
    return replace(variant, evaluates=candidate.given.kind)
