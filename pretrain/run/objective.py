"""The loss of a recipe on its scans: kernel, options and masked participants, checked once.

B = scans of this rank, P = size of the projector's output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
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
from pretrain.losses.dense import dense_loss
from pretrain.losses.diagnostics import effective_positives
from pretrain.losses.gather import AllGather, SingleProcess
from pretrain.losses.options import SHARED_OPTIONS, check_own_options, find_loss, takes
from pretrain.losses.proxies import build_kernel, proxy_columns, with_equal_subjects
from pretrain.losses.reconstruction import reconstruction_error
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
        people: participant number of each row; two scans of one participant then have weight 1. None: the kernel's.
        sites: site number of each row, for the share ``site_share`` of the loss that compares scans of one site only.
        site_share: 0 to 1.
        weights: weights of the terms, by name, if there are further terms: ``contrastive`` (1), then ``reconstruction`` and
            ``dense``, in the order of the model's further outputs.
    """

    name: str
    kernel: Kernel
    options: dict[str, Any]
    subjects: torch.Tensor | None
    cross_view: bool
    people: torch.Tensor | None = None
    sites: torch.Tensor | None = None
    site_share: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)

    def loss(
        self, views_2BP: torch.Tensor, temperature: torch.Tensor | None, batch: dict[str, torch.Tensor],
        *further: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Return this rank's scalar; the mean over the ranks is the loss of the whole batch. Collective.

        With further terms, return the terms (T,), each without its weight.

        Args:
            views_2BP: embeddings of both views, (2, B, P).
            temperature: the learned temperature, a scalar; None takes the recipe's.
            batch: the loader's batch, with ``proxies`` (B, number of proxies) and ``scan`` (B,).
            further: the model's further outputs (`pretrain.model.ContrastiveModel`).
        """
        gather, subjects, proxies = _gather(), _of_batch(self.subjects, batch), self._proxies_of(batch)
        sites = _of_batch(self.sites, batch)
        terms = [self._contrastive(views_2BP, proxies, gather, subjects, temperature=temperature, sites=sites)]
        if not further:
            return terms[0]
        outputs = list(further)
        if "reconstruction" in self.weights:
            terms.append(reconstruction_error(outputs.pop(0), gather))
        if "dense" in self.weights:
            cells, shown = outputs[0][..., :-1], (outputs.pop(0)[..., -1] > 0.5).all(dim=0)
            of_cell = partial(self._contrastive, temperature=temperature)
            terms.append(dense_loss(cells, shown, proxies, loss=of_cell, gather=gather, subjects=subjects))
        return torch.stack([term.to(terms[0].dtype) for term in terms])

    def _contrastive(
        self, views_2BP: torch.Tensor, proxies: torch.Tensor, gather: AllGather | SingleProcess | None,
        subjects: torch.Tensor | None, temperature: torch.Tensor | None, sites: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        loss, learned = find_loss(self.name), {} if temperature is None else {"temperature": temperature}
        supplied = {"kernel": self._pair_kernel(), "gather": gather, "subjects": subjects}
        taken = {name: value for name, value in supplied.items() if takes(loss, name)}
        options = {**taken, **self.options, **learned}
        if sites is None:
            return loss(views_2BP, proxies, **options)
        within = self.site_share * loss(views_2BP, proxies, sites=sites, **options)
        return (
            within if self.site_share == 1.0 else within + (1.0 - self.site_share) * loss(views_2BP, proxies, **options)
        )

    def effective_positives(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the effective number of positives (B,) of this rank's scans, by the loss's own kernel. Collective."""
        return effective_positives(
            self._proxies_of(batch), self._pair_kernel(), gather=_gather(), subjects=_of_batch(self.subjects, batch),
            cross_view=self.cross_view,
        )  # fmt: skip

    def _pair_kernel(self) -> Kernel:
        """Return the kernel for the columns of ``_proxies_of``."""
        return self.kernel if self.people is None else with_equal_subjects(self.kernel)

    def _proxies_of(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the proxies (B, P), and with ``people`` the participant as one more column."""
        people = _of_batch(self.people, batch)
        proxies = batch["proxies"]
        return proxies if people is None else torch.cat([proxies, people[:, None].to(proxies.dtype)], dim=1)


def build_objective(recipe: Recipe, manifest: Manifest, rows: NDArray[np.int64]) -> Objective:
    """Return the recipe's objective; bandwidth rules such as ``scott`` use the proxies of ``rows``, the training scans.

    Raises UserError if the loss, its options, the kernel or a proxy's column is wrong.
    """
    kernel, options = recipe_kernel(recipe, manifest, rows), loss_options(recipe.loss)
    if recipe.loss.name in SUPERVISED:
        options |= target_scale(torch.from_numpy(manifest.proxies(proxy_columns(recipe.loss.proxies), rows)))
    subjects = torch.from_numpy(manifest.subjects()) if recipe.loss.mask_subjects else None
    further = {"reconstruction": recipe.loss.reconstruction, "dense": recipe.loss.dense}
    weights = {name: section.weight for name, section in further.items() if section is not None}
    if recipe.loss.dense is not None and recipe.loss.name in SUPERVISED:
        raise UserError(f"loss.dense compares scans, and the loss {recipe.loss.name} does not; leave loss.dense out")
    return Objective(
        recipe.loss.name, kernel, options, subjects, recipe.loss.cross_view,
        people=torch.from_numpy(manifest.subjects()) if recipe.loss.subject_positives else None,
        sites=site_codes(manifest, rows) if recipe.loss.site_negatives else None, site_share=recipe.loss.site_negatives,
        weights={"contrastive": 1.0, **weights} if weights else {},
    )  # fmt: skip


def site_codes(manifest: Manifest, rows: NDArray[np.int64]) -> torch.Tensor:
    """Return the number of the site of each row of the manifest, int64.

    Raises UserError if the shards have no column ``site``, or one of the training scans ``rows`` has none.
    """
    if "site" not in manifest.scans:
        raise UserError(f"loss.site_negatives: {manifest.url} has no column site; leave site_negatives out")
    names = manifest.scans["site"].fillna("").astype(str)
    missing = int((names.iloc[rows] == "").sum())
    if missing:
        raise UserError(
            f"loss.site_negatives: {missing} of {len(rows)} scans have no site; exclude them with data.query, as in "
            "--data.query='site == site and site != \"\"'"
        )
    return torch.from_numpy(pd.factorize(names)[0].astype(np.int64))


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
        values = sorted(set(texts.dropna().astype(str)) - {""})
        if len(values) > 2:
            raise UserError(
                f"loss.proxies.{name}: column {column!r} of {manifest.url} is text ({', '.join(values[:3])}, ...), so its "
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
    _check_people_and_sites(section)
    if section.temperature_bounds is not None:
        if not takes(loss, "temperature"):
            raise UserError(f"loss.temperature_bounds is not an option of the loss {section.name}; leave it out")
        Temperature(section.temperature, *section.temperature_bounds)
    shared = {name: getattr(section, name) for name in SHARED_OPTIONS if takes(loss, name)}
    return {**shared, **check_own_options(section.name, section.options)}


def _check_people_and_sites(section: LossSection) -> None:
    """Raise UserError if the options about participants and sites exclude each other, or the loss does not take them."""
    loss = find_loss(section.name)
    if section.subject_positives and not takes(loss, "kernel"):
        raise UserError(f"loss.subject_positives is not an option of the loss {section.name}; leave it out")
    if section.subject_positives and section.mask_subjects:
        raise UserError(
            "loss.subject_positives makes positives of the scans that loss.mask_subjects leaves out; set one"
        )
    if section.site_negatives and not takes(loss, "sites"):
        raise UserError(f"loss.site_negatives is not an option of the loss {section.name}; leave it out")
    if section.site_negatives and section.dense is not None:
        raise UserError("loss.site_negatives does not go with loss.dense; leave one of them out")
    if section.site_negatives == 1.0 and section.subject_positives:
        raise UserError(
            "loss.site_negatives=1 compares scans of one site only, and so no scans of one participant on other scanners "
            "(loss.subject_positives); give a share below 1"
        )


def _of_batch(values: torch.Tensor | None, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the values (B,) of the batch's scans from those of all rows of the manifest."""
    return None if values is None else values[batch["scan"].cpu()].to(batch["proxies"].device)


def _gather() -> AllGather | None:
    return AllGather() if distributed.world_size() > 1 else None
