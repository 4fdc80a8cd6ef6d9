"""Encoders: sizes, published counts, norms that reach every layer, options that change speed and not the features."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.encoders import ENCODERS, build_encoder, check_encoder
from pretrain.encoders.layers import pad_to
from pretrain.encoders.networks import SMALLEST
from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.engine.engine import make_contiguous
from pretrain.model import ContrastiveModel, Projector, build_model

VBM = (121, 145, 121)
TRANSFORMERS = ("vit-small", "vit-base", "vit-large", "swin-unetr")
# Whose arithmetic is looked at: ViT-L is ViT-B with more of the same blocks, and a gigabyte of weights to initialise.
RUN = [pytest.param(name, marks=pytest.mark.slow) if name == "vit-large" else name for name in ENCODERS]
SMALL = {"norm": "group", "width": 0.125}


def options_of(name: str) -> dict[str, object]:
    return {} if name in TRANSFORMERS else {"norm": "group"}


def vit_parameters(width: int, tokens: int, blocks: int = 12) -> int:
    block = 12 * width**2 + 13 * width  # qkv, projection, two layers of four times the width, two norms; with biases
    return blocks * block + (16**3 + 1) * width + tokens * width + width + 2 * width


# name -> parameters, features, deepest map of a 121 x 145 x 121 volume
KNOWN = {
    "densenet121": (11_831_040 - (1024 + 1) * 512 - (512 + 1) * 128, 1024, (3, 4, 3)),
    "resnet18": (33_160_896, 512, (4, 5, 4)),
    "resnet50": (46_158_912, 2048, (4, 5, 4)),
    "unet": (14_134_944, 512, (7, 9, 7)),
    "resenc-l": (90_296_576, 320, (4, 5, 4)),
    "vit-small": (vit_parameters(384, 8 * 10 * 8), 384, (8 * 10 * 8 + 1,)),
    "vit-base": (vit_parameters(768, 8 * 10 * 8), 768, (8 * 10 * 8 + 1,)),
    "vit-large": (vit_parameters(1024, 8 * 10 * 8, blocks=24), 1024, (8 * 10 * 8 + 1,)),
    "swin-unetr": (8_062_002, 768, (4, 5, 4)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_features_and_deepest_map_at_the_vbm_grid(name):
    # Shapes without arithmetic; Swin's drop-path rates are numbers taken out of a tensor, which must have them.
    with torch.device("cpu" if name == "swin-unetr" else "meta"):
        encoder = build_encoder(name, {})
    encoder.to("meta")
    parameters, features, deepest = KNOWN[name]
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert encoder.feature_size == features
    volumes = torch.empty(2, 1, *VBM, device="meta")
    assert encoder(volumes).shape == (2, features)
    assert encoder.trunk(pad_to(volumes, encoder.multiple)).shape[2:] == deepest


@pytest.mark.parametrize("name", RUN)
def test_every_parameter_gets_a_gradient_on_the_coarse_grid(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, options_of(name)).train()
    features = encoder(torch.randn(2, 1, 30, 36, 30))
    assert features.shape == (2, encoder.feature_size)
    assert features.isfinite().all()
    features.square().sum().backward()
    assert [key for key, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        (n, norm)
        for n in ENCODERS
        if n != "vit-large"
        for norm in (("layer",) if n in TRANSFORMERS else ("group", "instance"))
    ],
)
def test_features_of_a_scan_do_not_depend_on_the_batch_without_batch_statistics(name, norm):
    torch.manual_seed(0)
    encoder = build_encoder(name, {"norm": norm}).train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    side = SMALLEST.get(name, (1, 1))[1] if norm == "instance" else 32
    volumes = torch.randn(2, 1, side, side, side)
    volumes[1] = 100 * volumes[1] + 10
    with torch.no_grad():
        together, alone = encoder(volumes)[:1], encoder(volumes[:1])
    # Convolutions of another batch size may sum in another order; statistics of the batch change features by their size.
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3 * float(alone.std()))


@pytest.mark.parametrize("name", [n for n in ENCODERS if n not in TRANSFORMERS])
@pytest.mark.parametrize(
    ("norm", "kind"),
    [("sync-batch", nn.SyncBatchNorm), ("group", nn.GroupNorm), ("instance", nn.InstanceNorm3d)],
)
def test_a_norm_takes_the_place_of_every_batch_norm_and_has_weights(name, norm, kind):
    with torch.device("meta"):
        counts = {n: build_encoder(name, {"norm": n}) for n in ("batch", norm)}
    before = [m for m in counts["batch"].modules() if isinstance(m, nn.BatchNorm3d)]
    after = [m for m in counts[norm].modules() if isinstance(m, kind)]
    assert len(after) == len(before) > 0
    assert not any(isinstance(m, nn.BatchNorm3d) for m in counts[norm].modules())
    assert [tuple(m.weight.shape) for m in after] == [tuple(m.weight.shape) for m in before]


def test_sync_batch_is_refused_for_training_on_a_cpu_and_serves_in_evaluation():
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


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("instance", [False, True])
def test_the_smallest_grid_is_the_smallest(name, instance):
    norm, side = "instance" if instance else "batch", SMALLEST[name][instance]
    encoder = build_encoder(name, {"norm": norm}).to("meta").train()
    encoder(torch.empty(2, 1, side, side, side, device="meta"))
    deepest = encoder.trunk(torch.empty(2, 1, side, side, side, device="meta")).shape[2:]
    assert min(deepest) >= (2 if instance else 1)
    if side == 1:
        return
    below = torch.empty(2, 1, side, side + 9, side - 1, device="meta")
    text = f"scans of {side}x{side + 9}x{side - 1} voxels are too small for {name} .* smallest grid is {side}x{side}x{side}"
    with pytest.raises(UserError, match=text):
        encoder(below)
    with pytest.raises(UserError, match=text):
        check_encoder(name, {"norm": norm}, grid=below.shape[2:])
    if instance:
        assert min(encoder.trunk(below).shape[2:]) < 2
    else:
        with pytest.raises(RuntimeError):
            encoder.trunk(below)


def test_densenet121_has_the_published_number_of_parameters():
    encoder = build_encoder("densenet121", {})
    model = ContrastiveModel(encoder, Projector(1024, 512, 128))
    assert sum(p.numel() for p in model.parameters()) == 11_831_040
    assert not any("norm5" in name for name in model.state_dict())


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


@pytest.mark.parametrize(("pooling", "dropout"), [("mean", 0.0), ("class", 0.1)])
def test_vit_gives_the_features_of_monais_own(pooling, dropout):
    from monai.networks.nets import ViT

    torch.manual_seed(0)
    encoder = build_encoder("vit-small", {"grid": [30, 36, 30], "pooling": pooling, "dropout": dropout}).eval()
    theirs = ViT(
        1, (32, 48, 32), 16, hidden_size=384, mlp_dim=1536, num_heads=6, classification=pooling == "class",
        num_classes=3, qkv_bias=True,
    ).eval()  # fmt: skip
    names = {
        "patches.": "patch_embedding.patch_embeddings.",
        "position": "patch_embedding.position_embeddings",
        "class_token": "cls_token",
    }
    state = {}
    for key, value in encoder.trunk.state_dict().items():
        for ours, its in names.items():
            key = key.replace(ours, its) if key.startswith(ours) else key
        state[key] = torch.randn_like(value) * 0.05 if key == "cls_token" else value
    if pooling == "class":
        encoder.trunk.class_token.data.copy_(state["cls_token"])
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all("cross_attn" in key or "classification_head" in key for key in missing)
    volumes = torch.randn(2, 1, 30, 36, 30)
    with torch.no_grad():
        hidden = theirs(pad_to(volumes, 16))[1][-1]
        tokens = theirs.norm(hidden)
        expected = tokens[:, 0] if pooling == "class" else tokens.mean(dim=1)
        torch.testing.assert_close(encoder(volumes), expected, rtol=1e-4, atol=1e-5)


def test_vit_positions_are_interpolated_between_the_centres_of_patches():
    encoder = build_encoder("vit-small", {"grid": [64, 32, 16], "pooling": "mean"})
    centres = torch.arange(4.0) + 0.5
    encoder.trunk.position.data.copy_(centres[:, None, None].expand(4, 2, 384).reshape(1, 8, 384))
    finer = encoder.trunk._position((8, 2, 1)).unflatten(1, (8, 2, 1))
    expected = ((torch.arange(8.0) + 0.5) / 2).clamp(0.5, 3.5)
    torch.testing.assert_close(finer[0, :, 1, 0, 7], expected)
    assert encoder.trunk._position((4, 2, 1)) is encoder.trunk.position


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("vit-small", {"dropout": 0.5}),
        ("vit-small", {"drop_path": 0.9}),
        ("swin-unetr", {"drop_path": 0.9}),
        ("unet", {"dropout": 0.5}),
    ],
)
def test_dropout_acts_in_training_and_never_in_evaluation(name, given):
    torch.manual_seed(0)
    plain, dropping = build_encoder(name, options_of(name)), build_encoder(name, options_of(name) | given)
    dropping.load_state_dict(plain.state_dict())
    volumes = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(dropping.eval()(volumes), plain.eval()(volumes), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(dropping.train()(volumes), plain(volumes), rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "given", "inner"),
    [
        ("densenet121", {"norm": "group"}, "denseblock2.denselayer1.layers.conv1"),
        ("resnet18", {"width": 0.125}, "layer2.0.conv1"),
        ("unet", {"norm": "batch"}, "down_2.convs.conv_0.conv"),
        ("resenc-l", {"norm": "batch"}, "stage2.0.conv1"),
        ("vit-small", {"dropout": 0.1}, "blocks.3.attn.qkv"),
        ("swin-unetr", {"dropout": 0.1}, "transformer.layers2.0.blocks.1.attn.qkv"),
    ],
)
def test_recomputation_changes_neither_gradients_nor_running_statistics(name, given, inner):
    torch.manual_seed(0)
    plain = build_encoder(name, given)
    saving = build_encoder(name, {**given, "checkpointing": True})
    saving.load_state_dict(plain.state_dict())
    side = 32 if name in TRANSFORMERS else 33
    volumes = torch.randn(3, 1, side, side, side)
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
    given = SMALL if name == "resnet18" else {"norm": "group"}
    plain, last = build_encoder(name, given), build_encoder(name, {**given, "channels_last": True})
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


def test_channels_last_weights_are_laid_out_as_deepspeed_broadcasts_them():
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
    ("name", "given"),
    [
        ("resnet18", SMALL),
        ("resnet18", {**SMALL, "checkpointing": True, "channels_last": True}),
        ("vit-small", {"grid": [32, 32, 32]}),
        ("vit-small", {"grid": [32, 32, 32], "checkpointing": True}),
    ],
)
def test_compiled_encoders_give_the_same_features_and_gradients_under_the_same_names(name, given):
    torch.manual_seed(0)
    plain, compiled = build_encoder(name, given), build_encoder(name, {**given, "compile": True})
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compiled.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    volumes = torch.randn(2, 1, 32, 32, 32)
    features = [network(volumes) for network in (plain, compiled)]
    torch.testing.assert_close(features[1], features[0], rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1  # it was compiled at all
    pull = torch.randn_like(features[0])
    for each in features:
        (each * pull).sum().backward()
    for (key, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        scale = float(a.grad.abs().max())
        torch.testing.assert_close(
            b.grad, a.grad, rtol=1e-2, atol=1e-3 * scale + 1e-6, msg=lambda t, k=key: f"{k}: {t}"
        )


def test_compilation_is_refused_under_zero_3():
    compiled = ["--encoder.options.compile=true", "--deepspeed.zero_optimization.stage"]
    with pytest.raises(
        UserError, match="compile=true does not go with deepspeed.zero_optimization.stage=3; use stage 0, 1"
    ):
        deepspeed_config(load_recipe("demo-cpu", [compiled[0], f"{compiled[1]}=3"]), world_size=2)
    deepspeed_config(load_recipe("demo-cpu", [compiled[0], f"{compiled[1]}=2"]), world_size=2)


def test_width_scales_the_features():
    assert build_encoder("resnet18", {"width": 0.25}).feature_size == 128
    assert build_encoder("resnet50", {"width": 0.25, "norm": "group"}).feature_size == 512


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("densnet121", {}, r"encoder.name='densnet121' is not known \(did you mean 'densenet121'\?\)"),
        ("resnet18", {"widht": 1}, r"encoder.options.widht is not an option of resnet18 \(did you mean 'width'\?\)"),
        ("resnet18", {"norm": "grop"}, r"encoder.options.norm='grop' is not known \(did you mean 'group'\?\)"),
        ("resnet18", {"norm": "group", "width": 0.3}, "norm='group' makes 8 groups of channels, and a layer has 19"),
        ("vit-base", {"norm": "batch"}, "norm='batch' is not known; allowed for vit-base, a transformer: layer"),
        ("swin-unetr", {"pooling": "class"}, r"pooling='class' is not known; allowed: mean, max, mean\+max"),
        ("densenet121", {"dropout": 1.5}, "dropout=1.5 is not possible; allowed: 0 to below 1"),
        ("densenet121", {"compile": "yes"}, "compile='yes' is not possible; allowed: true, false"),
        ("vit-small", {"grid": [121, 145]}, r"grid=\[121, 145\] is not possible; allowed: three sides in voxels"),
        (
            "resnet18",
            {"compile": True, "checkpointing": True},
            "cannot be combined with norm='batch' .* use norm group",
        ),
        ("unet", {"norm": ["group"]}, r"norm=\['group'\] is not known"),
    ],
)
def test_unknown_names_fail(name, options, text):
    with pytest.raises(UserError, match=text) as caught:
        build_encoder(name, options)
    assert "\n" not in str(caught.value)


def test_every_option_has_a_rule():
    for name, build in ENCODERS.items():
        check_encoder(name, dict(build.__kwdefaults__), grid=VBM, training=True)


def test_model_is_a_function_of_the_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    small = ["--encoder.options={width: 0.25}"]
    a, b = (build_model(load_recipe("demo-cpu", small)) for _ in range(2))
    c = build_model(load_recipe("demo-cpu", [*small, "--run.seed=1"]))
    assert torch.equal(torch.rand(3), expected)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_model_keeps_views_apart():
    model = build_model(load_recipe("demo-cpu", ["--encoder.options={width: 0.25}"])).eval()
    views = torch.randn(2, 3, 1, 16, 16, 16)
    with torch.no_grad():
        both, temperature = model(views)
        assert temperature is None
        assert both.shape == (2, 3, 128)
        torch.testing.assert_close(both[1], model(views[1:].expand(2, -1, -1, -1, -1, -1))[0][0])
