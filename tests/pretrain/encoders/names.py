"""The encoders for tests of each of them."""

from __future__ import annotations

import pytest

from pretrain.encoders import ENCODERS

DEEPER_RESNETS = ("resnet34", "resnet101", "resnet152", "resnet200")  # other ResNets with more of the same blocks
EACH_ENCODER = [pytest.param(name, marks=pytest.mark.slow) if name in DEEPER_RESNETS else name for name in ENCODERS]
