"""What a recipe comes to on its data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.loading.order import Order
from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from pretrain.config import Recipe


@dataclass
class Plan:
    """What a recipe comes to on its data."""

    recipe: Recipe
    manifest: Manifest
    rows: np.ndarray[Any, np.dtype[np.int64]]
    order: Order
    total_steps: int

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps an epoch; not whole where the batch does not divide the scans."""
        return self.order.length / self.recipe.batch.global_


def total_steps(recipe: Recipe, scans: int) -> int:
    """Steps of the run: ``train.steps``, else those of ``train.epochs`` epochs of ``scans`` scans."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    if recipe.train.epochs is None:
        raise UserError("train.epochs and train.steps are both null; set one of them")
    return math.ceil(recipe.train.epochs * scans / recipe.batch.global_)
