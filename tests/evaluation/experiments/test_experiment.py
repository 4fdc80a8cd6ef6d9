"""The experiment: its plan is whole, its intervals are what they say, and it runs from nothing to tables (slow)."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from evaluation.experiments.judge import Answered, load, save
from evaluation.experiments.report import MAIN, VARIANTS, Figures, Key, main_table, markdown, primary_table
from evaluation.experiments.run import (
    CLINICS,
    HEALTHY,
    JUDGED,
    METHODS,
    SHARDS,
    Plan,
    _claim,
    judged_on,
    main,
    pretrainings,
)
from evaluation.statistics.intervals import bootstrap_weights
from evaluation.statistics.metrics import auc
from infra.errors import UserError
from tests.runs import run

PLAN = Plan(sizes=(20,), draws=4, resamples=50)


def answered(method, seed, signal, clinic=MAIN, task="scz", draws=4, people=60, variant="main"):
    """Answers that tell classes apart by ``signal`` standard deviations; labels and people are the same for all."""
    labels = np.arange(people) % 2
    generator = np.random.default_rng([seed, len(method), draws])
    answers = signal * labels + generator.normal(size=(draws, people))
    names = np.array([f"p{number}" for number in range(people)])
    return Answered(
        clinic,
        method,
        variant,
        seed,
        task,
        np.full(draws, 20),
        np.arange(draws),
        answers.astype(np.float32),
        labels,
        names,
    )


def test_the_plan_is_whole():
    plan = Plan()
    every = pretrainings(plan)
    assert len({each.name for each in every}) == len(every)
    assert {each.data for each in every} == set(JUDGED.values())
    for clinic in JUDGED:
        assert {each.data for each in judged_on(clinic, plan)} == {JUDGED[clinic]}
    assert {each.name for clinic in JUDGED for each in judged_on(clinic, plan)} == {each.name for each in every}
    main_ones = [(each.method, each.seed) for each in judged_on("clinic-a0", plan)]
    assert sorted(main_ones) == sorted((method, seed) for method in METHODS for seed in range(3))
    for variant, clinic, _ in VARIANTS:
        there = {each.method for each in judged_on(clinic, plan) if each.variant == variant}
        assert {"y-aware", "age-regression"} <= there, (variant, clinic)
    assert {cohort for cohort, _ in SHARDS.values()} == {*HEALTHY, *CLINICS}


def test_answers_are_read_as_they_were_written(tmp_path):
    found = [answered("y-aware", 1, 0.5), answered("voxels", 0, 0.1, draws=2)]
    save(tmp_path / "results" / "x.npz", found)
    for before, after in zip(found, load(tmp_path / "results" / "x.npz"), strict=True):
        for name, value in vars(before).items():
            np.testing.assert_array_equal(getattr(after, name), value)
        assert isinstance(after.seed, int)
        assert isinstance(after.method, str)


def test_a_resample_draws_people_draws_and_seeds():
    found = [answered("y-aware", seed, 0.8) for seed in range(3)]
    figures = Figures(found, PLAN.resamples, seed=7)
    key = Key(MAIN, "y-aware", "main", "scz", 20)
    sample = figures.sample(key, 4)
    weights = np.concatenate(
        list(bootstrap_weights(np.unique(found[0].people, return_inverse=True)[1], PLAN.resamples, 7))
    )
    of_seeds, of_draws = figures._counts(3, "seeds"), figures._counts(4, "draws")
    assert (of_seeds.sum(1) == 3).all()
    assert (of_draws.sum(1) == 4).all()
    for b in (0, 17, 49):
        chosen = np.repeat(np.arange(60), weights[b].astype(int))
        values = [
            auc(found[s].labels[chosen], found[s].answers[d][chosen])
            for s in range(3) for _ in range(of_seeds[b, s]) for d in range(4) for _ in range(of_draws[b, d])
        ]  # fmt: skip
        assert sample[b] == pytest.approx(np.mean(values))
    value, low, high = figures.one(key)
    assert value == pytest.approx(np.mean([auc(each.labels, row) for each in found for row in each.answers]))
    assert low < value < high


def test_differences_are_paired_and_over_the_draws_that_both_have():
    found = [answered("y-aware", seed, 0.8) for seed in range(2)]
    twin = [replace(each, method="simclr") for each in found]
    few = [replace(each, method="fine-tuned", answers=each.answers[:2], sizes=each.sizes[:2], draws=each.draws[:2])
           for each in found]  # fmt: skip
    worse = [answered("random", seed, 0.0) for seed in range(2)]
    figures = Figures([*found, *twin, *few, *worse], 200, seed=0)
    of = {method: Key(MAIN, method, "main", "scz", 20) for method in ("y-aware", "simclr", "fine-tuned", "random")}
    assert figures.difference(of["y-aware"], of["simclr"]) == (0.0, 0.0, 0.0, 1.0)
    assert figures.difference(of["y-aware"], of["fine-tuned"])[0] == pytest.approx(0.0)
    value, low, high, p = figures.difference(of["y-aware"], of["random"])
    assert 0 < low < value < high
    assert p < 0.05
    back = figures.difference(of["random"], of["y-aware"])
    assert back == pytest.approx((-value, -high, -low, p))
    table = primary_table(figures, PLAN)
    assert list(table["y-aware less"]) == ["random encoder", "SimCLR", "y-aware, fine-tuned"]
    assert (table["p_holm"] >= table["p"]).all()
    assert list(table["draws won"]) == ["4 of 4", "0 of 4", "0 of 2"]


def test_intervals_of_a_difference_cover_the_truth():
    """Two methods of one quality on new people, draws and seeds: 95 % intervals of their difference hold 0 about as often."""
    key = {method: Key(MAIN, method, "main", "scz", 20) for method in ("y-aware", "simclr")}
    held = 0
    for study in range(60):
        found = []
        for method in key:
            for seed in range(3):
                one = answered(method, 1000 * study + seed, 0.8, people=80)
                found.append(replace(one, seed=seed))
        _, low, high, _ = Figures(found, 200, seed=study).difference(key["y-aware"], key["simclr"])
        held += low <= 0 <= high
    assert held >= 51


def test_tables_have_what_was_measured_alone():
    figures = Figures([answered("y-aware", 0, 0.8), answered("voxels", 0, 0.2)], 50, seed=0)
    table = main_table(figures, MAIN, "main", PLAN)
    assert list(table["method"]) == ["y-aware", "voxel ridge + age"]
    lines = list(markdown(pd.DataFrame({"a": [0.12345], "n": [3]})))
    assert lines == ["| a | n |", "|---|---|", "| 0.123 | 3 |"]


def test_a_folder_belongs_to_one_plan(tmp_path, capsys):
    _claim(tmp_path / "e", PLAN)
    _claim(tmp_path / "e", PLAN)
    with pytest.raises(UserError, match=r"holds an experiment with steps=200, now 5; choose another --out"):
        _claim(tmp_path / "e", replace(PLAN, steps=5))
    assert main(["--out", str(tmp_path / "f"), "--sizes", "20", "--network-draws", "1", "2"]) == 2
    assert "--network-draws must have a number for each of --sizes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(2700)
def test_the_experiment_from_nothing_to_tables(tmp_path):
    """The real command, tiny: every cohort, encoder, judgement, table and picture; again, and nothing is done twice."""
    command = [
        sys.executable, "-m", "evaluation.experiments.run", "--out", str(tmp_path / "e"), "--healthy", "300", "--clinic", "400",
        "--steps", "2", "--seeds", "2", "--variant-seeds", "1", "--sizes", "20", "40", "--draws", "3", "--network-draws", "2",
        "1", "--network-epochs", "1", "--resamples", "100", "--jobs", str(min(2, len(os.sched_getaffinity(0)))),
    ]  # fmt: skip
    assert run(command, tmp_path, timeout=2400).returncode == 0
    text = (tmp_path / "e" / "results.md").read_text()
    for name in ("main", "unscaled", "primary", "sweep", "variants", "bandwidth", "age"):
        assert len(pd.read_csv(tmp_path / "e" / f"{name}.csv")), name
        assert f"## {name}" in text
    assert len(pd.read_csv(tmp_path / "e" / "primary.csv")) == 2 * 2 * 5 + 2 * 2
    for picture in ("main", "sweep", "variants"):
        assert (tmp_path / "e" / f"experiment_{picture}.png").stat().st_size > 10_000
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "e" / "results").iterdir()}
    assert run(command, tmp_path, timeout=600).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert json.loads((tmp_path / "e" / "plan.json").read_text())["steps"] == 2
