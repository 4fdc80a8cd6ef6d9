"""The ranks of one host meet on 127.0.0.1; those of several hosts by torch's own store."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from infra.distributed import free_port, single_process_environment
from pretrain.engine.rendezvous import SCHEME, init_method
from tests.runs import ROOT, environment

RANK = """
import os, sys, psutil, torch
from pretrain.engine import engine
from tests.listening import addresses
rank, world = map(int, sys.argv[1:3])
engine.start_ranks()
total = torch.tensor([float(rank + 1)])
torch.distributed.all_reduce(total)
print(total.item(), torch.distributed.get_rank(), sorted(addresses([psutil.Process()])))
torch.distributed.barrier()
engine.stop_ranks()
"""


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.jobs)])
def test_ranks_of_one_host_meet_on_loopback(tmp_path, world):
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(world)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env={**environment(tmp_path), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                 "MASTER_ADDR": "localhost", "MASTER_PORT": port},
        )
        for rank in range(world)
    ]  # fmt: skip
    lines = [process.communicate(timeout=600)[0].split(maxsplit=2) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world
    assert lines == [[str(sum(range(world + 1)) + 0.0), str(rank), "['127.0.0.1']\n"] for rank in range(world)]


@pytest.mark.distributed
@pytest.mark.parametrize("address", ["127.0.0.1", "own"])
def test_a_port_that_another_program_has_is_one_line(tmp_path, address):
    """By the store on loopback and, with an address that others can reach, by torch's own."""
    host = "localhost" if address == "127.0.0.1" else socket.gethostname()
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "pretrain.train", "--config", "demo-cpu", f"--run.output={tmp_path / 'run'}"],
            cwd=ROOT, capture_output=True, text=True, timeout=600,
            env={**environment(tmp_path), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": host,
                 "MASTER_PORT": str(port)},
        )  # fmt: skip
    print(done.stderr)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("yaware: error:")]
    assert errors == [f"yaware: error: MASTER_PORT={port}: another program of this host listens on it, perhaps another job; "
                      "give the launcher a free port, such as --master_port=29517"]  # fmt: skip
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_several_hosts_and_torchrun_keep_their_store(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    assert init_method() is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert init_method() == f"{SCHEME}://"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert init_method() is None


def test_a_chosen_interface_of_gloo_is_kept(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert single_process_environment()["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    assert "GLOO_SOCKET_IFNAME" not in single_process_environment()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    assert "GLOO_SOCKET_IFNAME" not in single_process_environment()
