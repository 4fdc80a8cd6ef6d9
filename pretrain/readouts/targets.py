"""What readouts predict: columns of the scan table as numbers, and folds of the people whose errors are measured.

n = scans of the fit and of the calibration, P = targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from infra import random_streams
from infra.errors import UserError, nearest
from pretrain.readouts.calibration import Calibration
from pretrain.readouts.solve import FOLDS
from pretrain.weights.readouts import FEWEST_PEOPLE


@dataclass(frozen=True)
class Target:
    """A column as numbers.

    Attributes:
        name: the column.
        values: (n,) its values, NaN where they are missing.
        classes: the texts that 0 and 1 stand for; empty for a number.
        reason: why its errors are out of fold although the encoder may know the people; empty if there is no such reason.
    """

    name: str
    values: NDArray[np.float64]
    classes: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class TargetGroup:
    """Targets that are known for the same scans, and the folds of the people whose errors are measured.

    Attributes:
        targets: the targets.
        has_value: (n,) which scans are used: those of the fit, and of the calibration, for which the targets are known.
        folds: (n,) the fold of each scan's participant, -1 for scans whose errors are not measured.
        calibration: (n,) which scans are of the calibration and not fitted to; None if errors are out of fold.
    """

    targets: list[Target]
    has_value: NDArray[np.bool_]
    folds: NDArray[np.int64]
    calibration: NDArray[np.bool_] | None = None

    @property
    def values(self) -> NDArray[np.float64]:
        """The values (n, P)."""
        return np.stack([target.values for target in self.targets], axis=1)

    @property
    def fitted(self) -> NDArray[np.bool_]:
        """Which scans (n,) the coefficients are fitted to."""
        return self.has_value if self.calibration is None else self.has_value & ~self.calibration


@dataclass(frozen=True)
class Targets:
    """The targets of the scans of a fit and of its calibration.

    Attributes:
        rows: (n,) the scans, as rows of the manifest: first those of the fit, then those of the calibration, if a column needs
            them.
        fit: how many of them are of the fit.
        groups: the targets.
        left_out: columns that cannot be predicted, and why.
    """

    rows: NDArray[np.int64]
    fit: int
    groups: list[TargetGroup]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def calibration(self) -> NDArray[np.int64]:
        """The scans (m,) of the calibration, as rows of the manifest."""
        return self.rows[self.fit :]


def check_columns(manifest: Manifest, columns: Sequence[str], option: str) -> None:
    """Raise UserError if a column that a user named is not in the scan table."""
    for column in columns:
        if column not in manifest.scans:
            names = [str(name) for name in manifest.scans]
            raise UserError(
                f"{option}: {column!r} is not a column of {manifest.url}{nearest(column, names)}; its columns: "
                f"{', '.join(names)}"
            )


def read_targets(
    manifest: Manifest, rows: NDArray[np.integer[Any]], columns: Sequence[str], seed: int = 0,
    calibration: Calibration | None = None,
) -> Targets:  # fmt: skip
    """Return the columns that can be predicted, at the rows (n,) of a manifest and at those of the calibration.

    Numbers, and texts with two values (coded 0 and 1 in alphabetical order), can be predicted. A column that is missing, has
    other texts, has one value only, or is known for fewer than ``FEWEST_PEOPLE`` people of the fit is left out with a reason.
    """
    calibration, fit = calibration or Calibration(), len(rows)
    every = np.concatenate([np.asarray(rows, np.int64), calibration.rows])
    people = manifest.subjects()[every]
    out_of_fold, calibrated, left_out = list[Target](), list[Target](), dict[str, str]()
    for column in dict.fromkeys(columns):
        target = _read(manifest.scans, every, column, fit)
        if isinstance(target, Target) and (fault := _fault(target.values[:fit], people[:fit])):
            target = fault
        if isinstance(target, str):
            left_out[column] = target
            continue
        fault = calibration.fault(target.values[fit:], people[fit:]) if calibration.split else calibration.reason
        if calibration.split and not fault:
            calibrated.append(target)
        elif calibration.named:
            left_out[column] = fault
        else:
            out_of_fold.append(replace(target, reason=fault))
    end = len(every) if calibrated else fit
    groups = []
    for targets, calibrates in ((out_of_fold, False), (calibrated, True)):
        for alike in _known_alike(targets, end if calibrates else fit):
            groups.append(_group(alike, people[:end], fit, seed, calibrates=calibrates))
    return Targets(every[:end], fit, groups, left_out)


def _fault(values: NDArray[np.float64], people: NDArray[np.int64]) -> str:
    """Return why nothing can be fitted to the values (n,) of scans of some people (n,); empty if it can."""
    known = np.isfinite(values)
    count = len(np.unique(people[known]))
    if count < FEWEST_PEOPLE:
        return f"known for {count} people, fewer than {FEWEST_PEOPLE}"
    return "it has one value only" if len(np.unique(values[known])) < 2 else ""


def _known_alike(targets: Sequence[Target], count: int) -> list[list[Target]]:
    """Return the targets that are known for the same of the first ``count`` scans, together."""
    masks: dict[bytes, list[Target]] = {}
    for target in targets:
        masks.setdefault(np.isfinite(target.values[:count]).tobytes(), []).append(target)
    return list(masks.values())


def _group(
    targets: Sequence[Target], people: NDArray[np.int64], fit: int, seed: int, *, calibrates: bool
) -> TargetGroup:
    """Return targets that are known alike as a group of the scans of some people (n,), the first ``fit`` of them fitted to."""
    count = len(people)
    of_calibration = np.arange(count) >= fit
    known = np.isfinite(targets[0].values[:count])
    has_value = known if calibrates else known & ~of_calibration
    folds = deal_folds(people, known & of_calibration if calibrates else has_value, seed)
    shown = [replace(target, values=target.values[:count]) for target in targets]
    return TargetGroup(shown, has_value, folds, of_calibration if calibrates else None)


def deal_folds(
    people: NDArray[np.int64], has_value: NDArray[np.bool_], seed: int, folds: int = FOLDS
) -> NDArray[np.int64]:
    """Return the fold (n,) of each scan that has a value, -1 for others.

    People are spread evenly over folds; each is in one fold only.

    Args:
        people: (n,) the participant of each scan.
        has_value: (n,) which scans are dealt.
        seed: the order in which people are dealt.
        folds: how many there are.
    """
    names = np.unique(people[has_value])
    order = random_streams.generator(seed, random_streams.READOUT_FOLDS).permutation(len(names))
    fold_of_person = np.empty(len(names), np.int64)
    fold_of_person[order] = np.arange(len(names)) % folds
    result = np.full(len(people), -1)
    result[has_value] = fold_of_person[np.searchsorted(names, people[has_value])]
    return result


def _read(scans: pd.DataFrame, rows: NDArray[np.int64], column: str, fit: int) -> Target | str:
    """Return a column at some rows as a target, or why it is none. Classes are the texts of the first ``fit`` rows."""
    if column not in scans:
        return "the shards have no such column"
    values = scans[column].iloc[rows]
    if pd.api.types.is_numeric_dtype(values):
        numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
        return Target(column, np.where(np.isfinite(numbers), numbers, np.nan))
    texts = values.astype("string").str.strip()
    texts = texts.mask(texts == "")
    classes = sorted(texts.iloc[:fit].dropna().unique())
    if len(classes) != 2:
        return f"text with {len(classes)} values; numbers and texts with two values can be predicted"
    numbers = np.where(texts.isin(classes), (texts == classes[1]).fillna(False).astype(float), np.nan)
    return Target(column, numbers.astype(np.float64), tuple(map(str, classes)))
