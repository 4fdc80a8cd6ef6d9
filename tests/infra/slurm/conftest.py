"""The folder in which a command is typed, and a stand-in for sbatch."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def start(tmp_path, monkeypatch):
    """The folder in which the command is typed."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "YAWARE_PYTHON", "YAWARE_HOST_PYTHON"))]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def sbatch(start, monkeypatch):
    """A stand-in for sbatch that records its arguments and says what the test wrote into ``answer``."""
    tool = start / "bin" / "sbatch"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {start}/calls\n. {start}/answer\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return start / "answer"
