"""The pipeline as a user without name and home, with a read-only cohort, read-only shards and a TMPDIR of 100 letters."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.extensions import extensions_folder

ROOT = Path(__file__).resolve().parents[2]
AS_A_NUMBER = ("unshare", "--user", "--map-user=12345", "--map-group=12345")


def read_only(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pipeline_of_a_user_without_name_and_home(tmp_path):
    if subprocess.run([*AS_A_NUMBER, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a user namespace")
    temporary = tmp_path / ("t" * 100)
    temporary.mkdir(mode=0o700)
    shutil.copytree(extensions_folder(), tmp_path / "extensions")
    cohort, shards, output = tmp_path / "cohort", tmp_path / "shards", tmp_path / "run"
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C",
        "TMPDIR": str(temporary), "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }  # fmt: skip

    def yaware(words: str, *paths: object) -> None:
        command = [*AS_A_NUMBER, sys.executable, "-m", "infra.cli", *shlex.split(words), *map(str, paths)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        print(done.stdout[-2000:], done.stderr[-2000:])
        assert done.returncode == 0
        assert "Traceback" not in done.stderr

    yaware("cohort simulate --participants 60 --spacing 12 --workers 1", cohort)
    read_only(cohort)
    yaware("shards build", cohort, shards)
    read_only(shards)
    settings = "--train.steps=2 --batch.global=8 --monitor.every_epochs=0 --data.workers=1 --launch.ranks=1"
    small = "'--encoder.options={width: 0.25, norm: group}'"
    yaware(f"pretrain --config demo-cpu {settings} {small}", f"--data.shards={shards}", f"--run.output={output}")
    read_only(output)
    evaluate = f"evaluate {output} --shards {shards} --tasks age --folds 2 --n-train 20 --draws 1"
    yaware(f"{evaluate} --protocols linear")
    yaware(f"{evaluate} --protocols knn --workers 1 --cache", tmp_path / "features")
    assert list((tmp_path / "features").iterdir())
    yaware(f"embed {output} --shards {shards} --out", tmp_path / "features.tsv")
    assert list((temporary / "yaware-12345/.cache/yaware").iterdir())
