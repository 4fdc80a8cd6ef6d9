"""A recipe reaches every loss of the tables and the loss's own options; a new loss needs one line in a table."""

from __future__ import annotations

import re
import textwrap
from dataclasses import replace
from types import SimpleNamespace
from typing import Annotated

import pytest
import torch
from pydantic import Field

from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.engine import engine
from pretrain.losses import LOSSES
from pretrain.losses.contrastive import decoupled_uniformity
from pretrain.model import build_model
from pretrain.run.objective import build_objective, loss_options, site_codes
from pretrain.run.step import lr_factor, train_step
from tests.runs import ROOT

UNIFORMITY = ("--loss.name=decoupled-uniformity",)


def recipe_of(*overrides):
    return load_recipe("demo-cpu", ["--batch.global=4", "--encoder.options={width: 0.125, norm: group}", *overrides])


def batch_of_four():
    views = torch.randn(2, 4, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    return {"views": views, "proxies": torch.tensor([[20.0], [24.0], [31.0], [60.0]]), "scan": torch.arange(4)}


def test_a_loss_added_to_the_table_trains_from_a_recipe(one_rank, shards, monkeypatch):
    calls = []

    def toy(views, proxies, *, kernel, gather=None, subjects=None, margin: Annotated[float, Field(ge=0)] = 1.0):
        calls.append(margin)
        return (views[0] - views[1]).square().mean() + margin

    monkeypatch.setitem(LOSSES, "toy", toy)
    recipe = recipe_of("--loss.name=toy", "--loss.options.margin=0.25", "--optimizer.lr=0.01")
    manifest = Manifest.load(str(shards))
    objective = build_objective(recipe, manifest, manifest.rows(split=recipe.data.split))
    trained = engine.build_engine(recipe, build_model(recipe), lr_factor(recipe.optimizer, 20, 10))
    trained.train()
    before = trained.module.projector[0].weight.detach().clone()
    values = [train_step(trained, objective.loss, batch_of_four(), step, torch.float32)[0]["loss"] for step in range(3)]
    assert calls == [0.25] * 3
    assert values[2] < values[0]
    assert not torch.equal(trained.module.projector[0].weight, before)
    trained.destroy()


def test_the_loss_of_the_contributing_page_runs_without_the_arguments_that_it_lacks(shards, monkeypatch):
    """Its code has no parameter ``subjects``, so that the run does not pass it."""
    page = (ROOT / "CONTRIBUTING.md").read_text().partition("**A loss.**")[2].partition("**A kernel.**")[0]
    code = textwrap.dedent("\n".join(line for line in page.splitlines() if line.startswith("    ") or not line))
    names = {}
    exec(code, names)
    monkeypatch.setitem(LOSSES, "my-loss", names["my_loss"])
    manifest = Manifest.load(str(shards))
    views = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    for margin in (0.0, 0.5):
        recipe = recipe_of("--loss.name=my-loss", f"--loss.options.margin={margin}")
        loss = build_objective(recipe, manifest, manifest.rows(split=["pretrain"])).loss
        expected = ((views[0] - views[1]).square().sum(dim=-1) - margin).clamp(min=0.0).mean()
        torch.testing.assert_close(loss(views, None, batch_of_four()), expected)
    with pytest.raises(UserError, match="loss.mask_subjects is not an option of the loss my-loss"):
        loss_options(recipe_of("--loss.name=my-loss", "--loss.mask_subjects=true").loss)


def test_the_options_of_a_loss_reach_its_value(shards):
    manifest = Manifest.load(str(shards))
    rows = manifest.rows(split=["pretrain"])
    views = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    batch = batch_of_four()
    recipe = recipe_of(*UNIFORMITY, "--loss.options={scale: 3.0, ridge: 0.1}")
    kernel = lambda a, b: torch.exp(-(((a - b.T) / 5.0) ** 2) / 2)  # noqa: E731
    expected = decoupled_uniformity(views, batch["proxies"], kernel=kernel, scale=3.0, ridge=0.1)
    torch.testing.assert_close(build_objective(recipe, manifest, rows).loss(views, None, batch), expected)
    plain = build_objective(recipe_of(*UNIFORMITY), manifest, rows).loss(views, None, batch)
    assert abs(plain - expected) > 1e-2


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["--loss.options.scale=2.0"], "loss.options.scale is not an option of the loss y-aware; it has none of its own"),
        ([*UNIFORMITY, "--loss.options.rigde=1"], r"options.rigde is not .* \(did you mean 'ridge'\?\); allowed: scale, ridge"),
        ([*UNIFORMITY, "--loss.options.scale=0"], "loss.options.scale=0 is not possible: .* greater than 0"),
        ([*UNIFORMITY, "--loss.options.ridge=-0.1"], "loss.options.ridge=-0.1 is not possible: .* greater than or equal to 0"),
        ([*UNIFORMITY, "--loss.options.scale=wide"], "loss.options.scale='wide' is not possible: .* valid number"),
        ([*UNIFORMITY, "--loss.options.tile=2"], "loss.options.tile is not an option of the loss decoupled-uniformity"),
        (["--loss.name=regression", "--loss.options.scale=2"], "loss.options.scale is not an option of the loss regression"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_in_one_line(overrides, text):
    with pytest.raises(UserError, match=text) as caught:
        loss_options(recipe_of(*overrides).loss)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [(), ("--loss.name=regression",)])
def test_the_distance_of_texts_is_refused(shards, options):
    manifest = Manifest.load(str(shards))
    manifest.scans["hand"] = ["left", "right", "both"] * (len(manifest.scans) // 3) + ["both"] * (
        len(manifest.scans) % 3
    )
    rows = manifest.rows(split=["pretrain"])
    recipe = recipe_of("--loss.proxies={hand: {kernel: gaussian, bandwidth: 1.0}}", *options)
    with pytest.raises(
        UserError, match="loss.proxies.hand: column 'hand' of .* is text .both, left, right, ....*no distance"
    ):
        build_objective(recipe, manifest, rows)
    build_objective(recipe_of("--loss.proxies={hand: {kernel: same}}"), manifest, rows)


def test_participants_and_sites_reach_the_loss_from_a_recipe(shards):
    manifest = Manifest.load(str(shards))
    rows = manifest.rows(split=["pretrain"])
    views, batch = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)), batch_of_four()
    values = {}
    for name, overrides in {
        "plain": (), "people": ("--loss.subject_positives=true",), "sites": ("--loss.site_negatives=0.5",),
        "within": ("--loss.site_negatives=1.0",),
    }.items():  # fmt: skip
        objective = build_objective(recipe_of(*overrides), manifest, rows)
        if objective.people is not None:
            people = torch.arange(len(manifest.scans))
            people[:2] = 0  # two scans of one participant
            objective = replace(objective, people=people)
        if objective.sites is not None:
            assert objective.sites.tolist() == manifest.scans["site"].factorize()[0].tolist()
            objective = replace(objective, sites=torch.arange(len(manifest.scans)) % 2)
        values[name] = float(objective.loss(views, None, batch))
        positives = objective.effective_positives(batch)
        assert (positives[:2] > 1.9).all() or name != "people"
    assert len(set(values.values())) == 4
    assert values["sites"] == pytest.approx((values["plain"] + values["within"]) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ("--loss.subject_positives=true", "--loss.mask_subjects=true"),
            "makes positives of the scans that loss.mask_subjects",
        ),
        (
            (*UNIFORMITY, "--loss.site_negatives=0.5"),
            "loss.site_negatives is not an option of the loss decoupled-uniformity",
        ),
        (("--loss.site_negatives=0.5", "--loss.dense={grid: 2}"), "loss.site_negatives does not go with loss.dense"),
        (("--loss.site_negatives=1", "--loss.subject_positives=true"), "give a share below 1"),
    ],
)
def test_options_about_participants_and_sites_that_exclude_each_other_are_refused(overrides, text):
    with pytest.raises(UserError, match=text):
        loss_options(recipe_of(*overrides).loss)


def test_site_negatives_need_a_site_for_every_training_scan(shards):
    manifest = Manifest.load(str(shards))
    rows = manifest.rows(split=["pretrain"])
    scans = manifest.scans.copy()
    scans["site"] = scans["site"].astype(object)
    scans.loc[rows[0], "site"], scans.loc[rows[1], "site"] = "", None
    with pytest.raises(UserError, match=f"loss.site_negatives: 2 of {len(rows)} scans have no site") as raised:
        site_codes(SimpleNamespace(scans=scans, url="shards"), rows)
    advised = re.search(r"--data.query='(.*)'", str(raised.value))[1]
    assert scans.loc[rows].query(advised).index.tolist() == list(rows[2:])
    with pytest.raises(UserError, match="shards has no column site; leave site_negatives out"):
        site_codes(SimpleNamespace(scans=scans.drop(columns="site"), url="shards"), rows)
