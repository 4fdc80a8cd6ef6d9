"""The ranks of one host meet on 127.0.0.1; those of several hosts by torch's own store."""

from __future__ import annotations

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
@pytest.mark.parametrize("world", [1, 2, 3])
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
    lines = [process.communicate(timeout=120)[0].split(maxsplit=2) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world
    assert lines == [[str(sum(range(world + 1)) + 0.0), str(rank), "['127.0.0.1']\n"] for rank in range(world)]


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
