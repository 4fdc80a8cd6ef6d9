"""Commands killed at random moments end as without a kill; the campaign notices one that does not."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.faults import kill_campaign
from tests.faults.kill_campaign import Campaign, run_campaign
from tests.faults.kill_commands import Command, commands_in, contents, empty, file_names

# Counts to three, one file a step; is continued by the next start.
COUNT = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[1])
for number in range(3):
    time.sleep(0.3)
    (out / str(number)).write_text(str(number))
"""
# Each of these breaks one promise if it is killed, and ends at once when it is started again.
AGAIN = "import pathlib, subprocess, sys, time; out = pathlib.Path(sys.argv[1]); again = (out / 'begun').exists(); "
AGAIN += "(out / 'begun').write_text(''); "
BREAKS = {
    "appended": "print('x' * (1 + again), file=(out / 'table').open('w')); time.sleep(0 if again else 1)",
    "temporary": "(out / '.part' if not again else out / 'begun').write_text(''); time.sleep(0 if again else 1); "
    "again or (out / '.part').unlink()",
    "orphan": "again or subprocess.run([sys.executable, '-c', 'import time; time.sleep(1)'])",
    "refuses": "sys.exit('locked') if again else time.sleep(1)",
}
NOTICED = {
    "appended": "table", "temporary": "file .part stays", "orphan": "left behind", "refuses": "status 1 after 3 starts",
}  # fmt: skip


def command(folder: Path, name: str, code: str) -> Command:
    return Command(
        name=name, line=lambda out: [sys.executable, "-c", code, str(out)], prepare=empty, result=contents,
        undisturbed=folder / "undisturbed", killed=folder / "killed", environment=lambda out: dict(os.environ),
    )  # fmt: skip


def test_a_command_that_continues_passes(tmp_path):
    campaign = run_campaign(3, 0, tmp_path, {"count": command(tmp_path, "count", COUNT)})
    record = campaign.records["count"]
    assert record.kills == 3
    assert record.same == record.cases >= 2
    assert record.differences == []
    assert record.failed_starts == 0
    assert "| `count` | 3 | 0 | " in campaign.table()


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_promise_is_noticed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(kill_campaign, "LEFT_SECONDS", 0.1)
    campaign = Campaign(tmp_path, 0, {name: command(tmp_path, name, AGAIN + BREAKS[name])})
    campaign.run_undisturbed()
    monkeypatch.setattr(campaign.draw, "uniform", lambda low, high: high)
    monkeypatch.setattr(kill_campaign, "kill_after", kill_when_begun)
    campaign.case(name, most=1)
    record = campaign.records[name]
    assert (record.kills, record.cases, record.same) == (1, 1, 0)
    assert any(NOTICED[name] in text for text in record.differences), record.differences


def test_kept_checkpoints_may_be_of_other_steps_but_not_more_or_fewer(tmp_path):
    for run, steps in {"whole": (4, 6), "saved at 5": (5, 6), "too many": (4, 5, 6), "too few": (6,)}.items():
        for step in steps:
            (tmp_path / run / f"step-{step:08d}").mkdir(parents=True)
            (tmp_path / run / f"step-{step:08d}/state.json").touch()
    whole, saved, many, few = (file_names(tmp_path / run) for run in ("whole", "saved at 5", "too many", "too few"))
    assert whole == saved
    assert few < whole < many


def kill_when_begun(started, seconds, draw):
    """Kill the command itself as soon as it has written its first file and, if it starts one, has a child."""
    out = Path(started.process.args[-1])
    wants_child = "subprocess.run" in started.process.args[-2]
    while not (out / "begun").exists() or (wants_child and not started.note_family()):
        time.sleep(0.01)
    time.sleep(0.1)
    started.process.kill()
    started.process.wait()
    return "command"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_ten_kills_of_five_commands_end_the_same(tmp_path):
    seed = int(os.environ.get("KILL_SEED", "1"))
    campaign = run_campaign(10, seed, tmp_path, commands_in(tmp_path))
    print(campaign.table())
    assert [text for record in campaign.records.values() for text in record.differences] == []
    assert sum(record.kills for record in campaign.records.values()) == 10
