"""The loss of a recipe on its scans: kernel, options and masked participants, checked once.

B = scans of this rank, P = size of the projector's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from infra import distributed
from infra.errors import UserError
from pretrain.config import LossSection, Recipe
from pretrain.kernels import Kernel
from pretrain.losses.diagnostics import effective_positives
from pretrain.losses.gather import AllGather
from pretrain.losses.options import SHARED_OPTIONS, check_own_options, find_loss, takes
from pretrain.losses.proxies import build_kernel, proxy_columns
from pretrain.losses.supervised import SUPERVISED, target_scale
from pretrain.losses.temperature import Temperature

CATEGORICAL = ("same", "different")  # the kernels that only ask whether two values are equal


@dataclass(frozen=True)
class Objective:
    """The loss over the scans of all ranks.

    Attributes:
        name: a key of LOSSES or SUPERVISED.
        kernel: weights of pairs by their proxies.
        options: further arguments of the loss.
        subjects: participant number of each row of the manifest; None if sessions of one participant are not masked.
        cross_view: whether only pairs of different views are compared.
    """

    name: str
    kernel: Kernel
    options: dict[str, Any]
    subjects: torch.Tensor | None
    cross_view: bool

    def loss(
        self, views_2BP: torch.Tensor, temperature: torch.Tensor | None, batch: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return this rank's scalar; the mean over the ranks is the loss of the whole batch. Collective.

        Args:
            views_2BP: embeddings of both views, (2, B, P).
            temperature: the learned temperature, a scalar; None takes the recipe's.
            batch: the loader's batch, with ``proxies`` (B, number of proxies) and ``scan`` (B,).
        """
        loss, learned = find_loss(self.name), {} if temperature is None else {"temperature": temperature}
        supplied = {"kernel": self.kernel, "gather": _gather(), "subjects": self._subjects_of(batch)}
        taken = {name: value for name, value in supplied.items() if takes(loss, name)}
        return loss(views_2BP, batch["proxies"], **{**taken, **self.options, **learned})

    def effective_positives(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the effective number of positives (B,) of this rank's scans, by the loss's own kernel. Collective."""
        return effective_positives(
            batch["proxies"], self.kernel, gather=_gather(), subjects=self._subjects_of(batch),
            cross_view=self.cross_view,
        )  # fmt: skip

    def _subjects_of(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        if self.subjects is None:
            return None
        return self.subjects[batch["scan"].cpu()].to(batch["proxies"].device)


def build_objective(recipe: Recipe, manifest: Manifest, rows: NDArray[np.int64]) -> Objective:
    """Return the recipe's objective; bandwidth rules such as ``scott`` use the proxies of ``rows``, the training scans.

    Raises UserError if the loss, its options, the kernel or a proxy's column is wrong.
    """
    kernel, options = recipe_kernel(recipe, manifest, rows), loss_options(recipe.loss)
    if recipe.loss.name in SUPERVISED:
        options |= target_scale(torch.from_numpy(manifest.proxies(proxy_columns(recipe.loss.proxies), rows)))
    subjects = torch.from_numpy(manifest.subjects()) if recipe.loss.mask_subjects else None
    return Objective(recipe.loss.name, kernel, options, subjects, recipe.loss.cross_view)


def recipe_kernel(recipe: Recipe, manifest: Manifest, rows: NDArray[np.int64]) -> Kernel:
    """Return the kernel over the recipe's proxies; bandwidth rules use the proxies of ``rows``."""
    proxies = {name: proxy.options() for name, proxy in recipe.loss.proxies.items()}
    columns = proxy_columns(proxies)
    values = manifest.proxies(columns, rows)
    for name, proxy in recipe.loss.proxies.items():
        if proxy.kernel not in CATEGORICAL or recipe.loss.name in SUPERVISED:
            check_distances(name, manifest)
    return build_kernel(proxies, {name: torch.from_numpy(values[:, index]) for index, name in enumerate(columns)})


def check_distances(name: str, manifest: Manifest) -> None:
    """Raise UserError if a column is text with more than two values: the order of its codes means nothing."""
    for column in proxy_columns({name: None}):
        texts = manifest.scans[column]
        if pd.api.types.is_numeric_dtype(texts):
            continue
        found = sorted(set(texts.dropna().astype(str)) - {""})
        if len(found) > 2:
            raise UserError(
                f"loss.proxies.{name}: column {column!r} of {manifest.url} is text ({', '.join(found[:3])}, ...), so its "
                "values have no distance; use kernel: same or different, or correct the column in the participants' table"
            )


def loss_options(section: LossSection) -> dict[str, Any]:
    """Return the arguments that the recipe's loss takes from ``loss:``.

    Raises UserError if the loss is not known or does not take an option that the recipe sets.
    """
    loss, default = find_loss(section.name), LossSection()
    for name in SHARED_OPTIONS:
        if not takes(loss, name) and getattr(section, name) != getattr(default, name):
            raise UserError(f"loss.{name} is not an option of the loss {section.name}; leave it out")
    if section.mask_subjects and not takes(loss, "subjects"):
        raise UserError(f"loss.mask_subjects is not an option of the loss {section.name}; leave it out")
    if section.temperature_bounds is not None:
        if not takes(loss, "temperature"):
            raise UserError(f"loss.temperature_bounds is not an option of the loss {section.name}; leave it out")
        Temperature(section.temperature, *section.temperature_bounds)
    shared = {name: getattr(section, name) for name in SHARED_OPTIONS if takes(loss, name)}
    return {**shared, **check_own_options(section.name, section.options)}


def _gather() -> AllGather | None:
    return AllGather() if distributed.world_size() > 1 else None
