"""``yaware launch --slurm prepare``: a copy of the recipe, and files where the preparation accepts them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_pipeline.prepare.derivative import claim
from data_pipeline.prepare.settings import PrepareRecipe
from infra import cli

pytestmark = pytest.mark.usefixtures("start")


def launch(*words: str) -> int:
    return cli.run(["launch", "--slurm", *words])


@pytest.mark.parametrize(
    "words",
    [
        ["--recipe", "my.yaml"],
        ["--recipe=my.yaml"],
        ["--recipe", "./my.yaml"],
        ["--rec=my.yaml"],
        ["--reci", ".//my.yaml"],
    ],
)
def test_a_preparation_reads_a_copy_of_its_recipe(start, capsys, words):
    (start / "my.yaml").write_text("prepare: {seed: 7}\n")
    assert launch("--dry-run", "--dependency=afterok:1", "prepare", "raw", "out", "--spacing=2", *words) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    (given,) = (line for line in lines if line.startswith("set -- "))
    copy = re.fullmatch(r"set -- raw out --spacing=2 --recipe (\S+\.yaml)", given)[1]
    assert copy.startswith(f"{start}/out/.jobs/yaware-prepare-")
    assert f"{copy} is not written yet" in captured.err
    assert lines[-1].endswith('-m infra.slurm.ray_job cohort prepare "$@"')


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ("--script=out/a.sbatch", "--script=out/a.sbatch"),
        ("--script=out/jobs/a.sbatch", "--script=out/jobs/a.sbatch"),
        ("--sbatch-option=output={start}/out/%j.log", "--sbatch-option output={start}/out/%j.log"),
    ],
)
def test_a_job_puts_no_file_where_its_preparation_would_refuse_it(start, capsys, option, shown):
    words = ["--dry-run", "--dependency=afterok:1", option.format(start=start), "prepare", "raw", "out"]
    assert launch(*words) == 2
    error = f"yaware: error: {shown} lies in out, which must be new when the job starts; choose another place\n"
    assert capsys.readouterr().err == error.format(start=start)
    claim(start / "out", PrepareRecipe(), name="raw", simulated=False)  # a preparation that goes on
    assert launch(*words) == 0


def test_a_job_may_put_its_files_into_a_hidden_folder_of_the_preparation(start):
    assert launch("--dry-run", "--dependency=afterok:1", "--script=out/.my/a.sbatch", "prepare", "raw", "out") == 0


def test_a_submitted_preparation_finds_its_folder_free(sbatch, start, capsys):
    sbatch.write_text("echo 7")
    (start / "raw").mkdir()
    (start / "my.yaml").write_text("prepare: {seed: 7}\n")
    assert launch("prepare", "raw", "out", "--recipe=my.yaml") == 0
    log = re.search(r"its log: (\S+)", capsys.readouterr().out)[1]
    Path(log).write_text("SLURM opens the log before the command starts\n")
    assert len(list((start / "out").rglob("*.*"))) == 4  # the hidden folder: script, recipe and log
    claim(start / "out", PrepareRecipe(), name="raw", simulated=False)
