"""The order loses no scan, repeats none within an epoch, and does not depend on the number of ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.augment import PRESETS, draw_view, view_arrays
from data_pipeline.loading.augmentations.operator import ViewContext
from data_pipeline.loading.order import EveryScan, batch_of, epoch_order, global_batch, rank_slice, replacements

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
def test_ranks_divide_the_batch_evenly(batch, world_size):
    parts = [np.arange(batch)[rank_slice(batch, rank, world_size)] for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), np.arange(batch))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 1000), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_a_batch_across_two_epochs_holds_no_scan_twice(batch, more, seed, step):
    scans = 2 * batch + more
    numbers, _ = global_batch(scans, seed, step, batch)
    assert len(set(numbers.tolist())) == batch


def test_each_seed_and_epoch_has_its_own_order():
    orders = {tuple(epoch_order(50, seed, epoch, 4).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_every_scan_is_equally_likely_at_every_place():
    places = np.array([epoch_order(6, seed, 1, 2) for seed in range(3000)])
    counts = np.array([np.bincount(places[:, place], minlength=6) for place in range(6)])
    # 3000 draws over six scans: 500 ± 20 each; five standard deviations
    assert np.abs(counts - 500).max() < 105


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 1000), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_short_epochs_hold_every_scan_and_do_not_depend_on_earlier_calls(batch, more, seed, epoch):
    scans = min(2 * batch + more, 3 * batch - 1) if batch > 1 else 2
    epoch_order.cache_clear()
    late = epoch_order(scans, seed, epoch, batch)
    assert sorted(late) == list(range(scans))
    epoch_order.cache_clear()
    for earlier in range(epoch + 1):
        again = epoch_order(scans, seed, earlier, batch)
    assert np.array_equal(late, again)


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 1000), st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_replacements_are_not_in_the_batch_and_never_shared(batch, more, seed, step):
    scans = 2 * batch + more
    order = EveryScan(scans, seed, batch)
    numbers, _ = batch_of(order, step, batch)
    spare = scans - batch
    chains = [list(replacements(order, step, batch, place)) for place in range(batch)]
    fresh = [chain[: len(range(place, spare, batch))] for place, chain in enumerate(chains)]
    together = [number for chain in fresh for number in chain]
    assert all(fresh), "with two batches of scans or more, every place has a replacement"
    assert sorted([*together, *numbers.tolist()]) == list(range(scans))


def test_the_first_replacements_are_the_next_batch():
    order = EveryScan(40, 3, 4)
    following = batch_of(order, 3, 4)[0]
    assert [next(replacements(order, 2, 4, place)) for place in range(4)] == following.tolist()


def test_with_too_few_scans_the_batch_itself_gives_the_replacements():
    order = EveryScan(5, 0, 4)
    numbers, _ = batch_of(order, 0, 4)
    assert set(replacements(order, 0, 4, 2)) == set(numbers.tolist())


@given(SIZES, st.integers(0, 30), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_resuming_on_another_world_size_gives_the_same_scans_and_the_same_augmentation(sizes, step, before, after):
    scans, batch, seed = sizes
    order = EveryScan(scans, seed, batch)
    preset, shape = PRESETS["t1w"], (6, 5, 4)

    def seen(world_size):
        drawn = []
        for rank in range(world_size):
            numbers, shown = batch_of(order, step, batch)
            part = rank_slice(batch, rank, world_size)
            for number, times in zip(numbers[part], shown[part], strict=True):
                view = draw_view(preset, shape, seed=seed, epoch=int(times), scan=int(number), view=1)
                arrays = view_arrays(preset, view, ViewContext(shape, seed))
                drawn.append((int(number), [array.tobytes() for array in arrays]))
        return drawn

    first = seen(before)
    epoch_order.cache_clear()
    assert first == seen(after)
