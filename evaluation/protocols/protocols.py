"""The table of protocols. A new protocol, also one with a new model, is one entry of ``PROTOCOLS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaluation.features.candidates import FeatureChoice, candidate_blocks
from evaluation.features.tables import SCALES, WIDE, reduced, table_of
from evaluation.protocols.context import Candidate, EvaluationContext
from evaluation.protocols.features import cache_name, features_of, features_of_each
from evaluation.protocols.finetune import FineTuning
from evaluation.protocols.nested_cv import NestedCVResult, PreparedTask, search_grid, search_perceptrons
from evaluation.protocols.probes import LINEAR, LINEAR_WIDE, NEAREST_NEIGHBOURS, Probe, with_readout_penalties
from evaluation.protocols.settings import AUTO, EvaluationSettings, check_types, load_fine_tuning, names_of
from evaluation.protocols.tune_networks import search_fine_tuning, training_jobs
from evaluation.protocols.variant import ProtocolVariant
from evaluation.protocols.voxels import voxel_coordinates
from infra.errors import UserError, nearest
from pretrain.weights.layers import OWN, Block

# Settings of the protocols that search a grid: these repeat their cross-validation; perceptrons and networks do not.
RESAMPLING = ("repeats", "halvings", "permutations")

Inputs = Callable[[EvaluationContext, Candidate], NDArray[Any]]
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
        names = ("folds", "seed", "leave_site_out", *self.settings, *curve, *layer, *scale, *readouts)
        return settings.as_params(names)

    def gives_readouts(self, settings: EvaluationSettings) -> bool:
        """Return whether predicted proxies are given to the model."""
        return self.uses_readouts and settings.readouts != "no"

    def scale_of(self, settings: EvaluationSettings) -> str:
        """Return the scale of the features: ``each`` or ``all``."""
        return settings.scale if self.scale == "setting" else self.scale


def frozen_features(context: EvaluationContext, candidate: Candidate) -> NDArray[np.float32]:
    """Return the features (N, F) of the candidate's encoder, or of the configured layer, from the cache if they are there."""
    assert candidate.encoder is not None
    layer, pooling = context.settings.layer, context.settings.pooling
    if layer == AUTO:  # the map of the scans shows the encoder's own features
        layer = None
    cache = context.cache / cache_name(candidate.weights, context.manifest.digest, layer, pooling)
    title = f"features of {candidate.name} step {candidate.step}"
    return features_of(candidate.encoder, context.manifest, context.rows, cache, title, layer=layer, pooling=pooling)


def candidate_features(context: EvaluationContext, candidate: Candidate) -> dict[Block, NDArray[np.float32]]:
    """Return the features (N, F) of every block and pooling that ``--layer auto`` chooses from, computed in one pass."""
    assert candidate.encoder is not None
    network, manifest = candidate.encoder.network, context.manifest
    caches = {
        block: context.cache / cache_name(candidate.weights, manifest.digest, *block)
        for block in candidate_blocks(network, manifest.grid["shape"])
    }
    title = f"features of {len(caches)} candidates of {candidate.name} step {candidate.step}"
    return features_of_each(candidate.encoder, manifest, context.rows, caches, title)


def candidate_tables(context: EvaluationContext, candidate: Candidate) -> dict[str, list[FeatureChoice]]:
    """Return the features that ``--layer auto`` chooses from, for each task by name; the tasks share the arrays."""
    choices: dict[str, list[FeatureChoice]] = {task.name: [] for task in context.tasks}
    for (layer, pooling), features in candidate_features(context, candidate).items():
        for scale in SCALES:
            columns, count = reduced(features, scale)
            params = {"layer": layer or "encoder", "pooling": "+".join(pooling), "scale": scale}
            for task in context.tasks:
                places = context.positions_of(task)
                choices[task.name].append(FeatureChoice(params, table_of(task, columns, scale, places, count)))
    return choices


def add_readouts(
    context: EvaluationContext, candidate: Candidate, prepared: dict[str, PreparedTask]
) -> dict[str, PreparedTask]:
    """Return the tasks with the proxies that the candidate's readouts predict for their scans."""
    assert candidate.encoder is not None
    readouts = candidate.encoder.need_readouts()
    layer, pooling = readouts.layer, readouts.pooling
    cache = context.cache / cache_name(candidate.weights, context.manifest.digest, layer, pooling)
    title = f"readouts of {candidate.name} step {candidate.step}"
    features = features_of(
        candidate.encoder, context.manifest, context.rows, cache, title, layer=layer, pooling=pooling
    )
    values = readouts.predict(features)
    added = {}
    for task in context.tasks:
        entry, own = prepared[task.name], values[context.positions_of(task)]
        candidates = [choice._replace(table=replace(choice.table, readouts=own)) for choice in entry.candidates]
        added[task.name] = replace(entry, table=replace(entry.table, readouts=own), candidates=candidates)
    return added


def voxel_features(context: EvaluationContext, candidate: Candidate) -> NDArray[np.float64]:
    """Return coordinates (N, N) of the scans with the inner products of their voxels."""
    cache = context.cache / f"voxels-{context.manifest.digest[:16]}.npz"
    return voxel_coordinates(context.manifest, context.rows, cache)


def no_features(context: EvaluationContext, candidate: Candidate) -> NDArray[np.float32]:
    """Return an empty matrix (N, 0), for models that read the scans themselves."""
    return np.empty((len(context.rows), 0), dtype=np.float32)


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


def check_features(settings: EvaluationSettings) -> None:
    """Raise UserError if no protocol uses the scale or the readouts, or one cannot choose its features."""
    names = [name for name in settings.protocols if PROTOCOLS[name].scale == "setting"]
    if settings.scale != "each" and not names:
        raise UserError(
            f"scale={settings.scale} is not used by {', '.join(settings.protocols)}; only by paper and linear"
        )
    if settings.readouts != "no" and not any(PROTOCOLS[name].uses_readouts for name in settings.protocols):
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
    layer = settings.layer if protocol.uses_layer else None
    if protocol.uses_layer and layer is None and settings.pooling != OWN:
        layer = "end"
    scale = settings.scale if protocol.scale == "setting" and settings.scale != "each" else ""
    return ProtocolVariant(
        protocol=name, model=protocol.model, evaluates=protocol.evaluates, leave_site_out=settings.leave_site_out,
        layer=layer or "", pooling=settings.pooling if layer and layer != AUTO else (), scale=scale,
        readouts=settings.readouts if protocol.gives_readouts(settings) else "",
    )  # fmt: skip
