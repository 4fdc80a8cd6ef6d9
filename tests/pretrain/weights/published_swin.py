"""SwinUNETR's transformer as its weights were published: random tensors of its layout, and its forward pass by loops."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional as F


class Tensors:
    """Random tensors by name, scaled so that features neither vanish nor explode."""

    def __init__(self):
        self.state: dict[str, torch.Tensor] = {}
        self.source = torch.Generator().manual_seed(5)

    def conv(self, name, out, channels, side, bias=False):
        scale = (2 / (channels * side**3)) ** 0.5
        self.state[f"{name}.weight"] = torch.randn(out, channels, side, side, side, generator=self.source) * scale
        if bias:
            self.state[f"{name}.bias"] = torch.randn(out, generator=self.source) * 0.1

    def norm(self, name, channels, running=True):
        for part in ("weight", "bias", *(("running_mean", "running_var") if running else ())):
            self.state[f"{name}.{part}"] = 0.5 + torch.rand(channels, generator=self.source)
        if running:
            self.state[f"{name}.num_batches_tracked"] = torch.tensor(3)


DEPTH, WINDOW, SWIN_HEADS = 2, 7, (3, 6, 12, 24)
MERGED = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


def relative_positions():
    """(343, 343): for each pair of positions of a window the row of the table with its bias."""
    places = torch.tensor(list(itertools.product(range(WINDOW), repeat=3)))
    difference = places[:, None] - places[None] + WINDOW - 1
    return (difference * torch.tensor([(2 * WINDOW - 1) ** 2, 2 * WINDOW - 1, 1])).sum(-1)


def swin_state():
    """The tensors of SwinUNETR's transformer as model_swinvit.pt names them, without ``module.``."""
    tensors = Tensors()
    tensors.conv("patch_embed.proj", 48, 1, 2, bias=True)
    state, source = tensors.state, tensors.source

    def linear(name, out, inputs, bias=True):
        state[f"{name}.weight"] = torch.randn(out, inputs, generator=source) * inputs**-0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(out, generator=source) * 0.1

    for scale in range(4):
        width = 48 * 2**scale
        for number in range(DEPTH):
            name = f"layers{scale + 1}.0.blocks.{number}"
            for norm in ("norm1", "norm2"):
                tensors.norm(f"{name}.{norm}", width, running=False)
            table = torch.randn((2 * WINDOW - 1) ** 3, SWIN_HEADS[scale], generator=source)
            state[f"{name}.attn.relative_position_bias_table"] = table
            state[f"{name}.attn.relative_position_index"] = relative_positions()
            for layer, out, inputs in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
                linear(f"{name}.{layer}", out * width, inputs * width)
        tensors.norm(f"layers{scale + 1}.0.downsample.norm", 8 * width, running=False)
        linear(f"layers{scale + 1}.0.downsample.reduction", 2 * width, 8 * width, bias=False)
    return state


def naive_swin(state, volumes):
    """(N, 1, D, D, D), D a multiple of 32, -> (N, 768): window attention by loops over windows and heads."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def attend(tokens_TC, regions_T, name, heads):
        query, key, value = (part.chunk(heads, dim=-1) for part in linear(tokens_TC, f"{name}.qkv").chunk(3, dim=-1))
        index = state[f"{name}.relative_position_index"][: len(tokens_TC), : len(tokens_TC)]
        apart = regions_T[:, None] != regions_T[None]
        parts = []
        for head in range(heads):
            scores = query[head] @ key[head].T * query[head].shape[-1] ** -0.5
            scores = scores + state[f"{name}.relative_position_bias_table"][index, head]
            parts.append(torch.where(apart, scores - 100.0, scores).softmax(-1) @ value[head])
        return linear(torch.cat(parts, dim=-1), f"{name}.proj")

    def windows(x_DHWC, name, heads, shifted):
        side = x_DHWC.shape[0]
        window = min(side, WINDOW)
        shift = WINDOW // 2 if shifted and side > WINDOW else 0
        full = -(-side // window) * window
        x = F.pad(x_DHWC, (0, 0, *(0, full - side) * 3)).roll((-shift,) * 3, (0, 1, 2))
        along = torch.zeros(
            full, dtype=torch.long
        )  # 0, 1, 2: parts of an axis that only the shift has brought together
        if shift:
            along[full - window : full - shift], along[full - shift :] = 1, 2
        regions = along[:, None, None] * 9 + along[None, :, None] * 3 + along[None, None]
        out = torch.zeros_like(x)
        for corner in itertools.product(range(0, full, window), repeat=3):
            box = tuple(slice(first, first + window) for first in corner)
            found = attend(x[box].reshape(window**3, -1), regions[box].flatten(), name, heads)
            out[box] = found.reshape(window, window, window, -1)
        return out.roll((shift,) * 3, (0, 1, 2))[:side, :side, :side]

    features = []
    for volume in volumes:
        x = F.conv3d(volume[None], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=2)
        x = x[0].permute(1, 2, 3, 0)
        for scale, heads in enumerate(SWIN_HEADS, 1):
            for number in range(DEPTH):
                name = f"layers{scale}.0.blocks.{number}"
                x = x + windows(norm(x, f"{name}.norm1"), f"{name}.attn", heads, shifted=number % 2 == 1)
                x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
            x = torch.cat([x[i::2, j::2, k::2] for i, j, k in MERGED], dim=-1)
            name = f"layers{scale}.0.downsample"
            x = linear(norm(x, f"{name}.norm"), f"{name}.reduction")
        features.append(F.layer_norm(x, x.shape[-1:]).mean(dim=(0, 1, 2)))
    return torch.stack(features)
