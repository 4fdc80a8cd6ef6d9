"""Commands of an experiment: order, cores, errors, and what is not started."""

from __future__ import annotations

import sys

import pytest

from evaluation.experiments.processes import Command, Job, run_jobs
from infra.errors import UserError


def python(folder, name, code, **more):
    """Return a command that runs Python code."""
    return Command(name, [sys.executable, "-c", code], folder / f"{name}.log", **more)


def test_the_commands_of_a_job_run_in_order_and_done_ones_do_not(tmp_path):
    first = python(tmp_path, "first", f"open({str(tmp_path / 'a')!r}, 'w')")
    second = python(tmp_path, "second", f"open({str(tmp_path / 'a')!r}); open({str(tmp_path / 'b')!r}, 'w')")
    done = python(tmp_path, "done", "raise SystemExit(1)", is_done=lambda: True)
    assert run_jobs([Job("one", [first, done, second])], 2, "test") == []
    assert (tmp_path / "b").exists()


def test_jobs_that_may_not_start_are_named(tmp_path):
    answers = iter([True, False])
    jobs = [Job(name, [python(tmp_path, name, f"open({str(tmp_path / name)!r}, 'w')")]) for name in ("one", "two")]
    assert run_jobs(jobs, 1, "test", may_start=lambda: next(answers)) == ["two"]
    assert (tmp_path / "one").exists()
    assert not (tmp_path / "two").exists()


def test_a_failed_command_is_told_with_the_last_line_of_its_log(tmp_path):
    failing = python(tmp_path, "failing", "print('all is lost'); raise SystemExit(3)")
    with pytest.raises(UserError, match=r"failing ended with status 3: all is lost \(log: .*failing\.log\)"):
        run_jobs([Job("one", [failing])], 1, "test")
    unfinished = python(tmp_path, "unfinished", "", finish=lambda: "left nothing")
    with pytest.raises(UserError, match="unfinished left nothing"):
        run_jobs([Job("one", [unfinished])], 1, "test")
