"""Launchers: hostfiles, the command line of each entry of LAUNCHERS, signals, and a launcher added at run time."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from infra import cli
from infra.distributed import accelerator, free_port
from infra.errors import UserError
from pretrain.engine.engine import start_ranks
from pretrain.launch.hosts import read_hostfile
from pretrain.launch.launchers import LAUNCHERS, Job, Launcher
from pretrain.launch.processes import RankObserver
from pretrain.launch.start import start, start_on_this_host
from tests.runs import ROOT, SMALL, environment, losses


def test_a_launcher_is_one_entry_of_the_table(shards, tmp_path, monkeypatch, capfd):
    """A toy launcher: `yaware launch` starts its command, a signal reaches its `stop`, `yaware plan` prints its line."""
    stopped = []

    def command(job):
        script = (
            "import os, signal, sys, time; print('toy', *sys.argv[1:]); os.kill(os.getppid(), signal.SIGTERM); "
            "time.sleep(60)"
        )
        return [sys.executable, "-uc", script, str(sum(job.hosts.values())), *job.recipe]

    def stop(process):
        stopped.append(process.pid)
        process.kill()

    toy = Launcher(command, stop, lambda hosts, ranks, recipe: [f"toy --ranks={hosts * ranks} {recipe}"])
    monkeypatch.setitem(LAUNCHERS, "toy", toy)
    (tmp_path / "hosts").write_text("here slots=2\n")
    given = ["--config", "demo-cpu", f"--data.shards={shards}", f"--run.output={tmp_path}/run", "--batch.global=4"]
    assert cli.run(["launch", "--launcher", "toy", "--hostfile", f"{tmp_path}/hosts", *given]) == -signal.SIGKILL
    assert len(stopped) == 1
    assert f"toy 2 demo-cpu {given[2]}" in capfd.readouterr().out
    assert cli.run(["plan", *given, "--gpus", "2"]) == 0
    assert "  toy --ranks=2 demo-cpu" in capfd.readouterr().out


def test_an_unknown_launcher_is_refused_with_the_nearest(tmp_path, capsys):
    assert cli.run(["launch", "--launcher", "psdh", "--hostfile", f"{tmp_path}/hosts", "--config", "demo-cpu"]) == 2
    assert (
        "--launcher=psdh is not known (did you mean 'pdsh'?); allowed: one-host, pdsh, node, slurm"
        in capsys.readouterr().err
    )


def test_starting_restores_the_signal_handlers_and_the_environment(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    before = dict(os.environ), [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    assert start(LAUNCHERS["one-host"], [sys.executable, "-c", "raise SystemExit(3)"]).status == 3
    assert (dict(os.environ), [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]) == before


def test_an_error_while_the_job_runs_stops_the_job_and_closes_the_observer(monkeypatch):
    stopped, closed = [], []

    def stop(process):
        stopped.append(process)
        process.kill()

    def look(observer):
        raise RuntimeError("no memory")

    close = RankObserver.close
    monkeypatch.setattr(RankObserver, "look", look)
    monkeypatch.setattr(RankObserver, "close", lambda observer: closed.append(close(observer)))
    with pytest.raises(RuntimeError, match="no memory"):
        start(Launcher(lambda job: [], stop), ["sleep", "60"])
    assert [process.returncode for process in stopped] == [-signal.SIGKILL]
    assert len(closed) == 1


def test_slurm_submits_equal_hosts_from_the_checkout(tmp_path, monkeypatch):
    job = Job(["demo-cpu", "--run.name=a"], {"a": 4, "b": 4})
    expected = ["--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "infra/launch/pretrain.sbatch", *job.recipe]
    monkeypatch.chdir(ROOT)
    assert LAUNCHERS["slurm"].command(job) == ["sbatch", *expected]
    with pytest.raises(UserError, match="SLURM takes the same number on each"):
        LAUNCHERS["slurm"].command(Job(["demo-cpu"], {"a": 4, "b": 2}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="submit from the checkout"):
        LAUNCHERS["slurm"].command(job)


def test_slurm_does_not_carry_the_device_of_the_login_node_to_nodes_with_gpus(tmp_path, monkeypatch, shards):
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\n")
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.chdir(ROOT)
    given = ["--config", "demo-cpu", f"--data.shards={shards}", f"--run.output={tmp_path}/run", "--batch.global=4"]
    assert cli.run(["launch", "--launcher", "slurm", "--hostfile", f"{tmp_path}/hosts", *given]) == 0
    assert "DS_ACCELERATOR" not in (tmp_path / "environment").read_text()


def test_the_device_is_that_of_the_variable_or_the_one_that_torch_sees(monkeypatch):
    for sees_gpu, found in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda sees_gpu=sees_gpu: sees_gpu)
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        assert accelerator() == found
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        assert accelerator() == "cpu"
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(UserError, match="DS_ACCELERATOR=xpu is not supported; allowed: cuda, cpu, or unset"):
        accelerator()
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match="DS_ACCELERATOR=cuda, but torch sees no GPU on this host"):
        start_ranks()


def test_a_hostfile_means_the_same_as_to_deepspeed(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\nnode01 slots=8\n\n10.0.0.2   slots=4 # smaller\n")
    assert read_hostfile(path) == {"node01": 8, "10.0.0.2": 4}
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(path))) == read_hostfile(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("node01\n", "line 1: 'node01' is not of the form `name slots=8`"),
        ("a slots=2\na slots=2\n", "line 2: 'a slots=2' names a host for a second time"),
        ("# none\n", "names no host"),
        (None, "cannot be read: No such file"),
    ],
)
def test_an_error_in_a_hostfile_names_the_line(tmp_path, content, text):
    path = tmp_path / "hosts"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=text):
        read_hostfile(path)


@pytest.mark.parametrize("name", ["node[1-2]", "a,b", "a;reboot", "-oProxyCommand", "^file", "a%h", "$(x)"])
def test_a_name_that_pdsh_or_a_shell_would_interpret_is_refused(tmp_path, name):
    (tmp_path / "hosts").write_text(f"a slots=1\n{name} slots=1\n")
    with pytest.raises(
        UserError, match=rf"line 2: {re.escape(repr(name))} is not the name of one host; allowed: letters"
    ):
        read_hostfile(tmp_path / "hosts")


def test_names_addresses_and_users_of_hosts_are_read(tmp_path):
    (tmp_path / "hosts").write_text("gpu-01.lab.org slots=1\nme@n_2 slots=1\nfe80::1 slots=1\n")
    assert list(read_hostfile(tmp_path / "hosts")) == ["gpu-01.lab.org", "me@n_2", "fe80::1"]


def test_one_host_refuses_a_hostfile_with_two(tmp_path, capsys):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    given = ["--config", "demo-cpu", "--hostfile", f"{tmp_path}/hosts", "--launcher", "one-host"]
    assert cli.run(["launch", *given]) == 2
    assert "one-host starts one host, but" in (error := capsys.readouterr().err)
    assert "hosts names 2: a, b; use pdsh, node or slurm" in error


def job(recipe, **more):
    return Job(recipe, {"node01": 8, "node02": 8}, master_port=29500, **more)


def test_pdsh_starts_all_hosts_with_the_first_as_the_master(tmp_path):
    command = LAUNCHERS["pdsh"].command(job(["demo-cpu"], hostfile=tmp_path))
    assert command[command.index("--master_addr") + 1] == "node01"
    assert "--no_ssh" not in command
    with pytest.raises(UserError, match="shells of the other hosts would split or expand .*; write it into a recipe"):
        LAUNCHERS["pdsh"].command(job(["demo-cpu", "--encoder.options={width: 1}"], hostfile=tmp_path))


def test_node_starts_one_host_and_refuses_a_number_beyond_the_hostfile(tmp_path):
    given = ["demo-cpu", "--encoder.options={width: 1}"]
    command = LAUNCHERS["node"].command(job(given, hostfile=tmp_path, node_rank=1))
    assert command[command.index("--node_rank") + 1] == "1"
    assert command[command.index("--master_addr") + 1] == "node01"
    assert devices_of(command) == {"node01": list(range(8)), "node02": list(range(8))}
    assert command[-2:] == given
    with pytest.raises(UserError, match="--node_rank=2 is not a host of .*, which has 2: 0 to 1"):
        LAUNCHERS["node"].command(job(["demo-cpu"], hostfile=tmp_path, node_rank=2))


STAND_INS = {
    # Over pdsh DeepSpeed's handler ends the ranks on the other hosts, then pdsh here, and exits with 1.
    "pdsh": """
import pathlib, signal, subprocess, sys, time
below = subprocess.Popen(["./pdsh"])
def end(*_):
    pathlib.Path("asked").write_text("pdsh still there" if below.poll() is None else "pdsh gone")
    below.kill()
    below.wait()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
pathlib.Path("ready").touch()
while True:
    time.sleep(0.01)
""",
    # On one host before any rank has started: no handler, and a child process that would be orphaned.
    "one-host": """
import pathlib, subprocess, time
below = subprocess.Popen(["sleep", "60"])
pathlib.Path("asked").write_text(str(below.pid))
pathlib.Path("ready").touch()
while True:
    time.sleep(0.01)
""",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("kind", STAND_INS)
def test_a_signal_ends_a_launcher_that_has_no_ranks_on_this_host(kind, number, tmp_path):
    """Scripts stand in for DeepSpeed's launcher and for pdsh. SIGINT comes from `kill`, not from a terminal."""
    (tmp_path / "launcher.py").write_text(STAND_INS[kind])
    (tmp_path / "pdsh").write_text("#!/bin/bash\nexec -a pdsh sleep 60\n")
    (tmp_path / "pdsh").chmod(0o755)
    code = (
        "import sys; from pretrain.launch.launchers import LAUNCHERS; from pretrain.launch.start import start; "
        f"sys.exit(start(LAUNCHERS[{kind!r}], [sys.executable, 'launcher.py']).status)"
    )
    started = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        limit = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(0.2)  # until the handler is installed
        started.send_signal(number)
        status = started.wait(timeout=30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    assert status != 0
    asked = (tmp_path / "asked").read_text()
    if kind == "pdsh":
        assert (status, asked) == (1, "pdsh still there")
    else:
        assert not psutil.pid_exists(int(asked)) or psutil.Process(int(asked)).status() == psutil.STATUS_ZOMBIE


@pytest.mark.jobs
@pytest.mark.distributed
@pytest.mark.timeout(1000)
def test_launch_trains_on_one_host_of_a_hostfile(shards, tmp_path):
    """One host with two ranks, started by --node_rank as each host of a cluster without ssh is."""
    (tmp_path / "hosts").write_text("127.0.0.1 slots=2\n")
    given = [f"--data.shards={shards}", f"--run.output={tmp_path}/run", "--train.steps=1", *SMALL]
    given.append("--encoder.options={width: 0.25, norm: batch, channels_last: true}")  # weights that are not contiguous
    command = [sys.executable, "-m", "infra.cli", "launch", "--config", "demo-cpu", "--hostfile", f"{tmp_path}/hosts"]
    where = ["--node_rank", "0", "--master_port", str(free_port())]
    done = subprocess.run(
        [*command, *where, *given], env=environment(tmp_path), capture_output=True, text=True, timeout=900
    )
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    assert " -m pretrain.engine.local_ranks --world_info=" in done.stdout
    assert [step for step, _ in losses(tmp_path / "run")] == [0]


def devices_of(command: list[str]) -> dict[str, list[int | str]]:
    """Return the devices that a command gives the ranks of each host."""
    (word,) = [word for word in command if word.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(word.partition("=")[2]))


@pytest.mark.parametrize(
    ("visible", "devices"),
    [(None, [0, 1]), ("", [0, 1]), ("5,3,1", [5, 3]), ("GPU-8f6e, GPU-11aa", ["GPU-8f6e", "GPU-11aa"])],
)
def test_one_host_keeps_the_gpus_that_the_user_made_visible(monkeypatch, visible, devices):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices_of(LAUNCHERS["one-host"].command(Job(["demo-cpu"], {"localhost": 2}))) == {"localhost": devices}
    two_hosts = LAUNCHERS["node"].command(Job(["demo-cpu"], {"a": 2, "b": 2}, node_rank=1))
    assert devices_of(two_hosts) == {"a": [0, 1], "b": devices}


def test_more_ranks_than_gpus_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("pretrain.launch.start.visible_gpus", lambda: 1)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match=r"launch.ranks=2 needs a GPU .*; found 1 \(CUDA_VISIBLE_DEVICES=3\); lower"):
        start_on_this_host(["demo-cpu"], 2, tmp_path)
