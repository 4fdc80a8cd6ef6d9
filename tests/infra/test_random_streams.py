"""Random streams: their numbers are pinned, distinct, and used by every module that draws."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import numpy as np

from infra import random_streams
from infra.random_streams import generator, named_stream

ROOT = Path(__file__).resolve().parents[2]
PINNED = {
    "SPLITS": 0x5917, "SHARD_SHUFFLE": 0x5AAD, "EPOCH_ORDER": 0x04DE4, "BALANCED_ORDER": 0xBA1A, "SHARD_ORDER": 0x57EA,
    "AUGMENTATION": 0xA06, "NOISE_BANK": 0xA07, "SIMULATED_ORDER": 0x51A1, "SIMULATED_PERSON": 0x51A2,
    "SIMULATED_SITE": 0x51A3, "SIMULATED_FOCI": 0x51A4, "SIMULATED_VOLUME": 0x5CA4, "SIMULATED_TIV": 0x71B,
    "MONITORED_SCANS": 0x0B5, "FEW_SHOT_DRAWS": 0xC0DE, "FINE_TUNING_ORDER": 0xF17E, "BOOTSTRAP": 0xB007,
    "PERMUTATION": 0xDEA1, "RESAMPLES": 0x4A1F, "READOUT_FOLDS": 0x4EAD, "MASKED_PATCHES": 0xA08,
    "SIMULATED_SUBTYPE": 0x51A5, "SIMULATED_SUBTYPES": 0x51A6, "SIMULATED_MISREGISTRATION": 0x51A7,
}  # fmt: skip


def test_the_numbers_of_the_streams_never_change():
    streams = {name: value for name, value in vars(random_streams).items() if name.isupper()}
    assert streams == PINNED


def test_no_two_streams_share_a_number():
    """All keys have the shape (seed, stream), so distinct numbers are enough for distinct draws."""
    experiments = [named_stream(f"{purpose}{n}") for purpose, n in itertools.product(("seeds", "draws"), range(1000))]
    numbers = [*PINNED.values(), *experiments]
    assert len(set(numbers)) == len(numbers)


def test_a_generator_draws_as_numpys_philox_with_this_key_and_counter():
    bits = np.random.Philox(key=[7, 0xA06], counter=[0, 3, 11, 1])
    expected = np.random.Generator(bits).random(5)
    assert np.array_equal(generator(7, random_streams.AUGMENTATION, (0, 3, 11, 1)).random(5), expected)
    without_counter = np.random.Generator(np.random.Philox(key=[7, 0xA06])).random(5)
    assert np.array_equal(generator(7, random_streams.AUGMENTATION).random(5), without_counter)


def test_only_this_module_makes_generators_from_a_key():
    users = []
    for package in ("infra", "data_pipeline", "pretrain", "evaluation"):
        for path in (ROOT / package).rglob("*.py"):
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            if "Philox" in names:
                users.append(str(path.relative_to(ROOT)))
    assert users == ["infra/random_streams.py"]
