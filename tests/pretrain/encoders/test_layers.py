"""Parts of all encoders: norms, pooling, padding, and options that change speed or memory but not the features."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from infra.errors import UserError
from pretrain.encoders import ENCODERS, build_encoder, check_encoder
from pretrain.encoders.layers import pad_to
from pretrain.engine.engine import make_contiguous

TRANSFORMERS = ("vit-small", "vit-base", "vit-large", "swin-unetr")
SMALL = {"norm": "group", "width": 0.125}


@pytest.mark.parametrize("name", [n for n in ENCODERS if n not in TRANSFORMERS])
@pytest.mark.parametrize(
    ("norm", "kind"),
    [("sync-batch", nn.SyncBatchNorm), ("group", nn.GroupNorm), ("instance", nn.InstanceNorm3d)],
)
def test_a_norm_replaces_every_batch_norm_and_has_weights(name, norm, kind):
    with torch.device("meta"):
        counts = {n: build_encoder(name, {"norm": n}) for n in ("batch", norm)}
    before = [m for m in counts["batch"].modules() if isinstance(m, nn.BatchNorm3d)]
    after = [m for m in counts[norm].modules() if isinstance(m, kind)]
    assert len(after) == len(before) > 0
    assert not any(isinstance(m, nn.BatchNorm3d) for m in counts[norm].modules())
    assert [tuple(m.weight.shape) for m in after] == [tuple(m.weight.shape) for m in before]


def test_sync_batch_is_refused_for_training_on_a_cpu_but_works_in_evaluation():
    torch.manual_seed(0)
    batch = build_encoder("resnet18", {"width": 0.125}).train()
    volumes = torch.randn(2, 1, 32, 32, 32)
    batch(volumes)
    sync = build_encoder("resnet18", {"width": 0.125, "norm": "sync-batch"})
    sync.load_state_dict(batch.state_dict())
    with torch.no_grad():
        assert torch.equal(sync.eval()(volumes), batch.eval()(volumes))
    with pytest.raises(UserError, match="norm='sync-batch' trains on CUDA only .* choose group"):
        sync.train()(volumes)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="norm='sync-batch' trains on CUDA only"):
            check_encoder("resnet18", {"norm": "sync-batch"}, training=True)


def test_poolings():
    torch.manual_seed(0)
    volumes = torch.randn(2, 1, 33, 40, 33)
    encoders = {p: build_encoder("resnet18", {**SMALL, "pooling": p}).eval() for p in ("mean", "max", "mean+max")}
    state = encoders["mean"].state_dict()
    with torch.no_grad():
        features = {}
        for pooling, encoder in encoders.items():
            encoder.load_state_dict(state)
            features[pooling] = encoder(volumes)
            assert features[pooling].shape == (2, encoder.feature_size)
        maps = encoders["mean"].trunk(volumes)
    torch.testing.assert_close(features["mean"], maps.mean(dim=(2, 3, 4)))
    assert torch.equal(features["max"], maps.amax(dim=(2, 3, 4)))
    assert torch.equal(features["mean+max"], torch.cat([features["mean"], features["max"]], dim=1))


def test_padding_repeats_the_outermost_voxels_on_both_sides():
    volumes = torch.randn(2, 1, 30, 33, 16)
    padded = pad_to(volumes, 16)
    expected = np.pad(volumes.numpy(), [(0, 0), (0, 0), (1, 1), (7, 8), (0, 0)], mode="edge")
    assert np.array_equal(padded.numpy(), expected)
    assert pad_to(padded, 16) is padded


@pytest.mark.parametrize(
    ("name", "options", "inner"),
    [
        ("densenet121", {"norm": "group"}, "denseblock2.denselayer1.layers.conv1"),
        ("resnet18", {"width": 0.125}, "layer2.0.conv1"),
        ("unet", {"norm": "batch"}, "down_2.convs.conv_0.conv"),
        ("resenc-l", {"norm": "batch"}, "stage2.0.conv1"),
        ("vit-small", {"dropout": 0.1}, "blocks.3.attn.qkv"),
        ("swin-unetr", {"dropout": 0.1}, "transformer.layers2.0.blocks.1.attn.qkv"),
    ],
)
def test_recomputation_changes_neither_gradients_nor_running_statistics(name, options, inner):
    torch.manual_seed(0)
    plain = build_encoder(name, options)
    saving = build_encoder(name, {**options, "checkpointing": True})
    saving.load_state_dict(plain.state_dict())
    side = 32 if name in TRANSFORMERS else 33
    volumes = torch.randn(2, 1, side, side, side)
    passes = []
    for network in (plain, saving):
        count = []
        network.trunk.get_submodule(inner).register_forward_pre_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(1)
        network(volumes).square().sum().backward()
        passes.append(len(count))
    assert passes == [1, 2]
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, key=key: f"{key}: {text}")
    for (key, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b), key


def test_a_copy_of_a_recomputing_encoder_uses_its_own_weights():
    encoder = build_encoder("resnet18", {**SMALL, "checkpointing": True})
    twin = copy.deepcopy(encoder)
    for p in encoder.parameters():
        p.data.fill_(float("nan"))
    assert twin(torch.randn(1, 1, 16, 16, 16)).isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "unet"])
def test_channels_last_reaches_every_block_and_changes_no_feature(name):
    torch.manual_seed(0)
    options = SMALL if name == "resnet18" else {"norm": "group"}
    plain, last = build_encoder(name, options), build_encoder(name, {**options, "channels_last": True})
    last.load_state_dict(plain.state_dict())
    formats = []
    for network in (plain, last):
        seen = []
        for block in list(network.trunk.children())[1:]:
            block.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last_3d))
            )
        formats.append(seen)
    volumes = torch.randn(2, 1, 33, 34, 35)
    with torch.no_grad():
        torch.testing.assert_close(last(volumes), plain(volumes), rtol=1e-4, atol=1e-5)
    assert not any(formats[0])
    assert all(formats[1])
    kernels = [p for p in last.parameters() if p.ndim == 5 and min(p.shape[1], p.shape[2]) > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in kernels)


def test_channels_last_weights_become_contiguous_as_deepspeed_needs_them():
    torch.manual_seed(0)
    encoder = build_encoder("densenet121", {"norm": "group", "channels_last": True})
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    with pytest.raises(RuntimeError, match="stride"):
        [p.data.view(torch.uint8) for p in encoder.parameters()]
    make_contiguous(encoder)
    for name, p in encoder.named_parameters():
        assert p.data.view(torch.uint8).shape[:-1] == p.shape[:-1]
        assert torch.equal(p, before[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", SMALL),
        ("resnet18", {**SMALL, "checkpointing": True, "channels_last": True}),
        ("vit-small", {"grid": [32, 32, 32]}),
        ("vit-small", {"grid": [32, 32, 32], "checkpointing": True}),
    ],
)
def test_compiled_encoders_give_the_same_features_and_gradients_under_the_same_names(name, options):
    torch.manual_seed(0)
    plain, compiled = build_encoder(name, options), build_encoder(name, {**options, "compile": True})
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compiled.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    volumes = torch.randn(2, 1, 32, 32, 32)
    features = [network(volumes) for network in (plain, compiled)]
    torch.testing.assert_close(features[1], features[0], rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1  # it was compiled
    layer = "layer2" if name == "resnet18" else "blocks.3"
    with torch.no_grad():
        maps = [network.maps_and_features(volumes, [layer, None])[0] for network in (plain, compiled)]
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-3, atol=1e-4)
    direction = torch.randn_like(features[0])
    for result in features:
        (result * direction).sum().backward()
    for (key, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        scale = float(a.grad.abs().max())
        torch.testing.assert_close(
            b.grad, a.grad, rtol=1e-2, atol=1e-3 * scale + 1e-6, msg=lambda t, k=key: f"{k}: {t}"
        )
