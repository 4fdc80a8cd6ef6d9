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
    "RETEST_PEOPLE": 0x7E57,
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


# Names by which libraries get a seed -> the modules that use them; the comment in infra/random_streams.py lists them.
SEEDED = {
    "default_rng": ["infra/random_streams.py"],
    "Random": ["data_pipeline/loading/stream.py"],
    "manual_seed": [
        "evaluation/protocols/finetune.py", "pretrain/forecast/fake_pass.py", "pretrain/model.py",
        "pretrain/run/checkpoint.py", "pretrain/weights/import_weights.py",
    ],
    "random_state": [
        "evaluation/features/embedding.py", "evaluation/tasks/folds.py", "pretrain/run/online_probes.py",
    ],
    "RandomState": ["evaluation/tasks/group_folds.py"],
}  # fmt: skip


def test_the_seeds_of_libraries_never_change():
    assert [random_streams.inner_fold_seed(3, repeat) for repeat in range(3)] == [3, 7922, 15841]
    assert random_streams.buffer_seed(3, 5) == 3 * 2**20 + 5
    assert random_streams.resumed_seed(7, 2) == 7_000_023
    assert np.array_equal(random_streams.saliency_generator(4).random(3), np.random.default_rng(4).random(3))


def test_every_seed_of_a_library_is_listed():
    listed = (ROOT / "infra/random_streams.py").read_text()
    users = {name: [] for name in SEEDED}
    for package in ("infra", "data_pipeline", "pretrain", "evaluation"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = str(path.relative_to(ROOT))
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            names = {node.func.attr for node in calls if isinstance(node.func, ast.Attribute)}
            names |= {node.func.id for node in calls if isinstance(node.func, ast.Name)}
            names |= {keyword.arg for node in calls for keyword in node.keywords}
            for name in users.keys() & names:
                users[name].append(module)
    users = {name: sorted(modules) for name, modules in users.items()}
    assert users == SEEDED
    for module in {module for modules in users.values() for module in modules} - {"infra/random_streams.py"}:
        assert module.removesuffix(".py").replace("/", ".") in listed


def test_only_this_module_makes_generators_from_a_key():
    users = []
    for package in ("infra", "data_pipeline", "pretrain", "evaluation"):
        for path in (ROOT / package).rglob("*.py"):
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            if "Philox" in names:
                users.append(str(path.relative_to(ROOT)))
    assert users == ["infra/random_streams.py"]
