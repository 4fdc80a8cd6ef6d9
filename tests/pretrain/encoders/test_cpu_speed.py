"""The layout and the batches in which features are computed on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.volume.errors import BadScan
from pretrain.encoders import build_encoder, cpu_speed
from pretrain.weights import embedding


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="only x86_64 has another layout"
)
@pytest.mark.parametrize(("norm", "is_faster"), [("batch", True), ("group", True), ("instance", False)])
def test_the_layout_changes_features_by_rounding_only_and_the_weights_not_at_all(norm, is_faster):
    network = build_encoder("resnet18", {"width": 0.25, "norm": norm}).eval()
    volumes = np.random.default_rng(0).normal(size=(3, 33, 35, 34)).astype(np.float32)
    with torch.no_grad():
        plain = network(torch.from_numpy(volumes[:, None])).numpy()
    layouts, stored = [], [(weight.data_ptr(), weight.stride()) for weight in network.parameters()]

    def note(module, inputs, output):
        layouts.append(output.is_contiguous(memory_format=torch.channels_last_3d))

    def read(position):
        if position == 3:
            raise RuntimeError("the disk has failed")
        return volumes[position]

    source = SimpleNamespace(names=["a", "b", "c", "d"], read=read)
    with network.trunk.layer2.register_forward_hook(note):
        (batch,) = embedding.embed_source(network, source, [0, 1, 2], device="cpu", progress=False)
        np.testing.assert_allclose(batch.features, plain, rtol=0, atol=1e-5 * np.abs(plain).max())
        with pytest.raises(RuntimeError, match="the disk has failed"):
            list(
                embedding.embed_source(
                    network, source, [0, 1, 3], batch_size=2, workers=0, device="cpu", progress=False
                )
            )
    assert layouts == [is_faster] * 2
    assert [(weight.data_ptr(), weight.stride()) for weight in network.parameters()] == stored


def test_uses_of_a_network_at_the_same_time_leave_its_weights_as_they_were(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    network = build_encoder("resnet18", {"width": 0.25}).eval()
    stored = [(weight.data_ptr(), weight.stride()) for weight in network.parameters()]
    volumes = np.random.default_rng(0).normal(size=(4, 33, 35, 34)).astype(np.float32)
    source = SimpleNamespace(names=[*"abcd"], read=lambda position: volumes[position])
    first, second = (
        embedding.embed_source(network, source, range(4), batch_size=2, device="cpu", progress=False) for _ in range(2)
    )
    next(first), next(second)
    kernel = network.trunk.layer1[0].conv1.weight
    assert not kernel.is_contiguous()
    first.close()
    assert not kernel.is_contiguous()
    list(second)
    assert [(weight.data_ptr(), weight.stride()) for weight in network.parameters()] == stored
    assert len(list(embedding.embed_source(network, source, range(4), device="cpu", progress=False))) == 1
    assert [(weight.data_ptr(), weight.stride()) for weight in network.parameters()] == stored


def test_a_network_is_as_it_was_if_memory_runs_out(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    network, made = build_encoder("resnet10", {"width": 0.25}), []
    stored = [(weight.data_ptr(), weight.stride()) for weight in network.parameters()]

    def full(tensor, **options):
        if len(made) == 3:
            raise MemoryError
        made.append(tensor.new_empty(tensor.shape))
        return made[-1]

    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(MemoryError), cpu_speed.fast_layout(network, torch.device("cpu")):
        pytest.fail("the block ran")
    assert [(weight.data_ptr(), weight.stride()) for weight in network.parameters()] == stored


@pytest.mark.parametrize(
    ("capability", "device", "is_faster"),
    [("AVX512", "cpu", True), ("AVX2", "cpu", True), ("NO AVX", "cpu", False), ("DEFAULT", "cpu", False),
     ("SVE256", "cpu", False), ("AVX512", "cuda", False)],
)  # fmt: skip
def test_only_x86_cpus_have_another_layout(monkeypatch, capability, device, is_faster):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    network = build_encoder("resnet10", {"width": 0.25})
    assert cpu_speed.is_faster_in_channels_last(network, torch.device(device)) == is_faster


class Theirs(torch.nn.Module):
    """A network of others, which notes how many scans it gets at a time."""

    def __init__(self):
        super().__init__()
        self.conv, self.batches = torch.nn.Conv3d(1, 4, 3), []

    def forward(self, volumes):
        self.batches.append(len(volumes))
        return self.conv(volumes).view(len(volumes), -1)


def test_a_network_of_others_keeps_its_layout():
    volumes = np.random.default_rng(0).normal(size=(2, 8, 9, 7)).astype(np.float32)
    source, network = SimpleNamespace(names=["a", "b"], read=lambda position: volumes[position]), Theirs()
    (batch,) = embedding.embed_source(network, source, [0, 1], device="cpu", progress=False)
    with torch.no_grad():
        np.testing.assert_array_equal(batch.features, network(torch.from_numpy(volumes[:, None])).numpy())


@pytest.mark.parametrize(
    ("most_voxels", "batch_size", "batches"),
    [(10_000_000, None, [8, 3]), (2000, None, [3, 3, 3, 2]), (503, None, [1] * 11), (503, 5, [5, 5, 1])],
)
def test_large_scans_have_smaller_batches_on_a_cpu(monkeypatch, most_voxels, batch_size, batches):
    monkeypatch.setattr(cpu_speed, "BATCH_VOXELS", most_voxels)
    volume = np.random.default_rng(0).normal(size=(8, 9, 7)).astype(np.float32)  # 504 voxels

    def read(position):
        if position == 0:
            raise BadScan("damaged")
        return volume

    network, source = Theirs(), SimpleNamespace(names=[*"abcdefghijkl"], read=read)
    found = list(
        embedding.embed_source(network, source, range(12), batch_size=batch_size, device="cpu", progress=False)
    )
    assert network.batches == batches == [len(batch.positions) for batch in found]
    assert [position for batch in found for position in batch.positions] == [*range(1, 12)]
    assert found[0].unreadable == {0: "damaged"}
