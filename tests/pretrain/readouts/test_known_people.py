"""Predictions of people whom the encoder or its readouts know: one warning with their number, for shards and for files."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

import yaware
from data_pipeline.storage.manifest import Manifest
from infra import cli
from pretrain.readouts.add import add_readouts
from pretrain.weights import embedding
from pretrain.weights.scan_source import scan_source
from pretrain.weights.seen_scans import source_of
from tests.pretrain.weights.encoders import write_encoders_of

WARNING = "embed: warning: "
ENDING = (
    "; their predictions may be closer to the truth than those of new people: do not judge the readouts, and do not compare "
    "groups, by them\n"
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, two_splits):
    """An encoder that was trained on 24 people of pretrain, with readouts that are calibrated on 55 of monitor."""
    folder = tmp_path_factory.mktemp("known") / "encoder"
    write_encoders_of(Manifest.load(two_splits), folder)
    add_readouts(folder, two_splits, columns=["age"], progress=False)
    return folder


def files(two_splits, split):
    """The NIfTI files of a split's scans."""
    cohort, manifest = two_splits.parent / "cohort", Manifest.load(two_splits)
    people = manifest.scans["participant_id"].iloc[manifest.rows(split=split)]
    return [str(next(cohort.glob(f"sub-{person}/**/*.nii.gz"))) for person in people]


KNOWN = {
    "pretrain": "24 of 24 scans are of people whom the encoder was trained on (24), to whom its readouts were fitted (24)",
    "monitor": "55 of 55 scans are of people on whom its readouts were calibrated (55)",
    "other": "",
}


@pytest.mark.parametrize("split", list(KNOWN))
def test_scans_of_shards_are_recognised_by_their_people(encoder, two_splits, split, capsys):
    option = "--gap" if split == "other" else "--readouts"
    assert cli.run(["embed", str(encoder), "--shards", str(two_splits), "--split", split, option]) == 0
    said = [line for line in capsys.readouterr().err.splitlines(keepends=True) if line.startswith(WARNING)]
    assert said == ([WARNING + KNOWN[split] + ENDING] if KNOWN[split] else [])


@pytest.mark.parametrize("split", ["pretrain", "other"])
def test_files_are_recognised_by_their_voxels(encoder, two_splits, split, capsys):
    assert cli.run(["embed", str(encoder), *files(two_splits, split), "--readouts"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines(keepends=True) if line.startswith(WARNING)]
    assert said == ([WARNING + KNOWN[split] + ENDING] if KNOWN[split] else [])


def test_files_are_recognised_by_their_voxels_before_scaling(encoder, two_splits):
    """A build takes the digest of a scan before it is divided by the head's size."""
    manifest = Manifest.load(two_splits)
    paths = files(two_splits, "pretrain")[:2] + files(two_splits, "other")
    preprocessing = {**yaware.Encoder.from_pretrained(encoder).preprocessing, "scaling": "tiv"}
    source = scan_source(paths, preprocessing, tiv=[1450.0] * 5)
    source.identify = True
    for position in range(4):
        source.read(position)
    seen = source.seen([source_of(manifest, np.arange(len(manifest.scans)))])
    assert seen.tolist() == [True] * 4 + [False]  # the last one was not read


def test_without_readouts_nothing_is_said_or_computed(encoder, two_splits, capsys, monkeypatch):
    digests = []
    monkeypatch.setattr("pretrain.weights.scan_source.voxels_digest", lambda voxels: digests.append(1) or "0" * 64)
    path = files(two_splits, "pretrain")[0]
    assert cli.run(["embed", str(encoder), path]) == 0
    assert WARNING not in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yaware.embed(encoder, [path], progress=False)
    assert not digests
    yaware.Encoder.from_pretrained(encoder).embed([path], progress=False, readouts=True)
    assert digests == [1]


def test_in_python_it_is_a_warning(encoder, two_splits):
    manifest = Manifest.load(two_splits)
    rows = np.concatenate([manifest.rows(split="pretrain")[:2], manifest.rows(split="other")])
    with pytest.warns(UserWarning, match=r"^2 of 5 scans are of people whom the encoder was trained on \(2\), to whom"):
        yaware.Encoder.from_pretrained(encoder).embed(rows, manifest=manifest, readouts=True, progress=False)


def test_a_continued_run_counts_all_files(encoder, two_splits, tmp_path, monkeypatch, capsys):
    out = tmp_path / "table.tsv"
    command = ["embed", str(encoder), *files(two_splits, "pretrain"), "--readouts", "--out", str(out), "--workers", "0"]
    encoded, encode = [], embedding._encode

    def killed_in_the_third_batch(*arguments):
        encoded.append(1)
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(embedding, "_encode", killed_in_the_third_batch)
    assert cli.run(command) == 130
    monkeypatch.setattr(embedding, "_encode", encode)
    capsys.readouterr()
    assert cli.run(command) == 0
    printed = capsys.readouterr()
    assert "24 scans, 16 of them embedded before" in printed.out
    assert WARNING + KNOWN["pretrain"] + ENDING in printed.err
    assert len(pd.read_csv(out, sep="\t")) == 24
