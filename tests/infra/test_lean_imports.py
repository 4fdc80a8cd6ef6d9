"""Imports: each entry of the program loads only the large libraries that it needs; modules can be left out for a while."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from infra.lean_imports import without

LARGE = ("torch", "torch._dynamo", "torch._inductor.compile_fx", "deepspeed", "monai", "mlflow", "ray", "pandas", "sklearn",
         "nvidia.dali", "matplotlib.pyplot", "nibabel")  # fmt: skip
HELP = """
from contextlib import suppress
from infra.cli import run
with suppress(SystemExit):
    run([{!r}, '--help'])"""


def large_modules(code: str) -> set[str]:
    """Return which of LARGE a new process has imported after ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps([name for name in {LARGE!r} if sys.modules.get(name)]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import infra.cli", set()),
        ("import yaware", set()),
        (HELP.format("pretrain"), set()),
        (HELP.format("evaluate"), set()),
        ("import pretrain.launch.start", set()),
        ("import pretrain.engine.importing as i; i.import_deepspeed()", {"torch", "deepspeed"}),
        (
            "import pretrain.engine.importing as i; i.import_deepspeed(); i.import_muon_uncompiled()",
            {"torch", "deepspeed"},
        ),
        ("import pretrain.train", {"torch", "pandas", "nibabel"}),
    ],
)
def test_an_entry_imports_only_what_it_needs(code, allowed):
    assert large_modules(code) <= allowed


def test_a_module_is_hidden_only_within_the_block():
    sys.modules.pop("this", None)
    with pytest.raises(ImportError), without("this"):
        import this  # noqa: F401
    assert "this" not in sys.modules
    import colorsys

    with without("colorsys"):
        import colorsys as again
    assert again is colorsys is sys.modules["colorsys"]


def test_a_module_that_the_block_imports_under_the_same_name_stays():
    with without("wave"):
        del sys.modules["wave"]
        import wave
    assert sys.modules["wave"] is wave
