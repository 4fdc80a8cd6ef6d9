"""Columns of scans.parquet as numbers: covariates, confounds and strata. Nothing here is fitted to the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.cohort.cells import NAME_OF_DIGITS, number_as_text, parse_number


def normalise_spelling(value: object) -> str:
    """Return a value as text in lower case, with hyphens, underscores and runs of spaces replaced by one space.

    Numbers are written alike: 1, 1.0, "1" and "1.0" are equal.
    """
    number = parse_number(str(value).strip())
    if number is not None:
        return number_as_text(number)
    return " ".join(str(value).replace("_", " ").replace("-", " ").lower().split())


def name_of_label(value: object) -> str:
    """``normalise_spelling`` that keeps names of digits as they are written: 007 and 7 differ, 1 and 1.0 do not."""
    text = str(value).strip()
    return text if NAME_OF_DIGITS.fullmatch(text) else normalise_spelling(value)


def as_text(column: pd.Series[Any]) -> pd.Series[str]:
    """Return the values of a column as a table writes them: 10234560, not 10234560.0; empty where missing."""
    if pd.api.types.is_numeric_dtype(column):
        return column.map(lambda value: "" if pd.isna(value) else number_as_text(float(value))).astype(str)
    return column.map(lambda value: "" if value is None or value != value else str(value)).astype(str)


def as_numbers(scans: pd.DataFrame, names: Sequence[str]) -> NDArray[np.float64]:
    """Return columns of a table as a matrix (N, C) of numbers.

    A numeric column is kept, with NaN where it is missing. A text column is one-hot encoded without its first value. The
    values of a text column are those of all given scans, so a model may be fitted to scans that lack some of them; such a
    model gives these values no weight.
    """
    columns = []
    for name in names:
        column = scans[name]
        if pd.api.types.is_numeric_dtype(column):
            columns.append(column.to_numpy(dtype=np.float64, na_value=np.nan))
            continue
        text = column.astype("string").fillna("")
        columns += [(text == value).to_numpy(dtype=np.float64) for value in sorted(set(text))[1:]]
    return np.stack(columns, axis=1) if columns else np.empty((len(scans), 0))


def as_strata(labels: NDArray[Any], kind: str, scans: pd.DataFrame, names: Sequence[str]) -> NDArray[np.int64]:
    """Return codes (N,) of the strata that stratified folds balance: the label crossed with some columns.

    Labels of a regression and numeric columns enter by their quintile, text columns by their value. Missing numbers take
    the quintile of the median.
    """
    strata = [quintiles(labels) if kind == "regression" else labels.astype(np.int64)]
    for name in names:
        column = scans[name]
        if pd.api.types.is_numeric_dtype(column):
            values = column.to_numpy(dtype=np.float64, na_value=np.nan)
            strata.append(quintiles(np.where(np.isfinite(values), values, np.nanmedian(values))))
        else:
            strata.append(pd.Categorical(column.astype("string").fillna("")).codes.astype(np.int64))
    return np.unique(np.stack(strata, axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def quintiles(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return the quintile, 0 to 4, of each value among all values."""
    return np.searchsorted(np.quantile(values, np.arange(0.2, 1.0, 0.2)), values)
