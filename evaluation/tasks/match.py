"""Controls that are matched to patients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from evaluation.tasks.columns import as_text


@dataclass(config={"extra": "forbid"})
class Match:
    """Match controls to patients: each patient gets the ``ratio`` controls nearest in ``column``, none twice.

    A control is matched only if it differs from the patient by at most ``within``, has the same value in every column of
    ``same``, and is on the same side of a fixed test set. Pairs that cross it would make the training set's difference in
    ``column`` the opposite of the test set's.
    """

    column: str = "age"
    within: float = Field(default=5.0, gt=0)
    ratio: int = Field(default=2, ge=1)
    same: list[str] = Field(default_factory=list)


def match_controls(
    scans: pd.DataFrame, labels: NDArray[Any], match: Match, test: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Return which scans to keep: patients with at least one matching control, and these controls.

    Patients choose in the order of the rows; every patient gets a first control before any gets a second. Scans are
    matched, so a patient with two sessions has controls for each. A patient without a value in a column of ``same`` is
    left out.

    Args:
        scans: (n) rows of the scan table.
        labels: (n,) 1 for patients, 0 for controls.
        match: the columns and limits.
        test: (n,) the fixed test set; None if there is none.
    """
    values = scans[match.column].to_numpy(np.float64)
    texts = [as_text(scans[column]).to_numpy(dtype=str) for column in match.same]
    known = np.all([text != "" for text in texts], axis=0) if texts else np.ones(len(scans), dtype=bool)
    sides = [np.unique(text, return_inverse=True)[1].reshape(-1) for text in texts]
    if test is not None:
        sides.append(test.astype(np.int64))
    patients, controls = np.flatnonzero((labels == 1) & known), np.flatnonzero((labels == 0) & known)
    keep, free = np.zeros(len(scans), dtype=bool), np.ones(len(controls), dtype=bool)
    for round_ in range(match.ratio):
        for patient in patients:
            if round_ and not keep[patient]:
                continue
            gap = np.abs(values[controls] - values[patient])
            alike = np.all([side[controls] == side[patient] for side in sides], axis=0) if sides else True
            distance = np.where(free & alike & np.isfinite(gap), gap, np.inf)
            best = int(np.argmin(distance)) if len(controls) else 0
            if len(controls) and distance[best] <= match.within:
                keep[patient] = keep[controls[best]] = True
                free[best] = False
    return keep
