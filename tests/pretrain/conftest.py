from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import pytest

from data_pipeline.storage.manifest import Manifest
from pretrain.engine import engine
from tests.cohorts import write_cohort


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """DeepSpeed's process group of one rank, started once for all tests."""
    engine.start_ranks()
    yield
    engine.stop_ranks()


@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    """The manifest of shards of 50 healthy people with two sessions each, all in split pretrain.

    Age is missing for two people; ``handed`` is a text with two values, known for every second person.
    """
    from data_pipeline.shards.build import build_shards

    cohort = write_cohort(tmp_path_factory.mktemp("healthy") / "cohort", 50, sessions=2, diagnosis=("control",))
    table = pd.read_csv(cohort / "participants.tsv", sep="\t", dtype=str)
    table.loc[[4, 11], "age"] = "n/a"
    table["handed"] = ["right" if n % 3 else "left" for n in range(50)]
    table.loc[1::2, "handed"] = "n/a"
    table["scanner"] = "only one"
    table.to_csv(cohort / "participants.tsv", sep="\t", index=False)
    out = cohort.parent / "shards"
    build_shards(cohort, out, scans_per_shard=30, splits={"pretrain": 1.0})
    return Manifest.load(out)


@pytest.fixture(scope="session")
def two_splits(tmp_path_factory):
    """Folder of shards of 82 healthy people: 24 in split pretrain, 55 in monitor and 3 in other, a scan of each.

    Age is missing for one person of monitor. ``handed`` is a text with two values in pretrain and a third one in monitor;
    ``rare`` is known for everybody in pretrain and for 30 people of monitor.
    """
    from data_pipeline.shards.build import build_shards

    cohort = write_cohort(tmp_path_factory.mktemp("two") / "cohort", 82, diagnosis=("control",))
    table = pd.read_csv(cohort / "participants.tsv", sep="\t", dtype=str)
    table["split"] = ["other" if n > 78 else "pretrain" if n % 10 in (0, 3, 7) else "monitor" for n in range(82)]
    monitor = table.index[table["split"] == "monitor"]
    table["handed"] = ["right" if n % 3 else "left" for n in range(82)]
    table.loc[monitor[:2], "handed"] = "both"
    table["rare"] = [f"{n % 7}" for n in range(82)]
    table.loc[monitor[30:], "rare"] = "n/a"
    table.loc[monitor[4], "age"] = "n/a"
    table.to_csv(cohort / "participants.tsv", sep="\t", index=False)
    out = cohort.parent / "shards"
    build_shards(cohort, out, scans_per_shard=30)
    return out
