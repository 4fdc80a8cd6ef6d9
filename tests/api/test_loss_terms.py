"""Reconstruction, the dense loss and a product of kernels from Python, as a user sets them in a recipe."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from pretrain import Run
from tests.api.test_pretrain import python

pytestmark = [pytest.mark.distributed, pytest.mark.jobs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    """The folder with a run of one rank and one of two ranks with reader processes and micro-batches, of the same recipe."""
    folder = tmp_path_factory.mktemp("terms")
    code = """
recipe = yaware.Recipe.load("demo-cpu").with_(**sections(3)).with_(
    encoder={{"options": {{"width": 0.25, "norm": "group"}}}},
    loss={{"reconstruction": {{"weight": 0.5, "masked": 0.3, "layer": "layer2"}},
          "dense": {{"weight": 2.0, "grid": 2, "layer": "layer2"}}, "proxies": {{
        "age": {{"kernel": "gaussian", "bandwidth": 8.0}}, "sex": {{"kernel": "same", "otherwise": 0.5, "missing": 1.0}}}}}},
)
yaware.pretrain(recipe, ranks=1, output="one")
yaware.pretrain(recipe.with_(data={{"workers": 1}}, batch={{"micro": 2}}), ranks=2, output="two")
plain = recipe.with_(loss={{"reconstruction": None, "dense": None}})
yaware.pretrain(plain, ranks=1, output="plain")
print(json.dumps("done"))
""".replace("{{", "{").replace("}}", "}")
    python(code, folder, shards)
    return folder


def test_the_terms_are_logged_apart_and_add_up(runs):
    metrics = Run(runs / "one").metrics
    total = metrics["loss/contrastive"] + 0.5 * metrics["loss/reconstruction"] + 2.0 * metrics["loss/dense"]
    assert metrics["loss"].tolist() == pytest.approx(total.tolist(), rel=1e-6)
    assert (metrics[["loss/contrastive", "loss/reconstruction", "loss/dense"]] > 0.01).all(axis=None)
    assert [name for name in Run(runs / "plain").metrics if "/" in name and name.startswith("loss")] == []


def test_ranks_readers_and_micro_batches_do_not_change_the_losses(runs):
    one, two = Run(runs / "one").metrics, Run(runs / "two").metrics
    for name in ("loss", "loss/contrastive", "loss/reconstruction", "loss/dense", "grad_norm"):
        assert two[name].tolist() == pytest.approx(one[name].tolist(), rel=1e-4), name


def test_the_exported_encoder_has_neither_decoder_nor_cells(runs):
    names = [
        set(load_file(Run(runs / name).checkpoints[-1] / "encoder" / "model.safetensors")) for name in ("one", "plain")
    ]
    assert names[0] == names[1]
    assert all(name.startswith("trunk.") for name in names[0])
    assert Run(runs / "one").encoder().config["feature_size"] == 128
