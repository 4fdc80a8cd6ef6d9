"""The beginning and the end of a batch job of SLURM, for ``infra/launch/*.sbatch``: checks, and whether to queue it again.

``python -m pretrain.launch.batch_job begin RECIPE ...`` checks the job. ``... end STATUS RECIPE ...`` decides after the job
step, whose exit status is STATUS, and exits with the status of the job. The run itself says whether it is finished
(``infra.watchdog.run_status``), and its ranks say whether one of them failed or was lost (``infra.watchdog.exit_note``). A rank
whose input is wrong says so in the file of ``YAWARE_PROBLEM_FILE``: another start would meet the same input. The status of the
job step does not tell it, since SLURM ends the other ranks then, and the status may be theirs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra.distributed import slurm_attempt
from infra.errors import LoaderError, UserError
from infra.files import read_text
from infra.slurm.requeue import AGAIN, check_job, is_preempted, queue_again, show_job
from infra.watchdog.exit_note import PROBLEM_FILE, ExitNote, read_notes
from infra.watchdog.exit_note import RUNNING as NO_WORD
from infra.watchdog.run_status import FINISHED, STOPPED, RunStatus, read_status
from pretrain.config import load_recipe

RECORD = "requeues.jsonl"
WRONG_INPUT = "wrong input"
SHOWN = 4  # ranks of a message


def why_unfinished(
    status: int, said: RunStatus | None, notes: Sequence[ExitNote], preempted: bool, wrong_input: bool = False
) -> tuple[bool, str]:
    """Return whether an unfinished run should continue by itself, and why its job step ended.

    Args:
        status: exit status of the job step.
        said: what the run said of itself in this start of the job; None if nothing.
        notes: what its ranks said in this start of the job.
        preempted: whether SLURM is preempting the job.
        wrong_input: whether a rank ended because its input is wrong.
    """
    if said is not None and said.state == STOPPED:
        return said.stopped_by != "SIGINT", f"stopped by {said.stopped_by} after step {said.step}"
    if preempted:
        return True, "preempted"
    if wrong_input:
        return False, WRONG_INPUT
    verdicts = [note.verdict.removeprefix("watchdog: ") for note in notes if note.verdict]
    silent = [f"{note.rank} ({note.host})" for note in notes if note.ending == NO_WORD]
    lost = [f"rank {silent[0]} was lost" if len(silent) == 1 else
            f"{len(silent)} ranks were lost, one of them first: {', '.join(silent[:SHOWN])}"] if silent else []  # fmt: skip
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
    again, reason = why_unfinished(status, said, notes, is_preempted(job), is_input_wrong(notes, variables))
    if not again:
        _say(f"{reason}; job {number} is not queued again")
        return 2 if reason == WRONG_INPUT else status or AGAIN
    latest = output / "checkpoints" / "latest"
    checkpoint = read_text(latest).strip() if latest.is_file() else ""
    queue_again(output / RECORD, checkpoint, reason, variables, _say)
    return status or AGAIN


def is_input_wrong(notes: Sequence[ExitNote], variables: Mapping[str, str]) -> bool:
    """Return whether a rank of this job step ended with wrong input, which another start would meet again.

    A rank that cannot read its scans does not count: its node may be at fault, and another start may have another one.
    """
    path = variables.get(PROBLEM_FILE)
    unread = any(note.ending.startswith(f"failed: {LoaderError.__name__}") for note in notes)
    return bool(path) and not unread and Path(str(path)).is_file()


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
        job, error = show_job(os.environ["SLURM_JOB_ID"])
        if error:
            _say(f"the job is not queued again: {error}")
        return end_job(status, output, job, os.environ)
    except UserError as error:
        print(f"yaware: error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
