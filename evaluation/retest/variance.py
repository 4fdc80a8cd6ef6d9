"""The shares of person, scanner, session and rest in the variance of a measurement, by a mixed model (statsmodels)."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from evaluation.retest.design import FEWEST_PEOPLE, Codes

PARTS = ("person", "scanner", "session", "rest")
MOST_PEOPLE = 200  # of whom the model is fitted; its time grows with the square of their number


def variance_shares(
    values: NDArray[np.float64], *, people: Codes, scanners: Codes, sessions: Codes
) -> dict[str, float]:
    """Return the share of each of ``PARTS`` in the variance of ``values`` (N,), by restricted maximum likelihood.

    Person, scanner and session are crossed random effects. A part that cannot be told from the rest is NaN and counts to the
    rest: the session if none has two scans or fewer than five people have several, the scanner if there is one. All are NaN
    if the values do not vary, or if the fit fails.

    Args:
        values: of the scans.
        people: (N,) codes.
        scanners: (N,) codes.
        sessions: (N,) codes of a person's sessions.
    """
    from statsmodels.regression.mixed_linear_model import MixedLM, VCSpec

    shares = dict.fromkeys(PARTS, np.nan)
    spread = float(values.std())
    if spread <= 1e-9 * float(np.abs(values).max(initial=0.0)):
        return shares
    codes = {"person": people, "scanner": scanners, "session": sessions}
    separable = {name: each for name, each in codes.items() if _separable(each)}
    if not _within_people(sessions, people):
        separable.pop("session", None)
    designs = {name: _indicators(each) for name, each in separable.items()}
    names = [[f"{name}{number}" for number in range(design.shape[1])] for name, design in designs.items()]
    parts = VCSpec(list(designs), [[columns] for columns in names], [[design] for design in designs.values()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an estimate at the boundary: a share of 0 is a result
        try:
            scaled = (values - values.mean()) / spread
            model = MixedLM(scaled, np.ones((len(values), 1)), groups=np.zeros(len(values)), exog_vc=parts)
            fit = model.fit(reml=True)
        except (np.linalg.LinAlgError, ValueError):
            return shares
    found = {**dict(zip(designs, map(float, fit.vcomp), strict=True)), "rest": float(fit.scale)}
    total = sum(found.values())
    if not (np.isfinite(total) and total > 0):
        return shares
    return shares | {name: value / total for name, value in found.items()}


def _separable(codes: Codes) -> bool:
    """Whether the effect of a part can be told from the rest: it has several levels, and some level has several scans."""
    levels, counts = np.unique(codes, return_counts=True)
    return len(levels) > 1 and bool((counts > 1).any())


def _within_people(sessions: Codes, people: Codes) -> bool:
    """Whether enough people have several sessions; else the effects of sessions are those of people, and the fit singular."""
    pairs = np.unique(np.stack([people, sessions], 1), axis=0)
    return int((np.unique(pairs[:, 0], return_counts=True)[1] > 1).sum()) >= FEWEST_PEOPLE


def _indicators(codes: Codes) -> NDArray[np.float64]:
    """Return a column for each level, (N, levels)."""
    levels, places = np.unique(codes, return_inverse=True)
    return np.eye(len(levels))[places]
