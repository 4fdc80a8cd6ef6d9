from __future__ import annotations

from collections.abc import Iterator

import pytest

from pretrain.engine import engine


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """DeepSpeed's process group of one rank, started once for all tests."""
    engine.start_ranks()
    yield
    engine.stop_ranks()
