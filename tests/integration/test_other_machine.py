"""The pipeline on another machine: no name and no home, read-only folders, TMPDIR, /dev/shm, locks and console.

Each row of the matrix is a world (``elsewhere.World``), each column a command. The worlds share one cohort, its shards and
a run of two steps.
"""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.cohorts import write_cohort
from tests.integration.elsewhere import EACH, World
from tests.runs import pretrain_command, run
from tests.stores import store_at

SMALL = ["--train.steps=2", "--batch.global=8", "--monitor.every_epochs=0", "--data.workers=1", "--launch.ranks=1"]
SMALL += ["--encoder.options={width: 0.25, norm: group}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cohort with a site that is not ASCII, its shards, and a run of two steps."""
    from data_pipeline.shards.build import build_shards

    folder = tmp_path_factory.mktemp("made")
    cohort = write_cohort(folder / "cohort", participants=40)
    table = cohort / "participants.tsv"
    table.write_text(table.read_text().replace("site1", "Zürich"), encoding="utf-8")
    build_shards(cohort, folder / "shards")
    done = run(pretrain_command(folder / "shards", folder / "run", 2, *SMALL), folder)
    assert done.returncode == 0
    return folder


def reading(made, world):
    """The commands that read what is there and write elsewhere."""
    out, shards, checkpoint = world.folder / "out", made / "shards", made / "run"
    store = store_at(world.folder / "mlflow.db")
    evaluate = [
        "evaluate",
        checkpoint,
        "--shards",
        shards,
        "--tasks",
        "age,sex",
        "--protocols",
        "linear",
        "--folds",
        "2",
    ]
    evaluate += ["--n-train", "12", "--draws", "1", "--repeats", "1", "--halvings", "0", "--tracking-uri", store]
    return [
        ["cohort", "inspect", made / "cohort", "--out", out / "inspect"],
        ["shards", "info", shards],
        ["shards", "verify", shards],
        ["shards", "preview", shards, "--out", out / "preview.png", "--scans", "2"],
        ["export", checkpoint, out / "encoder"],
        ["embed", checkpoint, "--shards", shards, "--out", out / "features.tsv"],
        evaluate,
        ["saliency", checkpoint, "--shards", shards, "--task", "age", "--scans", "2", "--cubes", "2", "--tracking-uri", store],
        ["compare", "--out", out / "report.html", "--tracking-uri", store],
    ]  # fmt: skip


def writing(made, world):
    """The commands that build and pretrain."""
    shards = world.folder / "shards"
    return [
        ["shards", "build", made / "cohort", shards],
        ["pretrain", "--config", "demo-cpu", *SMALL, f"--data.shards={shards}", f"--run.output={world.folder}/run"],
    ]


def check(done: subprocess.CompletedProcess[str], commands: list) -> None:
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert done.stdout.count(": status 0") == len(commands)


ALL = {"nobody": True, "ascii": True, "long_tmpdir": True, "noexec_tmpdir": True, "small_shm": True}
ROWS = {
    "no name and home": {"nobody": True},
    "HOME read-only": {"home_read_only": True},
    "LANG=C": {"ascii": True},
    "TMPDIR of 100 letters": {"long_tmpdir": True},
    "TMPDIR without execution": {"noexec_tmpdir": True},
    "64 MB of /dev/shm": {"small_shm": True},
    "no flock": {"no_flock": True},
}


def world_of(folder, made, **unusual):
    world = World(folder, read_only=[made / "cohort", made / "shards", made / "run"], **unusual)
    if reason := world.why_not():
        pytest.skip(reason)
    return world


@pytest.mark.jobs
def test_everything_unusual_at_once(made, tmp_path):
    world = world_of(tmp_path, made, **ALL, no_flock=True)
    commands = [*reading(made, world), *writing(made, world)]
    check(world.yaware(*commands), commands)
    assert "Zürich" in (tmp_path / "out/inspect/inspect.html").read_text(encoding="utf-8")
    assert list((world.tmpdir / "yaware-12345/.cache/yaware").iterdir())


@pytest.mark.jobs
def test_a_place_that_cannot_be_written_is_one_line(made, tmp_path):
    store = f"sqlite:///{made}/mlflow.db"
    table = tmp_path / "bmi.tsv"
    table.write_text("participant_id\tbmi\nsub-000\t21\n")
    world = world_of(tmp_path, made)
    shards, checkpoint, cohort, inside = made / "shards", made / "run", made / "cohort", made / "shards" / "new"
    evaluate = ["evaluate", checkpoint, "--shards", shards, "--tasks", "age", "--folds", "2", "--tracking-uri", store]
    expected = {
        "--out=.*preview.png cannot be written": ["shards", "preview", shards],
        "--out=.*new cannot be written": ["cohort", "inspect", cohort, "--out", inside],
        r"shards/\S+: Read-only file system; give a folder that can be written": ["shards", "annotate", shards, table],
        r"shards/\S+: Read-only file system; give a folder": ["shards", "append", cohort, shards, "--dataset", "second"],
        "new: Read-only file system; give a folder that": ["shards", "build", cohort, inside],
        "new: Read-only file system; give a": ["cohort", "simulate", inside, "--participants", "4", "--spacing", "12"],
        "OUT=.*new cannot be written": ["export", checkpoint, inside],
        "--out=.*new.tsv cannot be written": ["embed", checkpoint, "--shards", shards, "--out", f"{inside}.tsv"],
        "--cache=.*new cannot be written": [*evaluate, "--cache", inside],
        "--storage=.*new cannot be written": [*evaluate, "--storage", inside],
        "--out=.*new.html cannot be written": ["compare", "--tracking-uri", store, "--out", f"{inside}.html"],
        "run.output=.*new cannot be written": [
            "pretrain", "--config", "demo-cpu", *SMALL, f"--data.shards={shards}", f"--run.output={inside}"
        ],
    }  # fmt: skip
    done = world.yaware(*expected.values(), code=EACH)
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert "Traceback" not in done.stderr
    assert done.stdout.count(": status 2") == len(errors) == len(expected)
    for pattern, line in zip(expected, errors, strict=True):
        assert re.search(f"^yaware: error: .*{pattern}", line), (pattern, line)


@pytest.mark.slow
@pytest.mark.parametrize("unusual", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("group", [reading, writing])
def test_one_thing_unusual(made, tmp_path, group, unusual):
    world = world_of(tmp_path, made, **unusual)
    commands = group(made, world)
    check(world.yaware(*commands), commands)
