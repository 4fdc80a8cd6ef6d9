"""The learned temperature: its gradient and its bounds."""

from __future__ import annotations

import math

import pytest
import torch

from infra.errors import UserError
from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import y_aware_infonce
from pretrain.losses.temperature import Temperature


def test_the_gradient_is_that_of_the_loss_with_respect_to_log_temperature() -> None:
    views = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    ages = torch.linspace(20, 60, 6)[:, None]
    kernel = KERNELS["gaussian"](bandwidth=5.0)
    learned = Temperature(0.2)
    y_aware_infonce(views, ages, kernel=kernel, temperature=learned()).backward()
    step = 1e-4
    higher, lower = (
        y_aware_infonce(views.double(), ages, kernel=kernel, temperature=0.2 * math.exp(sign * step)).item()
        for sign in (1, -1)
    )
    assert learned.log_temperature.grad.item() == pytest.approx((higher - lower) / (2 * step), rel=1e-4)


@pytest.mark.parametrize(("start", "sign"), [(0.01, 1.0), (1.0, -1.0)])
def test_the_temperature_stops_at_its_bounds_and_can_return(start: float, sign: float) -> None:
    learned = Temperature(start, low=0.01, high=1.0)
    (sign * learned()).backward()
    assert learned.log_temperature.grad.item() == 0.0
    learned.log_temperature.grad = None
    (-sign * learned()).backward()
    assert learned.log_temperature.grad.item() == pytest.approx(-sign * start)
    with torch.no_grad():
        learned.log_temperature += -10 * sign
    assert learned().item() == pytest.approx(start, rel=1e-6)


def test_wrong_bounds_are_refused() -> None:
    with pytest.raises(UserError, match=r"temperature_bounds=\[0.5, 1.0\]"):
        Temperature(0.1, low=0.5)
