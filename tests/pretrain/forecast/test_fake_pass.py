"""The memory that is counted on fake tensors: against layers by hand, and against real tensors that autograd has saved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.forecast import operations
from pretrain.forecast.fake_pass import LiveBytes, loss_pass, network_pass
from pretrain.forecast.gpu_autocast import GpuAutocast
from pretrain.losses import LOSSES
from pretrain.losses.supervised import SUPERVISED
from tests.pretrain.forecast.real_pass import saved_by_a_real_pass

GRID = (24, 24, 24)
SMALL = "--encoder.options={width: 0.25, norm: group}"


def recipe_of(*options):
    return load_recipe("demo-cpu", [SMALL, *options])


class Two(nn.Module):
    """A linear layer of 4 x 8 without bias, a ReLU, and a linear layer of 8 x 2 without bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)

    def forward(self, views_2B1DHW):
        return self.second(torch.relu(self.first(views_2B1DHW.flatten(2)))), None


def test_what_two_layers_keep_is_counted_by_hand(monkeypatch):
    monkeypatch.setattr(operations, "build_model", lambda recipe: Two())
    found = network_pass(recipe_of(), (1, 2, 2), 3, keep_gradients=True)
    hidden, output, rows = 8 * 4, 2 * 4, 2 * 3
    # Saved: the ReLU's output, which is also the second layer's input; alive beside it: the outputs.
    assert found.hooked == hidden * rows
    assert found.saved == (hidden + output) * rows


def test_a_freed_tensor_is_no_longer_counted():
    with FakeTensorMode(), LiveBytes() as counted:
        first = torch.empty(1000)
        second = first + 1
        del first
        third = second.view(10, 100)  # the same storage
        assert (counted.live, counted.peak) == (4000, 8000)
        del second, third
        assert counted.live == 0


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize("scans", [1, 3])
def test_fake_tensors_save_what_real_ones_do(scans, precision):
    recipe = recipe_of(f"--train.precision={precision}")
    found = network_pass(recipe, GRID, scans, keep_gradients=False, on_gpu=False)
    # The statistics of a normalisation of 16-bit volumes are float32 in torch's kernel, and 16-bit on fake tensors.
    assert found.hooked == pytest.approx(
        saved_by_a_real_pass(recipe, GRID, scans), rel=0 if precision == "fp32" else 1e-3
    )


def test_memory_grows_by_the_same_for_every_scan():
    one, two, five = (network_pass(recipe_of(), GRID, scans, keep_gradients=False) for scans in (1, 2, 5))
    assert five.saved == one.saved + 4 * (two.saved - one.saved)
    assert five.peak == pytest.approx(one.peak + 4 * (two.peak - one.peak), rel=0.02)


def test_recomputation_keeps_less_and_kept_gradients_add_to_the_peak():
    plain, saving = recipe_of(), load_recipe("demo-cpu", [SMALL.replace("}", ", checkpointing: true}")])
    kept, dropped = (network_pass(plain, GRID, 2, keep_gradients=keep) for keep in (True, False))
    assert network_pass(saving, GRID, 2, keep_gradients=False).saved < 0.7 * dropped.saved
    assert dropped.peak < kept.peak
    assert dropped.saved == kept.saved


def test_half_precision_keeps_less():
    full, half = (
        network_pass(recipe_of(f"--train.precision={p}"), GRID, 2, keep_gradients=False) for p in ("fp32", "bf16")
    )
    assert 0.45 < half.saved / full.saved < 0.6


LOW, FULL = torch.bfloat16, torch.float32
# Operation on 16-bit volumes (2, 4, 4, 4, 4) -> type on a GPU and on a CPU, by torch's ATen/autocast_mode.h.
TYPES = {
    "convolution": (lambda v: F.conv3d(v, torch.ones(4, 4, 1, 1, 1)), LOW, LOW),
    "linear": (lambda v: F.linear(v, torch.ones(4, 4)), LOW, LOW),
    "largest": (lambda v: F.max_pool3d(v, 2), LOW, FULL),
    "mean": (lambda v: nn.AvgPool3d(2)(v), LOW, FULL),
    "mean of all": (lambda v: nn.AdaptiveAvgPool3d(1)(v), LOW, FULL),
    "padding": (lambda v: F.pad(v, [1] * 6, mode="replicate"), LOW, FULL),
    "batch": (lambda v: nn.BatchNorm3d(4)(v), LOW, LOW),
    "gelu": (F.gelu, LOW, LOW),
    "layer": (lambda v: nn.LayerNorm(4)(v), FULL, LOW),
    "groups": (lambda v: nn.GroupNorm(2, 4)(v), FULL, LOW),
    "softmax": (lambda v: v.softmax(1), FULL, LOW),
    "square": (lambda v: v**2, FULL, LOW),
    "sum": (lambda v: v.sum(1), FULL, LOW),
    "larger": (lambda v: F.interpolate(v, scale_factor=2, mode="trilinear"), FULL, LOW),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_autocast_gives_the_types_of_a_gpu(name):
    operation, on_gpu, on_cpu = TYPES[name]
    with FakeTensorMode():
        volumes = torch.ones(2, 4, 4, 4, 4, dtype=LOW)
        with torch.autocast("cpu", LOW):
            with GpuAutocast():
                assert operation(volumes).dtype == on_gpu
            assert operation(volumes).dtype == on_cpu
        with GpuAutocast():
            assert F.max_pool3d(volumes.float(), 2).dtype == FULL
            assert F.softmax(volumes, 1).dtype == LOW, "changed without autocast"


def test_autocast_on_a_gpu_keeps_about_half():
    """On an H200 autocast took 0.56 times as much memory (docs/benchmarks/h200.md)."""
    dense = "--encoder.name=densenet121", "--encoder.options={norm: batch}"
    full, half = (
        network_pass(load_recipe("demo-cpu", [*dense, f"--train.precision={p}"]), (96, 96, 96), 2, keep_gradients=False)
        for p in ("fp32", "autocast")
    )
    assert 0.5 < half.saved / full.saved < 0.6


def test_further_terms_of_the_loss_are_counted():
    more = recipe_of("--loss.reconstruction={weight: 1.0}", "--loss.dense={grid: 3}")
    plain, further = (network_pass(recipe, GRID, 2, keep_gradients=False) for recipe in (recipe_of(), more))
    assert further.saved > plain.saved


@pytest.mark.parametrize("name", sorted({**LOSSES, **SUPERVISED}))
@pytest.mark.parametrize("tile", ["null", "auto"])
def test_every_loss_can_be_counted(name, tile):
    options = [f"--loss.name={name}"] + ([f"--loss.tile={tile}"] if tile != "null" else [])
    try:
        recipe = recipe_of(*options)
        found = loss_pass(recipe, 8, 4)
    except UserError as error:
        pytest.skip(str(error))  # a loss without tiles
    assert found.peak >= found.saved > 0


@pytest.mark.parametrize(("tile", "least", "most"), [("null", 12.0, 17.0), ("auto", 1.0, 6.0)])
def test_the_plain_loss_is_quadratic_in_the_scans_and_the_tiled_one_is_not(tile, least, most):
    few, many = (loss_pass(recipe_of(f"--loss.tile={tile}"), scans, 8).peak for scans in (512, 2048))
    assert least < many / few < most
