"""How ``yaware doctor`` reaches nodes, with stand-ins for ssh, pdsh and srun: secrets, options of SLURM, the queue."""

from __future__ import annotations

import os

import pytest

from infra import cli
from infra.errors import UserError
from pretrain.doctor import reach
from pretrain.doctor.node import lines_of
from pretrain.doctor.output import NodeCommand, output_of
from pretrain.doctor.reach import Allocation, ask_over_slurm, ask_over_ssh, has_started, is_secret
from pretrain.doctor.row import Request

SECRET = "s3cr3t-word"
ANSWER = lines_of("a", {"python": {"found": "3.11.0"}})[0]


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    """No variables of SLURM or MLflow, and an own home and folder."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Return a function that writes a stand-in for a command; it records its arguments in ``calls``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name, body):
        tool = folder / name
        tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >> {tmp_path}/calls\n{body}\n')
        tool.chmod(0o755)
        return tmp_path / "calls"

    return write


def test_secrets_go_through_the_input_and_never_on_a_command_line(stand_in, tmp_path, monkeypatch):
    calls = stand_in("ssh", f"cat >> {tmp_path}/input; echo '{ANSWER}'")
    stand_in("pdsh", "exit 1")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://ann:{SECRET}@server")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    answers, rows = ask_over_ssh(Request({"a": 1}))
    assert (list(answers), rows) == (["a"], [])
    typed = calls.read_text()
    assert typed.startswith("ssh ")
    assert SECRET not in typed
    assert "MLFLOW_TRACKING_USERNAME=ann" in typed
    assert typed.rstrip().endswith(" a -")
    assert (tmp_path / "input").read_text().count(SECRET) == 2


def test_without_secrets_pdsh_is_used(stand_in):
    calls = stand_in("pdsh", f"echo 'a: {ANSWER}'")
    assert list(ask_over_ssh(Request({"a": 1}))[0]) == ["a"]
    assert calls.read_text().startswith("pdsh ")


def test_a_node_reads_the_secrets_before_it_looks(stand_in, monkeypatch, capsys):
    """The real program of the node behind a stand-in for ssh that runs the command here."""
    stand_in("ssh", 'for word; do last=$word; done; exec sh -c "$last"')
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH") or str(reach.Path(__file__).parents[3]))
    request = Request({"a": 1}, ["demo-cpu", "--data.shards=/nowhere"], seconds=1)
    answers, rows = ask_over_ssh(request)
    assert rows == []
    assert answers["a"]["python"]["found"].startswith("3.")


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [("MLFLOW_TRACKING_TOKEN", "x", True), ("MLFLOW_S3_SECRET_ACCESS_KEY", "x", True), ("NCCL_DEBUG", "INFO", False),
     ("MLFLOW_TRACKING_URI", "postgresql://u:pw@h/d", True), ("MLFLOW_TRACKING_URI", "http://h:5000", False)],
)  # fmt: skip
def test_secrets_are_known_by_name_or_by_their_address(name, value, secret):
    assert is_secret(name, value) == secret


def test_srun_is_asked_for_gpus_account_and_other_options(stand_in, capsys):
    calls = stand_in("srun", f"echo '0: {ANSWER}'")
    words = [
        "doctor",
        "--slurm",
        "--nodes=1",
        "--gpus=4",
        "--partition=gpu",
        "--account=lab",
        "--sbatch-option=qos=low",
    ]
    cli.run([*words, "--json"])
    typed = calls.read_text()
    for word in ("--nodes=1", "--gpus-per-node=4", "--partition=gpu", "--account=lab", "--qos=low"):
        assert f" {word} " in typed
    assert "doctor: waiting for 1 nodes of SLURM (no limit; --wait SECONDS sets one" in capsys.readouterr().err


def test_the_wait_in_the_queue_does_not_count(stand_in, monkeypatch):
    """The queue takes longer than a node may; the node then answers in time."""
    monkeypatch.setattr(reach, "PATIENCE", 0.5)
    stand_in("srun", f"sleep 1.2; echo 'srun: job 7 has been allocated resources' >&2; sleep 0.1; echo '0: {ANSWER}'")
    answers, rows = ask_over_slurm(Request(seconds=0.1), Allocation(1, {}), os.environ)
    assert (list(answers), rows) == (["a"], [])


def test_a_limit_of_the_wait_ends_it_and_is_named(stand_in):
    stand_in("srun", "exec sleep 30")
    answers, (row,) = ask_over_slurm(Request(), Allocation(1, {}, wait=0.3), os.environ)
    assert answers == {}
    assert (row.state, "no allocation within 0.3 s (--wait)" in row.text) == ("fail", True)


def test_a_node_that_has_started_must_answer_in_time():
    command = NodeCommand(["sh", "-c", "echo 0: yaware-doctor-started; exec sleep 30"])
    out, err = output_of(command, 0.3, has_started=has_started, wait=20)
    assert "started" in out
    assert "no answer within 0 s" in err


def test_options_of_a_new_allocation_are_refused_inside_of_one(stand_in):
    stand_in("srun", "exit 1")
    with pytest.raises(UserError, match="--partition is for a new allocation, and this process is in job 7"):
        ask_over_slurm(Request(), Allocation(1, {"partition": "gpu"}), {"SLURM_JOB_ID": "7"})
