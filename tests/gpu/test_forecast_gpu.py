"""What autograd keeps in a forward pass on a GPU, against the forecast on fake tensors."""

from __future__ import annotations

import pytest

from pretrain.config import load_recipe
from pretrain.forecast.fake_pass import network_pass
from tests.pretrain.forecast.real_pass import saved_by_a_real_pass

pytestmark = pytest.mark.gpu
GRID = (48, 48, 48)
NETWORKS = {
    "densenet121": "{norm: batch}", "densenet121, channels-last": "{norm: batch, channels_last: true}",
    "resnet18": "{norm: group}", "vit-small": "{}", "unet": "{norm: group}",
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_pass_on_a_gpu_keeps_what_is_forecast(device, network, precision):
    name, options = network.split(",")[0], NETWORKS[network]
    recipe = load_recipe("demo-cpu", [f"--encoder.name={name}", f"--encoder.options={options}",
                                      f"--train.precision={precision}"])  # fmt: skip
    found = saved_by_a_real_pass(recipe, GRID, 2, device)
    forecast = network_pass(recipe, GRID, 2, keep_gradients=False, on_gpu=device != "cpu").hooked
    print(f"{network}, {precision}: {found:,} bytes kept, {forecast:,} forecast")
    assert forecast == pytest.approx(found, rel=0.05)
