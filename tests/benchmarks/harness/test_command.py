"""The command chooses rows, keeps finished ones, names what cannot be measured, and runs from end to end."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib import import_module

import pytest

from infra.errors import UserError
from tests.benchmarks.harness import command, environment, machine
from tests.benchmarks.harness.command import Bench, chosen_rows, command_of, main, parse
from tests.benchmarks.harness.row import Row, Side
from tests.benchmarks.harness.table import QUICK, Sizes, data_of, rows_of
from tests.benchmarks.harness.turns import ROOT, CaseFailed

RESULTS = {"cpu": 1.0, "wall": 1.0}


@pytest.mark.parametrize("sizes", [Sizes(), QUICK])
def test_every_case_exists_and_takes_its_arguments(sizes):
    rows = rows_of(sizes)
    assert len({row.name for row in rows}) == len(rows)
    prepared = data_of(sizes)
    cases = [(side.case, side.arguments, side.peer) for row in rows for side in row.sides]
    for case, arguments, peer in cases + [(data.case, data.arguments, data.peer) for data in prepared.values()]:
        module, _, function = case.partition(":")
        assert peer == module.startswith("peers."), case
        inspect.signature(getattr(import_module(f"tests.benchmarks.{module}"), function)).bind(**arguments)
    needed = {name for row in rows for needs in (row.needs, *(side.needs for side in row.sides)) for name in needs}
    assert needed <= set(prepared)


def test_the_default_rows_and_their_data_are_expected_to_take_at_most_forty_minutes():
    assert 120 + sum(row.seconds for row in rows_of(Sizes()) if not row.optional) <= 40 * 60


def test_patterns_choose_rows_and_optional_ones_must_be_named():
    rows = rows_of(Sizes())
    assert [row.name for row in chosen_rows(rows, "read-r*, plan")] == [
        "read-raw",
        "read-raw-shards",
        "read-raw-cold",
        "plan",
    ]
    assert "search-large" not in [row.name for row in chosen_rows(rows, None)]
    assert [row.name for row in chosen_rows(rows, "search-large")] == ["search-large"]
    with pytest.raises(UserError, match="--rows=lost matches no row; rows: read, "):
        chosen_rows(rows, "read,lost")


def test_a_wrong_pattern_ends_with_status_2(capsys, tmp_path):
    assert main(["--rows", "nothing", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("bench: error: --rows=nothing matches no row")


def test_all_rows_are_listed_with_those_that_run_only_if_they_are_named(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows_of(Sizes())) + 1
    (named,) = [line for line in lines if line.endswith("(runs only if it is named)")]
    assert named.startswith("search-large ")


@pytest.mark.parametrize(
    ("arguments", "fails", "published"),
    [
        ([], "", "whole"),
        (["--quick"], "", None),
        (["--peers", "none"], "", None),
        (["--rows", "search-large"], "", "apart"),
        (["--rows", "search-large", "--peers", "none"], "", "apart"),  # none of its sides needs the peers
        (["--rows", "search*"], "", None),
        (["--rows", "read"], "", None),
        ([], "cases.search:run_case", None),
        (["--rows", "search-large"], "cases.search:run_case", None),
        ([], "peers.reading:litdata", "whole"),  # a peer's own error is a result
    ],
)
def test_only_whole_results_without_failures_of_ours_go_into_docs(tmp_path, monkeypatch, arguments, fails, published):
    def run_case(python, case, arguments, threads):
        if case == fails:
            raise CaseFailed("no space left")
        return {**RESULTS, "rate": 1.0, "peak": 1e6}

    went, made = [], []
    monkeypatch.setattr(command, "run_case", run_case)
    monkeypatch.setattr(command, "counts_of", lambda results: None)
    monkeypatch.setattr(command.environment, "make", lambda folder: made.append(folder) or folder / "bin" / "python")
    monkeypatch.setattr(command.environment, "versions", lambda python: {"nidl": "0"})
    monkeypatch.setattr(command, "publish", lambda content: went.append("whole"))
    monkeypatch.setattr(command, "publish_apart", lambda content: went.append("apart"))
    assert main([*arguments, "--out", str(tmp_path)]) == int(fails.startswith("cases."))
    assert went == [published] * (published is not None)
    assert len(made) == int("none" not in arguments and "search" not in " ".join(arguments))
    name = command.SOME if "--rows" in arguments else "performance"
    assert (tmp_path / f"{name}.json").is_file()
    assert (tmp_path / f"{name}.md").is_file()


def test_what_a_benchmark_writes_into_docs_is_no_change_of_the_code(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    written = ("docs/performance.md", "docs/benchmarks/performance.json", "docs/figures/performance_loss.png")
    for name in (*written, "code.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    git("add", ".")
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    git(*author, "commit", "-m", "one")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "git_tags", lambda folder: {"mlflow.source.git.commit": "abc"})
    for name in (*written, "docs/benchmarks/performance_search-large.json"):
        (tmp_path / name).write_text("another result")
    assert machine.difference() == ""
    assert machine.commit()[1] == "false"
    (tmp_path / "code.py").write_text("y")
    assert "+y" in machine.difference()
    assert machine.commit()[1] == "true"


def test_the_recorded_command_names_no_folder():
    chosen = parse(["--rows", "read*", "--peers", "/some/folder", "--out", "/other", "--quick"])
    assert command_of(chosen) == "python -m tests.benchmarks --rows 'read*' --quick"


def bench(tmp_path, kept="k", peers=None):
    return Bench(tmp_path, QUICK, peers, until=0.0, kept=kept)


def test_a_finished_row_is_kept_until_the_code_or_the_row_changes(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(command, "run_case", lambda python, case, arguments, threads: ran.append(case) or RESULTS)
    row = Row("r", "S", "t", "s", (Side("ours", "a:b"),), 1, rounds=2)
    first = bench(tmp_path).measure(row)
    assert bench(tmp_path).measure(row) == first
    assert len(ran) == 2
    bench(tmp_path, kept="another commit").measure(row)
    assert len(ran) == 4
    bench(tmp_path, kept="another commit").measure(Row("r", "S", "t", "s", (Side("ours", "a:c"),), 1, rounds=2))
    assert len(ran) == 6


def test_data_is_prepared_once_and_its_failure_is_the_text_of_the_sides_that_need_it(tmp_path, monkeypatch):
    ran = []

    def run_case(python, case, arguments, threads):
        ran.append(case)
        if case == "peers.reading:write_litdata":
            raise CaseFailed(f"OSError: {tmp_path}/data/full is full")
        return RESULTS

    monkeypatch.setattr(command, "run_case", run_case)
    rows = {row.name: row for row in rows_of(QUICK)}
    state = bench(tmp_path, peers=tmp_path / "bin" / "python")
    state.measure(rows["read-raw"])
    found = state.measure(rows["read-raw-shards"])
    assert found["errors"] == {"litdata": "OSError: DATA/full is full"}
    state.measure(rows["read-raw-cold"])
    assert [ran.count(case) for case in ("cases.data:scans", "peers.reading:write_litdata")] == [1, 1]


def test_data_of_other_sizes_or_other_code_is_prepared_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(command, "run_case", lambda python, case, arguments, threads: ran.append(case) or RESULTS)
    for sizes, kept in ((QUICK, "k"), (QUICK, "k"), (Sizes(), "k"), (Sizes(), "another commit")):
        assert Bench(tmp_path, sizes, None, until=0.0, kept=kept).prepare("full") == ""
    assert ran == ["cases.data:scans"] * 3


def test_a_row_in_which_one_of_our_own_sides_failed_is_measured_again(tmp_path, monkeypatch):
    def run_case(python, case, arguments, threads):
        if case == failing:
            raise CaseFailed("no space left")
        return RESULTS

    monkeypatch.setattr(command, "run_case", run_case)
    row, failing = Row("r", "S", "t", "s", (Side("ours", "a:b"),), 1, rounds=1), "a:b"
    assert bench(tmp_path).measure(row)["errors"] == {"ours": "no space left"}
    failing = ""
    assert bench(tmp_path).measure(row)["errors"] == {}


def test_without_peers_their_sides_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_case", lambda *arguments: RESULTS)
    row = Row("r", "S", "t", "s", (Side("ours", "a:b"), Side("nidl", "peers.x:y", peer=True)), 1, rounds=1)
    assert bench(tmp_path).measure(row)["errors"] == {"nidl": "not measured: --peers none"}


def test_only_a_failure_of_our_own_sides_fails_the_run(capsys):
    sides = [{"name": "ours", "peer": False}, {"name": "nidl", "peer": True}]
    assert command.report_failures([{"name": "r", "sides": sides, "errors": {"nidl": "no"}}]) == 0
    assert command.report_failures([{"name": "r", "sides": sides, "errors": {"ours": "no"}}]) == 1
    assert capsys.readouterr().err == "bench: error: r, ours: no\n"


def test_a_folder_with_other_files_does_not_become_the_peers_environment(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is neither empty nor a virtual environment"):
        environment.make(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_every_peer_is_pinned():
    lines = [line for line in environment.PINS.read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 and " " not in line for line in lines)
    pinned = {line.partition("==")[0].lower() for line in lines}
    assert set(environment.NAMES) <= pinned
    assert "torchvision" not in pinned


def test_the_empty_torchvision_has_every_module_and_name(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(environment.STUB.read_text())
    script = (
        "import torchvision.transforms.functional as f; from torchvision.datasets import VisionDataset\n"
        "from torchvision.transforms import InterpolationMode; from abc import ABC\n"
        "class C(VisionDataset, ABC): ...\n"
        "print(InterpolationMode.BICUBIC, hasattr(f, '__file__'), f.to_tensor.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "BICUBIC False to_tensor\n", done.stderr


@pytest.mark.jobs
def test_the_command_measures_writes_and_continues(tmp_path):
    rows = "read,read-raw,read-raw-shards,open-1000,loss-32,loss-ranks-2,plan,stages"
    arguments = ["--quick", "--peers", "none", "--rows", rows, "--minutes", "0", "--out", str(tmp_path)]

    def run():
        return subprocess.run(
            [sys.executable, "-m", "tests.benchmarks", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=800,
        )

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    written = tmp_path / f"{command.SOME}.json"
    content = json.loads(written.read_text())
    assert [row["name"] for row in content["rows"]] == rows.split(",")
    ours = ({"ours", "nibabel"}, {"ours", "npy", "npy, float16"}, {"ours", "npy, float16"})
    theirs = ({"webdataset", "streaming, unpacking"}, {"streaming, unpacked"}, {"litdata", "streaming, raw"})
    checks = []
    for read, measured, lacking in zip(content["rows"], ours, theirs, strict=False):
        assert {side for results in read["attempts"][0]["rounds"] for side in results} == measured
        assert read["errors"].keys() == lacking
        checks += [result["check"] for result in read["attempts"][0]["rounds"][0].values()]
    assert checks == pytest.approx([checks[0]] * 7, rel=1e-3)  # all have decoded the same scans
    assert "## Roofline of the main recipe" in (tmp_path / f"{command.SOME}.md").read_text()
    again = run()
    assert again.returncode == 0, again.stderr
    assert json.loads(written.read_text())["rows"] == content["rows"]
    assert "--rows" in content["command"]
    refused = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--page", str(written)], cwd=ROOT, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert refused.stderr.endswith("; docs/performance.md shows that of `python -m tests.benchmarks`\n")


def test_the_help_can_be_shown(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    assert "above 15%)" in capsys.readouterr().out.replace("\n", " ")
