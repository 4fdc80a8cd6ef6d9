"""Regression of the proxies on real ranks: the mean of values and gradients is that of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.losses.gather import AllGather
from pretrain.losses.supervised import regression, target_scale
from tests.pretrain.losses.test_supervised import batch

pytestmark = pytest.mark.distributed


def on_a_rank(group, rank, cuts):
    views, proxies = batch(cuts[-1])
    own = slice(cuts[rank], cuts[rank + 1])
    leaf = views.clone().requires_grad_()
    value = regression(leaf[:, own], proxies[own], **target_scale(proxies), gather=AllGather(group))
    value.backward()
    return float(value.detach()), leaf.grad


@pytest.mark.parametrize("cuts", [(0, 6), (0, 1, 6), (0, 2, 3, 6)])
def test_the_mean_over_ranks_is_that_of_one_process(ranks, cuts):
    found = ranks.run(on_a_rank, len(cuts) - 1, cuts=cuts)
    views, proxies = batch(6)
    views.requires_grad_()
    value = regression(views, proxies, **target_scale(proxies))
    value.backward()
    assert np.mean([one for one, _ in found]) == pytest.approx(float(value.detach()), rel=1e-12)
    torch.testing.assert_close(sum(gradient for _, gradient in found) / len(found), views.grad, rtol=1e-12, atol=1e-14)
