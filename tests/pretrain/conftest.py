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
