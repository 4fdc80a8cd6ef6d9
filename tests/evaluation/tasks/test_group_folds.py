"""Stratified folds of groups are those of scikit-learn, for whatever groups and strata."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from evaluation.tasks.group_folds import stratified_group_folds


def of_scikit_learn(strata, groups, count, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a stratum with fewer scans than folds
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        return list(splitter.split(np.zeros(len(strata)), strata, groups))


@pytest.mark.skipif(
    tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8),
    reason="scikit-learn < 1.8 shuffles groups and strata apart",
)
@given(
    people=st.integers(2, 60), scans=st.integers(1, 4), strata=st.integers(1, 12), count=st.integers(2, 10),
    seed=st.integers(0, 2**31 - 1), varies=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_the_folds_are_those_of_scikit_learn(people, scans, strata, count, seed, varies):
    generator = np.random.default_rng(seed)
    groups = np.repeat(generator.permutation(people), generator.integers(1, scans + 1, people))
    stratum = generator.integers(0, strata, len(groups)) if varies else generator.integers(0, strata, people)[groups]
    order = generator.permutation(len(groups))
    stratum, groups = stratum[order], groups[order]
    sizes = np.unique(stratum, return_counts=True)[1]
    if people < count or (sizes < count).all():
        return  # scikit-learn refuses
    expected = of_scikit_learn(stratum, groups, count, seed)
    found = stratified_group_folds(stratum, groups, count, seed)
    assert len(found) == len(expected) == count
    for ours, theirs in zip(found, expected, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_more_folds_than_groups_are_refused():
    with pytest.raises(ValueError, match="2 groups cannot be divided into 3 folds"):
        stratified_group_folds(np.array([0, 1, 0, 1]), np.array([5, 5, 7, 7]), 3, 0)
