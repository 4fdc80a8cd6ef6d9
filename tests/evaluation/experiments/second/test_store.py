"""Stored answers of a piece: small, with the same order of scores, and only of equal people."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evaluation.experiments.second.store import (
    PARTS,
    check_same_people,
    code_of,
    coded,
    load_piece,
    save_piece,
    stored_digest,
)
from evaluation.statistics.metrics import auc
from infra.errors import UserError
from tests.evaluation.experiments.second.answers import made_up


def test_stored_answers_have_the_same_tasks_and_nearly_the_same_auc(tmp_path):
    answers = [made_up("y-aware", "spatial", 1.0, people=700, draws=20), made_up("simclr", "pooled", 0.2, people=700)]
    path = tmp_path / "x.npz"
    save_piece(path, "abc", answers)
    assert stored_digest(path) == "abc"
    for before, after in zip(answers, load_piece(path), strict=True):
        for name in ("clinic", "method", "variant", "seed", "task"):
            assert getattr(before, name) == getattr(after, name)
        for name in ("sizes", "draws", "labels"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
        exact = [auc(before.labels, row) for row in before.answers]
        stored = [auc(after.labels, row) for row in after.answers]
        np.testing.assert_allclose(stored, exact, atol=1e-3)
        assert np.mean(stored) == pytest.approx(np.mean(exact), abs=2e-4)
        people = np.unique(before.people, return_inverse=True)[1]
        np.testing.assert_array_equal(after.people, people)


def test_a_piece_takes_about_six_bits_per_test_person_and_training_set(tmp_path):
    answers = [made_up("y-aware", "spatial", 1.0, people=800, draws=20, sizes=(100, 500))]
    save_piece(tmp_path / "x.npz", "abc", answers)
    assert (tmp_path / "x.npz").stat().st_size < 40 * 800 * 7 / 8


def test_the_commits_of_the_pieces_are_named(tmp_path, monkeypatch):
    for name, dirty in (("a", "false"), ("b", "true"), ("c", "false")):
        tags = {"mlflow.source.git.commit": "0123456789abcdef", "yaware.git_dirty": dirty}
        monkeypatch.setattr("evaluation.experiments.second.store.git_tags", lambda folder, tags=tags: tags)
        save_piece(tmp_path / f"{name}.npz", "abc", [made_up("y-aware", "spatial", 1.0)])
    files = [tmp_path / f"{name}.npz" for name in "abc"]
    assert code_of(files) == {"0123456789ab": ["a", "c"], "0123456789ab (changed)": ["b"]}


def test_codes_keep_the_order_and_ties_of_the_scores():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 300, size=(3, 500)).astype(np.float32)
    for row, codes in zip(scores, coded(scores), strict=True):
        order = np.argsort(row, kind="stable")
        assert (np.diff(codes[order].astype(int)) >= 0).all()
        assert all(len(set(codes[row == value])) == 1 for value in np.unique(row))
        assert codes.max() < PARTS


def test_predicted_ages_are_kept_as_they_are(tmp_path):
    ages = replace(
        made_up("y-aware", "readout", 0.0), task="age", labels=np.linspace(20, 80, 60), answers=np.full((1, 60), 41.25),
        sizes=np.array([0]), draws=np.array([0]),
    )  # fmt: skip
    save_piece(tmp_path / "x.npz", "abc", [ages])
    (found,) = load_piece(tmp_path / "x.npz")
    np.testing.assert_array_equal(found.answers, ages.answers)
    np.testing.assert_allclose(found.labels, ages.labels, rtol=1e-6)


@pytest.mark.parametrize("content", [None, b"", b"no zip file", b"PK\x03\x04 and then nothing"])
def test_a_file_that_cannot_be_read_has_no_digest(tmp_path, content):
    path = tmp_path / "x.npz"
    if content is not None:
        path.write_bytes(content)
    assert stored_digest(path) is None


def test_pieces_about_other_people_are_refused_within_a_level(tmp_path):
    one = made_up("voxels", "main", 0.5)
    other = replace(one, people=np.array([f"q{number}" for number in range(60)]))
    for name, answers in (("a", one), ("b", replace(one, method="brain-age")), ("c", other),
                          ("d", replace(other, clinic="hard"))):  # fmt: skip
        save_piece(tmp_path / f"{name}.npz", "abc", [answers])
    check_same_people([tmp_path / f"{name}.npz" for name in "abd"])
    with pytest.raises(UserError, match=r"c\.npz and a\.npz hold answers about other test people"):
        check_same_people([tmp_path / f"{name}.npz" for name in "abc"])
