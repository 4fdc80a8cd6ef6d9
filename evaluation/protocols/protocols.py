"""The table of protocols. A new protocol, also one with a new model, is one entry of ``PROTOCOLS``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evaluation.features.tables import WIDE
from evaluation.protocols.context import Candidate, EvaluationContext
from evaluation.protocols.finetune import FineTuning
from evaluation.protocols.inputs import Inputs, no_features, voxel_features
from evaluation.protocols.inputs import frozen_features as frozen_features  # a protocol of one's own may use it
from evaluation.protocols.nested_cv import NestedCVResult, PreparedTask, search_grid, search_perceptrons
from evaluation.protocols.probes import LINEAR, LINEAR_WIDE, NEAREST_NEIGHBOURS, Probe, with_readout_penalties
from evaluation.protocols.settings import AUTO, OWN_LAYER, EvaluationSettings, check_types, load_fine_tuning, names_of
from evaluation.protocols.tune_networks import search_fine_tuning, training_jobs
from evaluation.protocols.variant import BY_DEFAULT, JOINT, ProtocolVariant
from evaluation.tasks.leakage import check_readouts
from infra.errors import UserError, nearest
from infra.search_place import searching
from pretrain.weights.layers import OWN

# Settings of the protocols that search a grid: these repeat their cross-validation; perceptrons and networks do not.
RESAMPLING = ("repeats", "halvings", "permutations")

# (context, candidate, prepared tasks by name, folder of unfinished searches, title of progress bars) -> results by task
Search = Callable[
    [EvaluationContext, Candidate, dict[str, PreparedTask], Path, str], dict[str, NestedCVResult]
]  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """How candidates are evaluated on tasks.

    Args:
        description: one line for people.
        evaluates: ``checkpoint``: every given checkpoint; ``architecture``: the architecture of each of them, with random
            weights; ``shards``: the scans themselves, without any checkpoint. The last two are baselines.
        model: name of what is fitted. Protocols that fit the same model to the same inputs share it.
        inputs: returns the features (N, F) of the scans ``context.rows``; F is 0 if the search reads the scans itself.
        search: fits the model on all folds and draws, with nothing chosen on test scans.
        settings: the fields of ``EvaluationSettings``, beyond those of every protocol, on which results depend.
        learning_curve: whether these settings ask for learning curves.
        uses_layer: whether ``layer`` and ``pooling`` select the features.
        scale: of the features; see ``features.tables.split_features``; ``setting``: that of the settings.
        uses_readouts: whether predicted proxies can be given to the model (``EvaluationSettings.readouts``).
        plain_names: log metrics on the checkpoint's own page in MLflow as ``TASK.METRIC``, not ``PROTOCOL/TASK.METRIC``.
        map_features: the columns of the inputs from which the map of the scans is made.
    """

    description: str
    evaluates: Literal["checkpoint", "architecture", "shards"]
    model: str
    inputs: Inputs
    search: Search
    settings: tuple[str, ...] = ("inner_repeats", *RESAMPLING)
    learning_curve: Callable[[EvaluationSettings], bool] = lambda settings: False
    uses_layer: bool = False
    scale: Literal["each", "all", "setting"] = "each"
    uses_readouts: bool = False
    plain_names: bool = False
    map_features: slice = field(default_factory=lambda: slice(None))

    @property
    def resamples(self) -> bool:
        """Whether the search repeats its cross-validation, for statistics that include the training sets."""
        return set(RESAMPLING) <= set(self.settings)

    def params(self, settings: EvaluationSettings) -> dict[str, Any]:
        """Return the settings on which results of this protocol depend, as MLflow parameters."""
        curve = ("n_train", "draws") if self.learning_curve(settings) else ()
        layer = ("layer", "pooling") if self.uses_layer else ()
        scale = ("scale",) if self.scale == "setting" else ()
        readouts = ("readouts",) if self.gives_readouts(settings) else ()
        joint = self.uses_joint(settings)
        features = () if joint else (*layer, *scale)
        names = ("folds", "seed", "leave_site_out", *self.settings, *curve, *features, *readouts)
        return settings.as_params(names) | ({"layer": JOINT} if joint else {})

    def gives_readouts(self, settings: EvaluationSettings) -> bool:
        """Return whether predicted proxies are given to the model; not before ``auto`` is decided (``decide_readouts``)."""
        return self.uses_readouts and settings.readouts not in ("no", "auto")

    def uses_joint(self, settings: EvaluationSettings) -> bool:
        """Return whether the models get the encoder's own features and spatial ones (``inputs.joint_tables``)."""
        return self.uses_layer and self.scale == "setting" and settings.joint

    def scale_of(self, settings: EvaluationSettings) -> str:
        """Return the scale of the features: ``each`` or ``all``."""
        return settings.scale if self.scale == "setting" else self.scale


def grid_of(probe: Probe) -> Search:
    """Return the search over a probe's grid."""

    def search(
        context: EvaluationContext, candidate: Candidate, prepared: dict[str, PreparedTask], folder: Path, title: str
    ) -> dict[str, NestedCVResult]:
        """Try every entry of the grid on every task."""
        chosen = LINEAR_WIDE if probe is LINEAR and any(map(has_wide, prepared.values())) else probe
        given = any(entry.table.readouts is not None for entry in prepared.values())
        if given and context.settings.readouts == "penalised":
            chosen = with_readout_penalties(chosen)
        return search_grid(prepared, chosen, folder, title)

    return search


def _perceptrons(
    context: EvaluationContext, candidate: Candidate, prepared: dict[str, PreparedTask], folder: Path, title: str
) -> dict[str, NestedCVResult]:
    return search_perceptrons(prepared, context.settings.mlp_trials, folder, title)


def _networks(
    context: EvaluationContext, candidate: Candidate, prepared: dict[str, PreparedTask], folder: Path, title: str
) -> dict[str, NestedCVResult]:
    return search_fine_tuning(training_jobs(context, candidate), prepared, folder, title)


def has_wide(prepared: PreparedTask) -> bool:
    """Whether a task's features may need a larger penalty than those of ``LINEAR``."""
    table = prepared.table
    return bool(prepared.candidates) or table.features.dtype == np.float32 or table.count > WIDE


PROTOCOLS: dict[str, Protocol] = {
    "paper": Protocol(
        "logistic regression (ridge for a regression) on frozen features, with learning curves",
        "checkpoint", "linear", frozen_features, grid_of(LINEAR),
        learning_curve=lambda settings: True, uses_layer=True, scale="setting", uses_readouts=True, plain_names=True,
    ),
    "linear": Protocol(
        "the model of paper, without learning curves",
        "checkpoint", "linear", frozen_features, grid_of(LINEAR), uses_layer=True, scale="setting", uses_readouts=True,
        plain_names=True,
    ),
    "knn": Protocol(
        "nearest neighbours by cosine similarity on frozen features",
        "checkpoint", "knn", frozen_features, grid_of(NEAREST_NEIGHBOURS), uses_layer=True,
    ),
    "mlp": Protocol(
        "a perceptron with one hidden layer on frozen features",
        "checkpoint", "mlp", frozen_features, _perceptrons, settings=("inner_repeats", "mlp_trials"), uses_layer=True,
    ),
    "finetune": Protocol(
        "all weights trained on the task, from the checkpoint's",
        "checkpoint", "network", no_features, _networks, settings=("finetune",),
        learning_curve=lambda settings: settings.finetune.curve,
    ),
    "scratch": Protocol(
        "the same network trained from random weights",
        "architecture", "network", no_features, _networks, settings=("finetune",),
        learning_curve=lambda settings: settings.finetune.curve,
    ),
    "voxels": Protocol(
        "the model of paper on voxels",
        "shards", "linear", voxel_features, grid_of(LINEAR), learning_curve=lambda settings: True, scale="all",
        map_features=slice(-2, None),
    ),
}  # fmt: skip
NOT_PROTOCOLS = {
    "age-supervised": "is a pretraining: run yaware pretrain --config RECIPE --loss.name=regression and evaluate the result "
    "like any other checkpoint",
}


def check_protocols(names: tuple[str, ...]) -> None:
    """Raise UserError if there is no protocol or one is unknown."""
    if not names:
        raise UserError(f"protocols is empty; allowed: {', '.join(PROTOCOLS)}")
    for name in names:
        if name in NOT_PROTOCOLS:
            raise UserError(f"protocol {name} {NOT_PROTOCOLS[name]}")
        if name not in PROTOCOLS:
            raise UserError(
                f"protocol {name!r} is not known{nearest(name, PROTOCOLS)}; allowed: {', '.join(PROTOCOLS)}"
            )


def check_search(search: str, protocols: Sequence[str]) -> None:
    """Raise UserError if the protocols cannot be searched there; see ``evaluate``."""
    with searching(search):  # raises if there is no such place
        others = [name for name in protocols if not PROTOCOLS[name].resamples]
    if search == "here" and others:
        raise UserError(
            f"search=here is not possible for {', '.join(others)}, which Ray Tune searches; use auto or ray"
        )


def check_features(settings: EvaluationSettings) -> None:
    """Raise UserError if no protocol uses the scale or the readouts, or one cannot choose its features."""
    names = [name for name in settings.protocols if PROTOCOLS[name].scale == "setting"]
    if settings.scale != "each" and not names:
        raise UserError(
            f"scale={settings.scale} is not used by {', '.join(settings.protocols)}; only by paper and linear"
        )
    asked = settings.readouts not in ("no", "auto")
    if asked and not any(PROTOCOLS[name].uses_readouts for name in settings.protocols):
        raise UserError(
            f"readouts={settings.readouts} is not used by {', '.join(settings.protocols)}; only by paper and linear"
        )
    others = [name for name in settings.protocols if PROTOCOLS[name].uses_layer and name not in names]
    if settings.layer == AUTO and (others or not names):
        raise UserError(
            f"layer={AUTO} is for the protocols paper and linear, and not for {', '.join(others or settings.protocols)}; name "
            "a block, or leave out the layer"
        )


def checked_settings(
    *, tasks: Any, protocols: Any, pooling: Any, n_train: Any, seed: Any, finetune: Any, **more: Any
) -> EvaluationSettings:
    """Return the settings of these arguments of `evaluate`. Raises UserError if one cannot be used."""
    check_types(seed, n_train, finetune, tasks=tasks, protocols=protocols, pooling=pooling)
    settings = EvaluationSettings(
        tasks=names_of(tasks), protocols=names_of(protocols), pooling=names_of(pooling), n_train=tuple(n_train), seed=seed,
        finetune=finetune if isinstance(finetune, FineTuning) else load_fine_tuning(finetune or {}, seed), **more,
    )  # fmt: skip
    settings.check()
    check_protocols(settings.protocols)
    check_features(settings)
    return settings


def variant_of(name: str, settings: EvaluationSettings) -> ProtocolVariant:
    """Return a protocol with the options that apply to it."""
    protocol = PROTOCOLS[name]
    layer = settings.layer if protocol.uses_layer and settings.layer != OWN_LAYER else None
    if protocol.uses_layer and layer is None and settings.pooling != OWN:
        layer = "end"
    if protocol.uses_joint(settings):
        layer = JOINT
    scale = settings.scale if protocol.scale == "setting" and settings.scale != "each" else ""
    return ProtocolVariant(
        protocol=name, model=protocol.model, evaluates=protocol.evaluates, leave_site_out=settings.leave_site_out,
        layer=layer or "", pooling=settings.pooling if layer and layer not in (AUTO, JOINT) else (), scale=scale,
        readouts=settings.readouts if protocol.gives_readouts(settings) else "",
    )  # fmt: skip


def decide_readouts(context: EvaluationContext, checkpoints: Sequence[Candidate]) -> EvaluationContext:
    """Return the context with ``readouts`` decided: by default if every checkpoint has some that may be used, else ``no``.

    All checkpoints are evaluated in the same way, so that they can be compared. If only some have readouts, or some were
    fitted to test participants, a printed line says why no readouts are given.
    """
    settings = context.settings
    if settings.readouts != "auto":
        return context
    usable = False
    if any(PROTOCOLS[name].uses_readouts for name in settings.protocols) and any(map(_has_readouts, checkpoints)):
        faults = [(checkpoint.name, _fault(context, checkpoint)) for checkpoint in checkpoints]
        usable = not any(fault for _, fault in faults)
        if usable and (other := _different_columns(checkpoints)):
            faults, usable = [other], False
        for name, fault in [entry for entry in faults if entry[1]][:1]:
            print(f"evaluate: readouts are not given to the models: {name}: {fault}")
    return replace(context, settings=replace(settings, readouts=BY_DEFAULT if usable else "no"))


def _different_columns(checkpoints: Sequence[Candidate]) -> tuple[str, str] | None:
    """Return a checkpoint whose readouts predict other columns than the first one's, and the fault; None if there is none."""
    columns = {c.name: list(c.encoder.readouts.readouts) for c in checkpoints if c.encoder and c.encoder.readouts}
    first = next(iter(columns), "")
    for name, own in columns.items():
        if set(own) != set(columns[first]):
            return (
                name,
                f"it predicts {', '.join(own)}, and {first} {', '.join(columns[first])}; `yaware readouts --replace`",
            )
    return None


def _has_readouts(checkpoint: Candidate) -> bool:
    encoder = checkpoint.encoder
    return encoder is not None and encoder.readouts is not None and bool(encoder.readouts.readouts)


def _fault(context: EvaluationContext, checkpoint: Candidate) -> str:
    """Return why a checkpoint's readouts cannot be used; empty if they can."""
    if not _has_readouts(checkpoint):
        return "it has none; `yaware readouts` fits them"
    assert checkpoint.encoder is not None
    try:
        check_readouts(checkpoint.encoder.need_readouts(), context.manifest, context.rows, checkpoint.name)
    except UserError as error:
        return str(error).removeprefix(f"{checkpoint.name}: ").removesuffix("; evaluate on other scans")
    return ""
