"""infra/launch: documented commands, batch scripts and container; SLURM's variables; packing of the GPU kit."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.cli import batch_check
from infra.distributed import expand_counts, expand_hosts, free_port, slurm_environment
from infra.errors import UserError
from infra.slurm.batch_script import WORKS, JobSize
from tests.runs import ROOT, environment, losses, pretrain_command

LAUNCH = ROOT / "infra" / "launch"
README = (LAUNCH / "README.md").read_text()
SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_NTASKS": "6", "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_TASKS_PER_NODE": "2(x3)",
}  # fmt: skip


def lines_of(word: str) -> list[list[str]]:
    """Return the commands in the README's code blocks that begin with ``word``, as a shell splits them."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in commands if line.split(" ")[0] == word]


def test_rank_and_master_of_a_task_of_srun():
    assert slurm_environment(SLURM) == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "23456",
    }  # fmt: skip


def test_a_job_step_has_its_own_number_of_tasks_and_hosts():
    step = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_TASKS_PER_NODE": "3",
            "SLURM_NODEID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"}  # fmt: skip
    found = slurm_environment({**SLURM, **step})
    assert (found["WORLD_SIZE"], found["MASTER_ADDR"], found["LOCAL_WORLD_SIZE"]) == ("3", "gpu08", "3")


def test_a_given_master_takes_precedence():
    found = slurm_environment({**SLURM, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "29500")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"SLURM_NTASKS": ""}, "SLURM_NTASKS is not set although SLURM_PROCID is; start with srun"),
        ({"SLURM_LOCALID": "one"}, "a variable of SLURM is not a number: .*'one'"),
        ({"SLURM_JOB_NODELIST": "gpu[07-"}, "SLURM_JOB_NODELIST='gpu.07-' cannot be read"),
        ({"SLURM_JOB_NODELIST": "gpu[a-b]"}, "holds .a-b., which is not a list of numbers"),
        ({"SLURM_TASKS_PER_NODE": "2x3"}, "SLURM_TASKS_PER_NODE='2x3' cannot be read"),
    ],
)
def test_a_missing_or_unreadable_variable_of_slurm_is_named(change, text):
    with pytest.raises(UserError, match=text):
        slurm_environment({**SLURM, **change})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a[1-3,7],b", ["a1", "a2", "a3", "a7", "b"]),
        ("node[098-101]-ib", ["node098-ib", "node099-ib", "node100-ib", "node101-ib"]),
        ("r[1-2]n[08,10]", ["r1n08", "r1n10", "r2n08", "r2n10"]),
    ],
)
def test_a_host_list_in_slurms_short_form_is_expanded(text, hosts):
    assert expand_hosts(text) == hosts


@given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 12)), min_size=1, max_size=5), st.integers(1, 4))
def test_ranges_of_hosts_are_expanded_in_order(ranges, width):
    short = ",".join(f"{first:0{width}d}-{first + more:0{width}d}" for first, more in ranges)
    naive = [f"n{number:0{width}d}.ib" for first, more in ranges for number in range(first, first + more + 1)]
    assert expand_hosts(f"n[{short}].ib") == naive


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 9)), min_size=1, max_size=6))
def test_task_counts_are_expanded(groups):
    short = ",".join(f"{tasks}(x{hosts})" if hosts > 1 else f"{tasks}" for tasks, hosts in groups)
    assert expand_counts(short) == [tasks for tasks, hosts in groups for _ in range(hosts)]


@pytest.mark.jobs
@pytest.mark.distributed
def test_two_processes_with_slurms_variables_are_two_ranks(shards, tmp_path):
    arguments = pretrain_command(shards, tmp_path / "run", 3)[4:]
    variables = {**environment(tmp_path), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "1",
                 "SLURM_TASKS_PER_NODE": "2", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "pretrain.train", *arguments],
            cwd=ROOT, env={**variables, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [task.communicate(timeout=600)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0]
    assert "over 2 ranks" in outputs[0]
    assert "pretrain:" not in outputs[1]
    assert [step for step, _ in losses(tmp_path / "run")] == [0, 1, 2]


def test_deepspeed_reads_the_hostfile_and_the_environment_file():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert runner.fetch_hostfile(str(LAUNCH / "hostfile")) == {"node01": 8, "node02": 8}
    # DeepSpeed's launcher splits each line at its first "=" and supports neither comments nor empty lines.
    for line in (LAUNCH / "deepspeed_env").read_text().splitlines():
        assert re.fullmatch(r"[A-Z_]+=[^\s\"'#]+", line), line


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("deepspeed", ["--num_accelerators", "--hostfile", "--no_ssh"]),  # one host, several, several without ssh
        ("sbatch", ["infra/launch/pretrain.sbatch"]),
    ],
)
def test_the_launcher_understands_every_documented_command(word, shown):
    from deepspeed.launcher.runner import parse_args

    from pretrain.config import load_recipe
    from pretrain.train import parse_arguments

    commands = lines_of(word)
    assert [option for option in shown if not any(option in command for command in commands)] == []
    for command in commands:
        if word == "deepspeed":
            parsed = parse_args(command[1:])
            assert (parsed.user_script, parsed.module) == ("pretrain.train", True)
            assert parsed.hostfile == "/job/hostfile" or (ROOT / parsed.hostfile).is_file()
            rest = parsed.user_args
        else:
            script = next(part for part in command if part.endswith(".sbatch"))
            assert (ROOT / script).is_file()
            rest = ["--config", *command[command.index(script) + 1 :]]
            if not Path(script).name.startswith("pretrain"):
                continue  # the next test
        load_recipe(*parse_arguments(rest))


def test_the_documented_jobs_on_ray_are_commands_that_can_be_submitted():
    checked = []
    for command in lines_of("sbatch"):
        place = next(number for number, part in enumerate(command) if part.endswith(".sbatch"))
        works = {script: words for script, words in WORKS.values() if words != ("pretrain",)}
        if words := works.get(Path(command[place]).name):
            name, *more = words
            batch_check(name)([*more, *command[place + 1 :]], JobSize(1, waits=True))
            checked.append(name)
    assert checked == ["cohort", "shards", "evaluate", "shards"]


def test_the_files_that_the_container_copies_are_a_working_package(tmp_path):
    """The copied files alone resolve every subcommand, have every module that pyproject.toml names, and the pins."""
    text = (LAUNCH / "Containerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            into = tmp_path / target / (source if target == "./" else "")
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, into)
    pins = re.findall(r"pip install .* -c (\S+)", text)
    assert pins
    assert all((tmp_path / path).is_file() for path in pins)
    modules = re.findall(
        r'"(\w+)"', re.findall(r"^py-modules = (.*)$", (tmp_path / "pyproject.toml").read_text(), re.M)[0]
    )
    code = (
        "import importlib, sys; from infra.cli import SUBCOMMANDS; "
        "[importlib.import_module(module).COMMANDS[name] for name, (module, _) in SUBCOMMANDS.items()]; "
        "print(*(importlib.import_module(name).__file__ for name in ['infra', *sys.argv[1:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(tmp_path)) for path in done.stdout.split()), "imported from elsewhere"


@pytest.mark.slow
def test_the_documented_ray_commands_make_one_cluster():
    head, worker = lines_of("ray")
    port = free_port()
    binaries = Path(sys.executable).parent
    # Two daemons share this machine, so their stores are small; otherwise the commands are as documented.
    extra = ["--object-store-memory", "80000000", "--num-cpus", "1"]
    given_port = [str(port) if part == "6379" else part for part in head[1:]]
    given_address = [part.replace("node01:6379", f"127.0.0.1:{port}") for part in worker[1:]]
    daemons = []
    try:
        for arguments in ([*given_port, "--include-dashboard", "false"], given_address):
            daemons.append(subprocess.Popen([binaries / "ray", *arguments, *extra], stdout=subprocess.DEVNULL))
            time.sleep(12)
        code = "from infra.ray_cluster import session\nwith session() as ray: print('cpus', ray.cluster_resources()['CPU'])"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600,
                              env={**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}"})  # fmt: skip
        assert "cpus 2.0" in done.stdout, done.stderr[-2000:]
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=60)


@pytest.mark.slow
def test_the_documented_mlflow_command_serves_a_store(tmp_path):
    (command,) = lines_of("mlflow")
    port = free_port()
    arguments = [str(port) if part == "5000" else part for part in command[1:]]
    variables = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen([Path(sys.executable).parent / "mlflow", *arguments], cwd=tmp_path, env=variables,
                              start_new_session=True)  # fmt: skip
    try:
        limit = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.read() == b"OK"
                break
            except OSError:
                assert time.monotonic() < limit
                time.sleep(0.5)
        assert (tmp_path / "mlflow.db").is_file()
    finally:
        import psutil

        family = [*psutil.Process(server.pid).children(recursive=True), server]
        for process in family:
            process.terminate()
        server.wait(timeout=60)


@pytest.fixture
def packed(tmp_path):
    """Files of awkward sizes with names of wheels, packed in small parts."""
    source = tmp_path / "given"
    source.mkdir()
    for number, size in enumerate((1, 70_001, 250_000)):
        (source / f"package{number}-1.0-py3-none-any.whl").write_bytes(os.urandom(size))
    done = _pack("--wheels", str(source), "--part-size", "60K", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    return source, tmp_path / "out"


def _pack(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(ROOT / "infra/gpu/pack.sh"), *arguments], capture_output=True, text=True)


def _unpack(folder: Path, dest: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(folder / "unpack.sh"), *arguments, str(dest)], capture_output=True, text=True)


def test_the_kit_is_split_and_joined_without_loss(packed, tmp_path):
    source, out = packed
    parts = sorted(out.glob("yaware-gpu.tar.*"))
    assert len(parts) > 6
    assert all(part.stat().st_size <= 60 * 1024 for part in parts)
    done = _unpack(out, tmp_path / "there", "--check")
    assert done.returncode == 0, done.stderr
    for wheel in source.iterdir():
        assert (tmp_path / "there/wheels" / wheel.name).read_bytes() == wheel.read_bytes()
    for name in ("pyproject.toml", "pretrain/recipes/demo-cpu.yaml", "tests/runs.py", "Makefile"):
        assert (tmp_path / "there/yaware" / name).read_bytes() == _committed(name)


def _committed(name: str) -> bytes:
    return subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, check=True).stdout


@pytest.mark.parametrize("harm", ["cut short", "missing"])
def test_a_damaged_part_is_named_and_nothing_is_unpacked(packed, tmp_path, harm):
    _, out = packed
    part = out / "yaware-gpu.tar.003"
    if harm == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1])
    done = _unpack(out, tmp_path / "there", "--check")
    assert done.returncode == 2
    assert done.stderr == "unpack: error: missing or damaged: yaware-gpu.tar.003; copy them again\n"
    assert not (tmp_path / "there").exists()


def test_a_part_of_an_older_kit_is_ignored(packed, tmp_path):
    _, out = packed
    shutil.copy(out / "yaware-gpu.tar.000", out / "yaware-gpu.tar.999")
    assert _unpack(out, tmp_path / "there", "--check").returncode == 0


def test_the_kit_has_every_pinned_package_except_torch_and_development_tools():
    listed = {line.split("=")[0].split(">")[0] for line in _pack("--list").stdout.splitlines()}
    assert {"deepspeed", "monai", "pytest", "hypothesis", "nvidia-dali-cuda130", "setuptools", "numpy"} <= listed
    assert not {"torch", "ruff", "mypy"} & listed
    assert len(listed) > 120


def test_packing_over_an_older_kit_is_refused(packed):
    done = _pack("--wheels", str(packed[0]), str(packed[1]))
    assert done.returncode == 2
    assert "is not empty; choose another folder" in done.stderr
