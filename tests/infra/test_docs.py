"""The documentation builds without warnings, needs no network, and its reference lists every public name."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import yaware

ROOT = Path(__file__).resolve().parents[2]
# What a browser would load from another host: scripts, images, style sheets and fonts; links are fine.
LOADED = re.compile(r"""(?:\bsrc=|<link[^>]*\bhref=|\burl\(|@import\s+)["']?(?:https?:)?//[^"')\s>]+""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning fails the build (``strict`` in mkdocs.yml)."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_pages_load_nothing_from_other_hosts(site):
    for path in site.rglob("*"):
        if path.suffix in (".html", ".css", ".js"):
            assert LOADED.findall(path.read_text(encoding="utf-8")) == [], path


def test_the_page_of_the_launch_files_is_their_readme(site):
    assert "pretrain-deepspeed.sbatch" in (site / "launch.html").read_text(encoding="utf-8")
    assert 'href="launch.html' in (site / "index.html").read_text(encoding="utf-8")
    assert 'href="cluster.html' in (site / "index.html").read_text(encoding="utf-8")


def test_the_reference_lists_every_public_name():
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    listed = {name for page in pages for name in re.findall(r"^::: yaware\.(\w+)$", page, re.MULTILINE)}
    assert listed == set(yaware.__all__)


def test_a_notebook_becomes_a_page_with_its_outputs():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    outputs = [
        {"output_type": "stream", "text": ["\x1b[1mone\x1b[0m\n", "two\n"]},
        {"output_type": "display_data", "data": {"image/png": "aGk=", "text/plain": ["<Figure>"]}},
        {"output_type": "execute_result", "data": {"text/html": ["<table></table>"], "text/plain": ["x"]}},
        {"output_type": "execute_result", "data": {"text/plain": ["3"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text."]},
        {"cell_type": "code", "source": ["x = 1\n", "x + 2"], "outputs": outputs},
    ]
    page, images = hooks.notebook_page({"cells": cells}, "first")
    assert images == {"first-1.png": b"hi"}
    assert page.split("\n\n") == [
        "# Title\nText.", "```python\nx = 1\nx + 2\n```", "```text\none\ntwo\n```", "![output](first-1.png)",
        "<table></table>", "```text\n3\n```\n",
    ]  # fmt: skip


def test_every_file_and_module_that_a_page_names_exists():
    names = ("README.md", "CONTRIBUTING.md", "infra/launch/README.md")
    missing = []
    for page in [*ROOT.glob("docs/**/*.md"), *(ROOT / name for name in names)]:
        text = page.read_text(encoding="utf-8")
        paths = re.findall(r"`((?:infra|data_pipeline|pretrain|evaluation|tests|docs)/[\w./-]*\w)`", text)
        missing += [f"{page.name}: {path}" for path in paths if not (ROOT / path).exists()]
        modules = re.findall(r"`((?:infra|data_pipeline|pretrain|evaluation|tests)\.\w+)", text)
        missing += [f"{page.name}: {name}" for name in modules if not _exists(name)]
    assert not missing


def _exists(name):
    """Whether ``package.name`` is a module, a room, a public name, or a file of infra/launch."""
    package, attribute = name.split(".")
    path = ROOT / package / attribute
    if path.is_dir() or path.with_suffix(".py").is_file() or (ROOT / "infra" / "launch" / name).is_file():
        return True
    return attribute in getattr(importlib.import_module(package), "__all__", [])
