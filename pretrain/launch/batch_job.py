"""The beginning and the end of a batch job of SLURM, for ``infra/launch/*.sbatch``: checks, and whether to queue it again.

``python -m pretrain.launch.batch_job begin RECIPE ...`` checks the job. ``... end STATUS RECIPE ...`` decides after the job
step, whose exit status is STATUS, and exits with the status of the job. The run itself says whether it is finished
(``infra.watchdog.run_status``), and its ranks say whether one of them failed or was lost (``infra.watchdog.exit_note``).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.distributed import slurm_attempt
from infra.errors import UserError
from infra.files import read_text
from infra.watchdog.exit_note import RUNNING as NO_WORD
from infra.watchdog.exit_note import ExitNote, read_notes
from infra.watchdog.run_status import FINISHED, STOPPED, RunStatus, read_status
from pretrain.config import load_recipe

AGAIN = 75  # EX_TEMPFAIL: not finished; the same command continues
MAX_REQUEUES, MAX_WITHOUT_PROGRESS = ("YAWARE_MAX_REQUEUES", 100), ("YAWARE_RESTARTS", 3)
RECORD = "requeues.jsonl"


@dataclass(frozen=True)
class Requeue:
    """A line of ``requeues.jsonl``: a job put itself back into the queue.

    Attributes:
        attempt: which start of which job ended, see ``distributed.slurm_attempt``.
        checkpoint: name of the newest checkpoint; empty if there was none.
        reason: why the job step ended.
    """

    attempt: str
    checkpoint: str
    reason: str


def check_job(variables: Mapping[str, str]) -> None:
    """Raise UserError for a job of SLURM that these scripts cannot run, naming its variable."""
    if variables.get("SLURM_ARRAY_JOB_ID"):
        raise UserError("SLURM_ARRAY_JOB_ID: every task of a job array would train the same run; submit one job a run, "
                        "without --array")  # fmt: skip
    if int(variables.get("SLURM_HET_SIZE") or 0) > 1:
        raise UserError(f"SLURM_HET_SIZE={variables['SLURM_HET_SIZE']}: a heterogeneous job would start the ranks of its first "
                        "part only; submit one part")  # fmt: skip
    for name, default in (MAX_REQUEUES, MAX_WITHOUT_PROGRESS):
        _limit(variables, name, default)


def _limit(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name) or str(default)
    if not re.fullmatch(r"\d{1,6}", text):
        raise UserError(f"{name}={text!r} is not a number of requeues; give 0 or more (default: {default})")
    return int(text)


def why_unfinished(status: int, said: RunStatus | None, notes: Sequence[ExitNote], preempted: bool) -> tuple[bool, str]:
    """Return whether an unfinished run should continue by itself, and why its job step ended.

    Args:
        status: exit status of the job step.
        said: what the run said of itself in this start of the job; None if nothing.
        notes: what its ranks said in this start of the job.
        preempted: whether SLURM is preempting the job.
    """
    if said is not None and said.state == STOPPED:
        return said.stopped_by != "SIGINT", f"stopped by {said.stopped_by} after step {said.step}"
    if preempted:
        return True, "preempted"
    verdicts = [note.verdict.removeprefix("watchdog: ") for note in notes if note.verdict]
    lost = [f"rank {note.rank} ({note.host}) was lost" for note in notes if note.ending == NO_WORD]
    failed = [note.ending for note in notes if note.ending.startswith("failed")]
    if verdicts or lost:
        return True, (verdicts or lost)[0]
    if failed:
        return False, failed[0]
    return status == AGAIN or status >= 128, f"ended with status {status}"


def end_job(status: int, output: Path, job: Mapping[str, str], variables: Mapping[str, str]) -> int:
    """Queue the job again if its run is to continue; say so in one line. Return the exit status of the job.

    Args:
        status: exit status of the job step.
        output: folder of the run.
        job: fields of ``scontrol show job``.
        variables: environment of the batch script.
    """
    attempt, number = slurm_attempt(variables), variables["SLURM_JOB_ID"]
    said = read_status(output)
    said = said if said and said.attempt == attempt else None
    if said is not None and said.state == FINISHED:
        if status:
            _say(f"the run is finished; its job step ended with status {status}")
        return 0
    if job.get("JobState") != "RUNNING":
        return status  # cancelled, or SLURM itself queues it again
    notes = [note for note in read_notes(output) if note.attempt == attempt]
    again, reason = why_unfinished(status, said, notes, job.get("PreemptTime", "None") != "None")
    if not again:
        _say(f"{reason}; job {number} is not queued again")
        return status or AGAIN
    latest = output / "checkpoints" / "latest"
    checkpoint = read_text(latest).strip() if latest.is_file() else ""
    refusal = bound_reached(checkpoint, read_requeues(output), variables)
    if not refusal:
        restart, most = int(variables.get("SLURM_RESTART_COUNT") or 0) + 1, _limit(variables, *MAX_REQUEUES)
        _say(f"{reason}; requeueing job {number} ({restart} of at most {most} times)")
        # Before the request, after which SLURM ends this process.
        with (output / RECORD).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(Requeue(attempt, checkpoint, reason))) + "\n")
        refusal = _scontrol("requeue", number)[1]
    if refusal:
        _say(f"{reason}; job {number} is not queued again: {refusal}; the same command continues")
    return status or AGAIN


def bound_reached(checkpoint: str, requeues: Sequence[Requeue], variables: Mapping[str, str]) -> str:
    """Return which bound forbids another requeue; empty if none does.

    Args:
        checkpoint: name of the newest checkpoint.
        requeues: what the run's folder records.
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
        return f"{in_vain} requeues brought no new checkpoint ({MAX_WITHOUT_PROGRESS[0]}={most})"
    return ""


def read_requeues(output: Path) -> list[Requeue]:
    """Return the requeues that a run's folder records, the oldest first; a line that a kill has truncated is left out."""
    path, requeues = output / RECORD, []
    for line in read_text(path).splitlines() if path.is_file() else []:
        with suppress(ValueError, TypeError):
            requeues.append(Requeue(**json.loads(line)))
    return requeues


def _scontrol(*words: str) -> tuple[str, str]:
    """Run ``scontrol`` and return what it printed, and its error in one line; the error is empty if there was none."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False)
    except OSError as error:
        return "", f"scontrol: {error.strerror}"
    return done.stdout, "" if done.returncode == 0 else " ".join(f"scontrol: {done.stderr or done.stdout}".split())


def fields_of_job(text: str) -> dict[str, str]:
    """Return the fields that ``scontrol --oneliner show job`` printed, each as its first appearance says."""
    return dict(reversed(re.findall(r"(\w+)=(\S*)", text)))


def _say(text: str) -> None:
    print(f"pretrain: {text}", flush=True)


def main(arguments: list[str]) -> int:
    """Run ``begin RECIPE ...`` or ``end STATUS RECIPE ...`` and return the exit status; wrong input is status 2."""
    try:
        if arguments[0] == "begin":
            check_job(os.environ)
            load_recipe(arguments[1], arguments[2:])
            return 0
        status, output = int(arguments[1]), Path(load_recipe(arguments[2], arguments[3:]).run.output)
        shown, error = _scontrol("--oneliner", "show", "job", os.environ["SLURM_JOB_ID"])
        if error:
            _say(f"the job is not queued again: {error}")
        return end_job(status, output, fields_of_job(shown), os.environ)
    except UserError as error:
        print(f"yaware: error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
