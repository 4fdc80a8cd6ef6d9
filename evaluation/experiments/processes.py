"""Runs an experiment's commands, several at a time, each on its own CPU cores."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from infra import ray_cluster
from infra.errors import UserError
from infra.files import read_text


@dataclass(frozen=True)
class Command:
    """A command of a job.

    Args:
        title: names the command in messages.
        words: the command line.
        log: file for what it prints.
        is_done: whether it need not run; asked before it starts.
        finish: called after it ended with status 0; a returned text is an error.
    """

    title: str
    words: Sequence[str]
    log: Path
    is_done: Callable[[], bool] = lambda: False
    finish: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other on the same cores."""

    name: str
    commands: Sequence[Command]


def run_jobs(
    jobs: Sequence[Job], at_a_time: int, title: str, *, may_start: Callable[[], bool] = lambda: True
) -> list[str]:
    """Run jobs, ``at_a_time`` of them at once; return the names of those that were not started.

    SIGTERM and Ctrl-C are passed on to the running commands, which can save their state.

    Args:
        jobs: in the order of their start.
        at_a_time: the cores of this process are divided among so many jobs.
        title: of the progress lines.
        may_start: asked before each job; False leaves out this one.

    Raises:
        UserError: with the last line of its log, if a command fails; no further job is started.
    """
    cores = sorted(os.sched_getaffinity(0))
    free_cores: SimpleQueue[list[int]] = SimpleQueue()
    for job in range(at_a_time):
        free_cores.put(cores[job % len(cores) :: at_a_time])
    start, running, left_out = time.monotonic(), set[subprocess.Popen[bytes]](), list[str]()

    def run_one(number: int) -> None:
        """Run a job on the next free cores."""
        job, job_cores = jobs[number], free_cores.get()
        try:
            if not may_start():
                left_out.append(job.name)
                return
            for command in job.commands:
                if not command.is_done():
                    _run_command(command, job_cores, running)
        finally:
            free_cores.put(job_cores)
        minutes = (time.monotonic() - start) / 60
        print(f"{title}: {job.name} done, {minutes:.1f} min for {number + 1} of {len(jobs)}", flush=True)

    pool = ThreadPoolExecutor(at_a_time)
    try:
        with _sigterm_as_interrupt():
            list(pool.map(run_one, range(len(jobs))))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True)
    return left_out


def _run_command(command: Command, cores: list[int], running: set[subprocess.Popen[bytes]]) -> None:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    threads = dict.fromkeys(ray_cluster.WORKER_THREADS, str(len(cores)))
    with command.log.open("wb") as stream:
        process = subprocess.Popen(
            command.words, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **threads},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
    running.add(process)
    status = process.wait()
    running.discard(process)
    problem = f"ended with status {status}" if status else command.finish()
    if problem:
        lines = read_text(command.log, errors="replace").splitlines()
        last_line = next((line for line in reversed(lines) if line.strip()), "")
        raise UserError(f"{command.title} {problem}: {last_line[:300]} (log: {command.log})")


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, so that both signals stop the running processes."""

    def interrupt(*_: Any) -> None:
        """Handle SIGTERM."""
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
