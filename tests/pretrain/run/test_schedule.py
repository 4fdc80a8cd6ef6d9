"""The factors on the learning rate equal their formulas."""

from __future__ import annotations

import math

import pytest

from pretrain.config import OptimizerSection
from pretrain.run.step import lr_factor


def test_constant_is_one_everywhere():
    factor = lr_factor(OptimizerSection(), 100, 10)
    assert {factor(step) for step in range(100)} == {1.0}


def test_warm_up_is_linear_and_reaches_one():
    factor = lr_factor(OptimizerSection(warmup_steps=4), 100, 10)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_runs_from_one_to_zero():
    factor = lr_factor(OptimizerSection(decay="cosine", warmup_steps=10), 110, 10)
    assert factor(10) == 1.0
    assert factor(60) == pytest.approx(0.5)
    assert factor(110) == pytest.approx(0.0, abs=1e-12)
    assert factor(35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_step_decay_falls_every_ten_epochs():
    factor = lr_factor(OptimizerSection(decay="step", step_epochs=10, step_factor=0.9), 1000, 5.5)
    assert factor(54) == 1.0
    assert factor(55) == pytest.approx(0.9)
    assert factor(110) == pytest.approx(0.81)
