"""How checkpoints are judged: the protocols by name, and the settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from evaluation.protocols.finetune import FineTuning
from evaluation.protocols.variant import ProtocolVariant
from evaluation.tasks.published import PUBLISHED, SOURCE
from infra.errors import UserError, nearest


@dataclass(frozen=True)
class Kind:
    """A protocol: what it looks at, the model on it, and whether it gives learning curves.

    ``subject`` checkpoint: every checkpoint given; architecture: each of their architectures, with random weights; shards:
    the scans themselves, whatever the checkpoints.
    """

    subject: Literal["checkpoint", "architecture", "shards"]
    model: Literal["linear", "knn", "mlp", "network"]
    curve: bool
    says: str


PROTOCOLS: dict[str, Kind] = {
    "paper": Kind(
        "checkpoint", "linear", True, "frozen features, logistic regression (ridge for numbers), learning curves"
    ),
    "linear": Kind("checkpoint", "linear", False, "the same without learning curves"),
    "knn": Kind("checkpoint", "knn", False, "frozen features, nearest neighbours by cosine"),
    "mlp": Kind("checkpoint", "mlp", False, "frozen features, a perceptron with one hidden layer"),
    "finetune": Kind("checkpoint", "network", False, "all weights trained on the task"),
    "scratch": Kind("architecture", "network", False, "the same network from random weights"),
    "voxels": Kind("shards", "linear", True, "the linear model on the voxels themselves"),
}
ELSEWHERE = {
    "age-supervised": "is a pretraining: yaware pretrain --config RECIPE --loss.name=regression, then evaluate it like any "
    "other checkpoint",
}


@dataclass(frozen=True)
class Protocol:
    """How checkpoints are judged; logged as the run's parameters."""

    tasks: tuple[str, ...]
    folds: int = 5
    n_train: tuple[int, ...] = (100, 300, 500)
    draws: int = 10
    seed: int = 0
    protocols: tuple[str, ...] = ("paper",)
    inner_repeats: int = 1
    leave_site_out: bool = False
    layer: str | None = None
    pooling: tuple[str, ...] = ("mean",)
    mlp_trials: int = 12
    finetune: FineTuning = field(default_factory=FineTuning)

    def variant(self, name: str) -> ProtocolVariant:
        """A protocol with the options that apply to it."""
        kind = PROTOCOLS[name]
        layer = self.layer if kind.subject == "checkpoint" and kind.model != "network" else None
        return ProtocolVariant(
            protocol=name, model=kind.model, evaluates=kind.subject, leave_site_out=self.leave_site_out,
            layer=layer or "", pooling=self.pooling if layer else (),
        )  # fmt: skip

    def settings_of(self, name: str) -> dict[str, Any]:
        """The settings that a protocol's answers depend on."""
        kind = PROTOCOLS[name]
        given: dict[str, Any] = {"folds": self.folds, "seed": self.seed, "leave_site_out": self.leave_site_out}
        if kind.model == "network":
            given |= {f"finetune.{key}": value for key, value in vars(self.finetune).items() if not key.startswith("_")}
        else:
            given |= {"inner_repeats": self.inner_repeats}
        if kind.curve or (kind.model == "network" and self.finetune.curve):
            given |= {"n_train": list(self.n_train), "draws": self.draws}
        if kind.model == "mlp":
            given |= {"mlp_trials": self.mlp_trials}
        if kind.subject == "checkpoint" and kind.model != "network":
            given |= {"layer": self.layer, "pooling": list(self.pooling)}
        return given


def check_protocols(names: tuple[str, ...]) -> None:
    """UserError for a protocol that is not there."""
    if not names:
        raise UserError(f"no protocol given; name some with --protocols: {', '.join(PROTOCOLS)}")
    for name in names:
        if name in ELSEWHERE:
            raise UserError(f"--protocols={name} {ELSEWHERE[name]}")
        if name not in PROTOCOLS:
            raise UserError(
                f"--protocols={name} is not known{nearest(name, PROTOCOLS)}; allowed: {', '.join(PROTOCOLS)}"
            )


def published_lines(task: str) -> list[str]:
    """The published figures of a task, a line a training size, named as what they are."""
    return [
        f"published ({SOURCE}; other scans than these), {task}, {size} training scans: "
        + ", ".join(f"{method} {value:.3f}" for method, value in row.items())
        for size, row in PUBLISHED.get(task, {}).items()
    ]
