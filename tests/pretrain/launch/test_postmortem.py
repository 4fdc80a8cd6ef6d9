"""A lost rank is named even if the launcher ends all other ranks before they can report it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from infra.watchdog.exit_note import RUNNING, TERMINATED, ExitNote, read_notes, remove_notes
from pretrain.launch import processes
from pretrain.launch.launchers import Launcher
from pretrain.launch.postmortem import explain
from pretrain.launch.processes import Death
from pretrain.launch.start import start
from tests.runs import ROOT

RANK = """
import os, signal, sys, time
from pathlib import Path
from infra.watchdog import RankNote
with RankNote(Path(sys.argv[1])):
    Path(f"ready-{os.environ['RANK']}").touch()
    if sys.argv[3:] == ["clean"]:
        sys.exit(0)
    time.sleep(0.5 if sys.argv[3:] == ["fail"] else 60)
    raise ValueError("bad")
"""
# Starts three ranks as DeepSpeed's launcher does; kills rank 2, and then ends the others without any delay.
LAUNCHER = """
import os, signal, subprocess, sys, time
from pathlib import Path
how, run = sys.argv[1:3]
kind = [how] if how in ("clean", "fail") else []
ranks = [subprocess.Popen([sys.executable, "rank.py", run, f"--local_rank={rank}", *kind],
                          env={**os.environ, "RANK": str(rank)}) for rank in range(3)]
while not all(Path(f"ready-{rank}").exists() for rank in range(3)):
    time.sleep(0.02)
if not kind:
    time.sleep(3)  # for the observer to find the ranks
    ranks[2].kill()
    # As a launcher sees it: all its threads have ended. /proc calls it a zombie before that.
    os.waitid(os.P_PID, ranks[2].pid, os.WEXITED | os.WNOWAIT)
    for rank in ranks[:2]:
        rank.send_signal(getattr(signal, how))
sys.exit([rank.wait() for rank in reversed(ranks)][0])
"""


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Run the launcher with three light ranks; returns how the job ended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "launcher.py").write_text(LAUNCHER)

    def launch(how):
        command = [sys.executable, "launcher.py", how, str(tmp_path / "run")]
        return start(Launcher(lambda job: command), command, run_folder=tmp_path / "run")

    return launch


def test_survivors_that_the_launcher_terminates_at_once_do_not_hide_the_killed_rank(launched):
    end = launched("SIGTERM")
    assert end.status == 256 - signal.SIGKILL
    assert end.reason.startswith(
        f"rank 2 ({socket.gethostname()}) was killed by SIGKILL (out of memory, perhaps: see dmesg)"
    )


def test_survivors_that_the_launcher_kills_do_not_hide_the_rank_that_was_killed_first(launched):
    # No time passes between the deaths. DeepSpeed's launcher waits 30 s before it sends SIGKILL.
    end = launched("SIGKILL")
    assert end.reason.startswith(f"rank 2 ({socket.gethostname()}) was killed by SIGKILL")
    assert "rank 0" not in end.reason


def test_deaths_keep_their_order_if_the_observer_looks_only_afterwards(monkeypatch):
    ranks = [subprocess.Popen(["sleep", "60"], env={**os.environ, "RANK": str(rank)}) for rank in range(4)]
    monkeypatch.setattr(processes, "local_ranks", lambda launcher: [psutil.Process(rank.pid) for rank in ranks])
    observer = processes.RankObserver(0)
    try:
        limit = time.monotonic() + 60
        while observer.running.count("rank ") < 4:  # a process that has just been started has no environment yet
            assert time.monotonic() < limit
            observer.look()
        for rank in (2, 0, 3):
            # /proc shows a zombie before those who watch it are told; an epoll is told as the observer's is.
            with select.epoll() as told:
                descriptor = os.pidfd_open(ranks[rank].pid)
                told.register(descriptor, select.EPOLLIN)
                ranks[rank].kill()
                assert told.poll(60)
                os.close(descriptor)
        observer.look()
        assert [(death.rank, death.signal_name) for death in observer.deaths] == [(r, "SIGKILL") for r in (2, 0, 3)]
        assert len({death.order for death in observer.deaths}) == 3
        assert observer.running == f"rank 1 (process {ranks[1].pid})"
    finally:
        observer.close()
        for process in ranks:
            process.kill()
            process.wait()


def test_a_rank_whose_environment_is_still_empty_is_found_later(monkeypatch):
    rank = subprocess.Popen(["sleep", "60"], env={**os.environ, "RANK": "3"})
    monkeypatch.setattr(processes, "local_ranks", lambda launcher: [psutil.Process(rank.pid)])
    monkeypatch.setattr(processes, "SEARCH_SECONDS", 0.0)
    observer = processes.RankObserver(0)
    try:
        with monkeypatch.context() as early:
            early.setattr(psutil.Process, "environ", lambda process: {})
            observer.look()
            assert not observer.running
        limit = time.monotonic() + 60
        while not observer.running:
            assert time.monotonic() < limit
            observer.look()
        assert observer.running == f"rank 3 (process {rank.pid})"
    finally:
        observer.close()
        rank.kill()
        rank.wait()


def test_a_process_forked_by_a_rank_is_neither_a_rank_nor_a_death(tmp_path, monkeypatch):
    """A rank that forks children with its own command line, then is killed."""
    script = "import os, sys, time; [os.fork() or time.sleep(60) for _ in range(2)]; time.sleep(60)"
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], '--local_rank=0'])"
    started = subprocess.Popen([sys.executable, "-c", launcher, script], env={**os.environ, "RANK": "5"})
    observer = processes.RankObserver(started.pid)
    try:
        limit = time.monotonic() + 60
        while len(psutil.Process(started.pid).children(recursive=True)) < 2:
            assert time.monotonic() < limit
            time.sleep(0.01)
        observer.look()
        (rank,) = processes.local_ranks(started.pid)
        assert observer.running == f"rank 5 (process {rank.pid})"
        child = next(iter(rank.children()))
        child.kill()
        while child.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        observer.look()
        assert observer.deaths == []
        rank.kill()
        started.wait(10)
        observer.look()
        assert [death.rank for death in observer.deaths] == [5]
    finally:
        observer.close()
        for process in psutil.process_iter(["cmdline"]):
            if script in (process.info["cmdline"] or []):
                process.kill()
        started.kill()
        started.wait()


def test_the_notes_suffice_if_the_observer_never_saw_the_ranks(launched, monkeypatch):
    monkeypatch.setattr("pretrain.launch.processes.local_ranks", lambda launcher: [])
    assert launched("SIGTERM").reason.startswith(f"rank 2 ({socket.gethostname()}) was killed by SIGKILL")


def test_ranks_that_end_by_themselves_are_not_lost(launched, tmp_path):
    assert launched("clean").reason == ""
    assert not (tmp_path / "run/ranks").exists(), "a clean end leaves no notes"
    end = launched("fail")
    assert (end.status, end.reason) == (1, "")
    assert {note.ending for note in read_notes(tmp_path / "run")} == {"failed: ValueError: bad"}


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
from infra.watchdog import RankNote, exit_note
write = exit_note.write_json

def write_slowly(path, content):
    if content["ending"].startswith("failed") and not Path("sent").exists():
        Path("sent").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
    write(path, content)

exit_note.write_json = write_slowly
with RankNote(Path(sys.argv[1])):
    raise RuntimeError("Connection closed by peer")
"""


def test_a_rank_that_is_terminated_while_it_writes_its_note_is_not_taken_for_the_killed_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "run")], cwd=tmp_path, capture_output=True, text=True,
        timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    (note,) = read_notes(tmp_path / "run")
    assert note.ending == "failed: RuntimeError: Connection closed by peer"


def test_a_verdict_of_the_watchdog_is_repeated():
    notes = [
        ExitNote(0, "a", 1, "ended by the watchdog", "watchdog: rank 1 (b) has died"),
        ExitNote(1, "b", 2, RUNNING),
    ]
    assert explain(notes, [], 75) == "rank 1 (b) has died"
    assert explain(notes, [], 0) == ""


def test_without_notes_the_first_rank_that_a_signal_ended_is_named():
    deaths = [Death(1, 4, "SIGSEGV"), Death(0, 9, "SIGKILL"), Death(2, 9, "SIGTERM")]
    assert explain([], deaths, 256 - signal.SIGSEGV).startswith("rank 1 was killed by SIGSEGV")
    assert explain([], [Death(0, 3), Death(1, 3, "SIGTERM")], 1) == ""


def test_ranks_whose_deaths_have_no_order_are_all_named_unless_their_notes_tell_them_apart():
    deaths = [Death(0, 5), Death(1, 5)]
    notes = [ExitNote(0, "a", 1, RUNNING), ExitNote(1, "a", 2, RUNNING)]
    assert explain(notes, deaths, 1).startswith("rank 0 (a) was killed; rank 1 (a) was killed (")
    notes[0].ending = TERMINATED
    assert explain(notes, deaths, 256 - signal.SIGBUS).startswith("rank 1 (a) was killed by SIGBUS (")


def test_old_notes_are_removed_only_for_the_given_host(tmp_path):
    from dataclasses import asdict

    from infra.files import write_json

    for rank, host in enumerate("ab"):
        write_json(tmp_path / f"ranks/rank-{rank:05d}.json", asdict(ExitNote(rank, host, os.getpid())))
    remove_notes(tmp_path, "a")
    assert [note.host for note in read_notes(tmp_path)] == ["b"]
    remove_notes(tmp_path)
    assert read_notes(tmp_path) == []
