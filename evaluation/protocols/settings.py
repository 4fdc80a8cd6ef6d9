"""The settings of an evaluation."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from evaluation.features.tables import SCALES
from evaluation.protocols.finetune import FineTuning
from evaluation.statistics.training_sets import FEWEST_HALVINGS
from evaluation.tasks.resamples import Resampling
from infra.errors import WHOLE, Kind, UserError, check_arguments, nearest
from infra.settings import load_settings
from pretrain.weights.layers import OWN

READOUTS = ("auto", "no", "free", "penalised")
AUTO = "auto"  # as a layer: block, pooling and scale are chosen on inner folds
OWN_LAYER = "own"  # as a layer: the encoder's own features alone


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of ``evaluation.evaluate`` on which its results depend."""

    tasks: tuple[str, ...]
    protocols: tuple[str, ...] = ("paper",)
    folds: int = 5
    n_train: tuple[int, ...] = (100, 300, 500)
    draws: int = 10
    seed: int = 0
    inner_repeats: int = 1
    leave_site_out: bool = False
    layer: str | None = None
    pooling: tuple[str, ...] = ("mean",)
    scale: str = "each"
    readouts: str = "auto"
    mlp_trials: int = 12
    repeats: int = 3
    halvings: int = 10
    permutations: int = 0
    finetune: FineTuning = field(default_factory=FineTuning)

    def check(self) -> None:
        """Raise UserError if a number is too small or no task is named."""
        least_of = {
            "folds": 2, "draws": 1, "inner_repeats": 1, "mlp_trials": 1, "repeats": 1, "halvings": 0, "permutations": 0,
        }  # fmt: skip
        check_arguments(WHOLE, **{name: getattr(self, name) for name in least_of})
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} is too small; it must be at least {least}")
        if 0 < self.halvings < FEWEST_HALVINGS:
            raise UserError(
                f"halvings={self.halvings} is too small for an interval; give at least {FEWEST_HALVINGS}, or 0 for none"
            )
        if self.scale not in SCALES:
            raise UserError(
                f"scale={self.scale!r} is not known{nearest(self.scale, SCALES)}; allowed: {', '.join(SCALES)}"
            )
        if self.readouts not in READOUTS:
            raise UserError(
                f"readouts={self.readouts!r} is not known{nearest(self.readouts, READOUTS)}; allowed: {', '.join(READOUTS)}"
            )
        if self.layer == AUTO and (self.pooling, self.scale) != (OWN, "each"):
            raise UserError("layer=auto chooses pooling and scale too; leave out pooling and scale")
        if not self.tasks:
            raise UserError("tasks is empty; name at least one, for example ad, scz, age or site")
        if self.finetune.batch < 2 * self.finetune.ranks:
            raise UserError(
                f"finetune.batch={self.finetune.batch} is too small for {self.finetune.ranks} ranks; it must be at least "
                f"{2 * self.finetune.ranks}, two scans per rank"
            )

    @property
    def block(self) -> str | None:
        """The block that ``layer`` names; None if it names none."""
        return None if self.layer in (AUTO, OWN_LAYER) else self.layer

    @property
    def joint(self) -> bool:
        """Whether no features are named, so that linear models use the own features and spatial ones."""
        return self.layer is None and self.pooling == OWN and self.scale == "each"

    @property
    def resampling(self) -> Resampling:
        """How often the protocols on fixed features repeat their cross-validation."""
        return Resampling(self.repeats, self.halvings, self.permutations)

    def as_params(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return some settings as MLflow parameters; ``finetune`` becomes one parameter for each of its keys."""
        params: dict[str, Any] = {}
        for name in names:
            value = getattr(self, name)
            if isinstance(value, FineTuning):
                params |= {f"{name}.{key}": item for key, item in vars(value).items() if not key.startswith("_")}
            else:
                params[name] = list(value) if isinstance(value, tuple) else value
        return params


def names_of(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return one name or several as a tuple."""
    return (names,) if isinstance(names, str) else tuple(names)


def check_types(seed: Any, n_train: Any, finetune: Any, **names: Any) -> None:
    """Raise UserError for an argument of a wrong type; ``names`` are a text or several."""
    check_arguments(WHOLE, seed=seed)
    for name, value in names.items():
        if isinstance(value, str):
            continue
        check_arguments(Kind((Sequence, Set), "a text, or a list of texts"), **{name: value})
        check_arguments(Kind((str, os.PathLike), "a text"), **{f"{name}[{n}]": text for n, text in enumerate(value)})
    check_arguments(Kind((Sequence,), "a list of whole numbers"), n_train=n_train)
    check_arguments(WHOLE, **{f"n_train[{n}]": size for n, size in enumerate(n_train)})
    check_arguments(Kind((FineTuning, Mapping, type(None)), "a mapping, a FineTuning or None"), finetune=finetune)


def load_fine_tuning(values: Mapping[str, Any], seed: int) -> FineTuning:
    """Return the settings of fine-tuning from some of its keys; text is read as on the command line.

    Raises UserError for an unknown key or a value that is not allowed.
    """
    texts = {key: value if isinstance(value, str) else _yaml(value) for key, value in {"seed": seed, **values}.items()}
    try:
        return load_settings(_Finetune, None, [f"--finetune.{key}={text}" for key, text in texts.items()]).finetune
    except UserError as error:
        message = str(error).partition("; set it in the recipe")[0].removeprefix("settings: ")
        raise UserError(re.sub(r"^--finetune\S*: ", "", message)) from None


@dataclass
class _Finetune:
    """The settings of fine-tuning as a section, so that errors name its keys as ``finetune.epochs``."""

    finetune: FineTuning = field(default_factory=FineTuning)


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
