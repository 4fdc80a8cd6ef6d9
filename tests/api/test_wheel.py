"""A wheel built from the checkout, installed into an environment of its own, works outside of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["infra", "data_pipeline", "pretrain", "evaluation"]
# Files beside the code that only a checkout needs: they set it up, run its demo, or pin its packages.
CHECKOUT_ONLY = {"infra/constraints.txt", "infra/demo/run.sh", "infra/setup.sh", "infra/test_packages.sh"}


def run(*command, cwd, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=True, **options
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without network by the installed setuptools from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source, ignored = folder / "source", shutil.ignore_patterns("__pycache__", "*.egg-info")
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "yaware.py"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    run(*pip, "--no-index", "--wheel-dir", folder, source, cwd=folder)
    (path,) = folder.glob("yaware-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A virtual environment with the wheel; its other packages are those of the running environment."""
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # .pth files found there are not read
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "venv" / "bin" / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
    return folder / "venv"


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {"yaware.py"}
    for package in PACKAGES:
        files = [path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        expected |= {path.relative_to(ROOT).as_posix() for path in files}
    missing = expected - inside - CHECKOUT_ONLY
    assert not missing
    top = {name.split("/")[0] for name in inside}
    assert {name for name in top if not name.endswith(".dist-info")} == {*PACKAGES, "yaware.py"}
    for name in ("pretrain/recipes/demo-cpu.yaml", "infra/launch/pretrain.sbatch", "pretrain/py.typed"):
        assert name in inside
    assert [name for name in inside if name.startswith("evaluation/tasks/files/")]


def test_the_installed_command_answers_outside_of_the_checkout(installed, tmp_path):
    command = installed / "bin" / "yaware"
    assert run(command, "--help", cwd=tmp_path).stdout.startswith("usage: yaware COMMAND")
    assert run(command, "--version", cwd=tmp_path).stdout.startswith("yaware ")
    printed = run(command, "pretrain", "--config", "demo-cpu", "--print_config", cwd=tmp_path).stdout
    assert "name: y-aware" in printed


def test_the_installed_library_is_imported_outside_of_the_checkout(installed, tmp_path):
    code = """
import json, yaware
import infra, pretrain, data_pipeline, evaluation
modules = [yaware, infra, pretrain, data_pipeline, evaluation]
recipe = yaware.Recipe.load("demo-cpu")
print(json.dumps([[module.__file__ for module in modules], recipe.encoder.name, sorted(yaware.KERNELS)[:1]]))
"""
    files, encoder, kernels = json.loads(run(installed / "bin" / "python", "-c", code, cwd=tmp_path).stdout)
    assert all(Path(file).is_relative_to(installed) for file in files)
    assert encoder == "resnet18"
    assert kernels
