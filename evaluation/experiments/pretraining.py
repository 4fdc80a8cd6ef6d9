"""The command that pretrains one encoder of an experiment with the recipe ``simulated-6mm``."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evaluation.experiments.processes import Command
from infra.files import read_text, write_json

RECIPE = "simulated-6mm"


def pretrain_command(
    folder: Path, *, shards: Path, steps: int, seed: int, experiment: str, settings: Any, overrides: Sequence[str] = ()
) -> Command:
    """Return the ``yaware pretrain`` command of a run.

    Args:
        folder: of the run; its name is that of the run, and the log lies beside it.
        shards: of healthy people.
        steps: of the optimiser; a seventh of them warms up.
        seed: of the run.
        experiment: in MLflow.
        settings: all that the run depends on (JSON). The run is done if it ended with the same settings.
        overrides: changes of the recipe, as ``--loss.name=regression``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    digest = settings_digest(settings)

    def finish() -> str | None:
        """Mark the run as done."""
        if not (folder / "checkpoints" / "latest").exists():
            return "ended with status 0 and without a checkpoint"
        write_json(folder / "done.json", {"settings": digest})
        return None

    words = [
        sys.executable, "-m", "infra.cli", "pretrain", "--config", RECIPE, f"--train.steps={steps}",
        f"--optimizer.warmup_steps={max(1, steps // 7)}", f"--data.shards={shards}", f"--run.output={folder}",
        f"--run.name={folder.name}", f"--run.seed={seed}", f"--run.experiment={experiment}",
        f"--data.device={'gpu' if torch.cuda.is_available() else 'cpu'}", *overrides,
    ]  # fmt: skip
    return Command(
        f"pretraining {folder.name}", words, folder.with_name(f"{folder.name}.log"),
        is_done=lambda: is_pretrained(folder, settings), finish=finish,
    )  # fmt: skip


def is_pretrained(folder: Path, settings: Any) -> bool:
    """Return whether a run folder holds a finished run with these settings."""
    path = folder / "done.json"
    return path.is_file() and bool(json.loads(read_text(path))["settings"] == settings_digest(settings))


def settings_digest(settings: Any) -> str:
    """Return the SHA-256 of settings as JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
