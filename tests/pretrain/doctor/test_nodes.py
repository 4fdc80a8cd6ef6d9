"""``yaware doctor --hostfile`` on two hosts (namespaces, real processes and mounts): planted faults, each found by name.

pdsh is the real one. The ``ssh`` that it calls enters a host's namespaces instead of logging in, after a script of the test has
planted what is wrong on that host.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.netns import CORES, ip, two_hosts, why_not
from tests.runs import ROOT, environment

REASON = why_not() or (None if shutil.which("pdsh") else "pdsh not found (Debian: pdsh; make test-packages)")
pytestmark = [pytest.mark.distributed, pytest.mark.jobs, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
SSH = """#!/bin/sh
for word; do host=$last; last=$word; done
case $host in
"""
ENTER = """{address}) exec ip netns exec {namespace} unshare --uts --mount sh -c \
'hostname "$0"; . "$1"; exec sh -c "$2"' {name} {folder}/{name}.sh "$last" ;;
"""
UNKNOWN = """*) echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255 ;;
esac
"""
# The folder has its own disk, since the doctor wants 5 GiB free and this machine's may be fuller.
HEALTHY = "export GLOO_SOCKET_IFNAME=cable\nmount -t tmpfs -o size=6g tmpfs {folder}/work\n"


@pytest.fixture(scope="module")
def pair():
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
def ask(pair, shards, tmp_path):
    """Return a function: faults of host b, slots of b, further hosts -> rows by (check, host), and the exit status."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "packages").mkdir()
    variables = environment(tmp_path)
    enter = [
        ENTER.format(address=host.address, namespace=host.namespace, name=host.name, folder=tmp_path)
        for host in (pair.a, pair.b)
    ]
    (tmp_path / "bin" / "ssh").write_text(SSH + "".join(enter) + UNKNOWN)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    (tmp_path / "host-a.sh").write_text(HEALTHY.format(folder=tmp_path))

    def ask(faults="", slots=1, more=()):
        (tmp_path / "host-b.sh").write_text(HEALTHY.format(folder=tmp_path) + faults)
        hosts = {pair.a.address: 1, pair.b.address: slots, **dict.fromkeys(more, 1)}
        (tmp_path / "hostfile").write_text("".join(f"{host} slots={n}\n" for host, n in hosts.items()))
        command = [sys.executable, "-m", "infra.cli", "doctor", "--hostfile", str(tmp_path / "hostfile"), "--seconds=6",
                   "--json", "--config", "demo-cpu", f"--data.shards={shards}"]  # fmt: skip
        packages = f"{tmp_path / 'packages'}:{ROOT}"
        done = subprocess.run(
            command, cwd=tmp_path / "work", capture_output=True, text=True, timeout=600,
            env={**variables, "PATH": f"{tmp_path / 'bin'}:{variables['PATH']}", "PYTHONPATH": packages},
        )  # fmt: skip
        assert done.stdout, done.stderr
        found = json.loads(done.stdout)
        assert found["status"] == done.returncode
        names = {pair.a.address: "a", pair.b.address: "b"}
        return {(row["check"], names.get(row["node"], row["node"])): row for row in found["rows"]}, done.returncode

    return ask


def test_two_healthy_hosts_pass(ask):
    rows, status = ask()
    assert [row for row in rows.values() if row["state"] == "fail"] == []
    assert status == 0
    checked = {check for check, _ in rows}
    assert {"reach", "environment", "checkout", "interface", "ports", "clock", "shm", "shards", "tracking"} <= checked
    assert "gloo takes cable" in rows["interface", "all"]["text"]
    assert " MB/s, " in rows["shards", "a"]["text"]


def planted(pair, shards, folder):
    """Return the lines that plant faults on host b, and the finding of each: (check, host) -> state and a part of the line."""
    site = folder / "site"
    site.mkdir()
    for name, version in (("nibabel", "5.3.7"), ("deepspeed", "0.18.0")):
        (site / f"{name}-{version}.dist-info").mkdir()
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (site / "sitecustomize.py").write_text("import time\n_true = time.time\ntime.time = lambda: _true() + 90.0\n")
    (folder / "other.py").write_text((ROOT / "pretrain" / "kernels.py").read_text() + "\n# another commit\n")
    (folder / "empty").touch()
    shard = sorted(Path(shards).glob("*.tar"))[0]
    lines = [
        "mount -t tmpfs -o size=1m tmpfs /dev/shm",
        f"mount --bind {folder}/empty {shard}",
        f"mount --bind {site} {folder}/packages",
        f"mount --bind {folder}/other.py {ROOT}/pretrain/kernels.py",
        f"mount --bind {folder}/empty $(readlink -f $(command -v g++))",
        f"mkdir -p {folder}/nothing; export TORCH_EXTENSIONS_DIR={folder}/nothing",
        f"mount -t tmpfs -o size=1m tmpfs {folder}/work",
        "export GLOO_SOCKET_IFNAME=eth9",
        f"mount --bind {folder}/mlflow.db {folder}/mlflow.db; mount -o remount,ro,bind {folder}/mlflow.db",
    ]
    found = {
        ("shm", "b"): ("fail", "1 MiB free in /dev/shm"),
        ("shards", "b"): ("fail", f"{shard.name} has 0 bytes, not "),
        ("environment", "b"): ("fail", "nibabel 5.3.7 ("),
        ("packages", "b"): ("fail", "deepspeed 0.18.0 (needs <0.20,>=0.19.8)"),
        ("clock", "b"): ("fail", "+90.0 s from the clock of "),
        ("checkout", "b"): ("fail", "differs from 0.1.0, code "),
        ("compiler", "b"): ("fail", "missing: g++"),
        ("collectives", "b"): ("warn", f"not compiled in {folder}/nothing"),
        ("disk", "b"): ("fail", "0 GiB free here"),
        ("interface", "b"): ("fail", "GLOO_SOCKET_IFNAME=eth9 is no interface with an address (found: lo, cable)"),
        ("tracking", "b"): ("fail", "it is read-only here"),
        ("memory", "b"): ("fail", "GiB free"),
        ("ports", "a"): ("fail", f"cannot reach port 29500 of {pair.b.address}: "),
    }
    return "\n".join(lines) + "\n", found


def test_thirteen_faults_of_one_host_are_found_and_the_other_host_is_not_blamed(ask, pair, shards, tmp_path):
    lines, expected = planted(pair, shards, tmp_path)
    rule = "rule add ipproto tcp dport 29500 prohibit"
    ip(f"-n {pair.a.namespace} {rule}")  # a firewall that lets nothing of host a out to the master's port
    try:
        # More ranks than this machine has memory or cores for.
        rows, status = ask(lines, slots=max(4 * len(CORES), 1 + int(psutil.virtual_memory().total / 2**29)))
    finally:
        ip(f"-n {pair.a.namespace} {rule.replace('add', 'del')}")
    print(json.dumps(list(rows.values()), indent=1))
    assert status == 1
    for key, (state, text) in expected.items():
        assert (rows[key]["state"], text in rows[key]["text"]) == (state, True), (key, rows[key])
        assert rows[key]["fix"] or key[0] in ("shards", "tracking"), key
    others = {key for key, row in rows.items() if row["state"] != "ok"} - set(expected)
    assert others == {("devices", "b")}  # so many ranks share the cores


def test_a_taken_port_a_name_without_address_and_a_host_that_cannot_be_reached_are_found(ask, pair):
    listen = (
        "import socket, time; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); "
        "s.bind(('', 29500)); s.listen(); print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        ["ip", "netns", "exec", pair.b.namespace, sys.executable, "-c", listen], stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        rows, status = ask("unset GLOO_SOCKET_IFNAME\n", more=["10.77.0.9"])
    finally:
        holder.kill()
        holder.wait()
    assert status == 1
    assert "cannot listen on port 29500: Address already in use" in rows["ports", "b"]["text"]
    assert rows["reach", "10.77.0.9"]["state"] == "fail"
    assert "No route to host" in rows["reach", "10.77.0.9"]["text"]
    assert "the host's name host-b has no address" in rows["interface", "b"]["text"]
    assert "set GLOO_SOCKET_IFNAME=cable" in rows["interface", "b"]["fix"]
