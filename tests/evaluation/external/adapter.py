"""Encoders of others as users write them: adapters named on the command line, and broken ones."""

from __future__ import annotations

import nibabel
import numpy as np
import torch
from torch import nn


class Blurred:
    """Means over cells of a grid, of the file's own voxels."""

    name = "blurred"

    def prepare(self, path):
        voxels = np.asarray(nibabel.load(path).dataobj, dtype=np.float32)
        return torch.from_numpy(voxels)[None]

    def embed(self, batch):
        return nn.functional.adaptive_avg_pool3d(batch, 3).flatten(1)


def blurred():
    return Blurred()


class Broken(Blurred):
    """An adapter with one fault."""

    def __init__(self, **methods):
        for name, method in methods.items():
            setattr(self, name, method)


def divide(path):
    return 1 / 0


FAULTS = {
    "prepare fails": {"prepare": divide},
    "prepare returns no tensor": {"prepare": lambda path: np.zeros((1, 4, 4, 4))},
    "prepare returns a wrong shape": {"prepare": lambda path: torch.zeros(4, 4, 4)},
    "prepare returns NaN": {"prepare": lambda path: torch.full((1, 4, 4, 4), torch.nan)},
    "embed fails": {"embed": lambda batch: batch @ "text"},
    "embed returns too few rows": {"embed": lambda batch: torch.zeros(1, 3)},
    "embed returns maps": {"embed": lambda batch: batch},
    "embed returns NaN": {"embed": lambda batch: torch.full((len(batch), 3), torch.nan)},
    "batch size": {"batch_size": 0},
    "no embed": {"embed": None},
}


def shape_of_its_own():
    sizes = iter(range(4, 100))
    return Broken(prepare=lambda path: torch.zeros(1, 4, 4, next(sizes)))


def number_of_its_own():
    numbers = iter(range(1, 100))
    return Broken(embed=lambda batch: torch.ones(len(batch), next(numbers)))


def leaves():
    raise SystemExit(3)


NOT_A_FUNCTION = 3


def __getattr__(name):
    """``fault_N`` is a factory of the N-th broken adapter."""
    prefix, _, number = name.partition("fault_")
    if prefix or not number:
        raise AttributeError(name)
    return lambda: Broken(**list(FAULTS.values())[int(number)])
