"""Balanced orders show groups and subjects equally often, and change the positives as documented."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.balance import EqualGroups, OneSession, SubjectPairs, build_order
from data_pipeline.loading.order import EveryScan, batch_of, epoch_order
from infra.errors import UserError
from pretrain.kernels import KERNELS
from pretrain.losses.diagnostics import effective_positives

GROUPS = st.lists(st.integers(1, 12), min_size=1, max_size=7)  # sizes
SEEDS = st.integers(0, 2**32)


def grouped(sizes):
    ends = np.cumsum(sizes)
    return tuple(np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True))


def group_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


@given(GROUPS, SEEDS, st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_groups_have_equal_places_in_an_epoch_and_within_one_in_a_batch(sizes, seed, batch, epoch):
    order, group = EqualGroups(grouped(sizes), seed, batch), group_of(sizes)
    numbers = order.epoch(epoch)
    assert len(numbers) == order.length >= sum(sizes)
    assert set(Counter(group[numbers].tolist()).values()) == {order.rounds}
    for first in range(0, order.length - batch + 1, batch):
        counts = np.bincount(group[numbers[first : first + batch]], minlength=len(sizes))
        assert counts.max() - counts.min() <= 1


@given(GROUPS, SEEDS, st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_scans_of_a_group_are_shown_equally_often_within_one_and_never_twice_with_one_augmentation(sizes, seed, batch):
    order = EqualGroups(grouped(sizes), seed, batch)
    shown = [
        pair for e in range(4) for pair in zip(order.epoch(e).tolist(), order.times_shown(e).tolist(), strict=True)
    ]
    assert len(set(shown)) == len(shown), "a scan was shown twice with the same augmentation"
    counts = np.bincount([number for number, _ in shown], minlength=sum(sizes))
    for members in grouped(sizes):
        assert counts[members].max() - counts[members].min() <= 1
        if 4 * order.rounds >= len(members):
            assert counts[members].min() >= 1


@given(st.integers(1, 12), st.integers(1, 6), st.data(), SEEDS, st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_no_batch_holds_a_scan_twice_if_every_group_is_large_enough(batch, groups, data, seed, step):
    enough = -(-batch // groups) + 1
    sizes = data.draw(st.lists(st.integers(enough, enough + 8), min_size=groups, max_size=groups))
    numbers, _ = batch_of(EqualGroups(grouped(sizes), seed, batch), step, batch)
    assert len(set(numbers.tolist())) == batch


@given(GROUPS, SEEDS, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_each_subject_once_and_all_sessions_take_turns(sizes, seed, batch):
    order, subject = OneSession(grouped(sizes), seed, batch), group_of(sizes)
    epochs = [order.epoch(number) for number in range(max(sizes))]
    for numbers in epochs:
        assert sorted(subject[numbers].tolist()) == list(range(len(sizes)))
    seen = np.bincount(np.concatenate(epochs), minlength=sum(sizes))
    assert seen.min() >= 1
    for sessions in grouped(sizes):
        assert seen[sessions].max() - seen[sessions].min() <= 1


@given(st.integers(1, 6), st.integers(0, 10), SEEDS, st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_no_batch_holds_two_sessions_of_one_subject(batch, more, seed, step):
    sizes = [3] * (2 * batch + more)
    numbers, _ = batch_of(OneSession(grouped(sizes), seed, batch), step, batch)
    assert len(set(group_of(sizes)[numbers].tolist())) == batch


@given(GROUPS, SEEDS, st.integers(1, 5), st.integers(0, 30), st.sampled_from([EqualGroups, OneSession]))
@settings(max_examples=60, deadline=None)
def test_any_step_is_the_same_without_the_steps_before_it(sizes, seed, batch, step, kind):
    one = kind(grouped(sizes), seed, batch)
    one_by_one = [batch_of(one, s, batch) for s in range(step + 1)][-1]
    epoch_order.cache_clear()
    directly = batch_of(kind(grouped(sizes), seed, batch), step, batch)
    assert all(np.array_equal(a, b) for a, b in zip(one_by_one, directly, strict=True))


def table(**columns):
    scans = pd.DataFrame({"age": [20.0, 21.0, 34.0, 35.5, 61.0, 22.0], "site": list("aabbca"), **columns})
    people = pd.Categorical(["p", "p", "q", "r", "s", "t"]).codes.astype(np.int64)
    return SimpleNamespace(scans=scans, subjects=lambda: people)


def test_the_balance_section_gives_an_order_over_the_chosen_rows():
    rows = np.array([0, 1, 2, 4])
    ages = build_order(table(), rows, seed=0, batch=2, by="age", bins=5.0)
    assert [part.tolist() for part in ages.groups] == [[0, 1], [2], [3]]
    sites = build_order(table(), rows, seed=0, batch=2, by="site")
    assert [part.tolist() for part in sites.groups] == [[0, 1], [2], [3]]
    people = build_order(table(), rows, seed=0, batch=2, one_session_per_subject=True)
    assert [part.tolist() for part in people.sessions] == [[0, 1], [2], [3]]
    assert isinstance(build_order(table(), rows, seed=0, batch=2), EveryScan)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"by": "sight"}, r"data.balance.by='sight' is not a column of the manifest \(did you mean 'site'\?\)"),
        ({"bins": 5.0}, "data.balance.bins=5 needs data.balance.by"),
        ({"by": "site", "bins": 5.0}, "data.balance.bins=5: site is not a numeric column"),
        ({"by": "site", "one_session_per_subject": True}, "cannot be set together"),
        ({"by": "tiv"}, "data.balance.by=tiv: 1 of 6 scans have no tiv; exclude them with data.query"),
    ],
)
def test_invalid_options_are_named(options, text):
    manifest = table(tiv=[1, 2, 3, 4, 5, np.nan])
    with pytest.raises(UserError, match=text):
        build_order(manifest, np.arange(6), seed=0, batch=2, **options)


def cohort_of_many_young(scans=2000):
    """Ages as in the BHB cohort: most between 18 and 30 from a few large sites, few old."""
    generator = np.random.default_rng(0)
    young = generator.normal(24, 3, int(0.8 * scans))
    ages = np.concatenate([young, generator.uniform(30, 85, scans - len(young))])
    site = np.where(ages < 30, generator.integers(0, 4, scans), generator.integers(4, 24, scans))
    return pd.DataFrame({"age": ages, "site": [f"site{number:02d}" for number in site]})


def positives(scans, order, batch=64, steps=20):
    kernel, counts, ages_seen = KERNELS["gaussian"](bandwidth=5.0), [], []
    for step in range(steps):
        ages = scans["age"].to_numpy()[batch_of(order, step, batch)[0]]
        counts.append(effective_positives(torch.tensor(ages[:, None], dtype=torch.float64), kernel))
        ages_seen.append(ages)
    return torch.cat(counts).numpy(), np.concatenate(ages_seen)


def test_flat_ages_give_anchors_of_common_ages_fewer_positives_and_of_rare_ages_more():
    scans = cohort_of_many_young()
    manifest, rows = SimpleNamespace(scans=scans), np.arange(len(scans))
    plain, ages = positives(scans, build_order(manifest, rows, seed=0, batch=64))
    flat, flat_ages = positives(scans, build_order(manifest, rows, seed=0, batch=64, by="age", bins=5.0))
    assert flat_ages.std() > 1.3 * ages.std()
    assert flat.mean() < 0.5 * plain.mean()
    assert flat[flat_ages > 50].mean() > 1.5 * plain[ages > 50].mean()
    bins = np.bincount((flat_ages // 5).astype(int))
    bins = bins[bins > 0]
    assert bins.max() - bins.min() <= 20  # one per batch


def test_balanced_sites_make_pairs_from_one_site_rare():
    scans = cohort_of_many_young()
    manifest, rows = SimpleNamespace(scans=scans), np.arange(len(scans))

    def same_site(order):
        shares = []
        for step in range(10):
            site = scans["site"].to_numpy()[batch_of(order, step, 64)[0]]
            shares.append(((site[:, None] == site).sum() - 64) / (64 * 63))
        return np.mean(shares)

    plain = same_site(build_order(manifest, rows, seed=0, batch=64))
    balanced = same_site(build_order(manifest, rows, seed=0, batch=64, by="site"))
    assert balanced <= 1 / 24 < 0.1 < plain


@given(GROUPS, SEEDS, st.integers(0, 4))
@settings(max_examples=80, deadline=None)
def test_subject_pairs_show_every_scan_once_and_all_pairs_that_a_subject_has(sizes, seed, epoch):
    order, subject = SubjectPairs(grouped(sizes), seed), group_of(sizes)
    numbers, shown = order.epoch(epoch), order.times_shown(epoch)
    assert len(numbers) == order.length == sum(sizes) + sum(sizes) % 2
    assert set(numbers.tolist()) == set(range(sum(sizes)))
    assert len(set(zip(numbers.tolist(), shown.tolist(), strict=True))) == len(numbers)
    first, second = subject[numbers].reshape(-1, 2).T
    own = numbers.reshape(-1, 2)
    same = first[(first == second) & (own[:, 0] != own[:, 1])]
    found, expected = Counter(same.tolist()), Counter({n: size // 2 for n, size in enumerate(sizes) if size > 1})
    assert not expected - found
    assert (found - expected).total() <= sum(sizes) % 2  # a scan that is shown again may meet one of its subject
    again = SubjectPairs(grouped(sizes), seed)
    again.epoch(epoch + 1)
    np.testing.assert_array_equal(again.epoch(epoch), numbers)  # a pure function of seed and epoch


def test_an_even_batch_holds_both_scans_of_a_pair_and_epochs_pair_others():
    order, subject = SubjectPairs(grouped([4] * 6), 3), group_of([4] * 6)
    partners = set()
    for step in range(12):
        numbers, _ = batch_of(order, step, 4)
        pairs = numbers.reshape(-1, 2)
        assert (subject[pairs[:, 0]] == subject[pairs[:, 1]]).all()
        partners |= {tuple(sorted(pair)) for pair in pairs.tolist()}
    assert len(partners) > 12  # with fixed pairs there were 12


def test_each_epoch_draws_the_scan_that_is_shown_twice():
    sizes = [2, 3, 4]
    order = SubjectPairs(grouped(sizes), 0)
    repeated = [Counter(order.epoch(epoch).tolist()).most_common(1)[0] for epoch in range(200)]
    assert {count for _, count in repeated} == {2}
    assert {number for number, _ in repeated} == set(range(sum(sizes)))


def test_a_column_named_subject_is_not_taken_for_the_participants():
    scans = pd.DataFrame({"key": list("abcd"), "subject": ["x", "x", "y", "y"]})
    manifest = SimpleNamespace(scans=scans, url="shards", subjects=lambda: np.array([0, 0, 1, 1]))
    with pytest.raises(UserError, match="in pairs, but shards has a column subject too; build the shards with another"):
        build_order(manifest, np.arange(4), seed=0, batch=2, by="subject")


@pytest.mark.parametrize(
    ("options", "subjects", "text"),
    [
        ({"batch": 3}, [0, 0, 1, 1], "shows scans in pairs; batch.global=3 is odd"),
        ({"batch": 2, "bins": 5.0}, [0, 0, 1, 1], "data.balance.bins=5 does not go with data.balance.by=subject"),
        ({"batch": 2}, [0, 1, 2, 3], "none of the 4 participants has two scans"),
        ({"batch": 2, "one_session_per_subject": True}, [0, 0, 1, 1], "cannot be set together"),
    ],
)
def test_subject_pairs_that_cannot_be_are_one_line(options, subjects, text):
    manifest = SimpleNamespace(scans=pd.DataFrame({"key": list("abcd")}), subjects=lambda: np.array(subjects))
    with pytest.raises(UserError, match=text):
        build_order(manifest, np.arange(4), seed=0, by="subject", **options)
