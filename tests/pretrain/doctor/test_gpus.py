"""What ``yaware doctor`` says of GPUs, with a stand-in for nvidia-smi: broken drivers, unknown values, nodes without GPUs."""

from __future__ import annotations

import os

import pytest

from pretrain.doctor.checks import CHECKS
from pretrain.doctor.hardware import GIB, list_gpus
from pretrain.doctor.row import Request

GPU = {"name": "NVIDIA H100", "total": 80 * GIB, "used": 0, "driver": "580.1"}
EIGHT = {"gpus": [GPU] * 8, "torch": 8, "cuda": "13.0", "cores": 64, "visible": None, "problem": ""}
NONE = {**EIGHT, "gpus": [], "torch": None}


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Return a function that writes a stand-in for nvidia-smi, a shell script."""

    def write(body):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return write


def test_gpus_are_read_and_unknown_values_do_not_drop_a_gpu(nvidia_smi):
    nvidia_smi("echo 'NVIDIA H100, 81559, 3, 580.65'; echo 'NVIDIA GB10, [N/A], [N/A], [Not Supported]'")
    gpus, problem = list_gpus()
    assert problem == ""
    assert [(gpu["name"], gpu["total"], gpu["used"]) for gpu in gpus] == [
        ("NVIDIA H100", 81559 * 2**20, 3 * 2**20),
        ("NVIDIA GB10", None, None),
    ]
    value = {**EIGHT, "gpus": gpus, "torch": 2}
    (row,) = CHECKS["devices"].judge({"a": value}, Request(gpus=2))
    assert (row.state, "NVIDIA GB10 of unknown memory" in row.text) == ("ok", True)
    (row,) = CHECKS["driver"].judge({"a": {**value, "gpus": gpus[1:]}}, Request())
    assert (row.state, "version is not known" in row.fix) == ("warn", True)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", "nvidia-smi ends with status 9: NVIDIA-SMI has failed: no driver"),
        ("exit 15", "nvidia-smi ends with status 15: no message"),
        ("echo 'No devices were found'", "what nvidia-smi prints cannot be read: No devices were found"),
        ("echo 'NVIDIA H100, [GPU requires reset], 0, 580'", "cannot be read: NVIDIA H100, [GPU requires reset]"),
        ("true", "nvidia-smi lists no GPU"),
    ],
)  # fmt: skip
def test_a_broken_driver_fails_with_what_nvidia_smi_says(nvidia_smi, body, text):
    nvidia_smi(body)
    value = CHECKS["devices"].look(Request())
    for name in ("devices", "driver"):
        (row,) = CHECKS[name].judge({"a": value}, Request())
        assert row.state == "fail"
        assert text in row.text


def test_a_machine_without_nvidia_smi_has_no_gpu_and_no_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus() == ([], "")


def states(found, **request):
    return [(row.state, row.node) for row in CHECKS["devices"].judge(found, Request(**request))]


def test_a_node_without_gpus_fails_if_another_has_some():
    assert states({"a": EIGHT, "b": NONE}, hosts={"a": 8, "b": 8}) == [("ok", "a"), ("fail", "b")]
    assert states({"a": NONE, "b": EIGHT}, hosts={"a": 1, "b": 1}) == [("fail", "a"), ("ok", "b")]
    assert states({"a": NONE, "b": NONE}, hosts={"a": 2, "b": 2}) == [("ok", "a"), ("ok", "b")]
    assert states({"a": NONE}, gpus=2) == [("fail", "")]


def test_memory_and_shared_memory_are_judged_for_the_gpus_that_slurm_is_asked_for():
    assert CHECKS["memory"].judge({"a": 7.5 * GIB}, Request())[0].state == "ok"
    assert CHECKS["memory"].judge({"a": 7.5 * GIB}, Request(gpus=8))[0].state == "fail"
    assert CHECKS["shm"].judge({"a": 0.5 * GIB}, Request())[0].state == "ok"
    assert CHECKS["shm"].judge({"a": 0.5 * GIB}, Request(gpus=8))[0].state == "warn"
    assert states({"a": EIGHT}, gpus=9) == [("fail", "")]
