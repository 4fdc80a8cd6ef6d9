"""Models of the second experiment on a small simulated clinic: features, readouts, test sites; and the tuning's measures."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.storage.manifest import Manifest
from evaluation.experiments.cohorts import make_cohort, make_shards
from evaluation.experiments.plan import TEST_SITES
from evaluation.experiments.second.evaluate import Clinic, evaluate_piece, run_of, shards_of
from evaluation.experiments.second.plan import LEVELS, SPATIAL, Piece, SecondPlan
from evaluation.experiments.second.tune import effective_rank, measure
from evaluation.statistics.metrics import auc, mae
from infra.errors import UserError
from pretrain.readouts.add import add_readouts
from pretrain.weights.encoder import Encoder
from pretrain.weights.seen_scans import participants_of
from tests.pretrain.weights.encoders import write_encoders_of

pytestmark = pytest.mark.jobs
PLAN = SecondPlan(healthy=60, clinic=600, spacing=12.0, sizes=(16, 24), draws=2, network_draws=(1, 1), network_epochs=1)
PIECE = Piece("middle", "encoder", "y-aware", 0)
FITTED_TO_CLINIC = Piece("middle", "encoder", "simclr", 0)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder of the experiment with shards of the middle level and an encoder with random weights and readouts."""
    folder = tmp_path_factory.mktemp("second")
    for clinic in (False, True):
        cohort = folder / "cohorts" / ("clinic" if clinic else "healthy")
        make_cohort(cohort, participants=PLAN.clinic if clinic else PLAN.healthy, spacing=PLAN.spacing, seed=PLAN.seed,
                    clinic=clinic, jobs=1, differences=LEVELS["middle"])  # fmt: skip
        shards = shards_of(folder, "middle", clinic=clinic)
        make_shards(cohort, shards, scaling="none", seed=PLAN.seed, clinic=clinic, jobs=1)
    healthy, clinic = (Manifest.load(shards_of(folder, "middle", clinic=clinic)) for clinic in (False, True))
    write_encoders_of(healthy, run_of(folder, PIECE), run_of(folder, FITTED_TO_CLINIC))
    layer, pooling = SPATIAL
    for piece, manifest, split in ((PIECE, healthy, "pretrain"), (FITTED_TO_CLINIC, clinic, "downstream")):
        add_readouts(run_of(folder, piece), manifest, columns=["age"], split=[split], layer=layer, pooling=pooling,
                     progress=False)  # fmt: skip
    return folder


def names_of(manifest):
    """Return the participant of every scan."""
    return participants_of(manifest, np.arange(len(manifest.scans)))


@pytest.fixture(scope="module")
def answers(out):
    return {(entry.variant, entry.task): entry for entry in evaluate_piece(out, PLAN, PIECE)}


def test_an_encoder_is_evaluated_with_each_kind_of_features_on_the_test_sites_only(out, answers):
    assert set(answers) == {(kind, task) for kind in PIECE.features for task in ("scz", "ad")} | {("readout", "age")}
    manifest = Manifest.load(shards_of(out, "middle", clinic=True))
    site_of = dict(zip(names_of(manifest), manifest.scans["site"], strict=True))
    for (_, task), entry in answers.items():
        assert {site_of[person] for person in entry.people} <= set(TEST_SITES)
        if task != "age":
            assert entry.answers.shape == (4, len(entry.labels))
            assert (list(entry.sizes), list(entry.draws)) == ([16, 16, 24, 24], [0, 1, 0, 1])
            assert np.isfinite([auc(entry.labels, row) for row in entry.answers]).all()
    for one, other in (
        ("pooled", "spatial"),
        ("spatial", "readout"),
        ("spatial", "auto"),
        ("readout", "default"),
        ("pooled", "default"),
    ):
        assert not np.allclose(answers[one, "ad"].answers, answers[other, "ad"].answers)


def test_the_predicted_ages_are_those_of_the_readouts_for_the_controls(out, answers):
    entry = answers["readout", "age"]
    manifest = Manifest.load(shards_of(out, "middle", clinic=True))
    encoder = Encoder.from_pretrained(run_of(out, PIECE))
    table = encoder.embed(manifest, readouts=True, progress=False)
    first = manifest.scans["session"].astype(str) == "1"
    scans = manifest.scans.assign(name=names_of(manifest), predicted=table["predicted_age"].to_numpy())[
        first
    ].set_index("name")
    found = scans.loc[list(entry.people)]
    assert set(found["diagnosis"]) == {"control"}
    np.testing.assert_allclose(entry.answers[0], found["predicted"], rtol=1e-4)
    np.testing.assert_allclose(entry.labels, found["age"])


def test_readouts_that_were_fitted_to_test_people_are_refused(out):
    with pytest.raises(UserError, match="its readouts were fitted on participants of the test scans"):
        evaluate_piece(out, PLAN, FITTED_TO_CLINIC)


def test_voxels_with_and_without_the_brain_age_score_are_answered_for_the_same_people(out, answers):
    found = {(entry.method, entry.task): entry for entry in evaluate_piece(out, PLAN, Piece("middle", "voxels"))}
    methods = ("voxels", "voxels-brain-age", "brain-age")
    assert set(found) == {(method, task) for method in methods for task in ("scz", "ad")} | {("brain-age", "age")}
    for task in ("scz", "ad"):
        for method in methods:
            np.testing.assert_array_equal(found[method, task].people, answers["spatial", task].people)
        assert not np.allclose(found["voxels", task].answers, found["voxels-brain-age", task].answers)
    ages = found["brain-age", "age"]
    assert mae(ages.labels, ages.answers[0]) < 1.2 * np.abs(ages.labels - np.median(ages.labels)).mean()


def test_networks_are_trained_on_the_first_training_sets_of_each_size(out):
    found = {entry.method: entry for entry in evaluate_piece(out, PLAN, Piece("middle", "networks", "ad"))}
    assert set(found) == {"fine-tuned", "scratch"}
    for entry in found.values():
        assert (list(entry.sizes), list(entry.draws), entry.variant) == ([16, 24], [0, 0], "main")
        assert entry.answers.shape == (2, len(entry.labels))
    assert not np.allclose(found["fine-tuned"].answers, found["scratch"].answers)


def test_all_pieces_of_a_level_have_the_same_training_sets(out):
    first, second = (Clinic(out, PLAN, "middle") for _ in range(2))
    for name, task in first.tasks.items():
        np.testing.assert_array_equal(task.rows, second.tasks[name].rows)
        assert len(np.unique(task.groups)) == len(task.groups)  # one scan each
        assert not set(task.participants[task.test]) & set(task.participants[~task.test])


def test_effective_rank_counts_equal_directions():
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(40, 5)))[0]
    basis -= basis.mean(0)
    basis = np.linalg.qr(basis)[0]
    assert effective_rank(basis @ generator.normal(size=(5, 1)) @ np.ones((1, 8))) == pytest.approx(1.0)
    assert effective_rank(3.0 * basis + 7.0) == pytest.approx(5.0)
    assert effective_rank(np.ones((6, 4))) == pytest.approx(1.0)


def test_the_tuning_fits_to_the_pretraining_sites_and_judges_on_the_others(out, tmp_path, monkeypatch):
    manifest = Manifest.load(shards_of(out, "middle", clinic=False))
    found = measure(run_of(out, PIECE), manifest, tmp_path)
    assert set(found) == {
        f"{kind}: {name}" for kind in ("pooled", "spatial") for name in ("age error", "effective rank")
    }
    assert 1 < found["spatial: effective rank"] < 60
    # The error is that of unseen sites: with other ages there, only the error changes.
    unseen = manifest.scans["site"].isin([f"site{number:02d}" for number in range(8, 12)])
    manifest.scans.loc[unseen, "age"] += 1000.0
    shifted = measure(run_of(out, PIECE), manifest, tmp_path)
    assert shifted["pooled: age error"] > found["pooled: age error"] + 500
    assert shifted["pooled: effective rank"] == pytest.approx(found["pooled: effective rank"])
