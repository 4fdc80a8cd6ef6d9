"""DeepSpeed's launcher of one host: at SIGTERM the ranks may take their time to save; they get what DeepSpeed gives them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.runs import ROOT

# A rank that notes what it was given; rank 1 then fails, if it is told to, when rank 0 has done its part.
NOTING = """
import json, os, pathlib, sys, time
folder, status, rank = pathlib.Path(sys.argv[-1]), int(sys.argv[-2]), int(os.environ["RANK"])
part = folder / f"rank-{rank}.part"
part.write_text(json.dumps([sys.argv[1:-1], dict(os.environ)]))
part.rename(folder / f"rank-{rank}")
while status and rank and not (folder / "rank-0").exists():
    time.sleep(0.05)
sys.exit(status * rank)
"""
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
# What the launcher sets for a rank.
OF_A_RANK = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


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


@pytest.mark.distributed
@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("visible", [None, "4,5"])
def test_the_ranks_get_what_deepspeeds_own_launcher_gives_them(tmp_path, status, visible):
    from pretrain.launch.launchers import LAUNCHERS, LOCAL_RANKS, Job

    (tmp_path / "noting_rank.py").write_text(NOTING)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path))), "DS_ACCELERATOR": "cpu"}
    variables.pop("CUDA_VISIBLE_DEVICES", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            patch.setenv("CUDA_VISIBLE_DEVICES", visible)
        ours = LAUNCHERS["one-host"].command(Job(["demo-cpu"], {"localhost": 2}, master_port=29511))
    del ours[ours.index("pretrain.train") :]
    theirs = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", *ours[len(LOCAL_RANKS) :]]
    found, output = {}, {}
    for name, command in (("ours", ours), ("theirs", theirs)):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [*command, "noting_rank", str(status), str(tmp_path / name)], cwd=tmp_path, env=variables, capture_output=True,
            text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        output[name] = [line.partition("] ")[2] for line in done.stdout.splitlines()]
        notes = [json.loads((tmp_path / name / f"rank-{rank}").read_text()) for rank in (0, 1)]
        # What the import of DeepSpeed sets in the launcher, and so in its ranks, each rank sets itself.
        found[name] = [
            (arguments, {key: environment.get(key) for key in OF_A_RANK}) for arguments, environment in notes
        ]
        if name == "ours":
            added = {key for _, environment in notes for key in environment} - set(variables) - set(OF_A_RANK)
            assert added <= {"LC_CTYPE"}  # Python's own, in a locale without a language
    assert found["ours"] == found["theirs"]
    assert found["ours"][1][1]["CUDA_VISIBLE_DEVICES"] == (visible or "0,1")
    assert [len(lines) for lines in output.values()] == [bool(status)] * 2


def test_the_launcher_is_imported_whole_if_it_takes_more_than_is_known():
    code = """
        import os, sys
        os.environ["DS_ACCELERATOR"] = "cpu"
        from pretrain.engine import launcher_import
        assert launcher_import.import_launcher().__module__ == "deepspeed.launcher.launch" and "torch" not in sys.modules
        for name in [name for name in sys.modules if name.startswith("deepspeed")]:
            del sys.modules[name]
        launcher_import._put = lambda name, content: sys.modules.update({name: type(sys)(name)}) or {}
        assert launcher_import.import_launcher().__module__ == "deepspeed.launcher.launch"
        assert sys.modules["deepspeed"].DeepSpeedEngine
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


def test_the_launchers_sleep_ends_early_for_a_rank_that_is_done_and_not_for_one_that_failed():
    code = """
        import subprocess, sys, time
        from pretrain.engine.launcher_import import Clock

        def slept(status):
            child = subprocess.Popen([sys.executable, "-c", f"import sys; sys.exit({status})"])
            started = time.monotonic()
            Clock().sleep(20 if status == 0 else 1)
            seconds = time.monotonic() - started
            assert child.wait() == status
            return seconds

        assert slept(0) < 19
        assert slept(3) >= 1
        started = time.monotonic()
        Clock().sleep(20)  # without a child
        assert time.monotonic() - started < 19
        assert Clock().strftime("%Y", Clock().localtime(0)) in ("1969", "1970")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)
