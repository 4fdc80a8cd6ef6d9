"""DeepSpeed's launcher on two hosts (network namespaces): equal losses as on one host; a cut cable ends both hosts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.distributed import free_port
from infra.watchdog import EXIT_STATUS
from tests.faults.rank_process import run_ranks
from tests.netns import Pair, two_hosts, why_not, write_hostfile
from tests.runs import ROOT, SMALL, environment, losses

STEPS, SECONDS = 12, 8
REASON = why_not()
pytestmark = [pytest.mark.distributed, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(scope="module")
def pair():
    with two_hosts() as hosts:
        yield hosts


def training(shards: Path, output: Path) -> list[str]:
    overrides = [f"--data.shards={shards}", f"--run.output={output}", f"--train.steps={STEPS}", *SMALL]
    return ["--module", "pretrain.train", "--config", "demo-cpu", *overrides, f"--train.watchdog_seconds={SECONDS}"]


def launcher() -> list[str]:
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]


class Job:
    """``deepspeed --no_ssh --node_rank k`` on each host; the output goes to ``host-a.log`` and ``host-b.log``."""

    def __init__(self, pair: Pair, folder: Path, arguments: list[str], store: Path) -> None:
        folder.mkdir(exist_ok=True)
        hostfile = write_hostfile(folder / "hostfile", pair)
        where = [
            "--hostfile",
            str(hostfile),
            "--no_ssh",
            "--master_addr",
            pair.a.address,
            "--master_port",
            str(free_port()),
        ]
        variables = {**environment(store), "GLOO_SOCKET_IFNAME": pair.interface, "PYTHONPATH": str(ROOT)}
        self.folder, self.processes = folder, []
        for rank, host in enumerate((pair.a, pair.b)):
            command = host.command([*launcher(), *where, "--node_rank", str(rank), *arguments])
            with (folder / f"{host.name}.log").open("wb") as log:
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log))

    def log(self, host: str) -> str:
        return (self.folder / f"{host}.log").read_text()

    def wait(self, timeout: float = 240) -> list[int]:
        """Return the exit status on each host."""
        limit = time.monotonic() + timeout
        try:
            return [process.wait(timeout=max(0.1, limit - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
                for member in family:
                    member.kill()
                process.kill()
                process.wait()
            print(self.log("host-a")[-3000:], self.log("host-b")[-3000:])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The folder of one MLflow store for all runs, because creating a store takes as long as a run."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def one_host(shards, tmp_path_factory):
    """The losses of two ranks on one host. A rank has one thread, as it has on two hosts."""
    folder = tmp_path_factory.mktemp("one-host")
    run_ranks(training(shards, folder / "run"), folder)
    return losses(folder / "run")


@pytest.mark.jobs
def test_two_hosts_give_the_losses_of_one(pair, shards, tmp_path, one_host, store):
    assert len({loss for _, loss in one_host}) == STEPS
    job = Job(pair, tmp_path, training(shards, tmp_path / "run"), store)
    assert job.wait() == [0, 0]
    # Equal to the last bit: the ranks add the same two numbers.
    assert losses(tmp_path / "run") == one_host


@pytest.mark.jobs
def test_a_cut_cable_ends_both_hosts_and_a_restart_continues_exactly(pair, shards, tmp_path, one_host, store):
    output = tmp_path / "run"
    job = Job(pair, tmp_path / "cut", training(shards, output), store)
    try:
        wait_for(lambda: len(losses(output)) >= 6, job)
        pair.cut()
        cut = time.monotonic()
        assert job.wait(timeout=120) == [EXIT_STATUS, EXIT_STATUS]
        took = time.monotonic() - cut
    finally:
        pair.connect()
    assert SECONDS - 2 < took < SECONDS + 60
    for host, rank, lost_host, lost_rank in (("host-a", 0, "host-b", 1), ("host-b", 1, "host-a", 0)):
        lines = [line for line in job.log(host).splitlines() if line.startswith("watchdog: ")]
        assert len(lines) == 1, job.log(host)
        assert lines[0].startswith(f"watchdog: rank {lost_rank} ({lost_host}) has sent no message for ")
        assert f"rank {rank} ({host}) waited in the " in lines[0]
    assert 6 <= len(losses(output)) < STEPS, "cut too late to show anything"
    saved = int((output / "checkpoints/latest").read_text().strip().removeprefix("step-"))
    assert saved in (4, 8), "a checkpoint is written every 4 steps"
    assert Job(pair, tmp_path / "again", training(shards, output), store).wait() == [0, 0]
    assert f"resuming after step {saved}: " in (tmp_path / "again" / "host-a.log").read_text()
    assert losses(output) == one_host


def wait_for(ready, job: Job, timeout: float = 150) -> None:
    limit = time.monotonic() + timeout
    while not ready():
        assert all(process.poll() is None for process in job.processes), job.log("host-a") + job.log("host-b")
        assert time.monotonic() < limit, "the run did not get that far"
        time.sleep(0.02)


@pytest.fixture
def sshd(pair, tmp_path):
    """Start an sshd on each host that accepts a key made for the test; return the path of an ssh configuration for it."""
    for tool in ("pdsh", "ssh-keygen", "/usr/sbin/sshd"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} not found (Debian: pdsh, openssh-server)")
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    shutil.copy(tmp_path / "user_key.pub", tmp_path / "authorized_keys")
    Path("/run/sshd").mkdir(exist_ok=True)
    options = [f"HostKey={tmp_path}/host_key", f"AuthorizedKeysFile={tmp_path}/authorized_keys", "UsePAM=no",
               "StrictModes=no", "PermitRootLogin=prohibit-password", "PidFile=none"]  # fmt: skip
    flags = [part for option in options for part in ("-o", option)]
    servers = [
        subprocess.Popen(host.command(["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-p", "2222", *flags]))
        for host in (pair.a, pair.b)
    ]
    config = tmp_path / "ssh_config"
    config.write_text(
        f"Host 10.77.0.*\n  Port 2222\n  IdentityFile {tmp_path}/user_key\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    yield config
    for server in servers:
        server.terminate()
        server.wait()


def over_pdsh(pair: Pair, output: Path, *overrides: str, work: Path, shards: Path, sshd: Path, store: Path):
    """Return the command that starts both hosts from ``work``, and its environment."""
    work.mkdir()
    hostfile = write_hostfile(work / "hostfile", pair)
    variables = environment(store)
    carried = {"GLOO_SOCKET_IFNAME": pair.interface, "MLFLOW_TRACKING_URI": variables["MLFLOW_TRACKING_URI"],
               "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # fmt: skip
    (work / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in carried.items()))
    # pdsh passes the command to a shell on the other host, which would expand the braces of an override. The recipe has these
    # options itself.
    arguments = [part for part in training(shards, output) if not part.startswith("--encoder.options")]
    command = [*launcher(), "--hostfile", str(hostfile), "--no_ssh_check", "--master_addr", pair.a.address,
               "--master_port", str(free_port()), *arguments, *overrides]  # fmt: skip
    return command, variables | {"PDSH_SSH_ARGS_APPEND": f"-F {sshd}", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_pdsh_starts_both_hosts_from_one(pair, shards, tmp_path, one_host, sshd, store):
    command, variables = over_pdsh(
        pair, tmp_path / "run", work=tmp_path / "work", shards=shards, sshd=sshd, store=store
    )
    done = subprocess.run(
        pair.a.command(command), cwd=tmp_path / "work", env=variables, capture_output=True, text=True, timeout=600
    )
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    assert losses(tmp_path / "run") == one_host


def ranks_of(output: Path) -> list[psutil.Process]:
    """Return the ranks of a run on both hosts."""
    ranks = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"--run.output={output}" in words and any(word.startswith("--local_rank") for word in words):
            ranks.append(process)
    return ranks


@pytest.mark.slow
def test_sigterm_ends_both_hosts_of_a_launch_over_pdsh(pair, shards, tmp_path, sshd, store):
    """`yaware launch` without its checks, which would not read the test's ssh configuration."""
    output = tmp_path / "run"
    command, variables = over_pdsh(
        pair, output, "--train.steps=100000", work=tmp_path / "work", shards=shards, sshd=sshd, store=store
    )
    # DeepSpeed's launcher ends all launchers with the same python path on the hosts. A path of its own protects other tests.
    (tmp_path / "venv").symlink_to(sys.prefix)
    command[0] = str(tmp_path / "venv/bin/python")
    code = (
        "import sys; from pretrain.launch.launchers import LAUNCHERS; from pretrain.launch.start import start; "
        "sys.exit(start(LAUNCHERS['pdsh'], sys.argv[1:]).status)"
    )
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(
            pair.a.command([sys.executable, "-c", code, *command]), cwd=tmp_path / "work", env=variables, stdout=log,
            stderr=log,
        )  # fmt: skip
    try:
        limit = time.monotonic() + 150
        while len(losses(output)) < 3:
            assert started.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert len(ranks_of(output)) == 2
        started.terminate()
        assert started.wait(timeout=60) == 1
        limit = time.monotonic() + 60
        while ranks_of(output):
            assert time.monotonic() < limit
            time.sleep(0.1)
    finally:
        for process in ranks_of(output):
            process.kill()
        started.kill()
        started.wait()
        print((tmp_path / "log").read_text()[-5000:])
