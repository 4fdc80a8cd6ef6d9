"""Published layouts: an imported file of random tensors gives the features of the original network, written here by hand."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from infra import cli
from infra.errors import UserError
from pretrain import Encoder
from pretrain.weights.import_weights import ARCHITECTURES, import_weights, preprocessing_from
from tests.pretrain.weights.published_swin import Tensors, naive_swin, swin_state
from tests.pretrain.weights.test_import_weights import naive_features as naive_densenet
from tests.pretrain.weights.test_import_weights import published_state as densenet_state

State = dict[str, torch.Tensor]


def batch_norm(state, name, x):
    return F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))


def resnet_state(blocks, bottleneck, downsample_bias, projections=True):
    """The tensors of a 3D ResNet as MONAI and MedicalNet name them; with shortcut A it has no projections."""
    tensors, inputs = Tensors(), 64
    tensors.conv("conv1", 64, 1, 7)
    tensors.norm("bn1", 64)
    for stage, count in enumerate(blocks, 1):
        planes = 32 * 2**stage
        out = planes * (4 if bottleneck else 1)
        for number in range(count):
            name = f"layer{stage}.{number}"
            sizes = [(planes, inputs, 1), (planes, planes, 3), (out, planes, 1)] if bottleneck else \
                [(planes, inputs, 3), (planes, planes, 3)]  # fmt: skip
            for index, size in enumerate(sizes, 1):
                tensors.conv(f"{name}.conv{index}", *size)
                tensors.norm(f"{name}.bn{index}", size[0])
            for part in ("weight", "bias"):  # small branches, so that deep networks keep what is in the scan
                tensors.state[f"{name}.bn{len(sizes)}.{part}"] *= 0.3
            if projections and number == 0 and (stage > 1 or inputs != out):
                tensors.conv(f"{name}.downsample.0", out, inputs, 1, bias=downsample_bias)
                tensors.norm(f"{name}.downsample.1", out)
            inputs = out
    return tensors.state


def naive_resnet(state, volumes, blocks, *, first_stride, strides, dilations):
    """(N, 1, D, H, W) -> (N, F): a 3D ResNet in evaluation mode, mean over the last map."""
    x = F.conv3d(volumes, state["conv1.weight"], stride=first_stride, padding=3)
    x = F.max_pool3d(batch_norm(state, "bn1", x).relu(), 3, stride=2, padding=1)
    for stage, count in enumerate(blocks, 1):
        for number in range(count):
            name, stride, dilation = (
                f"layer{stage}.{number}",
                strides[stage - 1] if number == 0 else 1,
                dilations[stage - 1],
            )
            convs = [key for key in ("conv1", "conv2", "conv3") if f"{name}.{key}.weight" in state]
            strided = convs[1] if len(convs) == 3 else convs[0]  # the 3 x 3 x 3 one of a bottleneck
            out = x
            for conv in convs:
                weight = state[f"{name}.{conv}.weight"]
                wide = weight.shape[-1] == 3
                out = F.conv3d(
                    out, weight, stride=stride if conv == strided else 1, padding=dilation if wide else 0,
                    dilation=dilation if wide else 1,
                )  # fmt: skip
                out = batch_norm(state, f"{name}.bn{conv[-1]}", out)
                out = out.relu() if conv != convs[-1] else out
            if f"{name}.downsample.0.weight" in state:
                bias = state.get(f"{name}.downsample.0.bias")
                x = F.conv3d(x, state[f"{name}.downsample.0.weight"], bias, stride=stride)
                x = batch_norm(state, f"{name}.downsample.1", x)
            elif x.shape != out.shape:  # shortcut A: subsampled, and channels of zeros
                x = F.avg_pool3d(x, kernel_size=1, stride=stride)
                x = torch.cat([x, torch.zeros(len(x), out.shape[1] - x.shape[1], *x.shape[2:])], dim=1)
            x = (out + x).relu()
    return x.mean(dim=(2, 3, 4))


RESENC = ((32, 1), (64, 3), (128, 4), (256, 6), (320, 6), (320, 6))


def resenc_state():
    """The tensors of ResidualEncoder of dynamic-network-architectures with nnU-Net's ResEnc-L settings."""
    tensors, inputs = Tensors(), 32
    tensors.conv("stem.convs.0.conv", 32, 1, 3, bias=True)
    tensors.norm("stem.convs.0.norm", 32, running=False)
    for stage, (channels, blocks) in enumerate(RESENC):
        for number in range(blocks):
            name = f"stages.{stage}.blocks.{number}"
            for index, (out, before) in enumerate(((channels, inputs), (channels, channels)), 1):
                tensors.conv(f"{name}.conv{index}.conv", out, before, 3, bias=True)
                tensors.norm(f"{name}.conv{index}.norm", out, running=False)
            if inputs != channels:
                tensors.conv(f"{name}.skip.1.conv", channels, inputs, 1)
                tensors.norm(f"{name}.skip.1.norm", channels, running=False)
            inputs = channels
    return tensors.state


def naive_resenc(state, volumes):
    """(N, 1, D, H, W) -> (N, 320): the encoder's last map, averaged."""

    def unit(x, name, stride=1, active=True):
        weight = state[f"{name}.conv.weight"]
        x = F.conv3d(x, weight, state.get(f"{name}.conv.bias"), stride=stride, padding=weight.shape[-1] // 2)
        x = F.instance_norm(x, weight=state[f"{name}.norm.weight"], bias=state[f"{name}.norm.bias"])
        return F.leaky_relu(x, 0.01) if active else x

    x = unit(volumes, "stem.convs.0")
    for stage, (_, blocks) in enumerate(RESENC):
        for number in range(blocks):
            name, stride = f"stages.{stage}.blocks.{number}", 2 if stage and number == 0 else 1
            skip = F.avg_pool3d(x, 2, 2) if stride == 2 else x
            if f"{name}.skip.1.conv.weight" in state:
                skip = unit(skip, f"{name}.skip.1", active=False)
            x = F.leaky_relu(unit(unit(x, f"{name}.conv1", stride), f"{name}.conv2", active=False) + skip, 0.01)
    return x.mean(dim=(2, 3, 4))


def with_aliases(state):
    """Add the second names under which dynamic-network-architectures lists each convolution and norm."""
    both = dict(state)
    for key, value in state.items():
        index = {"conv": 0, "norm": 1}[key.split(".")[-2]]
        both[re.sub(r"\.(conv|norm)\.(\w+)$", rf".all_modules.{index}.\2", key)] = value
    return both


HEADS = {"projector.0.weight": torch.zeros(8, 8), "projector.2.weight": torch.zeros(4, 8)}


def simclr_file():
    state = resnet_state((2, 2, 2, 2), False, True)
    content = {f"encoder.{key}": value for key, value in state.items()} | HEADS
    file = {"epoch": 12, "model_state_dict": content, "optimizer_state_dict": {"state": {}, "param_groups": []}}
    strides = {"first_stride": 1, "strides": (1, 2, 2, 2), "dilations": (1, 1, 1, 1)}
    return file, lambda volumes: naive_resnet(state, volumes, (2, 2, 2, 2), **strides)


# Depth -> blocks of each stage, bottlenecks, and projections as shortcuts (B), as MedicalNet's README lists its files.
MEDICALNET = {
    10: ((1, 1, 1, 1), False, True), 18: ((2, 2, 2, 2), False, False), 34: ((3, 4, 6, 3), False, False),
    50: ((3, 4, 6, 3), True, True), 101: ((3, 4, 23, 3), True, True), 152: ((3, 8, 36, 3), True, True),
    200: ((3, 24, 36, 3), True, True),
}  # fmt: skip


def medicalnet_file(depth):
    blocks, bottleneck, projections = MEDICALNET[depth]
    state = resnet_state(blocks, bottleneck, False, projections)
    strides = {"first_stride": 2, "strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)}
    content = {f"module.{key}": value for key, value in state.items()}
    content["module.conv_seg.0.weight"] = torch.zeros(8, 8, 2, 2, 2)
    return {"state_dict": content}, lambda volumes: naive_resnet(state, volumes, blocks, **strides)


def brainiac_resnet_file():
    blocks = (3, 4, 6, 3)
    state = resnet_state(blocks, True, True)
    content = {f"backbone.{key}": value for key, value in state.items()}
    strides = {"first_stride": 2, "strides": (1, 2, 2, 2), "dilations": (1, 1, 1, 1)}
    content |= {"projector.layers.0.weight": torch.zeros(4, 4)}
    return {"epoch": 5, "state_dict": content}, lambda volumes: naive_resnet(state, volumes, blocks, **strides)


def vit_state(width=768, blocks=12, patches=216):
    """The tensors of MONAI 1.3's ViT with its default settings, which have no bias for queries, keys and values."""
    tensors = Tensors()
    state, source = tensors.state, tensors.source
    state["patch_embedding.position_embeddings"] = torch.randn(1, patches, width, generator=source)
    tensors.conv("patch_embedding.patch_embeddings", width, 1, 16, bias=True)

    def linear(name, out, inputs, bias=True):
        state[f"{name}.weight"] = torch.randn(out, inputs, generator=source) * inputs**-0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(out, generator=source) * 0.1

    for number in range(blocks):
        name = f"blocks.{number}"
        linear(f"{name}.mlp.linear1", 4 * width, width)
        linear(f"{name}.mlp.linear2", width, 4 * width)
        tensors.norm(f"{name}.norm1", width, running=False)
        linear(f"{name}.attn.out_proj", width, width)
        linear(f"{name}.attn.qkv", 3 * width, width, bias=False)
        tensors.norm(f"{name}.norm2", width, running=False)
    tensors.norm("norm", width, running=False)
    return state


def naive_vit(state, volumes, heads=12, blocks=12):
    """(N, 1, D, H, W) -> (N, C): the normed token of the first patch."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()))

    name = "patch_embedding.patch_embeddings"
    x = F.conv3d(volumes, state[f"{name}.weight"], state[f"{name}.bias"], stride=16).flatten(2).transpose(1, 2)
    x = x + state["patch_embedding.position_embeddings"]
    size = x.shape[-1] // heads
    for number in range(blocks):
        name = f"blocks.{number}"
        query, key, value = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").split(x.shape[-1], dim=-1)
        mixed = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / size**0.5
            mixed.append(scores.softmax(-1) @ value[..., part])
        x = x + linear(torch.cat(mixed, dim=-1), f"{name}.attn.out_proj")
        hidden = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.linear1"))
        x = x + linear(hidden, f"{name}.mlp.linear2")
    return norm(x, "norm")[:, 0]


def brainiac_vit_file():
    state = vit_state()
    content = {f"backbone.{key}": value for key, value in state.items()}
    content |= {f"backbone.blocks.{n}.norm_cross_attn.weight": torch.ones(768) for n in range(12)}  # of newer MONAI
    content |= {"projection_head.0.weight": torch.zeros(4, 768), "criterion.temperature": torch.zeros(1)}
    lightning = {"epoch": 18, "state_dict": content, "loops": {}, "hyper_parameters": {"lr": 5e-4}}
    return lightning, lambda volumes: naive_vit(state, volumes)


def nnssl_file():
    state = resenc_state()
    everything = {f"encoder.{key}": value for key, value in with_aliases(state).items()}
    everything |= {f"decoder.{key}": value for key, value in everything.items()}  # the decoder lists its encoder
    everything["decoder.seg_layers.0.weight"] = torch.zeros(1, 32, 1, 1, 1)
    return {"network_weights": everything, "current_epoch": 3}, lambda volumes: naive_resenc(state, volumes)


def nidl_file():
    state = {key: value for key, value in densenet_state().items() if key.startswith("features.")}
    content = {f"encoder.{key}": value for key, value in state.items()}
    content |= {"encoder.embedding.weight": torch.zeros(512, 1024), "encoder.embedding.bias": torch.zeros(512)}
    content |= {f"projection_head.layers.{n}.weight": torch.zeros(4, 4) for n in (0, 2)}
    lightning = {"epoch": 9, "global_step": 80, "pytorch-lightning_version": "2.5", "state_dict": content, "loops": {}}
    return {**lightning, "hyper_parameters": {"lr": 1e-4}}, lambda volumes: naive_densenet(state, volumes)


def monai_file():
    state = swin_state()
    content = {f"module.{key}": value for key, value in state.items()}
    content |= {"module.rotation_head.weight": torch.zeros(4, 768), "module.contrastive_head.bias": torch.zeros(512)}
    return {"state_dict": content, "epoch": 7}, lambda volumes: naive_swin(state, volumes)


FILES = {
    "resnet18-neuro-simclr": simclr_file, "resenc-l-nnssl": nnssl_file, "densenet121-nidl": nidl_file,
    "swin-unetr-monai": monai_file, "resnet50-brainiac": brainiac_resnet_file, "vit-base-brainiac": brainiac_vit_file,
    **{f"resnet{depth}-medicalnet": partial(medicalnet_file, depth) for depth in MEDICALNET},
}  # fmt: skip
SIDES = {"resenc-l-nnssl": 64, "densenet121-nidl": 48, "swin-unetr-monai": 64, "vit-base-brainiac": 96}  # others: 32
# 10 CPU seconds each: large networks
LONG = ("resenc-l-nnssl", "swin-unetr-monai", "resnet50-brainiac", "vit-base-brainiac",
        *(f"resnet{depth}-medicalnet" for depth in (18, 34, 50, 101)))  # fmt: skip
LONGEST = ("resnet152-medicalnet", "resnet200-medicalnet")


def marks_of(arch):
    return [pytest.mark.jobs] * (arch in LONG) + [pytest.mark.slow] * (arch in LONGEST)


def test_every_layout_but_the_first_has_a_file_here():
    assert {*FILES, "densenet121-yaware"} == set(ARCHITECTURES)  # that one: test_import_weights.py


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=marks_of(arch)) for arch in FILES])
def test_an_imported_file_gives_the_features_of_the_original_network(tmp_path, arch):
    content, original = FILES[arch]()
    torch.save(content, tmp_path / "weights.pt")
    out, match = import_weights(tmp_path / "weights.pt", arch, tmp_path / "out", preprocessing=preprocessing_from("4"))
    assert not match.missing
    side = SIDES.get(arch, 32)
    volumes = torch.randn(2, 1, side, side, side, generator=torch.Generator().manual_seed(1))
    volumes[1] *= 3
    encoder = Encoder.from_pretrained(out)
    with torch.no_grad():
        features, expected = encoder(volumes), original(volumes)
    assert features.shape == expected.shape
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert expected.std(dim=0).max() > 1e-2 * expected.std()  # the two scans differ, so the comparison means something
    assert encoder.config["source"]["arch"] == arch
    card = (out / "README.md").read_text()
    assert f"Licence of the published weights: {ARCHITECTURES[arch].licence}." in card


@pytest.mark.parametrize(
    ("arch", "other"),
    [
        ("resnet18-neuro-simclr", "densenet121-nidl"),
        ("densenet121-nidl", "resnet18-neuro-simclr"),
        ("resnet10-medicalnet", "resnet18-neuro-simclr"),
        ("resnet18-medicalnet", "resnet10-medicalnet"),
        ("resnet50-brainiac", "resnet10-medicalnet"),
        ("vit-base-brainiac", "densenet121-nidl"),
    ],
)
def test_a_file_of_another_layout_is_refused(tmp_path, arch, other):
    torch.save(FILES[other]()[0], tmp_path / "weights.pt")
    with pytest.raises(UserError) as caught:
        import_weights(tmp_path / "weights.pt", arch, tmp_path / "out", preprocessing=preprocessing_from("4"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_lightning_file_with_objects_is_refused_unread(tmp_path):
    content = {**nidl_file()[0], "hyper_parameters": {"encoder": torch.nn.Linear(1, 1)}}
    torch.save(content, tmp_path / "weights.ckpt")
    with pytest.raises(
        UserError, match=r"holds a torch.nn.modules.linear.Linear, which only code in the file could create"
    ):
        import_weights(
            tmp_path / "weights.ckpt", "densenet121-nidl", tmp_path / "out", preprocessing=preprocessing_from("4")
        )


def test_weights_that_were_not_trained_on_vbm_need_a_grid(tmp_path, capsys):
    torch.save(nidl_file()[0], tmp_path / "weights.pt")
    command = [
        "import-weights",
        str(tmp_path / "weights.pt"),
        "--arch",
        "resenc-l-nnssl",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.run(command) == 2
    assert "was not trained on CAT12's maps (OpenMind: " in capsys.readouterr().err
