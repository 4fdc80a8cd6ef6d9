"""The forecasts of docs/scaling.md and docs/cluster.md: the commands run from the pages, and the table is what they print."""

from __future__ import annotations

import re
import shlex

import pytest

from infra import cli
from tests.runs import ROOT

COMMAND = re.compile(r"^ *yaware (plan .*)$", re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """Return the words of the page's forecasts."""
    return [shlex.split(found) for found in COMMAND.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))]


def table_of(text: str) -> list[str]:
    """Return the rows of the table of forecasts in a text."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| GPUs | batch |"))
    return [line for line in lines[first:] if line.startswith("|")][: 2 + 8]


@pytest.mark.jobs
def test_the_forecasts_run_and_the_table_is_what_is_printed(capsys):
    found = commands("scaling.md")
    assert len(found) == 2
    for words in found:
        assert cli.run(words) == 0
    printed = capsys.readouterr().out
    assert table_of(printed) == table_of((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"))
    assert re.search(r"^assuming +messages of trees, ", printed, re.MULTILINE)


def test_the_first_day_on_a_cluster_plans_a_job_before_there_are_shards(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (words,) = commands("cluster.md")
    assert cli.run(words) == 0
    assert re.search(r"^ranks +8 \(2 x 4\)", capsys.readouterr().out, re.MULTILINE)
