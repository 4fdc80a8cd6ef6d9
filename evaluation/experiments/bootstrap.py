"""Means of AUC or MAE over pretraining seeds and training sets, with bootstrap intervals.

The bootstrap covers three sources of variation at once: test people, training sets (draws) and pretraining seeds are each
drawn with replacement. Differences between two methods use the same people, draws and seeds for both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.experiments.answers import MethodAnswers
from evaluation.experiments.plan import DISEASES
from evaluation.statistics.intervals import bootstrap_weights, participant_codes
from evaluation.statistics.metrics import auc, mae
from infra import random_streams
from infra.progress import Progress


class Cell(NamedTuple):
    """One cell of the experiment: a method under a variant, evaluated on a task with ``size`` labelled scans."""

    clinic: str
    method: str
    variant: str
    task: str
    size: int


class BootstrapMetrics:
    """The metric of every cell and its bootstrap samples. Samples of two cells of one clinic and task are paired.

    Attributes:
        values: cell -> (S, D) metric for each of S pretraining seeds and D draws.
    """

    def __init__(self, answers: list[MethodAnswers], resamples: int, seed: int) -> None:
        self._resamples, self._seed = resamples, seed
        self.values: dict[Cell, NDArray[Any]] = {}
        self._weighted: dict[Cell, NDArray[Any]] = {}  # (S, D, resamples): the metric of each sample of people
        people_weights: dict[tuple[str, str], NDArray[Any]] = {}
        grouped: dict[Cell, list[MethodAnswers]] = {}
        for entry in sorted(answers, key=lambda entry: entry.seed):
            for size in np.unique(entry.sizes):
                cell = Cell(entry.clinic, entry.method, entry.variant, entry.task, int(size))
                grouped.setdefault(cell, []).append(entry)
        if not grouped:
            return
        with Progress(len(grouped), "cells", "bootstrap") as progress:
            for cell, entries in grouped.items():
                metric, resampled = (auc, resampled_auc) if cell.task in DISEASES else (mae, mae)
                labels = entries[0].labels
                of_people = (cell.clinic, cell.task)
                if of_people not in people_weights:
                    codes = participant_codes(entries[0].people)
                    people_weights[of_people] = np.concatenate(list(bootstrap_weights(codes, resamples, seed)))
                weights = people_weights[of_people]
                of_seeds = [entry.answers[entry.sizes == cell.size] for entry in entries]
                self.values[cell] = np.array([[metric(labels, row) for row in rows] for rows in of_seeds])
                self._weighted[cell] = np.array(
                    [[resampled(labels, row, weights) for row in rows] for rows in of_seeds]
                )
                progress.advance()

    def sample(self, cell: Cell, draws: int) -> NDArray[Any]:
        """Return (resamples,) bootstrapped means over the seeds and the first ``draws`` draws of a cell."""
        weighted = self._weighted[cell][:, :draws]
        seeds, draws, _ = weighted.shape
        seed_counts, draw_counts = self.counts(seeds, "seeds"), self.counts(draws, "draws")
        return np.asarray(np.einsum("sdb,bs,bd->b", weighted, seed_counts, draw_counts) / (seeds * draws))

    def counts(self, number: int, purpose: str) -> NDArray[Any]:
        """Return (resamples, number) counts of each of ``number`` seeds or draws in every resample.

        They depend on the seed, ``number`` and ``purpose`` ("seeds" or "draws") alone, which pairs the methods.
        """
        stream = random_streams.named_stream(f"{purpose}{number}")
        generator = random_streams.generator(self._seed, stream)
        return generator.multinomial(number, np.full(number, 1 / number), size=self._resamples)

    def mean(self, cell: Cell) -> tuple[float, float, float]:
        """Return the mean over seeds and draws with the limits of its 95 % interval."""
        draws = self.values[cell].shape[1]
        return float(self.values[cell].mean()), *_limits(self.sample(cell, draws))

    def difference(self, first: Cell, second: Cell) -> tuple[float, float, float, float]:
        """Return ``first`` minus ``second``, the limits of its 95 % interval and its two-sided p.

        The difference is over the draws that both cells have, each with all of its seeds. Seeds are paired if both cells
        have the same number of them. The smallest possible p is 2 / (resamples + 1).
        """
        draws = min(self.values[cell].shape[1] for cell in (first, second))
        value = float(self.values[first][:, :draws].mean() - self.values[second][:, :draws].mean())
        differences = self.sample(first, draws) - self.sample(second, draws)
        tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
        return value, *_limits(differences), min(1.0, 2 * (tail + 1) / (len(differences) + 1))

    def draws_won(self, first: Cell, second: Cell) -> tuple[int, int]:
        """Return in how many of the common draws ``first`` has the higher mean over seeds, and their number."""
        first_means, second_means = (self.values[cell].mean(0) for cell in (first, second))
        draws = min(len(first_means), len(second_means))
        return int((first_means[:draws] > second_means[:draws]).sum()), draws


def resampled_auc(labels: NDArray[Any], scores: NDArray[Any], weights: NDArray[Any]) -> NDArray[np.float64]:
    """Return ``metrics.auc`` (R,) for weights (R, N), ten times as fast for a few hundred scans.

    The pairs of positives and negatives are compared once, and every sample is a product of matrices. Counts of up to a few
    thousand pairs per scan are exact in float32.
    """
    positive, negative = labels == 1, labels != 1
    above, below = scores[positive][:, None], scores[negative][None]
    wins = (above > below).astype(np.float32) + np.float32(0.5) * (above == below)
    of_positives, of_negatives = (weights[:, chosen].astype(np.float32) for chosen in (positive, negative))
    pairs = of_positives.sum(1, dtype=np.float64) * of_negatives.sum(1, dtype=np.float64)
    won = np.multiply(of_positives @ wins, of_negatives).sum(1, dtype=np.float64)
    return np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan)


def _limits(sample: NDArray[Any]) -> tuple[float, float]:
    low, high = np.quantile(sample, [0.025, 0.975])
    return float(low), float(high)
