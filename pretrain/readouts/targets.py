"""What readouts predict: columns of the scan table as numbers, and folds of people.

n = scans, P = targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from infra import random_streams
from infra.errors import UserError, nearest
from pretrain.readouts.solve import FOLDS
from pretrain.weights.readouts import FEWEST_PEOPLE


@dataclass(frozen=True)
class Target:
    """A column as numbers: values (n,), NaN where it is missing; ``classes`` are the texts that 0 and 1 stand for."""

    name: str
    values: NDArray[np.float64]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TargetGroup:
    """Targets that are known for the same scans, and the folds of these scans' people.

    Attributes:
        targets: the targets.
        has_value: (n,) whether they are known.
        folds: (n,) the fold of each scan's participant, -1 where the targets are not known.
    """

    targets: list[Target]
    has_value: NDArray[np.bool_]
    folds: NDArray[np.int64]

    @property
    def values(self) -> NDArray[np.float64]:
        """The values (n, P)."""
        return np.stack([target.values for target in self.targets], axis=1)


@dataclass(frozen=True)
class Targets:
    """The targets of some rows of a manifest, and why columns are left out."""

    groups: list[TargetGroup]
    left_out: dict[str, str] = field(default_factory=dict)


def check_columns(manifest: Manifest, columns: Sequence[str], option: str) -> None:
    """Raise UserError if a column that a user named is not in the scan table."""
    for column in columns:
        if column not in manifest.scans:
            names = [str(name) for name in manifest.scans]
            raise UserError(
                f"{option}: {column!r} is not a column of {manifest.url}{nearest(column, names)}; its columns: "
                f"{', '.join(names)}"
            )


def read_targets(manifest: Manifest, rows: NDArray[np.integer[Any]], columns: Sequence[str], seed: int = 0) -> Targets:
    """Return the columns that can be predicted, at the rows (n,) of a manifest.

    Numbers, and texts with two values (coded 0 and 1 in alphabetical order), can be predicted. A column that is missing, has
    other texts, has one value only, or is known for fewer than ``FEWEST_PEOPLE`` people is left out with a reason.
    """
    people = manifest.subjects()[rows]
    targets, left_out = list[Target](), dict[str, str]()
    for column in dict.fromkeys(columns):
        target_or_reason = _read(manifest.scans, rows, column)
        if isinstance(target_or_reason, Target):
            has_value = np.isfinite(target_or_reason.values)
            count, different = len(np.unique(people[has_value])), len(np.unique(target_or_reason.values[has_value]))
            if count < FEWEST_PEOPLE:
                target_or_reason = f"known for {count} people, fewer than {FEWEST_PEOPLE}"
            elif different < 2:
                target_or_reason = "it has one value only"
        if isinstance(target_or_reason, Target):
            targets.append(target_or_reason)
        else:
            left_out[column] = target_or_reason
    masks: dict[bytes, list[Target]] = {}
    for target in targets:
        masks.setdefault(np.isfinite(target.values).tobytes(), []).append(target)
    groups = []
    for alike in masks.values():
        has_value = np.isfinite(alike[0].values)
        groups.append(TargetGroup(alike, has_value, deal_folds(people, has_value, seed)))
    return Targets(groups, left_out)


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


def _read(scans: pd.DataFrame, rows: NDArray[np.integer[Any]], column: str) -> Target | str:
    """Return a column as a target, or why it is none."""
    if column not in scans:
        return "the shards have no such column"
    values = scans[column].iloc[rows]
    if pd.api.types.is_numeric_dtype(values):
        numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
        return Target(column, np.where(np.isfinite(numbers), numbers, np.nan))
    texts = values.astype("string").str.strip()
    texts = texts.mask(texts == "")
    classes = sorted(texts.dropna().unique())
    if len(classes) != 2:
        return f"text with {len(classes)} values; numbers and texts with two values can be predicted"
    numbers = np.where(texts.isna(), np.nan, (texts == classes[1]).fillna(False).astype(float))
    return Target(column, numbers.astype(np.float64), tuple(map(str, classes)))
