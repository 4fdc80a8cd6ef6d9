"""Grey-matter maps of small brains: tissue is conserved, and shards are built from them with `--scaling tiv`."""

from __future__ import annotations

import nibabel
import numpy as np
import pandas as pd
import pytest

from data_pipeline.prepare.driver import prepare_cohort
from data_pipeline.prepare.template import load_template
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.grid import Grid
from infra import cli
from tests.data_pipeline.prepare.phantoms import small_brain, small_recipe

pytestmark = pytest.mark.jobs  # ten CPU seconds
VBM = (
    "pipeline=vbm", "tissues.spacing=3", "nonlinear.spacing=3", "nonlinear.iterations=[10,5,0]",
    "spacing=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("vbm")
    for name, number in (("a", 0), ("b", 6)):
        folder = root / "raw" / f"sub-{name}" / "anat"
        folder.mkdir(parents=True)
        nibabel.save(small_brain(number), folder / f"sub-{name}_T1w.nii.gz")
    (root / "raw" / "participants.tsv").write_text("participant_id\tage\nsub-a\t30\nsub-b\t50\n")
    assert prepare_cohort(root / "raw", root / "out", small_recipe(*VBM), workers=1).prepared == 2
    return root / "out"


def grey_matter(folder, name):
    image = nibabel.load(
        folder / f"sub-{name}/ses-1/anat/sub-{name}_ses-1_space-MNI152NLin2009_desc-mwp1_probseg.nii.gz"
    )
    return np.asarray(image.dataobj, dtype=np.float64), image


def test_modulation_keeps_the_millilitres_of_grey_matter(prepared):
    table = pd.read_csv(prepared / "participants.tsv", sep="\t").set_index("participant_id")
    for name in ("a", "b"):
        row, (voxels, image) = table.loc[f"sub-{name}"], grey_matter(prepared, name)
        assert Grid.of(image.shape, image.affine) == Grid.vbm(3.0)
        assert voxels.sum() * 0.027 == pytest.approx(row["grey_ml"], rel=0.03)
        assert row["tiv"] == pytest.approx(row["grey_ml"] + row["white_ml"] + row["csf_ml"], rel=1e-4)
        assert 500 < row["grey_ml"] < 1100 > 1.05 * row["white_ml"] > 300
    # The sizes are 0.92 and 0.98 of the template.
    assert table.loc["sub-b", "tiv"] / table.loc["sub-a", "tiv"] == pytest.approx((0.98 / 0.92) ** 3, rel=0.08)


def test_grey_matter_lies_where_the_template_has_it(prepared):
    template = load_template(Grid.vbm(3.0))
    for name in ("a", "b"):
        assert np.corrcoef(grey_matter(prepared, name)[0].ravel(), template.grey.ravel())[0, 1] > 0.9


def test_shards_are_built_from_the_derivative_with_tiv(prepared, tmp_path):
    arguments = ["shards", "build", str(prepared), str(tmp_path / "shards"), "--modality", "vbm", "--scaling", "tiv"]
    assert cli.run(arguments) == 0
    manifest = Manifest.load(tmp_path / "shards")
    assert len(manifest.scans) == 2
    assert manifest.grid["spacing"] == [3.0, 3.0, 3.0]
    assert manifest.scans["grey_ml"].notna().all()


def test_the_warp_is_smooth_and_small(prepared):
    path = prepared / "sub-a/ses-1/anat/sub-a_ses-1_from-MNI152NLin2009_to-affine_mode-points_xfm.nii.gz"
    image = nibabel.load(path)
    assert image.shape == (*Grid.vbm(3.0).shape, 1, 3)
    assert image.header.get_intent()[0] == "vector"
    assert 0.05 < np.abs(image.get_fdata()).max() < 15
