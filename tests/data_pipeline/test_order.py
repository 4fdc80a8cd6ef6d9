"""The order loses nothing, repeats nothing, and does not know how many ranks there are."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import epoch_order, global_batch, rank_slice

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32))  # scans, batch, seed


@given(SIZES, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_each_epoch_holds_every_scan_once(sizes, epochs):
    scans, batch, seed = sizes
    steps = -(-epochs * scans // batch)
    parts = [global_batch(scans, seed, step, batch) for step in range(steps)]
    numbers = np.concatenate([p[0] for p in parts])
    which = np.concatenate([p[1] for p in parts])
    for epoch in range(epochs):
        assert sorted(numbers[which == epoch]) == list(range(scans))
    assert np.all(np.diff(which) >= 0)


@given(SIZES, st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_any_step_is_the_same_without_the_steps_before_it(sizes, step):
    scans, batch, seed = sizes
    first = [global_batch(scans, seed, s, batch) for s in range(step + 1)][-1]
    epoch_order.cache_clear()
    again = global_batch(scans, seed, step, batch)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])


@given(st.integers(1, 200), st.integers(1, 17))
def test_ranks_cut_the_batch_once_and_evenly(batch, world_size):
    parts = [np.arange(batch)[rank_slice(batch, rank, world_size)] for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), np.arange(batch))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 1000), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_a_batch_across_two_epochs_holds_no_scan_twice(batch, more, seed, step):
    scans = 3 * batch + more
    numbers, _ = global_batch(scans, seed, step, batch)
    assert len(set(numbers.tolist())) == batch


def test_seeds_and_epochs_give_other_orders():
    orders = {tuple(epoch_order(50, seed, epoch, 4).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_every_scan_is_equally_likely_in_every_place():
    places = np.array([epoch_order(6, seed, 1, 2) for seed in range(3000)])
    counts = np.array([np.bincount(places[:, place], minlength=6) for place in range(6)])
    # 3000 draws over six scans: 500 ± 20 each; five standard deviations
    assert np.abs(counts - 500).max() < 105
