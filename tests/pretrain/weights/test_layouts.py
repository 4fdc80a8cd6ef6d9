"""Published layouts: an imported file of random tensors gives the features of the original network, written here by hand."""

from __future__ import annotations

import re

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


def resnet_state(blocks, bottleneck, downsample_bias):
    """The tensors of a 3D ResNet as MONAI and MedicalNet name them."""
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
            if number == 0 and (stage > 1 or inputs != out):
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


def medicalnet_file():
    state = resnet_state((3, 4, 6, 3), True, False)
    strides = {"first_stride": 2, "strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)}
    return {"state_dict": {f"module.{key}": value for key, value in state.items()}}, lambda volumes: naive_resnet(
        state, volumes, (3, 4, 6, 3), **strides
    )


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
    "resnet18-neuro-simclr": simclr_file, "resnet50-medicalnet": medicalnet_file, "resenc-l-nnssl": nnssl_file,
    "densenet121-nidl": nidl_file, "swin-unetr-monai": monai_file,
}  # fmt: skip


SIDES = {
    "resnet18-neuro-simclr": 32,
    "resnet50-medicalnet": 48,
    "resenc-l-nnssl": 64,
    "densenet121-nidl": 48,
    "swin-unetr-monai": 64,
}


LONG = ("resenc-l-nnssl", "resnet50-medicalnet", "swin-unetr-monai")  # 10 CPU seconds each: large networks


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=[pytest.mark.jobs] * (arch in LONG)) for arch in FILES])
def test_an_imported_file_gives_the_features_of_the_original_network(tmp_path, arch):
    content, original = FILES[arch]()
    torch.save(content, tmp_path / "weights.pt")
    out, match = import_weights(tmp_path / "weights.pt", arch, tmp_path / "out", preprocessing=preprocessing_from("4"))
    assert not match.missing
    side = SIDES[arch]
    volumes = torch.randn(2, 1, side, side, side, generator=torch.Generator().manual_seed(1))
    encoder = Encoder.from_pretrained(out)
    with torch.no_grad():
        features, expected = encoder(volumes), original(volumes)
    assert features.shape == expected.shape
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert expected.std(dim=0).max() > 1e-2 * expected.std()  # the two scans differ, so the comparison means something
    assert encoder.config["source"]["arch"] == arch
    card = (out / "README.md").read_text()
    assert f"Licence of the published weights: {ARCHITECTURES[arch].licence}." in card


@pytest.mark.parametrize("arch", ["resnet18-neuro-simclr", "densenet121-nidl"])
def test_a_file_of_another_layout_is_refused(tmp_path, arch):
    other = {"resnet18-neuro-simclr": "densenet121-nidl"}.get(arch, "resnet18-neuro-simclr")
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
