"""The benchmark that compares defaults uses training scans only, and its table counts what is better in every cell."""

from __future__ import annotations

import numpy as np
import pandas as pd

from evaluation.features.candidates import FeatureChoice
from evaluation.features.tables import table_of
from evaluation.tasks.folds import outer_folds
from evaluation.tasks.tasks import Task
from tests.benchmarks.studies.default_features import COLUMNS, report, scores_of


def test_scores_use_training_scans_only_and_the_table_counts_better_cells():
    generator = np.random.default_rng(0)
    labels = generator.permutation(60) % 2
    task = Task(
        name="ad",
        title="ad",
        kind="binary",
        rows=np.arange(60),
        labels=labels,
        groups=np.arange(60),
        classes=["a", "b"],
    )
    noise = generator.normal(size=(60, 8)).astype(np.float32)
    signal = generator.normal(size=(60, 9)).astype(np.float32)
    signal[:, 0] += 3 * labels
    test = outer_folds(task, 5, 0)[0][1]
    noise[test], signal[test] = np.nan, np.nan  # would spread to every score
    candidates = [
        FeatureChoice(
            {"layer": layer, "pooling": "mean", "scale": "each"}, table_of(task, features, "each", np.arange(60))
        )
        for layer, features in (("encoder", noise), ("layer2", signal))
    ]
    default = table_of(task, np.column_stack([noise, signal]), "each")
    rows = list(scores_of(candidates, {"default": default}, task, repeats=2))
    assert len(rows) == 2 * 2 * 3 * 5  # sizes, repeats, folds; two candidates, auto, the default and that of before
    table = pd.DataFrame([(11, "y-aware", "ad", *row) for row in rows], columns=COLUMNS)
    assert table["score"].notna().all()
    assert table.groupby("features")["score"].mean()["layer2 mean each"] > 0.8
    lines = report(table).splitlines()
    assert [
        line.split()[-1] for line in lines if line.startswith(("encoder mean", "layer2 mean", "auto", "default"))
    ] == [
        "0",
        "1",
        "1",
        "1",
    ]
    assert "of 1 cells of the pretrained encoder" in lines[-1]
