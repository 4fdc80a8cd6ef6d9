"""The summary at the end of ``make demo`` shows the values of the output files."""

from __future__ import annotations

import json

import pytest

from infra.demo.summary import summary
from infra.errors import UserError

METRICS = """checkpoint,task,title,metric,value,low,high,chance,p_chance
y-aware,ad,Alzheimer,auc,0.7512,0.651,0.849,0.5,0.001
y-aware,ad,Alzheimer,bacc,0.9,0.9,0.9,,
y-aware,age,age,mae,7.91,7.2,8.6,14.25,0.001
random,ad,Alzheimer,auc,0.55,0.45,0.65,0.5,0.2
random,age,age,mae,10.6,9.9,11.3,14.25,0.001
"""


@pytest.fixture
def demo(tmp_path):
    """The output files of a demo that the summary reads."""
    manifest = {"grid": {"shape": [30, 36, 30]}, "shards": [{"scans": 128}, {"scans": 100}]}
    files = {
        "shards/manifest.json": json.dumps(manifest),
        "runs/y-aware/metrics.jsonl": '{"step": 0, "loss": 4.25}\n{"step": 1, "loss": 3.5}\n',
        "runs/random/metrics.jsonl": "",
        "report_metrics.csv": METRICS,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_summary_shows_data_losses_and_primary_metrics(demo):
    text = summary(demo)
    assert "228 simulated scans of 30 x 36 x 30 voxels in 2 shards" in text
    assert "y-aware: 2 steps, loss 4.250 at first, 3.500 at the end" in text
    header, y_aware, untrained, chance = (line.split() for line in text.splitlines()[4:8])
    assert header == ["ad", "auc", "age", "mae"]
    assert y_aware == ["y-aware", "0.75", "[0.65,", "0.85]", "7.91", "[7.20,", "8.60]"]
    assert untrained == ["random", "0.55", "[0.45,", "0.65]", "10.60", "[9.90,", "11.30]"]
    assert chance == ["by", "chance", "0.50", "14.25"]
    assert f"{demo}/report.html" in text


def test_an_unfinished_demo_is_named(demo):
    (demo / "report_metrics.csv").unlink()
    with pytest.raises(UserError, match=r"report_metrics.csv not found: the demo has not finished"):
        summary(demo)
