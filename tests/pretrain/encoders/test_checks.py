"""Encoders' names and options: a wrong one is refused in one line."""

from __future__ import annotations

import pytest

from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.encoders import ENCODERS, build_encoder, check_encoder
from pretrain.engine.deepspeed_config import deepspeed_config

VBM = (121, 145, 121)


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
def test_a_wrong_name_or_option_is_refused_in_one_line(name, options, text):
    with pytest.raises(UserError, match=text) as caught:
        build_encoder(name, options)
    assert "\n" not in str(caught.value)


def test_every_option_has_a_check():
    for name, build in ENCODERS.items():
        check_encoder(name, dict(build.__kwdefaults__), grid=VBM, training=True)


def test_compilation_is_refused_under_zero_3():
    compiled = ["--encoder.options.compile=true", "--deepspeed.zero_optimization.stage"]
    with pytest.raises(
        UserError, match="compile=true does not work with deepspeed.zero_optimization.stage=3; use stage 0, 1"
    ):
        deepspeed_config(load_recipe("demo-cpu", [compiled[0], f"{compiled[1]}=3"]), world_size=2)
    deepspeed_config(load_recipe("demo-cpu", [compiled[0], f"{compiled[1]}=2"]), world_size=2)
