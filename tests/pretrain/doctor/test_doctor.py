"""``yaware doctor`` on this machine; the judgement of what nodes found; the tracking store; wrong arguments."""

from __future__ import annotations

import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from infra import cli
from pretrain.doctor import hardware, services, software
from pretrain.doctor.checks import CHECKS, judge_all, status_of
from pretrain.doctor.node import encoded, lines_of, main, read_lines
from pretrain.doctor.reach import carried_variables
from pretrain.doctor.row import Check, Request, Row, on_each

GIB = 2**30


@pytest.fixture
def free_gib(monkeypatch):
    """Set the free disk space that the doctor sees."""

    def set_free(gib):
        monkeypatch.setattr(hardware.shutil, "disk_usage", lambda _: SimpleNamespace(free=gib * GIB))

    return set_free


def printed(capsys):
    return capsys.readouterr().out.splitlines()


def test_doctor_passes_on_a_machine_that_is_set_up(free_gib, monkeypatch, capsys):
    free_gib(6)
    monkeypatch.setattr(hardware, "MEMORY_WANTED", 1)
    monkeypatch.setattr(hardware, "MEMORY", 1)
    assert cli.run(["doctor"]) == 0
    lines = printed(capsys)
    names = [name for name, check in CHECKS.items() if check.where == "always"]
    assert [line.split()[:2] for line in lines[:-1]] == [["ok", name] for name in names]
    assert "deepspeed" in lines[2]
    assert lines[-1] == f"{len(names)} checks: 0 failed, 0 warnings"


@pytest.mark.parametrize("missing", ["g++", "ninja"])
def test_doctor_fails_and_names_a_missing_compiler_tool(missing, free_gib, monkeypatch, capsys):
    free_gib(6)
    monkeypatch.setattr(software.shutil, "which", lambda tool: None if tool == missing else tool)
    assert cli.run(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    failed = [row for row in found["rows"] if row["state"] == "fail"]
    assert [(row["check"], row["text"]) for row in failed] == [("compiler", f"missing: {missing}")]
    assert found["status"] == 1


def test_doctor_fails_on_a_full_disk(free_gib, capsys):
    free_gib(4)
    assert cli.run(["doctor"]) == 1
    assert "fail disk         4 GiB free here; at least 5 GiB are needed" in printed(capsys)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--nodes", "2"], "--nodes is for --slurm; a hostfile names its hosts"),
        (["--gpus", "2"], "--gpus is for --slurm"),
        (["--slurm", "--account", ""], "--account is empty; give a value"),
        (["--slurm", "--wait", "nan"], "--wait=nan must be more than 0 and finite"),
        (
            ["--slurm", "--gpus=1", "--sbatch-option=gres=gpu:1"],
            "--sbatch-option=gres=gpu:1: `yaware doctor` sets it itself",
        ),
        (["--slurm", "--hostfile", "x"], "--hostfile and --slurm name the nodes in two ways"),
        (["--hostfile", "nowhere"], "hostfile nowhere cannot be read"),
        (["--port", "0"], "--port=0 must be more than 0"),
        (["--data.shards=x"], "unknown option --data.shards=x"),
        (["--config", "demo-cpi"], "recipe 'demo-cpi' is not known (did you mean 'demo-cpu'?)"),
    ],
)
def test_wrong_arguments_are_one_line_with_status_2(given, text, capsys):
    assert cli.run(["doctor", *given]) == 2
    assert text in capsys.readouterr().err


def test_slurm_outside_an_allocation_needs_a_number_of_nodes(monkeypatch, tmp_path, capsys):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    assert cli.run(["doctor", "--slurm"]) == 2
    assert "--slurm outside an allocation needs --nodes N" in capsys.readouterr().err


def test_a_check_is_one_entry_of_the_table(monkeypatch, capsys):
    """A toy check: what it finds is printed, and an exception in it is a failed check beside the others."""
    kept = {"python": CHECKS["python"], "answer": Check(lambda request: 42, on_each(lambda n: ("warn", f"{n}", "ask again"))),
            "broken": Check(lambda request: 1 / 0, on_each(lambda n: ("ok", "", "")))}  # fmt: skip
    monkeypatch.setattr("pretrain.doctor.checks.CHECKS", kept)
    assert cli.run(["doctor"]) == 1
    lines = printed(capsys)
    assert lines[1:] == [
        "warn answer       42; ask again",
        "fail broken       division by zero",
        "3 checks: 1 failed, 1 warnings",
    ]


def test_a_node_prints_its_answer_in_short_lines(monkeypatch, capsys):
    monkeypatch.setattr("pretrain.doctor.checks.CHECKS", {"python": CHECKS["python"]})
    request = Request({"a": 1, "b": 2}, ["demo-cpu", "--run.name=x y"])
    assert Request.from_json(request.to_json()) == request
    assert main([encoded(request), "b"]) == 0
    assert read_lines(capsys.readouterr().out)["b"]["python"]["found"].startswith("3.")


def test_mixed_lines_of_two_nodes_are_told_apart_and_a_half_answer_does_not_count():
    long = {"text": "x" * 5000}
    mixed = [f"1: {line}" for pair in zip(lines_of("a", long), lines_of("b", long), strict=True) for line in pair]
    assert read_lines("\n".join(["noise", *mixed])) == {"a": long, "b": long}
    assert list(read_lines("\n".join(mixed[:-1]))) == ["a"]


def judged(check, found, hosts=None):
    rows = CHECKS[check].judge(found, Request(hosts or dict.fromkeys(found, 1)))
    return [(row.state, row.node, row.text) for row in rows]


GPU = {"name": "NVIDIA H100", "total": 80 * GIB, "used": 0, "driver": "580.1"}
EIGHT = {"gpus": [GPU] * 8, "torch": 8, "cuda": "13.0", "cores": 64, "visible": None, "problem": ""}


@pytest.mark.parametrize(
    ("change", "slots", "state", "text"),
    [
        ({}, 8, "ok", "8 GPUs (NVIDIA H100 80 GiB"),
        ({"torch": 0}, 8, "fail", "torch sees 0"),
        ({}, 9, "fail", "for 9 ranks"),
        ({"gpus": [{**GPU, "used": 20 * GIB}] + [GPU] * 7}, 8, "warn", "8 GPUs"),
        ({"torch": 2, "visible": "0,1"}, 2, "ok", "8 GPUs"),
        ({"torch": 2, "visible": "0,1"}, 4, "fail", "torch sees 2"),
    ],
)
def test_gpus_are_judged(change, slots, state, text):
    ((found, _, said),) = judged("devices", {"a": {**EIGHT, **change}}, {"a": slots})
    assert found == state
    assert text in said


def test_other_gpus_on_one_node_are_a_warning():
    other = {**EIGHT, "gpus": [{**GPU, "name": "NVIDIA A100"}] * 8}
    assert [row[:2] for row in judged("devices", {"a": EIGHT, "b": other})] == [("ok", "a"), ("warn", "b")]


@pytest.mark.parametrize(
    ("driver", "cuda", "state"),
    [("580.65", "13.0", "ok"), ("570.1", "13.0", "fail"), ("525.60", "12.8", "ok"), ("580", "", "fail")],
)
def test_the_driver_must_be_new_enough_for_cuda(driver, cuda, state):
    value = {**EIGHT, "gpus": [{**GPU, "driver": driver}], "cuda": cuda}
    assert judged("driver", {"a": value})[0][0] == state


VERSIONS = dict.fromkeys(software.PACKAGES, "1.0") | {"nvidia-nccl-cu13": "2.28"}


@pytest.mark.parametrize(
    ("versions", "cuda", "state", "text"),
    [
        (VERSIONS, "13.0", "ok", "NCCL 2.28"),
        ({**VERSIONS, "nvidia-dali-cuda120": "1.0"}, "13.0", "fail", "are both installed"),
        (VERSIONS, "12.8", "fail", "torch is built for CUDA 12.8, DALI is nvidia-dali-cuda130"),
        ({k: v for k, v in VERSIONS.items() if k != "ray"}, "", "fail", "missing: ray"),
        ({k: v for k, v in VERSIONS.items() if "nccl" not in k}, "13.0", "warn", "no nvidia-nccl package"),
        ({**VERSIONS, "nvidia-nccl-cu12": "2.21"}, "13.0", "fail", "CUDA 13.0, NCCL is nvidia-nccl-cu12"),
        ({**VERSIONS, "torch": "0.9"}, "", "fail", "torch 0.9 (needs <3,>=1.0)"),
    ],
)
def test_packages_must_fit_each_other(versions, cuda, state, text):
    found = {"installed": versions, "cuda": cuda, "requires": ["torch<3,>=1.0", "ray[tune]<3,>=0.5"]}
    ((judgement, _, said),) = judged("packages", {"a": found})
    assert judgement == state
    assert text in said


@pytest.mark.parametrize(
    ("version", "limits", "fits"),
    [("2.13.0+cpu", ">=2.11", True), ("0.20", "<0.20,>=0.19.8", False), ("0.19.10", "<0.20,>=0.19.8", True),
     ("3.17.2", "<3.18,>=3.17", True), ("1.6", "==1.6.0", True), ("1", "", True)],
)  # fmt: skip
def test_versions_are_compared_as_numbers(version, limits, fits):
    found = {"installed": {**VERSIONS, "torch": version}, "cuda": "", "requires": [f"torch{limits}"]}
    ((judgement, _, _),) = judged("packages", {"a": found})
    assert judgement == ("ok" if fits else "fail")


def test_slow_shards_and_other_shards_are_found():
    fast = {"bytes": 8e8, "seconds": 1.0, "read": 64, "scans": 9, "digest": "d1"}
    found = {"a": fast, "b": {**fast, "bytes": 1e8}, "c": {**fast, "digest": "d2"}}
    assert [row[:2] for row in judged("shards", found)] == [("ok", "a"), ("warn", "b"), ("fail", "c")]


def test_the_clock_is_taken_from_the_direction_that_answered():
    up, closed = (
        {"master": "", "chosen": "", "offset": -90.0, "error": 0.01},
        {"master": "timed out", "chosen": "", "offset": None},
    )
    found = {"a": {"busy": "", "peers": {"b": closed}}, "b": {"busy": "", "peers": {"a": up}}}
    assert judged("clock", found) == [("fail", "b", "+90.0 s from the clock of a")]
    assert judged("ports", found) == [("fail", "a", "cannot reach port 29500 of b: timed out")]
    found["b"]["peers"]["a"] = {**up, "offset": -1.2}
    assert judged("clock", found)[0][:2] == ("warn", "b")
    found["b"]["peers"]["a"] = closed
    assert judged("clock", found)[0][0] == "warn"


@contextmanager
def server(answer):
    """Serve ``answer(path)`` -> (status, JSON or text) for every POST and GET; yield the address and what was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            asked.append((self.path.rpartition("/mlflow/")[2], json.loads(self.rfile.read(length) or b"null")))
            status, content = answer(asked[-1][0])
            body = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", asked
    finally:
        running.shutdown()
        running.server_close()


def tracking(uri):
    return services.judge_tracking(services.look_tracking(Request(recipe=["demo-cpu", f"--run.tracking_uri={uri}"])))


def test_a_tracking_server_is_written_to():
    exists = {"error_code": "RESOURCE_ALREADY_EXISTS"}

    def answer(path):
        if path == "experiments/create":
            return 400, exists
        return 200, {"experiment": {"experiment_id": "7"}}

    with server(answer) as (uri, asked):
        assert tracking(uri)[0] == "ok"
    assert asked[-1][0] == "experiments/set-experiment-tag"
    assert asked[-1][1]["experiment_id"] == "7"


def test_the_experiment_of_the_doctor_is_created_in_a_new_store():
    def answer(path):
        if path.startswith("experiments/get-by-name"):
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}
        return 200, {"experiment_id": "8"}

    with server(answer) as (uri, asked):
        assert tracking(uri)[0] == "ok"
    assert [path for path, _ in asked[-2:]] == ["experiments/create", "experiments/set-experiment-tag"]
    assert asked[-1][1]["experiment_id"] == "8"


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (401, "You are not authenticated.", "it refuses the login"),  # as MLflow's own login answers
        (403, "Permission denied", "it does not let this user do that"),
        (500, {"message": "no"}, "an error of its own"),
        (401, {"message": "give a token"}, "give a token"),  # as a gateway before it may answer
    ],
)
def test_a_tracking_server_that_refuses_is_found(status, body, text):
    with server(lambda path: (status, body)) as (uri, _):
        state, said, _ = tracking(uri)
    assert state == "fail"
    assert text in said


def test_a_tracking_server_that_does_not_run_is_found():
    state, said, _ = tracking("http://127.0.0.1:9")
    assert state == "fail"
    assert "does not answer; start it" in said


def test_the_variables_of_the_launcher_are_carried_to_the_hosts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth1\nNCCL_DEBUG=INFO\n")
    carried = carried_variables({"NCCL_DEBUG": "WARN", "MLFLOW_TRACKING_URI": "x", "HOME": "/", "LANG": "C"})
    assert carried == {"NCCL_DEBUG": "INFO", "MLFLOW_TRACKING_URI": "x", "GLOO_SOCKET_IFNAME": "eth1"}


def test_only_a_failure_makes_the_status_1():
    assert status_of([Row("a", "warn", ""), Row("b", "ok", "")]) == 0
    assert status_of([Row("a", "fail", "")]) == 1
    assert judge_all({}, Request()) == []
