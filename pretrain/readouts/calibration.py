"""The people on whom the errors of readouts are measured: if possible, people whom the encoder has not seen.

An encoder that was trained with the ages of some people knows these ages in part. A regression on its features predicts them
too well, also for people who are left out of the regression. m = scans of the calibration people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cohort.split import PATIENT_SPLIT
from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError, nearest
from pretrain.weights.encoder import Encoder
from pretrain.weights.readouts import FEWEST_PEOPLE
from pretrain.weights.seen_scans import SeenScans, seen_in, source_of, trained_on

AUTO, NONE = "auto", "none"  # values of the setting that are not names of splits
MONITOR = "monitor"  # split of ``auto``, unless the recipe's monitor has another one
TEST_SPLITS = ("test", PATIENT_SPLIT)  # ``auto`` never uses their people
# Fewest people of ``auto``. With 50 people the interval holds 95 % of new people on average, and more than 90 % with a
# probability of 97 % (a Beta(49, 2) distribution); 18 penalties are compared on 40 of them.
FEWEST_OF_AUTO = 50


@dataclass(frozen=True)
class CalibrationChoice:
    """What a user asks for.

    Attributes:
        name: ``auto``, ``none`` or a split.
        monitor: the split that ``auto`` uses.
        query: only scans that fulfil this pandas query; that of the scans of the fit.
    """

    name: str = AUTO
    monitor: str = MONITOR
    query: str | None = None

    @property
    def split(self) -> str:
        """The split whose people are used if it has enough of them; empty for ``none``."""
        return {AUTO: self.monitor, NONE: ""}.get(self.name, self.name)


@dataclass(frozen=True)
class Calibration:
    """The calibration people, or why errors are out of fold.

    Attributes:
        split: whose people they are; empty if errors are those of the people of the fit, out of fold.
        rows: (m,) their scans, as rows of the manifest.
        excluded: people of the split that are not used: the fit or the encoder knows them, or they have scans in other splits.
        seen: whether the encoder was trained on people of the fit; None if that is not known.
        named: whether the user named the split; a column without enough people then has no readout.
        reason: why errors are out of fold although the encoder may know the people; empty if there is no such reason.
    """

    split: str = ""
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    excluded: int = 0
    seen: bool | None = None
    named: bool = False
    reason: str = ""

    @property
    def fewest(self) -> int:
        """People with a value that a column needs. If the user named the split: the fewest for an interval."""
        return FEWEST_PEOPLE if self.named else FEWEST_OF_AUTO

    def fault(self, values: NDArray[np.float64], people: NDArray[np.int64]) -> str:
        """Return why a column is not calibrated on the split, given its values (m,) and participants (m,); empty if it is."""
        known = np.isfinite(values)
        count = len(np.unique(people[known]))
        if count < self.fewest:
            return f"the split {self.split} has {count} people with a value to calibrate on, fewer than {self.fewest}"
        if len(np.unique(values[known])) < 2:
            return f"all people of the split {self.split} have one value"
        return ""


def choose_calibration(
    encoder: Encoder, manifest: Manifest, rows: NDArray[np.int64], choice: CalibrationChoice
) -> Calibration:
    """Return on whom readouts are calibrated that are fitted to the scans ``rows`` (n,) of a manifest.

    ``auto`` uses the monitor's split if the encoder was trained on people of the fit. If it was trained on none of them, their
    errors out of fold are those of new people.

    Raises:
        UserError: if a split that the user named does not exist, or all its people are known.
    """
    assert encoder.folder is not None
    trained = trained_on(encoder.folder, encoder.config, manifest)
    seen = None if trained is None else bool(seen_in(trained, manifest, rows).any())
    if choice.name == NONE or (choice.name == AUTO and not seen):
        reasons = {None: "no record says whom the encoder was trained on", False: "", True: f"calibration is {NONE}"}
        return Calibration(seen=seen, reason=reasons[seen])
    if choice.name == AUTO:
        if choice.split not in set(manifest.scans["split"]):
            return Calibration(seen=seen, reason=f"the shards have no split {choice.split}")
        if choice.split in TEST_SPLITS:
            return Calibration(seen=seen, reason=f"the monitor's split is {choice.split}, which is for tests")
    found, excluded = _unseen(manifest, rows, choice, trained or [])
    check_calibration(manifest, found, choice, "calibration")
    return Calibration(choice.split, found, excluded, seen, choice.name != AUTO)


def check_named_split(manifest: Manifest, rows: NDArray[np.int64], choice: CalibrationChoice, option: str) -> None:
    """Raise UserError if the user named a split that does not exist or has too few people beside those of ``rows`` (n,)."""
    if choice.name not in (AUTO, NONE):
        splits = sorted(set(manifest.scans["split"]))
        if choice.name not in splits:
            raise UserError(
                f"{option}={choice.name} is not a split of {manifest.url}{nearest(choice.name, [*splits, AUTO, NONE])}; "
                f"allowed: {AUTO}, {NONE}, {', '.join(splits)}"
            )
        check_calibration(manifest, _unseen(manifest, rows, choice, [])[0], choice, option)


def check_calibration(manifest: Manifest, rows: NDArray[np.int64], choice: CalibrationChoice, option: str) -> None:
    """Raise UserError if the user named a split and its scans ``rows`` (m,) are of too few people."""
    count = len(np.unique(manifest.subjects()[rows]))
    if choice.name != AUTO and count < FEWEST_PEOPLE:
        raise UserError(
            f"{option}={choice.name}: {count} people of this split are neither fitted to nor trained on, fewer than "
            f"{FEWEST_PEOPLE}; name a split with more people, or give {AUTO} or {NONE}"
        )


def most_scans(manifest: Manifest, choice: CalibrationChoice) -> int:
    """Return how many scans a calibration has at most."""
    if choice.split not in set(manifest.scans["split"]):
        return 0
    return len(manifest.rows(split=choice.split, query=choice.query))


def _unseen(
    manifest: Manifest, rows: NDArray[np.int64], choice: CalibrationChoice, trained: Sequence[SeenScans]
) -> tuple[NDArray[np.int64], int]:
    """Return the scans (m,) of the split's people whom neither the fit to ``rows`` nor the encoder knows; and other people.

    A person is known by one scan, in whatever split, and by the same voxels under another name. ``auto`` also leaves out
    people with scans in other splits, such as those of a test.
    """
    candidates = manifest.rows(split=choice.split, query=choice.query)
    subjects = manifest.subjects()
    known = seen_in([*trained, source_of(manifest, rows)], manifest, candidates)
    if choice.name == AUTO:
        elsewhere = subjects[(manifest.scans["split"] != choice.split).to_numpy()]
        known |= np.isin(subjects[candidates], elsewhere)
    return candidates[~known], len(np.unique(subjects[candidates[known]]))
