"""Wrong arguments of the public functions: one line that names the argument, what was found and what is allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import yaware
from data_pipeline.cohort.split import check_shares
from data_pipeline.loading.loader import TwoViewLoader
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.load import _unreadable
from evaluation.comparison.report import write_report
from evaluation.protocols.settings import load_fine_tuning
from infra import ray_cluster
from infra.errors import UserError
from pretrain.encoders import build_encoder
from pretrain.weights.encoder import Encoder
from pretrain.weights.readouts import Readouts

OPTIONS = {"width": 0.125, "norm": "group"}
GRID = {"shape": [20, 24, 20], "spacing": [6.0] * 3, "affine": np.diag([6.0, 6.0, 6.0, 1.0]).tolist()}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = {"encoder": {"name": "resnet18", "options": OPTIONS}, "feature_size": 64}
    return Encoder(build_encoder("resnet18", OPTIONS), config, {"grid": GRID, "scaling": "tiv", "modality": "vbm"})


@pytest.mark.parametrize(
    ("scans", "options", "message"),
    [
        (5, {}, "scans=5 is of type int; allowed: paths, a manifest"),
        ([], {}, "there are no scans to embed"),
        (["a.nii"], {"batch_size": "8"}, "batch_size='8' is of type str; allowed: a whole number or None"),
        (["a.nii"], {"on_error": "ignore"}, "on_error='ignore' is not known; allowed: raise, skip"),
        (["a.nii"], {"tiv": [1400.0], "layer": "nope"}, "layer='nope' is not a block of this encoder"),
        (["a.nii"], {"tiv": [1400.0], "pooling": "mena"}, "pooling='mena' is not known"),
    ],
)
def test_embed(encoder, scans, options, message):
    with pytest.raises(UserError, match=message):
        encoder.embed(scans, progress=False, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: yaware.Run(5), "folder=5 is of type int; allowed: a path"),
        (lambda: yaware.Recipe.load(3), "name=3 is of type int; allowed: a recipe's name or a path"),
        (lambda: yaware.pretrain(5), "recipe=5 is of type int; allowed: a recipe's name, a path or a Recipe"),
        (lambda: yaware.pretrain({"run": {}}), "recipe=.* is of type dict; allowed: "),
        (lambda: yaware.pretrain("demo-cpu", ranks=1, launch=5), "launch=5 is of type int; allowed: a mapping"),
        (
            lambda: yaware.export(None, "out"),
            "checkpoint=None is of type NoneType; allowed: a path, a Run or an Encoder",
        ),
        (lambda: yaware.embed(5, ["a.nii"]), "encoder=5 is of type int; allowed: a path"),
        (lambda: yaware.Manifest.load(5), "url=5 is of type int; allowed: a path"),
        (
            lambda: yaware.simulate_cohort("out", participants="ten"),
            "participants='ten' is of type str; allowed: a whole",
        ),
        (lambda: yaware.build_shards("in", "out", scans_per_shard="2"), "scans_per_shard='2' is of type str"),
        (lambda: yaware.build_shards("in", "out", quality={"grid": "refuse"}), "quality=.* is of type dict; allowed: "),
        (lambda: yaware.build_shards("in", "out", splits={"a": 2.0}), "splits=.* the shares sum to 2; they must be"),
        (lambda: yaware.build_shards("in", "out", workers=0), "workers=0 must be at least 1"),
        (lambda: yaware.evaluate("a", "b", tasks="ad", folds="3"), "folds='3' is of type str; allowed: a whole number"),
        (
            lambda: yaware.evaluate("a", "b", tasks="ad", n_train=5),
            "n_train=5 is of type int; allowed: a list of whole",
        ),
        (lambda: yaware.evaluate("a", "b", tasks=3), "tasks=3 is of type int; allowed: a text, or a list of texts"),
        (lambda: yaware.evaluate("a", "b", tasks="ad", seed="a"), "^seed='a' is of type str; allowed: a whole number$"),
        (lambda: yaware.evaluate("a", "b", tasks="ad", workers=0), "workers=0 must be at least 1"),
        (lambda: yaware.evaluate([], "b", tasks="ad"), r"checkpoints=\[\] names none; give one or more"),
        (lambda: yaware.evaluate("a", "b", tasks="ad", finetune={"x": 1}), "^unknown key 'finetune.x'; allowed here: "),
        (lambda: yaware.compare(5), "experiment=5 is of type int; allowed: a text"),
    ],
)
def test_functions(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call()
    assert not list(tmp_path.iterdir())


def test_a_step_of_a_run_is_a_whole_number_or_a_name(tmp_path):
    yaware.Recipe().save(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="step=2.0 is of type float; allowed: a step, 'best', or None"):
        yaware.Run(tmp_path).encoder(2.0)


def test_an_encoder_can_be_exported_if_it_was_read_from_a_folder(encoder, tmp_path):
    with pytest.raises(UserError, match="made in memory and has no folder"):
        yaware.export(encoder, tmp_path / "out")


def test_a_value_of_fine_tuning_is_named_without_the_command_line():
    with pytest.raises(UserError, match="^finetune.epochs: .*, found 'many'$"):
        load_fine_tuning({"epochs": "many"}, 0)


def test_shares_may_be_numbers_of_numpy():
    check_shares({"pretrain": np.float32(0.5), "downstream": np.float64(0.5)}, "")
    with pytest.raises(UserError, match="must map names to shares"):
        check_shares({"pretrain": "1"}, "")


@pytest.mark.parametrize("rows", ["all", [0, 1], np.zeros(2)])
def test_the_loader_takes_row_numbers_only(shards, rows):
    with pytest.raises(UserError, match="is no array of row numbers"):
        TwoViewLoader(Manifest.load(shards), rows=rows, global_batch=2)


def test_a_report_is_a_page(tmp_path):
    with pytest.raises(UserError, match=r"rep.csv is a page of HTML; give a name that ends in .html"):
        write_report(None, tmp_path / "rep.csv")


def test_a_session_needs_a_worker():
    with pytest.raises(UserError, match="workers=0 must be at least 1"), ray_cluster.session(0):
        pass


def test_manifest_and_readouts_have_short_texts(shards):
    assert repr(Manifest.load(shards)) == f"Manifest({str(shards)!r}: 72 scans, grid 14x16x12)"
    assert repr(Readouts({}, "0" * 64)) == "Readouts(none: 0 features)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("File {0}/sub-01.nii.gz is not a gzip file", "the file is not a gzip file"),
        ("cannot read '{0}/sub-01.nii.gz' at byte 3", "cannot read the file at byte 3"),
        ("sub-01.nii.gz: bad header of sub-01", "the file: bad header of the file"),
        ("a sub-01s header", "a sub-01s header"),
    ],
)
def test_the_reason_of_an_unreadable_scan_does_not_name_it(tmp_path, text, expected):
    found = str(_unreadable(tmp_path / "sub-01.nii.gz", OSError(text.format(tmp_path))))
    assert found == f"unreadable: OSError: {expected}"
