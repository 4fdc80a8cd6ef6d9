"""RankMe counts equal directions, and does not depend on scale or rotation."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.effective_rank import rankme


def test_the_rank_is_that_of_known_embeddings():
    orthonormal, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 6)))
    assert rankme(orthonormal) == pytest.approx(6.0)
    assert rankme(7.0 * orthonormal @ np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]) == pytest.approx(
        6.0
    )
    assert rankme(np.outer(np.arange(1.0, 9.0), np.ones(5))) == pytest.approx(1.0)
    assert rankme(np.zeros((4, 3))) == 1.0
    sizes = np.array([0.5, 0.25, 0.25])  # entropy 1.5 log 2
    assert rankme(orthonormal[:, :3] * sizes) == pytest.approx(2.0**1.5)


def test_of_many_scans_evenly_spaced_ones_are_taken():
    values = np.repeat(np.eye(4), 1500, axis=0)
    assert rankme(values) == pytest.approx(4.0, rel=1e-3)
