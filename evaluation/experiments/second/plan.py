"""The plan of the second experiment: levels of realism, encoders, features, and the pieces that it is run in.

A piece is what is done, or not done: one encoder at one level (pretrained and evaluated), the models without a network at one
level, or the networks trained end to end on one disease. The answers of a piece are kept in a file with a digest of all that
they depend on.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import pretrain
from data_pipeline.loading.augment import load_augmentation
from data_pipeline.simulation.settings import Simulation
from evaluation.experiments.evaluate import ALPHAS, LEAST_GREY_MATTER
from evaluation.experiments.plan import DISEASES, METHODS, TASKS
from evaluation.experiments.pretraining import RECIPE, settings_digest
from evaluation.features.candidates import MOST_FEATURES
from evaluation.protocols.finetune import FineTuning
from evaluation.protocols.probes import LINEAR, LINEAR_WIDE
from infra.errors import UserError, nearest
from infra.files import regular_file
from pretrain.readouts.solve import GRID

EXPERIMENT = "yaware-experiment-2"  # in MLflow
# Raise it when the same plan would give other answers, but for the last bits of the views: those of the committed answers were
# resampled by DALI, before torch did it on the CPU.
FORMAT = 3
MIDDLE = "middle"  # level of the primary comparisons
# Level -> settings of the simulation that differ from its defaults, of the healthy people as of the clinic.
LEVELS: dict[str, dict[str, Any]] = {
    "easy": {"individuality": 0.5, "misregistration": 0.0, "subtypes": 1},
    MIDDLE: {"individuality": 1.0, "misregistration": 1.0, "subtypes": 2},
    "hard": {"individuality": 1.5, "misregistration": 2.0, "subtypes": 3},
}
# Controls are matched within a site and a sex, so that neither predicts the diagnosis.
CLINIC_TASKS: dict[str, dict[str, Any]] = {
    disease: {**TASKS[disease], "match": {**TASKS[disease]["match"], "same": ["site", "sex"]}} for disease in DISEASES
}
SPATIAL = ("layer2", ("none",))  # block and pooling of the spatial features and of the readouts
# Kind of features -> block and pooling of the spatial ones that stand beside the own ones and the predicted age. The default of
# ``yaware evaluate`` when the experiment was run, and since then: the latter is no part of the experiment.
BESIDE_OWN = {"default": ("layer3", ("none",)), "default since": SPATIAL}
READOUTS = (f"--readouts.layer={SPATIAL[0]}", "--readouts.pooling=[none]", "--readouts.fit=true")
# Terms of the loss beside the y-aware one, at the middle level only: method -> changes of the recipe. They work on the block of
# the spatial features, since the last map has two positions at 6 mm.
VARIANTS: dict[str, tuple[str, ...]] = {
    "y-aware-dense": (f"--loss.dense={{weight: 1.0, grid: 2, layer: {SPATIAL[0]}}}",),
    "y-aware-reconstruction": (f"--loss.reconstruction={{weight: 0.5, masked: 0.25, layer: {SPATIAL[0]}}}",),
}
FEATURES = ("pooled", "spatial", "readout", "default")  # of every encoder
AUTO = "auto"  # features chosen on inner folds; of y-aware encoders at the middle level
NETWORK_METHODS = ("fine-tuned", "scratch")
VOXEL_METHODS = ("voxels", "voxels-brain-age", "brain-age")
WHOLE = "main"  # in place of the features of methods that have only one kind
# Sections of the recipe on which the weights do not depend.
ADMINISTRATION = ("run", "data", "launch", "checkpoint", "monitor", "readouts")


@dataclass(frozen=True)
class SecondPlan:
    """The size of the experiment. The defaults are those of docs/experiments_2.md."""

    healthy: int = 6000  # participants of each pretraining cohort
    clinic: int = 6500  # participants of each clinic
    spacing: float = 6.0  # mm
    steps: int = 1000  # of pretraining, 64 scans each
    seeds: int = 3  # pretrainings of each method
    sizes: tuple[int, ...] = (100, 500)  # labelled training scans
    draws: int = 20  # training sets of each size
    network_draws: tuple[int, ...] = (10, 4)  # for each size, the number of draws used by end-to-end training
    network_epochs: int = 15
    resamples: int = 5000  # of the bootstrap
    seed: int = 61


@dataclass(frozen=True)
class Piece:
    """A part of the experiment.

    Args:
        level: key of ``LEVELS``.
        kind: ``encoder``, ``voxels`` or ``networks``.
        method: of an encoder; the disease of networks.
        seed: of an encoder's pretraining.
    """

    level: str
    kind: str
    method: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """A unique name, such as ``middle/y-aware-0``."""
        if self.kind == "encoder":
            return f"{self.level}/{self.method}-{self.seed}"
        return f"{self.level}/{self.kind}" + (f"-{self.method}" if self.method else "")

    @property
    def features(self) -> tuple[str, ...]:
        """The kinds of features that an encoder is evaluated with."""
        return (*FEATURES, AUTO) if self.method == "y-aware" and self.level == MIDDLE else FEATURES

    @property
    def overrides(self) -> tuple[str, ...]:
        """The changes of the recipe for an encoder."""
        return (*(METHODS | VARIANTS)[self.method], *READOUTS)

    def file(self, results: Path) -> Path:
        """Return the file of the piece's answers."""
        return results / f"{self.name.replace('/', '-')}.npz"


FINE_TUNED = Piece(MIDDLE, "encoder", "y-aware", 0)  # whose weights the networks start from


def pieces_of(plan: SecondPlan) -> list[Piece]:
    """Return all pieces in the order of their run: the middle level first, networks trained end to end last in it."""
    pieces = []
    for level in (MIDDLE, *(name for name in LEVELS if name != MIDDLE)):
        pieces.append(Piece(level, "voxels"))
        methods = (*METHODS, *(VARIANTS if level == MIDDLE else ()))
        pieces += [Piece(level, "encoder", method, seed) for seed in range(plan.seeds) for method in methods]
        if level == MIDDLE:
            pieces += [Piece(level, "networks", disease) for disease in DISEASES]
    return pieces


def chosen_pieces(plan: SecondPlan, patterns: str) -> list[Piece]:
    """Return the pieces that a comma-separated list names: levels, names of pieces, or patterns such as ``*/simclr-*``.

    Raises UserError for a pattern without a piece.
    """
    every = pieces_of(plan)
    chosen = set[Piece]()
    for pattern in filter(None, (text.strip() for text in patterns.split(","))):
        matching = [piece for piece in every if pattern == piece.level or fnmatchcase(piece.name, pattern)]
        if not matching:
            names = [*LEVELS, *(piece.name for piece in every)]
            raise UserError(
                f"--pieces={pattern!r} names no piece{nearest(pattern, names)}; --list shows them, and {', '.join(LEVELS)} "
                "stand for all pieces of a level"
            )
        chosen |= set(matching)
    return [piece for piece in every if piece in chosen]


def recipe_settings() -> dict[str, Any]:
    """Return the part of the recipe on which the weights depend."""
    path = Path(pretrain.__file__).parent / "recipes" / f"{RECIPE}.yaml"
    recipe: Any = OmegaConf.to_container(OmegaConf.load(regular_file(path)))
    return {name: section for name, section in recipe.items() if name not in ADMINISTRATION}


def fixed_settings() -> dict[str, str]:
    """Return what the code fixes and no plan names, as text: augmentation, penalties, simulation, fine-tuning."""
    recipe = recipe_settings()
    return {
        "augmentation": repr(load_augmentation(recipe["augmentation"])), "simulation": repr(Simulation().to_dict()),
        "penalties": repr([LINEAR.grid, LINEAR_WIDE.grid, ALPHAS, LEAST_GREY_MATTER, GRID]),
        "fine_tuning": repr(FineTuning()), "most features": repr(MOST_FEATURES),
    }  # fmt: skip


def pretraining_settings(plan: SecondPlan, piece: Piece) -> dict[str, Any]:
    """Return all that an encoder depends on."""
    return {
        "format": FORMAT, "people": [LEVELS[piece.level], plan.healthy, plan.spacing, plan.seed], "steps": plan.steps,
        "recipe": recipe_settings(), "overrides": list(piece.overrides), "seed": piece.seed,
    }  # fmt: skip


def piece_digest(plan: SecondPlan, piece: Piece) -> str:
    """Return a SHA-256 of all that the answers of a piece depend on: two plans that agree in it share them."""
    settings: dict[str, Any] = {
        "format": FORMAT, "piece": piece.name,
        "people": [LEVELS[piece.level], plan.healthy, plan.clinic, plan.spacing, plan.seed],
        "tasks": CLINIC_TASKS, "sizes": plan.sizes, "draws": plan.draws, "fixed": fixed_settings(),
    }  # fmt: skip
    if piece.kind == "encoder":
        settings |= {
            "pretraining": pretraining_settings(plan, piece), "features": piece.features, "spatial": SPATIAL,
        }  # fmt: skip
    if piece.kind == "networks":
        settings |= {
            "pretraining": pretraining_settings(plan, FINE_TUNED), "draws": plan.network_draws,
            "epochs": plan.network_epochs,
        }  # fmt: skip
    return settings_digest(settings)
