"""The comparison's tables on age and scanner site: brain-age gap, site leakage, correlation of features with age."""

from __future__ import annotations

import numpy as np
import pandas as pd

from evaluation.comparison.evaluations import CheckpointEvaluation, labels_of
from evaluation.comparison.resampled import shown_value
from evaluation.statistics.brain_age import BiasLine, corrected_gaps
from evaluation.statistics.metrics import above_chance, openbhb_score, pearson

SITE_COLUMNS = ["checkpoint", "sites", "bacc", "chance", "leakage", "external_mae", "openbhb"]
BRAIN_AGE_COLUMNS = ["checkpoint", "task", "mae", "slope", "r_raw", "gap_sd", "r_corrected"]


def predicts_age(predictions: pd.DataFrame) -> bool:
    """Whether a task's label is the age at the scan in years; the unit of other numbers is unknown."""
    if predictions["kind"].iloc[0] != "regression" or "age" not in predictions:
        return False
    return np.allclose(predictions["label"].to_numpy(float), predictions["age"].to_numpy(float))


def brain_age_table(evaluations: list[CheckpointEvaluation]) -> pd.DataFrame:
    """Return BRAIN_AGE_COLUMNS for every task that predicts age and stored its folds.

    The gap is predicted minus real age. ``mae`` (years) is of the uncorrected predictions, as in the table of metrics; the
    others are of the first cross-validation. ``slope`` is that of predicted over real age, ``gap_sd`` (years) the standard
    deviation of the corrected gap. ``r_raw`` and ``r_corrected`` are Pearson's correlation of the gap with age before and
    after the correction (see ``statistics.brain_age``).
    """
    rows = []
    for evaluation in evaluations:
        for task in evaluation.tasks:
            predictions = evaluation.predictions_of(task)
            if not predicts_age(predictions) or predictions.get("fold", pd.Series([0])).nunique() < 2:
                continue
            ages, predicted = predictions["label"].to_numpy(float), predictions["answer"].to_numpy(float)
            folds, people = predictions["fold"].to_numpy(), predictions["participant"].to_numpy()
            gaps, corrected = predicted - ages, corrected_gaps(ages, predicted, folds, people)
            rows.append((
                evaluation.name, task, shown_value(evaluation, task, "mae"), BiasLine.fit(ages, predicted).slope,
                pearson(ages, gaps), float(corrected.std(ddof=1)), pearson(ages, corrected),
            ))  # fmt: skip
    return pd.DataFrame(rows, columns=BRAIN_AGE_COLUMNS)


def site_leakage_table(evaluations: list[CheckpointEvaluation]) -> pd.DataFrame:
    """Return SITE_COLUMNS for every checkpoint with an evaluation of the task ``site``: how well features tell the site.

    ``bacc`` is that of the table of metrics. ``leakage`` is 0 if it is at ``chance`` (1 / sites) and 1 if it is 1.
    ``external_mae`` (years) is the age MAE of the same model on sites left out of training, and ``openbhb`` the OpenBHB
    score of both. Both are NaN if age was not evaluated with sites left out.
    """
    rows = []
    for evaluation in evaluations:
        if "site" not in evaluation.tasks or evaluation.kind("site") != "multiclass":
            continue
        sites = len(np.unique(labels_of(evaluation.predictions_of("site"))))
        bacc = shown_value(evaluation, "site", "bacc")
        mae = _external_mae(evaluation, evaluations)
        score = openbhb_score(bacc, mae) if np.isfinite(mae) else float("nan")
        rows.append((evaluation.name, sites, bacc, 1 / sites, above_chance(bacc, sites), mae, score))
    return pd.DataFrame(rows, columns=SITE_COLUMNS)


def _external_mae(evaluation: CheckpointEvaluation, evaluations: list[CheckpointEvaluation]) -> float:
    """Age MAE of the same model of the same checkpoint on sites left out of training; NaN if there is none."""

    def model_of(each: CheckpointEvaluation) -> tuple[object, ...]:
        """Key of the fitted model."""
        return each.pretraining, each.step, each.weights, each.variant.fitted

    for other in evaluations:
        if "age" not in other.tasks or other.kind("age") != "regression" or not other.variant.leave_site_out:
            continue
        if model_of(other) == model_of(evaluation):
            return shown_value(other, "age", "mae")
    return float("nan")


def age_correlation(embedding: pd.DataFrame, axis: str) -> float:
    """Absolute Pearson correlation of an embedding's column with age; NaN if fewer than three ages or a single one is known.

    Absolute, because the sign of a principal component is arbitrary.
    """
    with_age = embedding[embedding["age"].notna()] if "age" in embedding else embedding[:0]
    ages = with_age["age"].to_numpy(float) if len(with_age) else np.empty(0)
    if len(ages) < 3 or np.ptp(ages) == 0:
        return float("nan")
    return abs(float(np.corrcoef(with_age[axis], ages)[0, 1]))
