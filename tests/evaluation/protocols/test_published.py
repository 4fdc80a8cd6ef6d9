"""The paper's values beside a task: those of the same method, or marked as those of another one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.protocols.candidates import variants_of
from evaluation.protocols.context import Candidate, print_tasks
from evaluation.protocols.protocols import checked_settings
from evaluation.tasks.tasks import Task


def printed(capsys, beside=(), simulated=False, **settings):
    """The first line with published values that an evaluation of schizophrenia by these settings prints."""
    codes = np.array([0, 1, 0, 1])
    task = Task(
        "scz", "schizophrenia", "binary", rows=np.arange(4), labels=codes, groups=np.arange(4), classes=["HC", "SCZ"],
        beside=list(beside),
    )  # fmt: skip
    own = {"tasks": "scz", "protocols": "paper", "pooling": "mean", "n_train": [100], "seed": 0, "finetune": None}
    context = SimpleNamespace(
        tasks=[task], manifest=SimpleNamespace(simulated=simulated), settings=checked_settings(**{**own, **settings})
    )
    print_tasks(context, variants_of(context, [Candidate("y-aware", "y-aware")]))
    return next((line for line in capsys.readouterr().out.splitlines() if "published" in line), None)


SOURCE = "evaluate: published (Dufumier et al., MICCAI 2021, arXiv:2106.08808; on other scans"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"layer": "own", "readouts": "no"}, "), scz, 100 training scans: y-Aware 0.737"),
        ({"layer": "own", "readouts": "no", "beside": ["age"]}, ", by another method than here (age)), scz, 100"),
        (
            {"readouts": "free", "beside": ["age"]},
            ", by another method than here (spatial features, readouts, age)), scz",
        ),
        (
            {"readouts": "no", "layer": "layer2", "scale": "all"},
            ", by another method than here (layer2 mean, one scale))",
        ),
        ({"readouts": "no", "layer": "auto"}, ", by another method than here (features chosen on inner folds)), scz"),
        ({"protocols": ["finetune", "scratch"], "readouts": "no"}, ", by another method than here (finetune)), scz"),
        ({"protocols": ["voxels"], "readouts": "no"}, ", by another method than here (no pretrained encoder)), scz"),
        ({"protocols": ["knn", "paper"], "layer": "own", "readouts": "no"}, "), scz, 100 training scans: y-Aware"),
    ],
)
def test_the_line_says_what_the_evaluation_does_and_the_paper_did_not(capsys, settings, text):
    assert printed(capsys, **settings).startswith(SOURCE + text)


def test_no_published_values_are_shown_for_simulated_scans(capsys):
    assert printed(capsys, simulated=True, layer="own", readouts="no") is None
