"""Which interfaces gloo and NCCL take, and which choice ``yaware doctor`` refuses."""

from __future__ import annotations

import pytest

from pretrain.doctor import network


@pytest.mark.parametrize(
    ("told", "taken"),
    [("", "ib0"), ("eth", "eth0"), ("=eth", ""), ("=eth1", "eth1"), ("^ib,lo,eth0", "docker0"), ("bond", "")],
)
def test_the_interface_of_nccl(told, taken):
    assert network._nccl(told, ["lo", "docker0", "eth0", "eth1", "ib0"]) == taken


def test_a_name_that_stands_for_the_loopback_is_found():
    addresses = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.7"]}
    value = {"addresses": addresses, "hostname": "n1", "address": "127.0.1.1", "route": "eth0", "gloo": "", "nccl": ""}
    state, text, fix = network.judge_interfaces(value)
    assert (state, fix) == ("fail", "set GLOO_SOCKET_IFNAME=eth0 on every node")
    assert "127.0.1.1" in text


TWO = {"addresses": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.7"], "ib0": ["10.1.0.7"], "ib1": []}, "hostname": "n1",
       "address": "10.0.0.7", "route": "eth0", "gloo": "", "nccl": "eth0"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "state", "text", "fix"),
    [
        ({}, "ok", "gloo takes eth0, NCCL eth0", ""),
        ({"nccl": "lo"}, "fail", "gloo takes eth0, NCCL lo, which is the loopback", "set NCCL_SOCKET_IFNAME=eth0 on every"),
        ({"gloo": "lo"}, "fail", "GLOO_SOCKET_IFNAME=lo is the loopback", "set GLOO_SOCKET_IFNAME=eth0 on every node"),
        ({"gloo": "ib1"}, "fail", "is the interface ib1, which has no IPv4 address (with one: lo, eth0, ib0)", "GLOO"),
        ({"nccl": "ib1"}, "fail", "NCCL_SOCKET_IFNAME=ib1 is the interface ib1, which has no IPv4 address", "NCCL"),
        ({"nccl": "bond"}, "fail", "is no interface with an address (found: lo, eth0, ib0)", "NCCL"),
        ({"nccl": ""}, "warn", "NCCL ib0; the other nodes are reached by eth0", "set NCCL_SOCKET_IFNAME=eth0 on every node"),
        ({"gloo": "ib0"}, "warn", "gloo takes ib0, NCCL eth0", "set GLOO_SOCKET_IFNAME=eth0 on every node"),
        ({"gloo": "ib0", "nccl": "ib0"}, "warn", "gloo takes ib0, NCCL ib0", "and NCCL_SOCKET_IFNAME=eth0"),
    ],
)  # fmt: skip
def test_interfaces_are_compared_with_the_one_to_the_other_nodes(change, state, text, fix):
    judgement, said, todo = network.judge_interfaces({**TWO, **change})
    assert judgement == state
    assert text in said
    assert fix in todo


def test_without_any_other_interface_nccl_would_take_the_loopback():
    value = {
        **TWO,
        "addresses": {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"]},
        "gloo": "docker0",
        "route": "",
        "nccl": "",
    }
    assert network.judge_interfaces(value)[0] == "fail"
