"""DeepSpeed's launcher of one host at SIGTERM: the ranks may take their time to save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.runs import ROOT

# A rank that needs a while to save, and that notes the signals that it gets.
RANK = """
import pathlib, signal, sys, time
got = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(signal.Signals(number).name))
pathlib.Path("ready").touch()
while not got:
    time.sleep(0.01)
time.sleep(2)
pathlib.Path("got").write_text(" ".join(got))
"""


@pytest.mark.distributed
def test_sigterm_asks_the_ranks_to_save_and_waits_for_their_end(tmp_path):
    from pretrain.launch.launchers import LAUNCHERS, Job

    (tmp_path / "slow_rank.py").write_text(RANK)
    command = LAUNCHERS["node"].command(Job(["demo-cpu"], {"here": 1}, node_rank=0, master_port=29500))
    command[command.index("pretrain.train") :] = ["slow_rank"]
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    started = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"})
    try:
        limit = time.monotonic() + 100
        while not (tmp_path / "ready").exists():
            assert started.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=60) == 0
    finally:
        started.kill()
        started.wait()
    assert (tmp_path / "got").read_text() == "SIGUSR1"


def test_sigterm_before_there_are_ranks_ends_the_launcher():
    code = (
        "import signal, time\nfrom pretrain.engine import local_ranks\nsignal.signal(signal.SIGTERM, local_ranks.stop_ranks)\n"
        "local_ranks.keep_handler(signal.SIGTERM)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\n"
        "time.sleep(60)"
    )
    started = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout.readline() == "ready\n"
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        started.kill()
        started.wait()
