"""The documentation builds without warnings, needs no network, and its reference lists every public name."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a browser would load from another host: scripts, images, style sheets and fonts; links are fine.
LOADED = re.compile(r"""(?:\bsrc=|<link[^>]*\bhref=|\burl\(|@import\s+)["']?(?:https?:)?//[^"')\s>]+""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning fails the build (``strict`` in mkdocs.yml)."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_pages_load_nothing_from_other_hosts(site):
    for path in site.rglob("*"):
        if path.suffix in (".html", ".css", ".js"):
            assert LOADED.findall(path.read_text(encoding="utf-8")) == [], path


def test_the_cluster_page_is_the_readme_of_the_launch_files(site):
    assert "pretrain-deepspeed.sbatch" in (site / "cluster.html").read_text(encoding="utf-8")
    assert 'href="cluster.html' in (site / "index.html").read_text(encoding="utf-8")


def test_the_reference_lists_every_public_name():
    listed = {}
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for path in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, name = path.rpartition(".")
            listed[name] = getattr(importlib.import_module(module), name)
    yaware = pytest.importorskip("yaware")
    assert set(yaware.__all__) <= listed.keys()
    assert all(listed[name] is getattr(yaware, name) for name in yaware.__all__)
