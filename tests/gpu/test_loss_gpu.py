"""Every loss on the GPU against float64 on the CPU: value and gradient, plain and tiled."""

from __future__ import annotations

import pytest
import torch

from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import LOSSES

pytestmark = pytest.mark.gpu

B, D = 24, 16
CASES = [(name, {}) for name in LOSSES]
CASES += [("y-aware", {"normalization": "column"}), ("y-aware", {"cross_view": True}), ("y-aware", {"tile": 7}),
          ("y-aware", {"normalization": "column", "tile": 7})]  # fmt: skip


def value_and_gradient(name: str, options: dict, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    views = torch.randn(2, B, D, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    ages = (20 + 60 * torch.rand(B, 1, generator=generator, dtype=torch.float64)).float()
    ages[5] = float("nan")
    loss = LOSSES[name](views, ages.to(device), kernel=KERNELS["gaussian"](bandwidth=5.0), **options)
    loss.backward()
    return loss.detach().double().cpu(), views.grad.double().cpu()


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name} {options or ''}".strip() for name, options in CASES])
def test_loss_and_gradient_are_those_of_float64(device, name, options):
    value, gradient = value_and_gradient(name, options, device, torch.float32)
    expected, direction = value_and_gradient(name, options, "cpu", torch.float64)
    assert float(direction.norm()) > 1e-3
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, direction, rtol=1e-4, atol=1e-5 * float(direction.abs().max()))
