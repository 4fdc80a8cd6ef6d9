"""``Embedder`` as a step of scikit-learn pipelines."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from pretrain import Embedder, Encoder
from tests.pretrain.weights.encoders import write_scans, write_small_encoder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("embedder")
    write_small_encoder(root / "encoder")
    return root / "encoder", [str(path) for path in write_scans(root / "scans", 12)]


def test_a_pipeline_takes_a_list_of_paths(files):
    folder, paths = files
    ages = np.arange(20.0, 32.0)
    model = make_pipeline(Embedder(folder), StandardScaler(), Ridge(1.0)).fit(paths, ages)
    features = Encoder.from_pretrained(folder).embed(paths, progress=False).to_numpy()
    expected = make_pipeline(StandardScaler(), Ridge(1.0)).fit(features, ages).predict(features)
    np.testing.assert_allclose(model.predict(paths), expected, rtol=1e-3)
    search = GridSearchCV(model, {"embedder__layer": [None, "layer1"]}, cv=3).fit(np.array(paths), ages)
    assert search.best_estimator_.predict(paths).shape == (12,)


def test_a_pipeline_takes_rows_of_a_manifest(tmp_path, shards):
    manifest = Manifest.load(shards)
    write_small_encoder(tmp_path / "encoder", manifest.grid, modality="vbm")
    model = make_pipeline(Embedder(tmp_path / "encoder", manifest=shards), Ridge(1.0))
    table = manifest.scans.iloc[manifest.rows(split="pretrain")[:9]]
    from_tables = cross_val_predict(model, table, table["age"], cv=3)
    from_rows = cross_val_predict(model, table.index.to_numpy(), table["age"], cv=3)
    np.testing.assert_allclose(from_tables, from_rows, rtol=1e-4)


def test_scikit_learns_conventions(files):
    folder, paths = files
    embedder = Embedder(folder, layer="layer2", pooling=("mean", "std"), batch_size=4)
    with pytest.raises(NotFittedError):
        embedder.transform(paths)
    assert embedder.fit(paths) is embedder
    copy = clone(embedder)
    assert copy.get_params() == embedder.get_params()
    assert not hasattr(copy, "encoder_")
    features = embedder.transform(paths)
    names = embedder.get_feature_names_out()
    assert features.shape == (12, len(names))
    table = embedder.set_output(transform="pandas").fit_transform(pd.DataFrame({"path": paths}, index=range(5, 17)))
    assert table.columns.tolist() == names.tolist() == [f"f{number}" for number in range(len(names))]
    assert table.index.tolist() == list(range(5, 17))
    np.testing.assert_array_equal(table.to_numpy(), features)
    assert embedder.set_params(layer=None, pooling="mean").fit(paths).transform(paths).shape == (12, 128)
    with pytest.raises(UserError, match="layer='layer9' is not a block"):
        embedder.set_params(layer="layer9").fit(paths)


def test_an_embedder_of_a_loaded_encoder_can_be_cloned_and_pickled(files):
    folder, paths = files
    embedder = Embedder(Encoder.from_pretrained(folder))
    features = embedder.fit_transform(paths[:2])
    for copy in (clone(embedder).fit(paths), pickle.loads(pickle.dumps(embedder))):
        np.testing.assert_array_equal(copy.transform(paths[:2]), features)


# scikit-learn's checks that call transform with a matrix of random numbers; an Embedder refuses what is not a path.
NEEDS_MATRIX = (
    "check_fit_score_takes_y", "check_estimators_dtypes", "check_pipeline_consistency", "check_estimators_pickle",
    "check_f_contiguous_array_estimator", "check_transformer_general", "check_transformer_preserve_dtypes",
    "check_methods_sample_order_invariance", "check_methods_subset_invariance", "check_dict_unchanged",
    "check_fit_idempotent",
)  # fmt: skip
# `fit` does not look at X, so that it cannot refuse a sparse matrix.
IGNORES_X = ("check_estimator_sparse_tag",)


class MatrixEmbedder(Embedder):
    """An Embedder that claims to take matrices: scikit-learn runs no checks for input of another kind."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


def test_scikit_learns_own_checks_pass_except_those_that_need_a_matrix(files):
    results = check_estimator(MatrixEmbedder(files[0]), on_skip=None, on_fail=None)
    failed = {result["check_name"]: str(result["exception"]) for result in results if result["status"] == "failed"}
    assert failed.keys() <= {*NEEDS_MATRIX, *IGNORES_X}, failed
    assert all("is not a path" in message for name, message in failed.items() if name in NEEDS_MATRIX)
    assert len([result for result in results if result["status"] == "passed"]) >= 20
