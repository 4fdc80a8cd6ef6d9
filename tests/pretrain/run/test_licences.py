"""The licences of the training data go into config.json, with those of the run that a run started from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pretrain.run.loop import licences_of_data
from tests.pretrain.weights.encoders import CONFIG, write_small_encoder

DATA_SETS = np.array(["ixi", "ixi", "clinic", "open"])
STATED = {"ixi": ["CC BY-SA 3.0"], "clinic": [], "open": ["CC0"]}


class FakeManifest:
    """A manifest of four scans of three data sets."""

    digest = "d" * 64

    def licences(self, rows):
        return {name: STATED[name] for name in sorted(set(DATA_SETS[rows]))}


def plan(output, resume="auto", rows=(0, 1, 2), watched=()):
    recipe = SimpleNamespace(run=SimpleNamespace(output=str(output), resume=str(resume)))
    observed = SimpleNamespace(rows=np.array(watched)) if watched else None
    return SimpleNamespace(recipe=recipe, manifest=FakeManifest(), rows=np.array(rows), watched=observed)


def test_the_data_sets_of_the_training_and_of_the_monitor_are_named(tmp_path):
    assert licences_of_data(plan(tmp_path), 5) == {"clinic": [], "ixi": ["CC BY-SA 3.0"]}
    assert licences_of_data(plan(tmp_path, watched=(3,)), 5) == {"clinic": [], "ixi": ["CC BY-SA 3.0"], "open": ["CC0"]}


def test_an_untrained_encoder_comes_from_no_data(tmp_path):
    assert licences_of_data(plan(tmp_path), 0) == {}


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ({"licences": {"secret": ["DUA"], "clinic": ["CC0"]}}, {"clinic": ["CC0"], "ixi": ["CC BY-SA 3.0"], "secret": ["DUA"]}),
        ({"licences": {}}, {"clinic": [], "ixi": ["CC BY-SA 3.0"]}),
        ({"run_name": "before"}, {"clinic": [], "ixi": ["CC BY-SA 3.0"], "the data of before": []}),
        ({"manifest_digest": FakeManifest.digest}, {"clinic": [], "ixi": ["CC BY-SA 3.0"]}),
    ],
)  # fmt: skip
def test_the_run_that_a_run_started_from_adds_its_data_sets(tmp_path, monkeypatch, recorded, expected):
    monkeypatch.setattr("tests.pretrain.weights.encoders.CONFIG", {**CONFIG, **recorded})
    write_small_encoder(tmp_path / "earlier")
    assert licences_of_data(plan(tmp_path / "run", tmp_path / "earlier"), 5) == expected
