"""The experiment on simulated people: its plan, its bootstrap, its tables, and a tiny run of the whole (slow)."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from evaluation.experiments.answers import MethodAnswers, load_answers, save_answers
from evaluation.experiments.bootstrap import BootstrapMetrics, Cell, resampled_auc
from evaluation.experiments.plan import (
    CLINICS,
    HEALTHY,
    MAIN_CLINIC,
    METHODS,
    PRETRAINED_ON,
    SHARDS,
    ExperimentPlan,
    encoders_for,
    pretrainings,
)
from evaluation.experiments.plan_options import check_plan_file
from evaluation.experiments.plots import plot_main
from evaluation.experiments.run import main
from evaluation.experiments.tables import VARIANTS, main_table, markdown, primary_table
from evaluation.statistics.intervals import bootstrap_weights
from evaluation.statistics.metrics import auc
from infra.errors import UserError
from tests.runs import run

PLAN = ExperimentPlan(sizes=(20,), draws=4, resamples=50)


def simulated_answers(method, seed, signal, *, clinic=MAIN_CLINIC, task="scz", draws=4, people=60, variant="main"):
    """Answers whose classes are ``signal`` standard deviations apart; labels and people are the same for all methods."""
    labels = np.arange(people) % 2
    generator = np.random.default_rng([seed, len(method), draws])
    answers = signal * labels + generator.normal(size=(draws, people))
    return MethodAnswers(
        clinic=clinic, method=method, variant=variant, seed=seed, task=task, sizes=np.full(draws, 20),
        draws=np.arange(draws), answers=answers.astype(np.float32), labels=labels,
        people=np.array([f"p{number}" for number in range(people)]),
    )  # fmt: skip


def test_every_encoder_of_the_plan_is_evaluated_on_matching_shards():
    plan = ExperimentPlan()
    every = pretrainings(plan)
    assert len({pretraining.name for pretraining in every}) == len(every)
    assert {pretraining.data for pretraining in every} == set(PRETRAINED_ON.values())
    for clinic, shards in PRETRAINED_ON.items():
        assert {pretraining.data for pretraining in encoders_for(clinic, plan)} == {shards}
    evaluated = {pretraining.name for clinic in PRETRAINED_ON for pretraining in encoders_for(clinic, plan)}
    assert evaluated == {pretraining.name for pretraining in every}
    main_encoders = [(pretraining.method, pretraining.seed) for pretraining in encoders_for("clinic-a0", plan)]
    assert sorted(main_encoders) == sorted((method, seed) for method in METHODS for seed in range(3))
    assert {cohort for cohort, _ in SHARDS.values()} == {*HEALTHY, *CLINICS}


def test_every_variant_has_both_methods_that_its_table_compares():
    for variant, clinic, _ in VARIANTS:
        methods = {
            pretraining.method
            for pretraining in encoders_for(clinic, ExperimentPlan())
            if pretraining.variant == variant
        }
        assert {"y-aware", "age-regression"} <= methods, (variant, clinic)


def test_stored_answers_are_read_back_unchanged(tmp_path):
    answers = [simulated_answers("y-aware", 1, 0.5), simulated_answers("voxels", 0, 0.1, draws=2)]
    save_answers(tmp_path / "results" / "x.npz", answers)
    for before, after in zip(answers, load_answers(tmp_path / "results" / "x.npz"), strict=True):
        for name, value in vars(before).items():
            np.testing.assert_array_equal(getattr(after, name), value)
        assert isinstance(after.seed, int)
        assert isinstance(after.method, str)


def test_a_resample_draws_people_draws_and_seeds_with_replacement():
    answers = [simulated_answers("y-aware", seed, 0.8) for seed in range(3)]
    metrics = BootstrapMetrics(answers, PLAN.resamples, seed=7)
    cell = Cell(MAIN_CLINIC, "y-aware", "main", "scz", 20)
    sample = metrics.sample(cell, 4)
    codes = np.unique(answers[0].people, return_inverse=True)[1]
    weights = np.concatenate(list(bootstrap_weights(codes, PLAN.resamples, 7)))
    seed_counts, draw_counts = metrics.counts(3, "seeds"), metrics.counts(4, "draws")
    assert (seed_counts.sum(1) == 3).all()
    assert (draw_counts.sum(1) == 4).all()
    for b in (0, 17, 49):
        scans = np.repeat(np.arange(60), weights[b].astype(int))
        values = [
            auc(answers[s].labels[scans], answers[s].answers[d][scans])
            for s in range(3) for _ in range(seed_counts[b, s]) for d in range(4) for _ in range(draw_counts[b, d])
        ]  # fmt: skip
        assert sample[b] == pytest.approx(np.mean(values))
    value, low, high = metrics.mean(cell)
    assert value == pytest.approx(np.mean([auc(entry.labels, row) for entry in answers for row in entry.answers]))
    assert low < value < high


def test_the_resampled_auc_is_that_of_the_metric_also_with_ties():
    generator = np.random.default_rng(0)
    labels, weights = np.arange(90) % 2, generator.integers(0, 4, (30, 90)).astype(float)
    weights[0, labels == 1] = 0  # a sample without positives
    for scores in (generator.normal(size=90), generator.integers(0, 5, 90).astype(float)):
        np.testing.assert_allclose(resampled_auc(labels, scores, weights), auc(labels, scores, weights), rtol=1e-12)


def test_differences_are_paired_and_over_the_draws_that_both_methods_have():
    y_aware = [simulated_answers("y-aware", seed, 0.8) for seed in range(2)]
    twin = [replace(entry, method="simclr") for entry in y_aware]
    fewer_draws = [
        replace(entry, method="fine-tuned", answers=entry.answers[:2], sizes=entry.sizes[:2], draws=entry.draws[:2])
        for entry in y_aware
    ]
    worse = [simulated_answers("random", seed, 0.0) for seed in range(2)]
    metrics = BootstrapMetrics([*y_aware, *twin, *fewer_draws, *worse], 200, seed=0)
    cells = {
        method: Cell(MAIN_CLINIC, method, "main", "scz", 20) for method in ("y-aware", "simclr", "fine-tuned", "random")
    }
    assert metrics.difference(cells["y-aware"], cells["simclr"]) == (0.0, 0.0, 0.0, 1.0)
    assert metrics.difference(cells["y-aware"], cells["fine-tuned"])[0] == pytest.approx(0.0)
    value, low, high, p = metrics.difference(cells["y-aware"], cells["random"])
    assert 0 < low < value < high
    assert p < 0.05
    reverse = metrics.difference(cells["random"], cells["y-aware"])
    assert reverse == pytest.approx((-value, -high, -low, p))
    table = primary_table(metrics, PLAN)
    assert list(table["y-aware minus"]) == ["random encoder", "SimCLR", "y-aware, fine-tuned"]
    assert (table["p_holm"] >= table["p"]).all()
    assert list(table["draws won"]) == ["4 of 4", "0 of 4", "0 of 2"]


def test_95_percent_intervals_of_a_difference_contain_the_truth_in_at_least_51_of_60_studies():
    """Two methods of equal quality on new people, draws and seeds: the true difference is 0."""
    cells = {method: Cell(MAIN_CLINIC, method, "main", "scz", 20) for method in ("y-aware", "simclr")}
    covered = 0
    for study in range(60):
        answers = []
        for method in cells:
            for seed in range(3):
                entry = simulated_answers(method, 1000 * study + seed, 0.8, people=80)
                answers.append(replace(entry, seed=seed))
        _, low, high, _ = BootstrapMetrics(answers, 200, seed=study).difference(cells["y-aware"], cells["simclr"])
        covered += low <= 0 <= high
    assert covered >= 51


def test_tables_have_the_measured_methods_only():
    metrics = BootstrapMetrics([simulated_answers("y-aware", 0, 0.8), simulated_answers("voxels", 0, 0.2)], 50, seed=0)
    table = main_table(metrics, MAIN_CLINIC, "main", PLAN)
    assert list(table["method"]) == ["y-aware", "voxel ridge + age"]
    unscaled = main_table(metrics, MAIN_CLINIC, "unscaled", PLAN)
    assert list(unscaled["method"]) == ["voxel ridge + age"]  # methods without pretraining have no variants
    lines = list(markdown(pd.DataFrame({"a": [0.12345], "n": [3]})))
    assert lines == ["| a | n |", "|---|---|", "| 0.123 | 3 |"]


def test_the_main_plot_draws_the_values_of_its_table_and_names_what_was_not_measured():
    metrics = BootstrapMetrics(
        [simulated_answers("y-aware", 0, 0.8), simulated_answers("voxels", 0, 0.2),
         simulated_answers("voxels", 0, 0.2, task="ad")], 50, seed=0,
    )  # fmt: skip
    table = main_table(metrics, MAIN_CLINIC, "main", PLAN)
    figure = plot_main(table)
    drawn = [[float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "o"] for axis in figure.axes]
    assert drawn == [list(table.loc[table["task"] == title, "auc"]) for title in dict.fromkeys(table["task"])]
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [[], ["not measured"]]


def test_a_folder_belongs_to_one_plan(tmp_path):
    check_plan_file(tmp_path / "e", PLAN)
    check_plan_file(tmp_path / "e", PLAN)
    with pytest.raises(
        UserError, match=r"holds an experiment with steps=200, but this one has steps=5; choose another"
    ):
        check_plan_file(tmp_path / "e", replace(PLAN, steps=5))


def test_a_number_of_network_draws_is_needed_for_each_size(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "f"), "--sizes", "20", "--network-draws", "1", "2"]) == 2
    assert "--network-draws has 2 numbers and --sizes 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(2700)
def test_a_tiny_experiment_writes_all_tables_and_a_second_run_repeats_nothing(tmp_path):
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
    # Five methods for two diseases and two sizes; both networks for schizophrenia only.
    assert len(pd.read_csv(tmp_path / "e" / "primary.csv")) == 2 * 2 * 5 + 2 * 2
    for plot in ("main", "sweep", "variants"):
        assert (tmp_path / "e" / f"experiment_{plot}.png").read_bytes().startswith(b"\x89PNG")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "e" / "results").iterdir()}
    assert run(command, tmp_path, timeout=600).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert json.loads((tmp_path / "e" / "plan.json").read_text())["steps"] == 2
