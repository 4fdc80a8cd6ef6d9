"""Put an unfinished batch job of SLURM back into the queue, within bounds; each requeue is recorded in a file."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.distributed import slurm_attempt
from infra.errors import UserError
from infra.files import read_text

AGAIN = 75  # EX_TEMPFAIL: not finished; the same command continues
MAX_REQUEUES, MAX_WITHOUT_PROGRESS = ("YAWARE_MAX_REQUEUES", 100), ("YAWARE_RESTARTS", 3)


@dataclass(frozen=True)
class Requeue:
    """A line of the record: a job put itself back into the queue.

    Attributes:
        attempt: which start of which job ended, see ``distributed.slurm_attempt``.
        checkpoint: how far it was: for pretraining the name of the newest checkpoint; empty if there was none.
        reason: why the job step ended.
    """

    attempt: str
    checkpoint: str
    reason: str


def check_job(variables: Mapping[str, str]) -> None:
    """Raise UserError for a job of SLURM that the batch scripts cannot run, naming its variable."""
    if variables.get("SLURM_ARRAY_JOB_ID"):
        raise UserError("SLURM_ARRAY_JOB_ID: every task of a job array would do the same work; submit one job a run, "
                        "without --array")  # fmt: skip
    if int(variables.get("SLURM_HET_SIZE") or 0) > 1:
        raise UserError(f"SLURM_HET_SIZE={variables['SLURM_HET_SIZE']}: a heterogeneous job would start its first part only; "
                        "submit one part")  # fmt: skip
    for name, default in (MAX_REQUEUES, MAX_WITHOUT_PROGRESS):
        _limit(variables, name, default)


def _limit(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name) or str(default)
    if not re.fullmatch(r"\d{1,6}", text):
        raise UserError(f"{name}={text!r} is not a number of requeues; give 0 or more (default: {default})")
    return int(text)


def queue_again(
    record: Path, checkpoint: str, reason: str, variables: Mapping[str, str], say: Callable[[str], None]
) -> None:
    """Queue the job of SLURM again, unless a bound forbids it. Say which of the two happened, and why, in one line.

    Args:
        record: file that records the requeues.
        checkpoint: how far the job is; requeues in a row with an equal text brought no progress.
        reason: why the job step ended.
        variables: environment of the batch script.
        say: prints a line.
    """
    number, refusal = variables["SLURM_JOB_ID"], bound_reached(checkpoint, read_requeues(record), variables)
    if not refusal:
        restart, most = int(variables.get("SLURM_RESTART_COUNT") or 0) + 1, _limit(variables, *MAX_REQUEUES)
        # Before the request, after which SLURM ends this process.
        try:
            record.parent.mkdir(parents=True, exist_ok=True)  # the ranks may have died before one of them made it
            with record.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(Requeue(slurm_attempt(variables), checkpoint, reason))) + "\n")
        except OSError as error:
            refusal = f"{record} cannot be written ({error.strerror})"
        else:
            say(f"{reason}; requeueing job {number} ({restart} of at most {most} times)")
            refusal = scontrol("requeue", number)[1]
    if refusal:
        say(f"{reason}; job {number} is not queued again: {refusal}; the same command continues")


def bound_reached(checkpoint: str, requeues: Sequence[Requeue], variables: Mapping[str, str]) -> str:
    """Return which bound forbids another requeue; empty if none does.

    Args:
        checkpoint: how far the job is.
        requeues: the recorded ones.
        variables: environment of the batch script.
    """
    restarts, most = int(variables.get("SLURM_RESTART_COUNT") or 0), _limit(variables, *MAX_REQUEUES)
    if restarts >= most:
        return f"it was restarted {restarts} times ({MAX_REQUEUES[0]}={most})"
    job = slurm_attempt(variables).partition(".")[0]
    of_job = [line.checkpoint for line in requeues if line.attempt.partition(".")[0] == job]
    in_vain = next((n for n, name in enumerate(reversed(of_job)) if name != checkpoint), len(of_job))
    most = _limit(variables, *MAX_WITHOUT_PROGRESS)
    if in_vain >= most:
        return f"{in_vain} requeues brought no progress ({MAX_WITHOUT_PROGRESS[0]}={most})"
    return ""


def requeue_record(variables: Mapping[str, str]) -> Path:
    """Return the record of a job without a run's folder: a file in the folder of its commands."""
    return Path(f".requeues-{variables['SLURM_JOB_ID']}.jsonl")


def read_requeues(record: Path) -> list[Requeue]:
    """Return the recorded requeues, the oldest first; a line that a kill has truncated is left out."""
    requeues = []
    for line in read_text(record).splitlines() if record.is_file() else []:
        with suppress(ValueError, TypeError):
            requeues.append(Requeue(**json.loads(line)))
    return requeues


def scontrol(*words: str) -> tuple[str, str]:
    """Run ``scontrol`` and return what it printed, and its error in one line; the error is empty if there was none."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False)
    except OSError as error:
        return "", f"scontrol: {error.strerror}"
    return done.stdout, "" if done.returncode == 0 else " ".join(f"scontrol: {done.stderr or done.stdout}".split())


def show_job(number: str) -> tuple[dict[str, str], str]:
    """Return the fields that SLURM shows of a job, and an error in one line; the error is empty if there was none."""
    shown, error = scontrol("--oneliner", "show", "job", number)
    return fields_of_job(shown), error


def fields_of_job(text: str) -> dict[str, str]:
    """Return the fields that ``scontrol --oneliner show job`` printed, each as its first appearance says."""
    return dict(reversed(re.findall(r"(\w+)=(\S*)", text)))


def is_preempted(job: Mapping[str, str]) -> bool:
    """Return whether SLURM is preempting a job, given its fields."""
    return job.get("PreemptTime", "None") != "None"
