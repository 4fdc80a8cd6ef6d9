"""Gaps of AUC, sensitivity and calibration of a binary task between groups of people, with intervals over people.

The measures of the groups and their gaps are fairlearn's (``MetricFrame``). Its intervals draw scans; these here draw people.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluation.statistics.intervals import bca
from evaluation.statistics.metrics import auc
from evaluation.statistics.subgroups import MINIMUM, MINIMUM_OF_A_CLASS

COLUMNS = ["by", "measure", "lowest", "highest", "groups", "gap", "low", "high"]
RESAMPLES = 1000
OfWeights = Callable[[NDArray[Any]], NDArray[Any]]  # weights (R, N) of scans -> (R,)


def fairness_table(
    labels: NDArray[Any], scores: NDArray[Any], probabilities: NDArray[Any], people: NDArray[Any],
    by: dict[str, NDArray[Any]],
) -> pd.DataFrame:  # fmt: skip
    """Return the largest gap of each measure between the groups of each column, as the difference ``highest`` minus ``lowest``.

    Measures: ``auc``; ``sensitivity`` at the threshold of the score, 0; ``calibration``, the mean probability minus the share
    of positives. The interval (BCa) is of the difference between the two groups that are farthest apart; of many groups the two
    are chosen by chance too, so that the interval is then too far from 0.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) above 0 for a predicted positive.
        probabilities: (N,) of the positive class.
        people: (N,) participant of each scan.
        by: columns (N,) of text; empty text is in no group. Groups of fewer than MINIMUM participants, or fewer than
            MINIMUM_OF_A_CLASS of a class, are left out; a column needs two groups.
    """
    rows = []
    for column, values in by.items():
        texts = np.asarray(pd.Series(values).fillna("").astype(str))
        groups = {text: texts == text for text in np.unique(texts[texts != ""])}
        groups = {text: members for text, members in groups.items() if _enough(labels[members], people[members])}
        if len(groups) < 2:
            continue
        measured, gaps = _groups_and_gaps(labels, scores, probabilities, groups)
        for measure, of_group in _measures(labels, scores, probabilities).items():
            lowest, highest = str(measured[measure].idxmin()), str(measured[measure].idxmax())
            both = groups[lowest] | groups[highest]
            low, high = _limits(of_group(groups[lowest]), of_group(groups[highest]), both, people)
            rows.append((column, measure, lowest, highest, len(groups), float(gaps[measure]), low, high))
    return pd.DataFrame(rows, columns=COLUMNS)


def _groups_and_gaps(
    labels: NDArray[Any], scores: NDArray[Any], probabilities: NDArray[Any], groups: dict[str, NDArray[np.bool_]]
) -> tuple[pd.DataFrame, pd.Series[float]]:
    """Return the measures (groups, 3) of disjoint groups, and the largest difference between two groups of each measure."""
    from fairlearn.metrics import MetricFrame, mean_prediction, true_positive_rate

    names = np.full(len(labels), "", dtype=object)
    for text, members in groups.items():
        names[members] = text
    used = names != ""
    frame = MetricFrame(
        metrics={
            "auc": lambda true, score: auc(true, score),
            "sensitivity": lambda true, score: true_positive_rate(true, np.asarray(score) > 0, pos_label=1),
            "calibration": lambda true, score, probability: mean_prediction(true, probability) - np.mean(true),
        },
        y_true=labels[used], y_pred=scores[used], sensitive_features=pd.Series(names[used], name="group"),
        sample_params={"calibration": {"probability": probabilities[used]}},
    )  # fmt: skip
    return frame.by_group, frame.difference(method="between_groups")


def _limits(
    low_of: OfWeights, high_of: OfWeights, both: NDArray[np.bool_], people: NDArray[Any]
) -> tuple[float, float]:
    """Return the limits of the difference of two groups; only the people of these groups are drawn."""

    def of_weights(weights: NDArray[Any]) -> NDArray[Any]:
        """Return the difference (R,) for weights (R, scans of both groups)."""
        spread = np.zeros((len(weights), len(both)))
        spread[:, both] = weights
        return np.asarray(high_of(spread) - low_of(spread))

    return bca(of_weights, people[both], resamples=RESAMPLES)[1:]


def _measures(
    labels: NDArray[Any], scores: NDArray[Any], probabilities: NDArray[Any]
) -> dict[str, Callable[[NDArray[np.bool_]], OfWeights]]:
    """Return measure -> function of a group's members (N,) -> function of weights."""
    hit = (scores > 0).astype(float)

    def share(values: NDArray[Any], among: NDArray[Any]) -> OfWeights:
        """Return the weighted mean of values (N,) among some scans (N,) bool."""

        def of_weights(weights: NDArray[Any]) -> NDArray[Any]:
            """Return the mean (R,); NaN without such scans."""
            total = weights[:, among].sum(1)
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray(weights[:, among] @ values[among] / total)

        return of_weights

    return {
        "auc": lambda members: lambda weights: auc(labels[members], scores[members], weights[:, members]),
        "sensitivity": lambda members: share(hit, members & (labels == 1)),
        "calibration": lambda members: share(probabilities - labels, members),
    }


def _enough(labels: NDArray[Any], people: NDArray[Any]) -> bool:
    """Whether a group has enough participants, and of each class."""
    counts = [len(np.unique(people[labels == code])) for code in (0, 1)]
    return len(np.unique(people)) >= MINIMUM and min(counts) >= MINIMUM_OF_A_CLASS
