"""Which evaluations are rows of the comparison, how they are named, and which pairs are compared."""

from __future__ import annotations

import pandas as pd
import pytest

from evaluation import compare
from evaluation.comparison.evaluations import CheckpointEvaluation
from evaluation.comparison.pairs import pairs
from evaluation.comparison.tables import differences_table
from evaluation.protocols.variant import ProtocolVariant
from infra import cli
from infra.tracking.tracker import Tracker
from tests.evaluation.comparison.stored import log_evaluation, people
from tests.stores import store_at


def evaluations_of(protocol, count=1, name=None, leave_site_out=False):
    """Evaluations without results, for tests of the choice of pairs."""
    evaluates = {"voxels": "shards", "scratch": "architecture"}.get(protocol, "checkpoint")
    variant = ProtocolVariant(protocol, evaluates=evaluates, leave_site_out=leave_site_out)
    run = {"tags": variant.to_tags(), "params": {}}
    return [
        CheckpointEvaluation(f"{name or variant.label} {n}", run, pd.DataFrame(), pd.DataFrame(), pd.DataFrame())
        for n in range(count)
    ]


def names_of_pairs(evaluations, against=None):
    return [(first.name, second.name) for first, second in pairs(evaluations, against)]


def test_pairs_are_of_one_protocol_and_baselines_pair_with_protocols_on_the_same_folds():
    evaluations = [
        *evaluations_of("linear", 2), *evaluations_of("finetune", 2), *evaluations_of("linear", 2, leave_site_out=True),
        *evaluations_of("voxels"), *evaluations_of("scratch", name="scratch resnet18"),
        *evaluations_of("voxels", leave_site_out=True),
    ]  # fmt: skip
    known_sites = ["linear 0", "linear 1", "finetune 0", "finetune 1"]
    unseen_sites = ["linear, sites left out 0", "linear, sites left out 1"]
    expected = {(pair[0], pair[1]) for pair in (known_sites[:2], known_sites[2:], unseen_sites)}
    expected |= {(name, baseline) for name in known_sites for baseline in ("voxels 0", "scratch resnet18 0")}
    expected |= {("voxels 0", "scratch resnet18 0")} | {(name, "voxels, sites left out 0") for name in unseen_sites}
    assert set(names_of_pairs(evaluations)) == expected
    assert names_of_pairs(evaluations, "linear 0") == [
        (other, "linear 0") for other in ("linear 1", "voxels 0", "scratch resnet18 0")
    ]


def test_features_of_others_pair_with_every_checkpoint_of_their_protocol():
    def one(name, protocol, **options):
        run = {"tags": ProtocolVariant(protocol, model="linear", **options).to_tags(), "params": {}}
        return CheckpointEvaluation(name, run, pd.DataFrame(), pd.DataFrame(), pd.DataFrame())

    evaluations = [
        one("joint", "paper", layer="own+spatial"), one("layer3", "paper", layer="layer3", pooling=("mean",)),
        one("FreeSurfer", "paper", evaluates="table"), one("adapter", "paper", evaluates="adapter"),
        one("FreeSurfer, linear", "linear", evaluates="table"), one("voxels", "voxels", evaluates="shards"),
        one("FreeSurfer, sites", "paper", evaluates="table", leave_site_out=True),
    ]  # fmt: skip
    assert evaluations[2].protocol == evaluations[0].protocol == "paper"
    paper = ["joint", "layer3", "FreeSurfer", "adapter"]
    expected = {(first, second) for n, first in enumerate(paper) for second in paper[n + 1 :]} - {("joint", "layer3")}
    expected |= {(name, "voxels") for name in [*paper, "FreeSurfer, linear"]}
    assert set(names_of_pairs(evaluations)) == expected


def test_more_than_six_checkpoints_of_a_protocol_are_compared_with_its_first_only():
    few = [*evaluations_of("paper", 3), *evaluations_of("knn", 3), *evaluations_of("mlp", 3)]
    assert len(names_of_pairs(few)) == 9  # three pairs in each protocol
    many = [*evaluations_of("paper", 7), *evaluations_of("knn", 2), *evaluations_of("voxels")]
    with_first = {("paper 0", f"paper {n}") for n in range(1, 7)}
    baseline_pairs = {(name, "voxels 0") for name in ("paper 0", "knn 0", "knn 1")}
    assert set(names_of_pairs(many)) == with_first | baseline_pairs | {("knn 0", "knn 1")}


def test_against_keeps_the_pairs_with_one_checkpoint(comparison):
    differences, unpaired = differences_table(comparison.last, "SimCLR, linear")
    assert set(differences["second"]) == {"SimCLR, linear"}
    assert set(differences["first"]) == {"y-aware, step 200, linear"}
    assert unpaired == ["scz: random, linear and SimCLR, linear were evaluated on different scans or labels"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "SimCRL"], "against='SimCRL' is not a checkpoint of this comparison; choose one of "),
        (["--filter", "tags.x = 'y'"], "no finished evaluation that matches --filter \"tags.x = 'y'\""),
    ],
)
def test_unknown_checkpoints_and_filters_without_a_match_are_user_errors(store, capsys, options, message):
    assert cli.run(["compare", "--experiment", "kept", "--tracking-uri", store, *options]) == 2
    assert message in capsys.readouterr().err


def test_evaluations_of_one_checkpoint_on_different_tasks_are_one_row(tmp_path, capsys):
    """The checkpoint is evaluated on scz and age, then on age and site, and on site by another protocol."""
    uri, scans = store_at(tmp_path / "mlflow.db"), people()
    linear, knn = {"yaware.protocol": "linear"}, {"yaware.protocol": "knn"}
    first = log_evaluation(
        uri, tmp_path / "a", "x", step=1, skill=0.9, scans=scans, tasks=("scz", "age"), tags=linear, saliency=True,
        params={"tasks": "scz,age", "seed": 1}, metrics={"age.mae": 1.0, "age.mae.low": 0.9, "age.mae.high": 1.1},
    )  # fmt: skip
    newer = log_evaluation(
        uri, tmp_path / "b", "x", step=1, skill=0.2, scans=scans, tasks=("age", "site"), tags=linear, sizes=()
    )
    log_evaluation(uri, tmp_path / "c", "x", step=1, skill=0.2, scans=scans, tasks=("site",), tags=knn, sizes=())
    comparison = compare("kept", tracking_uri=uri)
    assert {evaluation.name: set(evaluation.tasks) for evaluation in comparison.evaluations} == {
        "x, linear": {"scz", "age", "site"}, "x, knn": {"site"},
    }  # fmt: skip
    merged = next(evaluation for evaluation in comparison.evaluations if evaluation.name == "x, linear")
    assert {task: merged.run_of(task)["run_id"] for task in merged.tasks} == {"scz": first, "age": newer, "site": newer}
    metrics = comparison.metrics.set_index(["checkpoint", "task", "metric"])
    assert metrics.loc[("x, linear", "age", "mae"), "value"] != 1.0
    assert set(merged.curve["task"]) == {"scz"}
    assert set(merged.saliency) == {"scz"}
    assert comparison.superseded == [f"x, linear: age of evaluation {first[:10]}, by {newer[:10]}"]
    rows = {(row["checkpoint"], row["evaluation run"]) for row in comparison.provenance}
    assert {("x, linear (scz)", first[:10]), ("x, linear (age, site)", newer[:10])} < rows
    page = tmp_path / "out.html"
    assert cli.run(["compare", "--experiment", "kept", "--tracking-uri", uri, "--out", str(page)]) == 0
    assert f"superseded: {comparison.superseded[0]}" in capsys.readouterr().out.replace("\n", " ")
    assert comparison.superseded[0] in page.read_text()


def test_an_evaluation_that_is_wholly_superseded_is_not_read(tmp_path):
    uri, scans = store_at(tmp_path / "mlflow.db"), people()
    options = {"step": 1, "scans": scans, "tasks": ("scz",), "params": {"tasks": "scz"}}
    old = log_evaluation(uri, tmp_path / "a", "x", skill=0.2, tags={"yaware.manifest_digest": "b" * 64}, **options)
    new = log_evaluation(uri, tmp_path / "b", "x", skill=0.9, **options)
    comparison = compare("kept", tracking_uri=uri)
    assert [row["evaluation run"] for row in comparison.provenance] == [new[:10]]
    assert len(comparison.evaluations[0].predictions) == len(scans)
    assert comparison.superseded == [f"x: scz of evaluation {old[:10]} on other shards, by {new[:10]}"]


def test_checkpoints_with_equal_names_are_told_apart(tmp_path):
    uri, options = store_at(tmp_path / "mlflow.db"), {"skill": 0.5, "scans": people(), "tasks": ("scz",)}
    pretrainings = []
    for number in range(2):
        tracker = Tracker.open(uri, "kept", "x", tags={"yaware.kind": "pretraining"})
        tracker.log_params({"seed": number})
        tracker.end()
        pretrainings.append(str(tracker.run_id))
        tags = {"yaware.pretraining_run": pretrainings[-1], "yaware.weights_sha256": str(number) * 64}
        log_evaluation(uri, tmp_path / f"{number}", "x", step=5 + number, tags=tags, **options)
    other_weights = {"yaware.pretraining_run": pretrainings[0], "yaware.weights_sha256": "9" * 64}
    log_evaluation(uri, tmp_path / "again", "x", step=5, tags=other_weights, **options)
    for leave_site_out in (False, True):
        variant = ProtocolVariant("voxels", evaluates="shards", leave_site_out=leave_site_out)
        tags = {**variant.to_tags(), "yaware.weights_sha256": ""}
        log_evaluation(uri, tmp_path / variant.label, "voxels", step=0, tags=tags, **options)
    comparison = compare("kept", tracking_uri=uri)
    one, other = (f"x ({run_id[:8]})" for run_id in pretrainings)
    assert {evaluation.name for evaluation in comparison.last} == {
        f"{one}, weights 00000000", f"{one}, weights 99999999", other, "voxels", "voxels, sites left out",
    }  # fmt: skip
    assert {name: recipe["seed"] for name, recipe in comparison.recipes.items()} == {one: "0", other: "1"}
    assert comparison.superseded == []
    assert not comparison.over_steps  # steps 5 and 6 belong to two pretrainings


def test_evaluations_at_several_steps_of_one_pretraining_are_grouped(comparison):
    steps = {name: [evaluation.step for evaluation in members] for name, members in comparison.over_steps.items()}
    assert steps == {"y-aware, linear": [100, 200]}
