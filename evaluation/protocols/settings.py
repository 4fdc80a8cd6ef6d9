"""The settings of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evaluation.features.tables import SCALES
from evaluation.protocols.finetune import FineTuning
from evaluation.statistics.training_sets import FEWEST_HALVINGS
from evaluation.tasks.resamples import Resampling
from infra.errors import UserError, nearest
from infra.settings import load_settings
from pretrain.weights.layers import OWN

READOUTS = ("no", "free", "penalised")
AUTO = "auto"  # as a layer: block, pooling and scale are chosen on inner folds


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
    readouts: str = "no"
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
            raise UserError("layer=auto chooses pooling and scale too; leave out --pooling and --scale")
        if not self.tasks:
            raise UserError("tasks is empty; name at least one, for example ad, scz, age or site")
        if self.finetune.batch < 2 * self.finetune.ranks:
            raise UserError(
                f"finetune.batch={self.finetune.batch} is too small for {self.finetune.ranks} ranks; it must be at least "
                f"{2 * self.finetune.ranks}, two scans per rank"
            )

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


def load_fine_tuning(values: Mapping[str, Any], seed: int) -> FineTuning:
    """Return the settings of fine-tuning from some of its keys; text is read as on the command line.

    Raises UserError for an unknown key or a value that is not allowed.
    """
    texts = {key: value if isinstance(value, str) else _yaml(value) for key, value in {"seed": seed, **values}.items()}
    return load_settings(FineTuning, None, [f"--{key}={text}" for key, text in texts.items()])


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
