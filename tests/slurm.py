"""A SLURM cluster on one machine: Debian's daemons, a controller and two nodes in network namespaces, no file of the system's.

Everything lies in one temporary folder, and every process runs in a namespace of the cluster, by which it is found and ended.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from infra.processes.with_parent import command_with_parent
from tests import netns

CONTROLLER, NODES = "controller", ("node1", "node2")
ADDRESSES = {CONTROLLER: "10.77.1.1", "node1": "10.77.1.11", "node2": "10.77.1.12"}
INTERFACE = "cable"
# `cred_expire`: a requeued job waits until its old credentials have expired (120 s if this is not set).
# `MinJobAge`: a job that has ended can be asked about for as long as a test may wait.
# `GraceTime`: of a preempted job in the partition `low`; a job of `high` preempts it.
SLURM_CONF = """
ClusterName=yaware
SlurmctldHost=controller({controller})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
SlurmdDebug=debug
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdTimeout=15
KillWait=10
MinJobAge=3000
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=100000,sched_interval=2,bf_interval=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeAddr={node1} CPUs=8 RealMemory=8000 Gres=gpu:2
NodeName=node2 NodeAddr={node2} CPUs=8 RealMemory=8000 Gres=gpu:2
PartitionName=low Nodes=node1,node2 Default=YES PriorityTier=1 GraceTime=90
PartitionName=high Nodes=node1,node2 PriorityTier=10
"""
TOOLS = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "munged")


def why_not() -> str | None:
    """Return why this machine cannot run a SLURM cluster, or None if it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: slurm-wlm, munge; make test-packages)"
    if os.geteuid() != 0:
        return "SLURM's daemons are started as root"
    return netns.why_not()


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        folder: configuration, logs, spool and state.
        environment: variables that SLURM's commands need.
    """

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def namespace(self, host: str) -> str:
        """Return the name of a host's network namespace."""
        return f"{self.folder.name}-{host}"

    def enter(self, host: str, command: Sequence[str]) -> list[str]:
        """Return ``command`` wrapped to run on a host, which is also the host name that it sees."""
        script = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", self.namespace(host), "unshare", "--uts", "sh", "-c", script, host, *command]

    def run(self, *command: str, variables: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run one of SLURM's commands on the controller and return what it printed; fails with its error."""
        done = subprocess.run(
            self.enter(CONTROLLER, command), cwd=cwd, capture_output=True, text=True,
            env={**self.environment, **(variables or {})}, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, variables: dict[str, str] | None = None, cwd: Path | None = None) -> int:
        """Submit a batch job and return its number."""
        return int(self.run("sbatch", "--parsable", *arguments, variables=variables, cwd=cwd).strip())

    def job(self, number: int) -> dict[str, str]:
        """Return the fields that ``scontrol show job`` prints of a job, or of its first part: JobState, ExitCode, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", str(number)).splitlines()[0]
        return dict(re.findall(r"(\w+)=(\S*)", shown.partition(" Command=")[0]))

    def until(
        self, ready: Callable[[], dict[str, str] | None], seconds: float, told: Callable[[], str]
    ) -> dict[str, str]:
        """Wait until ``ready`` returns something, and return it; fails with what ``told`` returns and the logs."""
        limit = time.monotonic() + seconds
        while not (found := ready()):
            assert time.monotonic() < limit, f"{told()}\n{self.log()}"
            time.sleep(0.4)  # a look costs 20 ms of CPU
        return found

    def log(self) -> str:
        """Return the ends of the daemons' logs."""
        paths = [self.folder / f"{host}.log" for host in ADDRESSES]
        return "\n".join(f"{path.name}: {path.read_text()[-2500:]}" for path in paths if path.is_file())

    def processes(self, host: str) -> list[int]:
        """Return the process ids of a host."""
        done = subprocess.run(
            ["ip", "netns", "pids", self.namespace(host)], capture_output=True, text=True, check=False
        )
        return [int(word) for word in done.stdout.split()]

    def start_node(self, node: str) -> None:
        """Start a node's daemon, on a core of the node's own."""
        core = str(netns.CORES[0 if node == NODES[0] else -1])
        self._start(node, self.enter(node, ["taskset", "-c", core, "slurmd", "-D", "-N", node]))

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon and all that it has started, as a crash would."""
        while numbers := self.processes(node):
            for number in numbers:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            self.daemons[node].poll()
            time.sleep(0.02)
        self.daemons.pop(node).wait()

    def create(self) -> None:
        """Write the configuration, make the namespaces and start the daemons."""
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        for number in range(2):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(folder=self.folder, **ADDRESSES))
        (self.folder / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={self.folder}/gpu[0-1]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # detected, it would need /sys/fs/cgroup
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._create_network()
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed",
                 "log-file": "munge.log"}  # fmt: skip
        flags = [f"--{option}={self.folder / name}" for option, name in names.items()]
        self._start("munge", self.enter(CONTROLLER, ["munged", "--foreground", "--force", *flags]))
        limit = time.monotonic() + 20
        while not (self.folder / "munge.socket").exists():
            assert time.monotonic() < limit, (self.folder / "munge.out").read_text()
            time.sleep(0.02)
        self._start(CONTROLLER, self.enter(CONTROLLER, ["slurmctld", "-D"]))
        for node in NODES:
            self.start_node(node)
        self.await_nodes()

    def await_nodes(self, seconds: float = 40) -> None:
        """Wait until both nodes can be given to jobs."""
        limit = time.monotonic() + seconds
        while True:
            with suppress(AssertionError):
                states = self.run("sinfo", "-h", "-N", "--partition=low", "--format=%N %T").splitlines()
                if sorted(states) == ["node1 idle", "node2 idle"]:
                    return
            assert time.monotonic() < limit, self.log()
            time.sleep(0.1)

    def _create_network(self) -> None:
        hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in ADDRESSES.items())
        for host in ADDRESSES:
            namespace = self.namespace(host)
            netns.ip(f"netns add {namespace}")
            netns.ip(f"-n {namespace} link set lo up")
            # `ip netns exec` shows this file as /etc/hosts.
            (etc := Path("/etc/netns") / namespace).mkdir(parents=True)
            (etc / "hosts").write_text(hosts)
        hub = self.namespace(CONTROLLER)
        netns.ip(f"-n {hub} link add {INTERFACE} type bridge")
        for node in NODES:
            netns.ip(f"-n {hub} link add {node} type veth peer name {INTERFACE} netns {self.namespace(node)}")
            netns.ip(f"-n {hub} link set {node} master {INTERFACE} up")
        for host, address in ADDRESSES.items():
            netns.ip(f"-n {self.namespace(host)} address add {address}/24 dev {INTERFACE}")
            netns.ip(f"-n {self.namespace(host)} link set {INTERFACE} up")

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command_with_parent(command), env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def remove(self) -> None:
        """Stop the daemons and all that they have started, and remove the namespaces."""
        for host in ADDRESSES:
            for number in self.processes(host):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        for host in ADDRESSES:
            subprocess.run(["ip", "netns", "del", self.namespace(host)], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / self.namespace(host), ignore_errors=True)
        with suppress(OSError):
            Path("/etc/netns").rmdir()  # fails while others have files there
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Yield a cluster that exists inside the block."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    made = Cluster(folder, {**environment, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")})
    try:
        made.create()
        yield made
    finally:
        made.remove()


if __name__ == "__main__":
    with cluster() as started:
        print(started.run("sinfo"), started.folder, sys.executable)
