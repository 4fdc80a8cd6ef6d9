"""The pieces of the second experiment, and the digest by which stored answers are recognised."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from data_pipeline.simulation.settings import Simulation
from evaluation.experiments.cohorts import HEALTHY_SPLITS
from evaluation.experiments.plan import METHODS
from evaluation.experiments.pretraining import RECIPE
from evaluation.experiments.second import __main__ as command
from evaluation.experiments.second import plan as plans
from evaluation.experiments.second.comparisons import ALL, CURVES, PRIMARY, SECONDARY, TESTED, Method
from evaluation.experiments.second.piece import is_done
from evaluation.experiments.second.plan import (
    BESIDE_OWN,
    LEVELS,
    SPATIAL,
    VARIANTS,
    Piece,
    SecondPlan,
    chosen_pieces,
    piece_digest,
    pieces_of,
    pretraining_settings,
    recipe_settings,
)
from evaluation.experiments.second.store import save_piece
from evaluation.experiments.second.tune import TuningPlan, check_choices
from evaluation.features.candidates import spatial_block
from evaluation.protocols.probes import Probe
from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.encoders import build_encoder
from pretrain.readouts.calibration import FEWEST_OF_AUTO
from pretrain.run.plan import calibration_of
from tests.evaluation.experiments.second.answers import made_up

PLAN = SecondPlan()
BY_NAME = {piece.name: piece for piece in pieces_of(PLAN)}


def test_every_level_has_its_encoders_and_the_middle_one_the_variants_and_networks_too():
    assert len(BY_NAME) == len(pieces_of(PLAN))
    for level in LEVELS:
        expected = {f"{level}/{method}-{seed}" for method in METHODS for seed in range(3)} | {f"{level}/voxels"}
        if level == "middle":
            expected |= {f"middle/{method}-{seed}" for method in VARIANTS for seed in range(3)}
            expected |= {"middle/networks-scz", "middle/networks-ad"}
        assert {name for name in BY_NAME if name.startswith(f"{level}/")} == expected


def test_every_compared_method_is_measured_by_a_piece():
    at_middle = [piece for piece in pieces_of(PLAN) if piece.level == "middle"]
    measured = {Method(piece.method, kind) for piece in at_middle if piece.kind == "encoder" for kind in piece.features}
    measured |= set(map(Method, (*plans.VOXEL_METHODS, *plans.NETWORK_METHODS)))
    compared = {TESTED, *PRIMARY, *CURVES, *(method for pair in SECONDARY for method in pair)}
    assert set(ALL) == measured
    assert compared <= measured
    assert len({method.title for method in ALL}) == len(ALL)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("easy/voxels, middle/networks-*", {"easy/voxels", "middle/networks-scz", "middle/networks-ad"}),
        ("*/random-0", {f"{level}/random-0" for level in LEVELS}),
        ("hard", {name for name in BY_NAME if name.startswith("hard/")}),
    ],
)
def test_pieces_are_chosen_by_level_name_and_pattern(patterns, names):
    assert {piece.name for piece in chosen_pieces(PLAN, patterns)} == names


def test_a_pattern_without_a_piece_is_refused():
    with pytest.raises(UserError, match=r"--pieces='midle' names no piece; did you mean 'middle'\?|--pieces='midle'"):
        chosen_pieces(PLAN, "easy,midle")


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({"resamples": 10}, set()),
        ({"steps": 5}, {"encoder", "networks"}),
        ({"network_epochs": 2}, {"networks"}),
        ({"draws": 3}, {"encoder", "voxels"}),
        ({"seed": 7}, {"encoder", "voxels", "networks"}),
    ],
)
def test_a_piece_is_stale_if_something_changed_that_it_depends_on(change, stale):
    other = replace(PLAN, **change)
    names = ("hard/simclr-1", "middle/voxels", "middle/networks-ad")
    pieces = [BY_NAME[name] for name in names]
    assert {piece.kind for piece in pieces if piece_digest(PLAN, piece) != piece_digest(other, piece)} == stale


def test_every_piece_and_recipe_has_a_digest_of_its_own(monkeypatch):
    digests = {name: piece_digest(PLAN, piece) for name, piece in BY_NAME.items()}
    assert len(set(digests.values())) == len(digests)
    recipe = plans.recipe_settings()
    assert {"encoder", "loss", "optimizer", "augmentation"} <= set(recipe)
    monkeypatch.setattr(plans, "recipe_settings", lambda: {**recipe, "optimizer": {**recipe["optimizer"], "lr": 0.5}})
    changed = {name for name, piece in BY_NAME.items() if piece_digest(PLAN, piece) != digests[name]}
    assert changed == {name for name in BY_NAME if "voxels" not in name}


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALPHAS", (1.0,)), ("LEAST_GREY_MATTER", 0.5), ("MOST_FEATURES", 1), ("GRID", ()),
     ("LINEAR", Probe(None, [])), ("LINEAR_WIDE", Probe(None, [])), ("FineTuning", lambda: "others"),
     ("Simulation", lambda: Simulation(individuality=0.9)), ("load_augmentation", lambda section: "another")],
)  # fmt: skip
def test_a_piece_is_stale_if_the_code_fixes_something_else(monkeypatch, name, value):
    digests = {name: piece_digest(PLAN, piece) for name, piece in BY_NAME.items()}
    assert digests == {name: piece_digest(PLAN, piece) for name, piece in BY_NAME.items()}
    monkeypatch.setattr(plans, name, value)
    assert not any(piece_digest(PLAN, piece) == digests[name] for name, piece in BY_NAME.items())


def test_people_of_another_simulation_are_not_used(tmp_path, monkeypatch):
    """The levels were changed in the code, and cohorts of before are there, or only their shards."""
    # So few scans need no cluster.
    monkeypatch.setattr(command, "ray_cluster", SimpleNamespace(session=lambda workers: nullcontext()))
    tiny = replace(PLAN, healthy=20, clinic=20, spacing=12.0)
    command.prepare_level(tmp_path, tiny, "middle", 1)
    manifests = sorted(tmp_path.glob("shards/*/manifest.json"))
    before = [path.stat() for path in manifests]
    command.prepare_level(tmp_path, tiny, "middle", 1)
    assert [path.stat() for path in manifests] == before
    monkeypatch.setitem(plans.LEVELS, "middle", {**plans.LEVELS["middle"], "misregistration": 9.0})
    with pytest.raises(UserError, match=r"another simulation \(misregistration was 1.0, now 9.0\)"):
        command.prepare_level(tmp_path, tiny, "middle", 1)
    shutil.rmtree(tmp_path / "cohorts")
    with pytest.raises(UserError, match="people of another simulation .* remove the folder"):
        command.prepare_level(tmp_path, tiny, "middle", 1)


def test_a_stored_piece_of_another_plan_is_not_taken(tmp_path, capsys):
    piece, small = BY_NAME["easy/voxels"], replace(PLAN, healthy=50)
    save_piece(piece.file(tmp_path), piece_digest(small, piece), [made_up("voxels", "main", 0.5, level="easy")])
    assert is_done(tmp_path, small, piece)
    assert not is_done(tmp_path, PLAN, piece)
    shown = {}
    for healthy in ("50", "6000"):
        assert command.main(["--list", "--healthy", healthy, "--results", str(tmp_path)]) == 0
        shown[healthy] = dict(line.split("\t")[::-1] for line in capsys.readouterr().out.splitlines())
    assert (shown["50"]["easy/voxels"], shown["6000"]["easy/voxels"]) == ("done", "stale")
    assert shown["50"]["hard/voxels"] == "open"


def test_weights_depend_on_the_loss_and_the_level():
    y_aware, simclr = (Piece("middle", "encoder", method, 0) for method in ("y-aware", "simclr"))
    settings = [pretraining_settings(PLAN, piece) for piece in (y_aware, simclr, replace(y_aware, level="hard"))]
    assert settings[0] != settings[1]
    assert settings[0] != settings[2]
    assert any("bandwidth=0" in text for text in simclr.overrides)


def test_readouts_are_calibrated_on_the_split_that_sets_the_penalty_of_the_brain_age_ridge():
    for piece in pieces_of(PLAN):
        if piece.kind == "encoder":
            choice = calibration_of(load_recipe(RECIPE, list(piece.overrides)))
            assert (choice.name, choice.split, choice.query) == ("auto", "monitor", None)
    assert PLAN.healthy * HEALTHY_SPLITS["monitor"] >= FEWEST_OF_AUTO


def test_the_further_terms_work_on_the_block_whose_features_are_evaluated_which_has_places():
    for method, term in (("y-aware-dense", "dense"), ("y-aware-reconstruction", "reconstruction")):
        recipe = load_recipe(RECIPE, [*Piece("middle", "encoder", method, 0).overrides])
        assert getattr(recipe.loss, term).layer == SPATIAL[0] == recipe.readouts.layer
        encoder = build_encoder(recipe.encoder.name, recipe.encoder.options)
        assert encoder.map_of((30, 36, 30), SPATIAL[0]) == (32, 4, 5, 4)


def test_tuning_does_not_use_the_people_of_the_experiment_and_knows_its_methods():
    check_choices(TuningPlan(), ["y-aware", "simclr"])
    for seed in (PLAN.seed, PLAN.seed + 1):
        with pytest.raises(UserError, match=f"--seed={seed} is that of the experiment's people"):
            check_choices(TuningPlan(seed=seed), ["y-aware"])
    with pytest.raises(UserError, match="--methods=random is not known.*allowed: y-aware, simclr, age-regression"):
        check_choices(TuningPlan(), ["random"])


def test_wrong_options_end_with_one_line(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path / "f"), "--sizes", "20", "--network-draws", "1", "2"]) == 2
    assert "--network-draws has 2 numbers and --sizes 1" in capsys.readouterr().err


def test_the_default_since_then_has_the_spatial_features_of_evaluate():
    network = build_encoder("resnet18", recipe_settings()["encoder"]["options"])
    assert BESIDE_OWN["default since"] == spatial_block(network, (30, 36, 30))
