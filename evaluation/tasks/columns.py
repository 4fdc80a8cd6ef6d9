"""Columns of scans.parquet as numbers: covariates, confounds, strata. Nothing here is fitted to any scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

Array = np.ndarray[Any, np.dtype[Any]]


def spelling(text: object) -> str:
    """A value as it is compared: capitals, spaces, hyphens and underscores make no difference."""
    return " ".join(str(text).replace("_", " ").replace("-", " ").lower().split())


def as_numbers(scans: pd.DataFrame, names: Sequence[str]) -> Array:
    """(N, C) float64: numeric columns as they are, NaN where missing; a text column as 0/1 columns, one a value but one.

    Which values a text column has is taken from all scans given; a model fitted to some of them gives no weight to a value
    that none of these has.
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


def as_strata(labels: Array, kind: str, scans: pd.DataFrame, names: Sequence[str]) -> Array:
    """(N,) codes of the strata that folds spread alike: the label (fifths of a number's range) and some columns.

    Of a numeric column the fifths count, of a text column the values.
    """
    parts = [fifths(labels) if kind == "regression" else labels.astype(np.int64)]
    for name in names:
        column = scans[name]
        if pd.api.types.is_numeric_dtype(column):
            values = column.to_numpy(dtype=np.float64, na_value=np.nan)
            parts.append(fifths(np.where(np.isfinite(values), values, np.nanmedian(values))))
        else:
            parts.append(pd.Categorical(column.astype("string").fillna("")).codes.astype(np.int64))
    return np.unique(np.stack(parts, axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def fifths(values: Array) -> Array:
    """Which fifth of the values each belongs to."""
    return np.searchsorted(np.quantile(values, np.arange(0.2, 1.0, 0.2)), values)
