"""Effective positives of an anchor: perplexity, closed forms, and their summary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.kernels import KERNELS
from pretrain.losses.diagnostics import effective_positives, positive_statistics
from tests.reference import naive


def ages(scans: int = 8) -> Tensor:
    values = 20.0 + 40.0 * torch.rand(scans, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[2] = math.nan
    return values


@pytest.mark.parametrize(
    "options",
    [{}, {"cross_view": True}, {"subjects": torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])}],
    ids=["plain", "cross", "subj"],
)
def test_effective_positives_are_the_perplexity_of_the_row_of_weights(options: dict[str, Any]) -> None:
    proxies = ages()
    found = effective_positives(proxies, KERNELS["gaussian"](bandwidth=8.0), **options)
    table = naive.table(
        torch.ones(2, 8, 2, dtype=torch.float64), proxies, naive.pair_weight("gaussian", 8.0), **options
    )
    for view in (0, 1):
        for scan in range(8):
            row = [table.w[8 * view + scan][j] for j in table.others[8 * view + scan]]
            normalised = [w / sum(row) for w in row if w > 0]
            assert found[scan].item() == pytest.approx(math.exp(-sum(p * math.log(p) for p in normalised)), rel=1e-10)


def test_effective_positives_have_closed_forms_for_simclr_and_equal_ages() -> None:
    proxies = ages()
    simclr = effective_positives(proxies, KERNELS["gaussian"](bandwidth=0))
    torch.testing.assert_close(simclr, torch.ones(8, dtype=torch.float64))
    equal = effective_positives(torch.full((8, 1), 40.0), KERNELS["gaussian"](bandwidth=5.0))
    torch.testing.assert_close(equal, torch.full((8,), 15.0, dtype=torch.float64))
    assert effective_positives(proxies[:1], KERNELS["gaussian"](bandwidth=5.0)).tolist() == [1.0]


def test_the_summary_covers_all_batches() -> None:
    batches = [torch.tensor([1.0, 1.5, 2.0, 3.9]), torch.tensor([4.0, 5000.0])]
    proxies = [torch.tensor([[1.0], [math.nan], [2.0], [3.0]]), torch.tensor([[1.0], [2.0]])]
    found = positive_statistics([batch.double() for batch in batches], proxies)
    assert found.scans == 6
    assert found.mean == pytest.approx(5012.4 / 6)
    assert found.below_two == pytest.approx(2 / 6)
    assert found.missing == pytest.approx(1 / 6)
    assert found.histogram == (2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    metrics = found.metrics()
    assert metrics["positives/from_1"] == pytest.approx(2 / 6)
    assert metrics["positives/from_4096"] == pytest.approx(1 / 6)
    assert math.isnan(positive_statistics([], []).mean)
