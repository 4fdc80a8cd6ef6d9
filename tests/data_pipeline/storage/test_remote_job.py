"""The real commands on remote and foreign shards: the same losses as from disk, and an evaluation."""

from __future__ import annotations

import sys

import pytest

from data_pipeline.shards.index import index_shards
from data_pipeline.storage import remote
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.remote import Access
from tests.runs import losses, pretrain_command, run
from tests.servers import s3_server

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def bucket(shards, tmp_path_factory):
    """An S3 server with the built shards in s3://scans/built and only their tars in s3://scans/bare."""
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        store = remote.filesystem("s3://scans", Access())
        store.mkdir("scans")
        for path in shards.iterdir():
            if path.is_file():
                store.put_file(str(path), f"scans/built/{path.name}")
                if path.suffix == ".tar":
                    store.put_file(str(path), f"scans/bare/{path.name}")
        yield "s3://scans"


def test_pretraining_from_s3_has_the_same_losses_as_from_disk(shards, bucket, tmp_path):
    cache = tmp_path / "cache"
    for name, source, more in (("disk", str(shards), []), ("s3", f"{bucket}/built", [f"--data.cache={cache}"])):
        done = run(pretrain_command(source, tmp_path / name, 3, *more), tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "disk")) == 3
    assert losses(tmp_path / "s3") == losses(tmp_path / "disk")
    assert {path.stem for path in cache.glob("*.tar")} <= {row["sha256"] for row in Manifest.load(shards).shards}
    assert list(cache.glob("*.tar"))


def test_indexed_tars_in_s3_serve_pretraining_and_evaluation(bucket, shards, tmp_path):
    table = tmp_path / "participants.tsv"
    columns = ["participant_id", "session", "age", "sex", "site", "diagnosis"]
    Manifest.load(shards).scans[columns].to_csv(table, sep="\t", index=False)
    index = index_shards(f"{bucket}/bare", tmp_path / "index", participants=str(table), spacing=6.0, workers=2)
    assert (index.shards_root, len(index.scans)) == (f"{bucket}/bare", 72)
    done = run(pretrain_command(tmp_path / "index", tmp_path / "run", 2), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    command = [
        sys.executable,
        "-m",
        "infra.cli",
        "evaluate",
        str(tmp_path / "run"),
        "--shards",
        str(tmp_path / "index"),
    ]
    done = run([*command, "--tasks", "age", "--folds", "2", "--draws", "1", "--workers", "2"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "age.mae" in done.stdout
