"""``status.json`` of a run: whether the run is finished, was stopped, or still runs (or was lost while it ran)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from infra import distributed
from infra.errors import UserError
from infra.files import read_text, write_json

FILE = "status.json"
RUNNING, STOPPED, FINISHED = "running", "stopped", "finished"


@dataclass(frozen=True)
class RunStatus:
    """What a run says of itself.

    Attributes:
        state: RUNNING, STOPPED (a signal; a checkpoint was written) or FINISHED. A run that fails or is killed stays RUNNING.
        first_step: steps done when it started or continued.
        step: steps of the last checkpoint that it knows of.
        total_steps: steps of the whole run.
        stopped_by: name of the signal that stopped it.
        attempt: the start of a SLURM job that wrote this, see ``distributed.slurm_attempt``.
    """

    state: str
    first_step: int
    step: int
    total_steps: int
    stopped_by: str = ""
    attempt: str = field(default_factory=distributed.slurm_attempt)

    def write(self, output: Path) -> None:
        """Write ``status.json`` into a run's folder."""
        write_json(output / FILE, asdict(self))


def read_status(output: Path) -> RunStatus | None:
    """Return what the run in a folder last said of itself; None if it never said anything that can be read."""
    names = {entry.name for entry in fields(RunStatus)}
    try:
        content = json.loads(read_text(output / FILE))
        return RunStatus(**{name: value for name, value in content.items() if name in names})
    except (OSError, UserError, ValueError, TypeError, AttributeError):
        return None
