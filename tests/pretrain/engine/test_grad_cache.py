"""Gradient caching in a single process: dropout, batch normalisation, and the real engine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from infra.errors import UserError
from pretrain.config import BatchSection, check_micro_batch, load_recipe
from pretrain.engine import engine
from pretrain.engine.grad_cache import at_least_float32, cached_pass
from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import y_aware_infonce
from pretrain.model import build_model
from pretrain.run.step import lr_factor, train_step
from tests.distributed.cases import Network, PlainEngine

KERNEL = KERNELS["gaussian"](bandwidth=5.0)
AGES = torch.tensor([[20.0], [24.0], [31.0], [60.0], [63.0]], dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv3d(1, 6, 3), nn.BatchNorm3d(6), nn.GELU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 7)]
    return Network(nn.Sequential(*layers), learned=False).double().train()


def views() -> torch.Tensor:
    return torch.randn(2, 5, 1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def batch_loss(embeddings: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
    return y_aware_infonce(embeddings, AGES, kernel=KERNEL)


def reference(model: nn.Module, micro: int) -> torch.Tensor:
    """The same micro-batches with all their graphs in memory at once, which the cache avoids."""
    torch.manual_seed(9)
    parts = [model(part)[0] for part in torch.split(views(), micro, dim=1)]
    loss = batch_loss(torch.cat(parts, dim=1), None)
    loss.backward()
    return loss


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_dropout_and_batch_statistics_equal_those_of_one_forward_pass(micro: int) -> None:
    cached, plain = network(), network()
    expected = reference(plain, micro)
    torch.manual_seed(9)
    value, _, backward = cached_pass(PlainEngine(cached), views(), batch_loss, micro)
    backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for (name, p), q in zip(cached.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=name)
    # The running statistics were updated once per micro-batch, with the same values.
    for (name, p), q in zip(cached.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    assert cached.network[1].num_batches_tracked == -(-5 // micro)
    assert cached.network[1].track_running_stats


def test_different_dropout_masks_in_the_second_pass_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    cached, plain = network(), network()
    reference(plain, 2)
    monkeypatch.setattr("pretrain.engine.grad_cache._set_random_state", lambda part, state: None)
    torch.manual_seed(9)
    _, _, backward = cached_pass(PlainEngine(cached), views(), batch_loss, 2)
    backward()
    worst = max((p.grad - q.grad).abs().max() for p, q in zip(cached.parameters(), plain.parameters(), strict=True))
    assert worst > 1e-3


def test_embeddings_reach_the_loss_in_float32_or_better() -> None:
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert at_least_float32(torch.zeros(2, dtype=dtype)).dtype is expected


@pytest.mark.jobs
def test_the_real_engine_trains_the_same_from_micro_batches(one_rank) -> None:
    """Three steps of Adam with group normalisation give the losses and weights of whole batches."""
    batches = []
    for seed in range(3):
        source = torch.Generator().manual_seed(seed)
        batches.append({"views": torch.randn(2, 4, 1, 24, 24, 24, generator=source), "proxies": AGES[:4].float()})
    small = [
        "--encoder.options={width: 0.25, norm: group}",
        "--batch.global=4",
        "--loss.temperature_bounds=[0.01, 1.0]",
    ]
    results = []
    for micro in ([], ["--batch.micro=1"], ["--batch.micro=2"]):
        recipe = load_recipe("demo-cpu", [*small, *micro])
        trained = engine.build_engine(recipe, build_model(recipe), lr_factor(recipe.optimizer, 20, 10))
        trained.train()

        def loss(embeddings, temperature, batch):
            return y_aware_infonce(embeddings, batch["proxies"], kernel=KERNEL, temperature=temperature)

        metrics = [train_step(trained, loss, b, n, torch.float32, recipe.batch.micro)[0] for n, b in enumerate(batches)]
        results.append((metrics, copy.deepcopy(trained.module.state_dict())))
        trained.destroy()
    (plain, weights), *others = results
    assert plain[0]["temperature"] == pytest.approx(0.1)
    assert plain[2]["temperature"] != pytest.approx(0.1, rel=1e-5)
    for metrics, state in others:
        for mine, theirs in zip(metrics, plain, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-4)
        for name, value in weights.items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-4, msg=name)


def test_a_micro_batch_that_does_not_divide_the_batch_is_refused() -> None:
    assert check_micro_batch(BatchSection(global_=64, micro=8), 4) == 2
    assert check_micro_batch(BatchSection(global_=64), 4) == 1
    with pytest.raises(UserError, match=r"batch.micro=6 does not divide the 16 scans per rank .* use 4"):
        check_micro_batch(BatchSection(global_=64, micro=6), 4)
    with pytest.raises(UserError, match=r"batch.micro=32 does not divide the 16 scans .* use 16"):
        check_micro_batch(BatchSection(global_=64, micro=32), 4)
