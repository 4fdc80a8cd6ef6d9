"""Which jobs of SLURM may be queued again, and the record of the requeues."""

from __future__ import annotations

import json

import pytest

from infra.errors import UserError
from infra.slurm.requeue import Requeue, bound_reached, check_job, fields_of_job, read_requeues

JOB = {"SLURM_JOB_ID": "12"}


def test_requeues_are_bounded_in_all_and_without_a_new_checkpoint():
    def record(*names: str, job: int = 12) -> list[Requeue]:
        return [Requeue(f"{job}.{number}", name, "stopped") for number, name in enumerate(names)]

    assert bound_reached("", [], JOB) == ""
    assert bound_reached("c", record("a", "b", "b"), JOB) == ""
    assert bound_reached("b", record("a", "b", "b"), JOB) == ""
    assert bound_reached("b", record("b", "b", "b"), JOB) == "3 requeues brought no progress (YAWARE_RESTARTS=3)"
    assert bound_reached("b", record("b", "b", "b", job=11), JOB) == "", "requeues of another job"
    assert bound_reached("b", record("b"), {**JOB, "YAWARE_RESTARTS": "1"}) != ""
    restarted = {**JOB, "SLURM_RESTART_COUNT": "100"}
    assert bound_reached("c", [], restarted) == "it was restarted 100 times (YAWARE_MAX_REQUEUES=100)"
    assert bound_reached("c", [], {**restarted, "YAWARE_MAX_REQUEUES": "101"}) == ""


def test_a_truncated_line_of_the_record_is_left_out(tmp_path):
    line = json.dumps({"attempt": "12.0", "checkpoint": "a", "reason": "stopped"})
    (tmp_path / "record").write_text(f'{line}\n{{"attempt": "12\n[1]\n')
    assert read_requeues(tmp_path / "record") == [Requeue("12.0", "a", "stopped")]


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"SLURM_ARRAY_JOB_ID": "7"}, "SLURM_ARRAY_JOB_ID: .* job array .*; submit one job a run, without --array"),
        ({"SLURM_HET_SIZE": "2"}, "SLURM_HET_SIZE=2: a heterogeneous job .*; submit one part"),
        ({"YAWARE_MAX_REQUEUES": "many"}, "YAWARE_MAX_REQUEUES='many' is not a number of requeues; give 0 or more"),
        ({"YAWARE_RESTARTS": "-1"}, "YAWARE_RESTARTS='-1' is not a number"),
    ],
)
def test_a_job_that_cannot_run_is_refused_with_its_variable(variables, text):
    check_job(JOB)
    with pytest.raises(UserError, match=text):
        check_job({**JOB, **variables})


def test_the_fields_of_a_job_are_not_taken_from_its_command_line():
    text = "JobId=12 JobState=RUNNING PreemptTime=None Command=/x.sbatch demo-cpu --a.JobState=CANCELLED PreemptTime=1"
    assert {"JobState": "RUNNING", "PreemptTime": "None"}.items() <= fields_of_job(text).items()
