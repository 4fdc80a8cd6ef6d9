"""Made-up answers of methods of the second experiment."""

from __future__ import annotations

import numpy as np

from evaluation.experiments.answers import MethodAnswers


def made_up(method, features, signal, *, level="middle", task="scz", seed=0, sizes=(20,), draws=4, people=60):
    """Answers whose classes are ``signal`` standard deviations apart; labels and people are the same for all methods."""
    labels = np.arange(people) % 2
    generator = np.random.default_rng([seed, len(method), len(features), draws])
    count = len(sizes) * draws
    return MethodAnswers(
        clinic=level, method=method, variant=features, seed=seed, task=task, sizes=np.repeat(sizes, draws),
        draws=np.tile(np.arange(draws), len(sizes)),
        answers=(signal * labels + generator.normal(size=(count, people))).astype(np.float32), labels=labels,
        people=np.array([f"p{number}" for number in range(people)]),
    )  # fmt: skip
