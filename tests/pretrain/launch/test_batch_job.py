"""The end of a batch job of SLURM: which jobs are queued again, and what is said."""

from __future__ import annotations

import os

import pytest

from infra.files import write_json
from infra.slurm import requeue
from infra.slurm.requeue import Requeue, read_requeues
from infra.watchdog.exit_note import ExitNote
from infra.watchdog.run_status import FINISHED, RUNNING, STOPPED, RunStatus, read_status
from pretrain.launch import batch_job
from pretrain.launch.batch_job import end_job, why_unfinished

JOB = {"SLURM_JOB_ID": "12"}
STOP = RunStatus(STOPPED, 0, 40, 900, "SIGTERM", "12.0")
VERDICT = "watchdog: rank 1 (b) has died (its connection closed); the same command continues from the last checkpoint"


def note(ending: str = "running", verdict: str = "", attempt: str = "12.0", rank: int = 0) -> ExitNote:
    return ExitNote(rank, "a", 1, ending, verdict, attempt)


@pytest.mark.parametrize(
    ("status", "said", "notes", "preempted", "again", "reason"),
    [
        (0, STOP, [], True, True, "stopped by SIGTERM after step 40"),
        # DeepSpeed's launcher may have got the signal too.
        (241, STOP, [], True, True, "stopped by SIGTERM after step 40"),
        (0, RunStatus(STOPPED, 0, 40, 900, "SIGINT", "12.0"), [], False, False, "stopped by SIGINT after step 40"),
        (1, None, [], True, True, "preempted"),
        (75, RunStatus(RUNNING, 0, 0, 900, "", "12.0"), [note("ended by the watchdog", VERDICT)], False, True,
         VERDICT.removeprefix("watchdog: ")),
        # srun gives the highest status of the tasks, here of one that it ended itself.
        (143, None, [note("failed: NotFinite: the loss is nan"), note("ended by SIGTERM", rank=1)], False, False,
         "failed: NotFinite: the loss is nan"),
        (143, None, [note("failed: RuntimeError: Connection reset"), note(rank=1)], False, True, "rank 1 (a) was lost"),
        # srun has killed the survivors too, before they could say anything.
        (143, None, [note(), note(rank=1)], False, True, "2 ranks were lost, one of them first: 0 (a), 1 (a)"),
        (138, None, [], False, True, "ended with status 138"),
        (2, None, [], False, False, "ended with status 2"),
        (0, None, [], False, False, "ended with status 0"),
    ],
)  # fmt: skip
def test_an_unfinished_run_continues_unless_it_failed_or_the_user_stopped_it(
    status, said, notes, preempted, again, reason
):
    assert why_unfinished(status, said, notes, preempted) == (again, reason)


@pytest.fixture
def requeued(monkeypatch):
    """What scontrol was asked; it agrees."""
    asked = []
    monkeypatch.setattr(requeue, "scontrol", lambda *words: asked.append(words) or ("", ""))
    return asked


def test_a_stopped_run_is_recorded_and_requeued_in_one_line(tmp_path, requeued, capsys):
    STOP.write(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("step-00000040\n")
    assert end_job(0, tmp_path, {"JobState": "RUNNING"}, JOB) == 75
    assert requeued == [("requeue", "12")]
    assert read_requeues(tmp_path / "requeues.jsonl") == [
        Requeue("12.0", "step-00000040", "stopped by SIGTERM after step 40")
    ]
    assert capsys.readouterr().out == (
        "pretrain: stopped by SIGTERM after step 40; requeueing job 12 (1 of at most 100 times)\n"
    )


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "TIMEOUT"])
def test_a_job_that_slurm_ends_itself_is_left_alone(tmp_path, requeued, capsys, state):
    STOP.write(tmp_path)
    assert end_job(0, tmp_path, {"JobState": state}, JOB) == 0
    assert requeued == []
    assert capsys.readouterr().out == ""


def test_a_finished_run_is_a_success_whatever_ended_its_step(tmp_path, requeued, capsys):
    RunStatus(FINISHED, 0, 900, 900, "", "12.0").write(tmp_path)
    assert end_job(0, tmp_path, {"JobState": "RUNNING", "PreemptTime": "2026-01-01"}, JOB) == 0
    assert capsys.readouterr().out == ""
    assert end_job(143, tmp_path, {"JobState": "RUNNING"}, JOB) == 0
    assert capsys.readouterr().out == "pretrain: the run is finished; its job step ended with status 143\n"
    assert requeued == []


def test_the_words_of_an_earlier_start_do_not_count(tmp_path, requeued, capsys):
    STOP.write(tmp_path)
    (tmp_path / "ranks").mkdir()
    write_json(
        tmp_path / "ranks/rank-00001.json", {"rank": 1, "host": "a", "pid": 1, "verdict": VERDICT, "attempt": "12.0"}
    )
    assert end_job(2, tmp_path, {"JobState": "RUNNING"}, {**JOB, "SLURM_RESTART_COUNT": "1"}) == 2
    assert requeued == []
    assert capsys.readouterr().out == "pretrain: ended with status 2; job 12 is not queued again\n"


def test_wrong_input_is_not_queued_again_whatever_the_status_of_the_step(tmp_path, requeued, capsys):
    """SLURM has ended the other rank before it could say the same, and the step has that rank's status."""
    problem = tmp_path / ".problem-12"
    variables = {**JOB, "YAWARE_PROBLEM_FILE": str(problem)}
    assert end_job(143, tmp_path / "run", {"JobState": "RUNNING"}, variables) == 143
    assert len(requeued) == 1
    problem.write_text("none/manifest.json is missing")
    capsys.readouterr()
    assert end_job(143, tmp_path / "run", {"JobState": "RUNNING"}, variables) == 2
    assert len(requeued) == 1
    assert capsys.readouterr().out == "pretrain: wrong input; job 12 is not queued again\n"


def test_a_rank_that_cannot_read_its_scans_and_a_preempted_job_are_queued_again(tmp_path, requeued, capsys):
    problem = tmp_path / ".problem-12"
    problem.write_text("reader processes died")
    variables = {**JOB, "YAWARE_PROBLEM_FILE": str(problem)}
    (tmp_path / "ranks").mkdir()
    write_json(
        tmp_path / "ranks/rank-00001.json",
        {"rank": 1, "host": "a", "pid": 1, "ending": "failed: LoaderError: reader processes died", "attempt": "12.0"},
    )
    write_json(tmp_path / "ranks/rank-00000.json", {"rank": 0, "host": "b", "pid": 1, "attempt": "12.0"})
    assert end_job(143, tmp_path, {"JobState": "RUNNING"}, variables) == 143
    assert end_job(2, tmp_path / "new", {"JobState": "RUNNING", "PreemptTime": "2026-01-01T00:00:00"}, variables) == 2
    assert len(requeued) == 2
    assert [line.partition(";")[0] for line in capsys.readouterr().out.splitlines()] == [
        "pretrain: rank 0 (b) was lost",
        "pretrain: preempted",
    ]


def test_a_rank_that_was_lost_before_the_runs_folder_was_made_is_recorded(tmp_path, requeued, capsys):
    output = tmp_path / "runs" / "first"
    assert end_job(137, output, {"JobState": "RUNNING"}, JOB) == 137
    assert requeued == [("requeue", "12")]
    assert read_requeues(output / "requeues.jsonl") == [Requeue("12.0", "", "ended with status 137")]
    capsys.readouterr()
    (tmp_path / "file").touch()
    assert end_job(137, tmp_path / "file" / "run", {"JobState": "RUNNING"}, JOB) == 137
    assert len(requeued) == 1
    assert capsys.readouterr().out == (
        f"pretrain: ended with status 137; job 12 is not queued again: {tmp_path}/file/run/requeues.jsonl cannot be written "
        "(Not a directory); the same command continues\n"
    )


def test_a_refusal_of_slurm_is_said(tmp_path, monkeypatch, capsys):
    STOP.write(tmp_path)
    monkeypatch.setattr(requeue, "scontrol", lambda *words: ("", "scontrol: Requested operation is presently disabled"))
    assert end_job(0, tmp_path, {"JobState": "RUNNING"}, JOB) == 75
    assert capsys.readouterr().out.splitlines()[-1] == (
        "pretrain: stopped by SIGTERM after step 40; job 12 is not queued again: scontrol: Requested operation is presently "
        "disabled; the same command continues"
    )


def test_a_wrong_recipe_ends_the_batch_script_before_its_step(capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    assert batch_job.main(["begin", "demo-cpu", "--train.stepps=3"]) == 2
    assert "train.stepps" in capsys.readouterr().err
    assert batch_job.main(["begin", "demo-cpu", "--train.steps=3"]) == 0


def test_a_status_file_that_says_nothing_is_none(tmp_path):
    assert read_status(tmp_path) is None
    for content in ("", "[1]", '{"state": "running"}'):
        (tmp_path / "status.json").write_text(content)
        assert read_status(tmp_path) is None
    STOP.write(tmp_path)
    assert read_status(tmp_path) == STOP
