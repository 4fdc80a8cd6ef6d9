"""How well one candidate repeats: its tables of intraclass correlations, retest errors and shares of variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluation.retest.design import FEWEST_PEOPLE, Block, Design
from evaluation.retest.icc import KINDS, icc_with_intervals
from evaluation.retest.rates import Estimate, identify, predict_scanners, proportion, retest_errors
from evaluation.retest.variance import MOST_PEOPLE, PARTS, variance_shares
from infra import random_streams

COMPONENTS = 10
GOOD = 0.75  # an ICC from which reliability is called good (Koo and Li 2016)
ICC_COLUMNS = ["compared", "kind", "name", *(f"{kind}{end}" for kind in KINDS for end in ("", "_low", "_high"))]
RETEST_COLUMNS = [
    "compared",
    "name",
    "unit",
    *(f"{what}{end}" for what in ("sd", "difference") for end in ("", "_low", "_high")),
]
SHARE_COLUMNS = ["kind", "name", *PARTS]
AGE = "age"  # the prediction whose unit is years


@dataclass(frozen=True)
class Measured:
    """What is known of one candidate's scans, in the order of the design.

    ``features`` (N, F) and their names; F is 0 for predictions alone. ``predictions``: name -> (N,), ``age`` in years.
    """

    features: NDArray[np.floating[Any]]
    names: list[str]
    predictions: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Repeats:
    """The results of one candidate: ``summary`` by metric, and tables with ICC_COLUMNS, RETEST_COLUMNS and SHARE_COLUMNS."""

    summary: dict[str, float]
    icc: pd.DataFrame
    retest: pd.DataFrame
    shares: pd.DataFrame


def measure(measured: Measured, design: Design, *, seed: int = 0) -> Repeats:
    """Measure how well features, their principal components and predictions repeat.

    ``seed`` draws the people of the mixed models, if there are more than ``MOST_PEOPLE``.
    """
    features = standardised(measured.features)
    quantities = _quantities(features, measured)
    icc = pd.concat([_icc_rows(*each, design) for each in quantities], ignore_index=True)
    retest = pd.DataFrame(
        [row for name, values in measured.predictions.items() for row in _retest_rows(name, values, design)],
        columns=RETEST_COLUMNS,
    )
    shares = _share_rows([each for each in quantities if each[0] != "feature"], design, seed)
    summary = _icc_summary(icc) | _retest_summary(retest) | _share_summary(shares, features)
    if features.shape[1]:
        # With more features than scans: all coordinates have the same distances and inner products, and are fewer.
        compact = components_of(features, len(features)) if features.shape[1] > len(features) else features
        summary |= _identification(compact, design) | _scanner(compact, design)
    return Repeats(summary, icc, retest, shares)


def standardised(features: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return features (N, F) with mean 0 and variance 1; a constant one is 0."""
    values = np.asarray(features, dtype=np.float64)
    deviation = values.std(0)
    constant = deviation <= 1e-9 * np.abs(values).max(0, initial=0.0)
    return np.where(constant, 0.0, (values - values.mean(0)) / np.where(constant, 1.0, deviation))


def components_of(features: NDArray[np.float64], count: int = COMPONENTS) -> NDArray[np.float64]:
    """Return the scans' coordinates (N, up to ``count``) on the first principal components of standardised features."""
    if not features.shape[1]:
        return np.empty((len(features), 0))
    vectors, sizes, _ = np.linalg.svd(features, full_matrices=False)
    kept = int(min(count, (sizes > 1e-9 * max(sizes[0], 1e-300)).sum()))
    return np.asarray(vectors[:, :kept] * sizes[:kept])


def _quantities(
    features: NDArray[np.float64], measured: Measured
) -> list[tuple[str, list[str], NDArray[np.float64]]]:  # fmt: skip
    """Return kind, names and values (N, names) of features, components and predictions."""
    components = components_of(features)
    predictions = (
        np.stack([*measured.predictions.values()], 1) if measured.predictions else np.empty((len(features), 0))
    )
    return [
        ("feature", measured.names, features),
        ("component", [f"component {number + 1}" for number in range(components.shape[1])], components),
        ("prediction", list(measured.predictions), predictions),
    ]


def _icc_rows(kind: str, names: list[str], values: NDArray[np.float64], design: Design) -> pd.DataFrame:
    tables = [pd.DataFrame(columns=ICC_COLUMNS)] if not names else []
    for compared, blocks in design.blocks.items() if names else ():
        found = icc_with_intervals(values, blocks)
        columns = {
            f"{name}{end}": part
            for name, each in found.items()
            for end, part in zip(("", "_low", "_high"), each, strict=True)
        }
        tables.append(pd.DataFrame({"compared": compared, "kind": kind, "name": names, **columns}, columns=ICC_COLUMNS))
    return pd.concat(tables, ignore_index=True)


def _retest_rows(name: str, values: NDArray[np.float64], design: Design) -> list[list[Any]]:
    """Return the rows of a prediction; of age, the true ageing between the scans is subtracted if it is known."""
    in_years = name == AGE
    known = _blocks_of_known_age(design) if in_years else None
    errors = values if known is None else values - design.ages
    rows = []
    for compared, blocks in (known or design.blocks).items():
        found = retest_errors(errors, blocks)
        rows.append([compared, name, "years" if in_years else "", *found["sd"], *found["difference"]])
    return rows


def ageing(design: Design) -> str:
    """Return a line about the true ageing between scans: from whose predicted ages it is subtracted."""
    people, unknown = len(np.unique(design.people)), len(_without_age(design))
    if _blocks_of_known_age(design) is None:
        return (
            f"predicted ages: true ageing between scans is not subtracted, because {unknown} of {people} people have a scan "
            "without an age"
        )
    left_out = f"; {unknown} of {people} people, who have a scan without an age, are left out" if unknown else ""
    return f"predicted ages: true ageing between scans is subtracted{left_out}"


def _without_age(design: Design) -> NDArray[np.int64]:
    """Return the codes of people who have a scan without an age."""
    return np.unique(design.people[~np.isfinite(design.ages)])


def _blocks_of_known_age(design: Design) -> dict[str, list[Block]] | None:
    """Return the blocks without people who lack an age; None if that leaves too few for one of the comparisons."""
    unknown = _without_age(design)
    found: dict[str, list[Block]] = {}
    for compared, blocks in design.blocks.items():
        kept = [Block(b.people[~np.isin(b.people, unknown)], b.scans[~np.isin(b.people, unknown)]) for b in blocks]
        found[compared] = [block for block in kept if len(block.people) >= FEWEST_PEOPLE]
    return found if all(found.values()) else None


def _share_rows(
    quantities: list[tuple[str, list[str], NDArray[np.float64]]], design: Design, seed: int
) -> pd.DataFrame:  # fmt: skip
    people = np.unique(design.people)
    if len(people) > MOST_PEOPLE:
        people = random_streams.generator(seed, random_streams.RETEST_PEOPLE).permutation(people)[:MOST_PEOPLE]
    scans = np.isin(design.people, people)
    codes = {"people": design.people[scans], "scanners": design.scanners[scans], "sessions": design.sessions[scans]}
    rows = [
        {"kind": kind, "name": name, **variance_shares(values[scans, number], **codes)}
        for kind, names, values in quantities
        for number, name in enumerate(names)
    ]
    return pd.DataFrame(rows, columns=SHARE_COLUMNS)


def _icc_summary(icc: pd.DataFrame) -> dict[str, float]:
    """Return median, quartiles and the share of good values of the features' ICCs, and the ICC of each prediction."""
    summary: dict[str, float] = {}
    for (compared, kind), rows in icc.groupby(["compared", "kind"], sort=False):
        for name in KINDS:
            values = rows[name].to_numpy(np.float64)
            if kind == "feature" and np.isfinite(values).any():
                low, median, high = np.nanquantile(values, [0.25, 0.5, 0.75])
                summary |= {f"{compared}.{name}": median, f"{compared}.{name}.q25": low, f"{compared}.{name}.q75": high,
                            f"{compared}.{name}.good": float((values[np.isfinite(values)] >= GOOD).mean())}  # fmt: skip
            if kind == "prediction":
                for row in rows.to_dict("records"):
                    key = f"{compared}.{name}.{row['name']}"
                    summary |= {key: row[name], f"{key}.low": row[f"{name}_low"], f"{key}.high": row[f"{name}_high"]}
    return summary


def _retest_summary(retest: pd.DataFrame) -> dict[str, float]:
    return {
        f"{row['compared']}.{what}.{row['name']}{end}": row[f"{what}{end.replace('.', '_')}"]
        for row in retest.to_dict("records")
        for what in ("sd", "difference")
        for end in ("", ".low", ".high")
    }


def _share_summary(shares: pd.DataFrame, features: NDArray[np.float64]) -> dict[str, float]:
    """Return the shares of variance of the components together, each weighted by its variance."""
    rows = shares[shares["kind"] == "component"]
    if not len(rows):
        return {}
    weights = components_of(features).var(0)
    fitted = rows["rest"].notna().to_numpy()
    if not fitted.any():
        return {}
    weights = weights[fitted] / weights[fitted].sum()
    return {
        f"share.{part}": float(rows[part].to_numpy(np.float64)[fitted] @ weights)
        for part in PARTS
        if rows[part][fitted].notna().all()
    }


def _identification(features: NDArray[np.float64], design: Design) -> dict[str, float]:
    # If scanners are not compared, too few people have several: all are identified among all other scans.
    scanners = design.scanners if "scanners" in design.blocks else np.zeros_like(design.scanners)
    hits, chance = identify(features, design.people, scanners)
    known = np.isfinite(hits)
    found = _named("identification", proportion(hits[known], design.people[known]))
    return found | {"identification.chance": float(chance[known].mean()), "identification.scans": float(known.sum())}


def _scanner(features: NDArray[np.float64], design: Design) -> dict[str, float]:
    scans = design.crossed
    if not len(scans):
        return {}
    people, scanners = design.people[scans], design.scanners[scans]
    correct = (predict_scanners(features[scans], people, scanners) == scanners).astype(float)
    # Each block has every scanner equally often, so that this is the balanced accuracy.
    return _named("scanner", proportion(correct, people)) | {"scanner.chance": 1.0 / len(np.unique(scanners))}


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}.low": estimate.low, f"{name}.high": estimate.high}
