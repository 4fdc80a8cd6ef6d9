"""Positives of one person, and comparisons within sites, on real ranks with different scans: naive loops in one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.kernels import KERNELS
from pretrain.run import objective
from tests.distributed.cases import GATHERS
from tests.reference import naive

pytestmark = pytest.mark.distributed
TOTAL = 7
CUTS = [(0, 7), (0, 3, 7), (0, 2, 3, 7), (0, 0, 4, 7)]
PEOPLE = torch.tensor([5, 0, 5, 1, 1, 2, 5])  # on several sites and on one
SITES = torch.tensor([0, 0, 1, 1, 0, 2, 0])  # one scan is alone at its site
OPTIONS = {
    "people": {"people": True}, "sites": {"site_share": 1.0}, "some": {"site_share": 0.3},
    "both": {"people": True, "site_share": 0.4},
}  # fmt: skip


def batch():
    """Views and ages of the scans; the age of one is missing. They are rows 3 to 9 of a manifest of 10 scans."""
    source = torch.Generator().manual_seed(4)
    views = torch.randn(2, TOTAL, 5, generator=source, dtype=torch.float64, requires_grad=True)
    ages = 20 + 30 * torch.rand(TOTAL, 1, generator=source, dtype=torch.float64)
    ages[2] = torch.nan
    return views, ages


def on_a_rank(group, rank, cuts, name, options, tile, form="right"):
    objective._gather = lambda: GATHERS[form](group)
    views, ages = batch()
    own, before = slice(cuts[rank], cuts[rank + 1]), torch.full((3,), 99)
    shared = {"temperature": 0.2, **({} if tile is None else {"tile": tile})}
    share = options.get("site_share", 0.0)
    loss = objective.Objective(
        name, KERNELS["gaussian"](bandwidth=8.0), shared, None, False,
        people=torch.cat([before, PEOPLE]) if options.get("people") else None,
        sites=torch.cat([before, SITES]) if share else None, site_share=share,
    )  # fmt: skip
    value = loss.loss(views[:, own], None, {"proxies": ages[own], "scan": torch.arange(3, 10)[own]})
    value.backward()
    return value.item(), views.grad


def expected_of(name, options):
    views, ages = batch()
    weight = naive.pair_weight("gaussian", 8.0)
    kept = {"temperature": 0.2, **({"people": PEOPLE.tolist()} if options.get("people") else {})}
    share = options.get("site_share", 0.0)
    value = (1 - share) * naive.TWINS[name](views, ages, weight, **kept)
    if share:
        value = value + share * naive.TWINS[name](views, ages, weight, sites=SITES.tolist(), **kept)
    value.backward()
    return value.item(), views.grad


def worst(found, expected):
    return float((sum(found) / len(found) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(
    ("name", "tile"), [("y-aware", None), ("y-aware", 2), ("threshold", None), ("exp", None), ("rank-n-contrast", 2)]
)
def test_the_mean_over_ranks_is_that_of_the_naive_loops(ranks, cuts, name, tile):
    for options in OPTIONS.values():
        found = ranks.run(on_a_rank, len(cuts) - 1, cuts=cuts, name=name, options=options, tile=tile)
        values, gradients = zip(*found, strict=True)
        expected = expected_of(name, options)
        assert np.mean(values) == pytest.approx(expected[0], rel=1e-10), options
        assert worst(gradients, expected[1]) < 1e-10, options


@pytest.mark.parametrize("form", ["detached", "no-offset"])
def test_a_wrong_gather_is_detected(ranks, form):
    found = ranks.run(on_a_rank, 3, cuts=(0, 2, 3, 7), name="y-aware", options=OPTIONS["both"], tile=None, form=form)
    assert worst([gradient for _, gradient in found], expected_of("y-aware", OPTIONS["both"])[1]) > 1e-2


def test_each_option_changes_the_loss():
    values = [expected_of("y-aware", options)[0] for options in ({}, *OPTIONS.values())]
    assert len({round(value, 6) for value in values}) == len(values)
