"""Readouts of an encoder: predictions of its proxies (age, ...) from its features, with calibrated intervals.

They lie in the folder ``readouts`` of a checkpoint or of an exported encoder, as ``readouts.safetensors`` (coefficients and
residuals) and ``readouts.json`` (everything else), whose digests are in ``checksums.json`` beside them. They are fitted by
``pretrain.readouts``. n = scans, F = features, R = residuals, K = folds.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from infra.errors import UserError
from infra.files import regular_file, sha256_of, write_json
from infra.processes.scratch import scratch_folder
from pretrain.weights.folder import read_json
from pretrain.weights.schema import check_readouts_file
from pretrain.weights.seen_scans import SeenScans

FOLDER, TENSORS, JSON = "readouts", "readouts.safetensors", "readouts.json"
COVERAGE = 0.95  # of the intervals
FEWEST_PEOPLE = 20  # fewer residuals give no interval of this coverage
ARRAYS = ("coefficients", "fold_coefficients", "fold_intercepts", "residuals", "residual_folds", "residual_weights")
PREFIX = "predicted_"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Readout:
    """A ridge regression of one column on the features, with what its interval needs.

    Attributes:
        name: the column.
        classes: the texts that 0 and 1 stand for; empty for a number.
        intercept: of the regression that is fitted to all people.
        coefficients: (F,) of it, for features as they are.
        fold_coefficients: (K, F) of fold k, whose people are neither fitted to nor have chosen its penalty.
        fold_intercepts: (K,) of them.
        residuals: (R,) absolute errors of scans of people who are not fitted to, each predicted by the model of its person's
            fold.
        residual_folds: (R,) the fold of each.
        residual_weights: (R,) one divided by the number of scans of the person.
        summary: scale, penalty; people, scans, missing, unreadable of the fit; mae, r2 and, for a number, slope and offset of
            the line of predicted over true values; calibrated_on: whose errors these are (``whose_errors``).
        errors: of the same people: rows of by (all, age, site), group, people, scans, mae, bias.
    """

    name: str
    classes: tuple[str, ...]
    intercept: float
    coefficients: Floats
    fold_coefficients: Floats
    fold_intercepts: Floats
    residuals: Floats
    residual_folds: NDArray[np.int64]
    residual_weights: Floats
    summary: dict[str, Any]
    errors: list[dict[str, Any]] = field(default_factory=list)

    def predict(self, features: NDArray[Any]) -> Floats:
        """Return the predictions (n,) for features (n, F), in the column's unit; about 0 to 1 for classes."""
        return np.asarray(features, np.float64) @ self.coefficients + self.intercept

    def interval(self, features: NDArray[Any], coverage: float = COVERAGE) -> tuple[Floats, Floats]:
        """Return lower and upper limits (n,) that hold the truth of a new person with the probability ``coverage``.

        CV+ of Barber, Candès, Ramdas and Tibshirani (Annals of Statistics 49, 2021): with the prediction m_k(x) of fold k's
        model and the residual R_i of scan i of fold k(i), the limits are quantiles over i of m_k(i)(x) - R_i and of
        m_k(i)(x) + R_i. Each scan of a person with k scans has weight 1/k, since persons, not scans, are exchangeable. The
        guarantee is 2 x coverage - 1; the coverage of stable regressions as this one is near ``coverage``.
        It holds for people like those whose residuals these are: at a scanner that shifts all predictions it does not, and not
        if the encoder was trained on those people.
        """
        of_folds_nK = np.asarray(features, np.float64) @ self.fold_coefficients.T + self.fold_intercepts
        limits = np.empty((2, len(of_folds_nK)))
        block = max(1, 2**22 // len(self.residuals))
        for start in range(0, len(of_folds_nK), block):
            centres_nR = of_folds_nK[start : start + block, self.residual_folds]
            for number, sign in enumerate((-1.0, 1.0)):
                values = sign * centres_nR + self.residuals
                limits[number, start : start + block] = sign * _upper(values, self.residual_weights, coverage)
        return limits[0], limits[1]

    def corrected_gap(self, predicted: NDArray[Any], true: NDArray[Any]) -> Floats:
        """Return predicted minus true values (n,) without their dependence on the true value; NaN where that is missing.

        The line of predicted over true values is that of people who are not fitted to (de Lange and Cole 2020). Raises
        UserError for classes.
        """
        if self.classes:
            raise UserError(f"readout {self.name} predicts classes ({', '.join(self.classes)}); a gap needs a number")
        line = self.summary["slope"] * np.asarray(true, np.float64) + self.summary["offset"]
        return np.asarray(np.asarray(predicted, np.float64) - line)


@dataclass(frozen=True, repr=False)
class Readouts:
    """All readouts of an encoder.

    Attributes:
        readouts: by column.
        weights: SHA-256 of the encoder's model.safetensors.
        layer: the block whose features they read; None is the encoder's end.
        pooling: of that block.
        left_out: columns that were asked for and have no readout, with the reason.
        fitted_on: digests of the scans that they are fitted to, and calibrated on.
    """

    readouts: dict[str, Readout]
    weights: str
    layer: str | None = None
    pooling: tuple[str, ...] = ("mean",)
    left_out: dict[str, str] = field(default_factory=dict)
    fitted_on: list[SeenScans] = field(default_factory=list)

    def __repr__(self) -> str:
        """Name the columns and the number of features that they are read from."""
        features = next((readout.coefficients.size for readout in self.readouts.values()), 0)
        return f"Readouts({', '.join(self.readouts) or 'none'}: {features} features)"

    @property
    def columns(self) -> list[str]:
        """Columns of ``table``: predicted_age, predicted_age_low, predicted_age_high.

        A class has no limits: predicted_sex only.
        """
        return [
            f"{PREFIX}{name}{ending}"
            for name, readout in self.readouts.items()
            for ending in (("",) if readout.classes else ("", "_low", "_high"))
        ]

    def predict(self, features: NDArray[Any]) -> Floats:
        """Return the predictions (n, number of readouts) for features (n, F).

        Raises UserError if they are not the features that the readouts were fitted to.
        """
        self._check(features)
        return np.stack([readout.predict(features) for readout in self.readouts.values()], axis=1)

    def table(self, features: NDArray[Any]) -> pd.DataFrame:
        """Return predictions and, for numbers, the limits of their 95 % intervals; a row per scan of ``features`` (n, F).

        Raises UserError if they are not the features that the readouts were fitted to.
        """
        self._check(features)
        values: list[Floats] = []
        for readout in self.readouts.values():
            values += [readout.predict(features), *(() if readout.classes else readout.interval(features))]
        return pd.DataFrame(dict(zip(self.columns, values, strict=True)))

    def _check(self, features: NDArray[Any]) -> None:
        for name, readout in self.readouts.items():
            if features.shape[1] != len(readout.coefficients):
                raise UserError(
                    f"readout {name} was fitted to {len(readout.coefficients)} features, this encoder gives "
                    f"{features.shape[1]}; {REPAIR}"
                )

    def gaps(self, predicted: pd.DataFrame, true: pd.DataFrame) -> pd.DataFrame:
        """Return columns such as ``gap_age``: predicted minus true, without its dependence on the true value (n rows).

        Args:
            predicted: a table with ``predicted_age`` and so on.
            true: a table with ``age`` and so on, its rows in the same order; numbers without a column there are left out.
        """
        columns = {
            f"gap_{name}": readout.corrected_gap(
                predicted[f"{PREFIX}{name}"].to_numpy(), true[name].to_numpy(dtype=np.float64, na_value=np.nan)
            )
            for name, readout in self.readouts.items()
            if not readout.classes and name in true
        }
        return pd.DataFrame(columns, index=predicted.index)

    def errors(self) -> pd.DataFrame:
        """Return the errors on people not fitted to: readout, by (all, age, site), group, people, scans, mae, bias."""
        rows = [{"readout": name, **row} for name, readout in self.readouts.items() for row in readout.errors]
        return pd.DataFrame(rows, columns=["readout", "by", "group", "people", "scans", "mae", "bias"])

    def lines(self) -> list[str]:
        """Return a line of text for each readout and for each column that was left out."""
        lines = []
        for name, readout in self.readouts.items():
            summary = readout.summary
            missing = f", {summary['missing']} scans without a value left out" if summary["missing"] else ""
            unreadable = f", {summary['unreadable']} unreadable" if summary["unreadable"] else ""
            lines.append(
                f"readout of {name}: mean absolute error {summary['mae']:.3g}, R² {summary['r2']:.3g} "
                f"{whose_errors(summary)} (fitted to {summary['people']} people, {summary['scans']} scans{missing}"
                f"{unreadable}; penalty {summary['penalty']:g}){doubt(summary)}"
            )
        return lines + [f"no readout of {name}: {reason}" for name, reason in self.left_out.items()]


def whose_errors(summary: Mapping[str, Any]) -> str:
    """Return on whom the errors of a readout are measured, in words; ``summary`` is the readout's.

    ``summary["calibrated_on"]``, which older readouts lack, has the keys split (None: out of fold), people, scans, excluded
    (people of the split who are not used), seen (whether the encoder was trained on people whose errors these are; None: not
    known) and reason (why errors are out of fold though the encoder may know the people).
    """
    found = summary.get("calibrated_on") or {"split": None, "seen": None}
    if found["split"] is None:
        whose = {
            True: ", of the encoder's own training people",
            False: ", of people whom the encoder has not seen",
            None: "",
        }
        return f"out of fold{whose[found['seen']]}"
    unseen = " whom the encoder has not seen" if found["seen"] is False else ""
    excluded = f", {found['excluded']} others left out" if found["excluded"] else ""
    return f"on {found['people']} people of the split {found['split']}{unseen}{excluded}"


def doubt(summary: Mapping[str, Any]) -> str:
    """Return why the interval of a readout may be too narrow, as the end of a sentence; empty if there is no reason."""
    reason = (summary.get("calibrated_on") or {}).get("reason")
    return f"; the interval may be too narrow: {reason}" if reason else ""


def _upper(values: Floats, weights: Floats, coverage: float) -> Floats:
    """Return for each row of values (n, R) the smallest value v with weight coverage x (N + 1) at or below v.

    N is the sum of the weights, the number of people. The one that is added stands for the new person.
    """
    order = np.argsort(values, axis=1)
    below = np.cumsum(weights[order], axis=1)
    total = float(weights.sum())
    # Weights such as 1/3 do not add up to whole numbers exactly.
    reached = below >= coverage * (total + 1.0) - 1e-9 * total
    first = np.where(reached.any(1), reached.argmax(1), values.shape[1] - 1)
    quantile = np.take_along_axis(values, np.take_along_axis(order, first[:, None], 1), 1)[:, 0]
    return np.where(reached.any(1), quantile, np.inf)


def readouts_folder(encoder: Path) -> Path:
    """Return where the readouts of an exported encoder, or of the ``encoder`` of a checkpoint, lie or are to be written."""
    in_checkpoint = encoder.name == "encoder" and (encoder.parent / "state.json").is_file()
    return (encoder.parent if in_checkpoint and not (encoder / FOLDER).is_dir() else encoder) / FOLDER


def write_readouts(folder: Path, readouts: Readouts) -> None:
    """Write readouts to a folder ``readouts``, completely or not at all; older ones are replaced.

    Raises OSError if the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder("readouts", beside=folder) as place:
        temporary = place / folder.name
        temporary.mkdir()
        tensors, entries = {}, []
        for number, readout in enumerate(readouts.readouts.values()):
            for name in ARRAYS:
                tensors[f"{number}.{name}"] = np.ascontiguousarray(getattr(readout, name))
            entries.append({
                "name": readout.name, "classes": list(readout.classes), "intercept": readout.intercept,
                "summary": readout.summary, "errors": readout.errors,
            })  # fmt: skip
        try:
            save_file(tensors, temporary / TENSORS)
        except SafetensorError as error:
            raise OSError(f"{folder / TENSORS}: {error}") from error
        write_json(temporary / JSON, {
            "weights": readouts.weights, "layer": readouts.layer, "pooling": list(readouts.pooling), "coverage": COVERAGE,
            "readouts": entries, "left_out": readouts.left_out, "fitted_on": [vars(source) for source in readouts.fitted_on],
        })  # fmt: skip
        shutil.copymode(temporary / JSON, temporary / TENSORS)  # safetensors makes the file private
        write_json(temporary / "checksums.json", {name: sha256_of(temporary / name) for name in (TENSORS, JSON)})
        if folder.exists():
            folder.rename(place / "replaced")
        temporary.rename(folder)


def read_readouts(encoder: Path, weights: str) -> Readouts | None:
    """Return the readouts of an exported encoder or of a checkpoint's ``encoder``; None if it has none.

    ``weights`` is the SHA-256 of its model.safetensors. Raises UserError if a file is missing or damaged, holds values that
    are not possible, or belongs to other weights.
    """
    folder = readouts_folder(encoder)
    if not folder.is_dir():
        return None
    checksums = read_json(folder / "checksums.json")
    for name in (TENSORS, JSON):
        if not (folder / name).exists() or sha256_of(folder / name) != checksums.get(name):
            raise UserError(f"{folder / name} is missing or differs from checksums.json; {REPAIR}")
    content = read_json(folder / JSON)
    check_readouts_file(content, folder / JSON)
    if content["weights"] != weights:
        raise UserError(f"{folder / JSON}: weights={content['weights'][:16]}: fitted to other weights; {REPAIR}")
    try:
        tensors = load_file(regular_file(folder / TENSORS))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{folder / TENSORS} cannot be read ({' '.join(str(error).split())[:120]}); {REPAIR}") from None
    readouts = {}
    for number, entry in enumerate(content["readouts"]):
        arrays = {name: tensors.get(f"{number}.{name}", np.empty(0)) for name in ARRAYS}
        if fault := _fault(arrays):
            raise UserError(f"{folder / TENSORS}: {number}.{fault}; {REPAIR}")
        readouts[entry["name"]] = Readout(**{**entry, "classes": tuple(entry["classes"])}, **arrays)
    return Readouts(
        readouts, content["weights"], content["layer"], tuple(content["pooling"]), content["left_out"],
        [SeenScans(**source) for source in content["fitted_on"]],
    )  # fmt: skip


REPAIR = "remove that folder, then yaware readouts fits them again"


def _fault(arrays: dict[str, NDArray[Any]]) -> str:
    """Return which array of a readout has a wrong type, shape or value; empty if none has."""
    folds, features = arrays["fold_coefficients"].shape if arrays["fold_coefficients"].ndim == 2 else (0, 0)
    count = arrays["residuals"].size
    shapes: dict[str, Sequence[int]] = {
        "coefficients": (features,), "fold_coefficients": (folds, features), "fold_intercepts": (folds,),
        "residuals": (count,), "residual_folds": (count,), "residual_weights": (count,),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = arrays[name]
        kind = np.int64 if name == "residual_folds" else np.float64
        if values.dtype != kind or values.shape != shape or not values.size:
            return (
                f"{name} has type {values.dtype} and shape {values.shape}, expected {kind.__name__} and {tuple(shape)}"
            )
        if not np.isfinite(values).all():
            return f"{name} holds values that are not finite"
    if arrays["residual_folds"].min() < 0 or arrays["residual_folds"].max() >= folds:
        return "residual_folds holds a fold that does not exist"
    if arrays["residual_weights"].min() <= 0:
        return "residual_weights holds a weight that is not positive"
    return ""
