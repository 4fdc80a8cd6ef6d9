"""From raw heads to features: prepare, build, two steps of pretraining, and the embedding of a raw head."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pandas as pd
import pytest

from data_pipeline.storage.manifest import Manifest
from infra import cli
from pretrain import Encoder
from tests import runs
from tests.data_pipeline.prepare.dressed import write_raw_heads
from tests.data_pipeline.prepare.phantoms import SMALL_OPTIONS, small_brain


@pytest.mark.parametrize(
    ("participants", "spacing", "skull", "options"),
    [
        pytest.param(5, 5.0, False, SMALL_OPTIONS, id="small"),
        pytest.param(50, 2.0, True, ["--prepare.spacing=4"], marks=[pytest.mark.slow, pytest.mark.timeout(7200)], id="50"),
    ],
)  # fmt: skip
def test_raw_heads_become_an_encoder_that_takes_raw_heads(tmp_path, participants, spacing, skull, options):
    raw, out, shards, run = (tmp_path / name for name in ("raw", "out", "shards", "run"))
    heads = write_raw_heads(raw, participants, spacing, skull=skull)
    people = pd.read_csv(raw / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    people.assign(split="pretrain").to_csv(raw / "participants.tsv", sep="\t", index=False)
    workers = [] if skull else ["--workers", "1"]
    assert cli.run(["cohort", "prepare", str(raw), str(out), *options, *workers]) == 0
    table = pd.read_csv(out / "participants.tsv", sep="\t")
    assert len(table) >= 0.96 * len(heads)
    assert cli.run(["shards", "build", str(out), str(shards), "--modality", "quasiraw"]) == 0
    more = ["--batch.global=4", "--launch.ranks=1", "--encoder.options={width: 0.125, norm: group}"]
    assert runs.run(runs.pretrain_command(shards, run, 2, *more), tmp_path).returncode == 0
    encoder = Encoder.from_pretrained(run)
    recorded = encoder.preprocessing["preparation"]
    described = json.loads((out / "dataset_description.json").read_text())
    assert recorded["recipe"] == described["Preparation"]
    low, high = recorded["figures"]["brain_ml"]
    assert table["brain_ml"].min() == pytest.approx(low)
    assert table["brain_ml"].max() == pytest.approx(high)

    manifest = Manifest.load(shards)
    key = str(manifest.scans["key"].iloc[0])
    (source,) = [path for path in heads if path.name.removesuffix("_T1w.nii.gz") in key]
    kept = tmp_path / "kept"
    features = encoder.embed([source], prepared=kept, progress=False).to_numpy()
    stored = encoder.embed([0], manifest=manifest, progress=False).to_numpy()
    np.testing.assert_allclose(features, stored, rtol=0, atol=1e-6 * np.abs(stored).max())
    (volume,) = kept.rglob("*_T1w.nii.gz")
    again = encoder.embed([volume], progress=False).to_numpy()
    np.testing.assert_array_equal(again, features)
    if not skull:  # a brain whose figures no training scan has
        image = small_brain(6)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine * [[0.85], [0.85], [0.85], [1]]),
                     tmp_path / "new.nii.gz")  # fmt: skip
        with pytest.warns(UserWarning, match=r"1 of 1 scans is unlike .*new.nii.gz: (tiv|brain_ml) is"):
            new = encoder.embed([tmp_path / "new.nii.gz"], progress=False).to_numpy()
        assert np.isfinite(new).all()
