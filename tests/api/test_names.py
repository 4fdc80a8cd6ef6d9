"""The public names as a user imports them: lazy, complete, and the same whatever was imported before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import yaware

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "data_pipeline": [
        "AUGMENTATIONS",
        "Manifest",
        "PrepareRecipe",
        "TwoViewLoader",
        "build_shards",
        "prepare_cohort",
        "read_cohort",
        "simulate_cohort",
    ],
    "pretrain": [
        "ENCODERS",
        "Embedder",
        "Encoder",
        "KERNELS",
        "LOSSES",
        "Recipe",
        "Run",
        "add_readouts",
        "embed",
        "export",
        "pretrain",
    ],
    "evaluation": ["Comparison", "PROTOCOLS", "Reliability", "compare", "evaluate", "reliability"],
}
FUNCTIONS = [
    "add_readouts",
    "build_shards",
    "compare",
    "embed",
    "evaluate",
    "export",
    "prepare_cohort",
    "pretrain",
    "read_cohort",
    "reliability",
    "simulate_cohort",
]
# Imported before the names are used: submodules whose names could replace a function of the same name.
SUBMODULES = [
    "data_pipeline.shards.build", "data_pipeline.cohort.read", "data_pipeline.simulation.cohort", "data_pipeline.cli",
    "pretrain.weights.embedding", "pretrain.weights.write", "pretrain.weights.cli", "pretrain.cli",
    "pretrain.train", "pretrain.api",
    "evaluation.comparison.comparison", "evaluation.protocols.evaluate", "evaluation.cli", "evaluation.compare_cli",
    "evaluation.retest.api",
]  # fmt: skip


def python(code):
    """Run code in a fresh process and return what it prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def kinds_after(imports):
    """The kind of every public function in a process that began with some imports."""
    owners = {name: package for package, names in PACKAGES.items() for name in names if name in FUNCTIONS}
    code = f"""
import importlib, json
for name in {imports!r}:
    importlib.import_module(name)
import yaware
kinds = {{}}
for name, package in {owners!r}.items():
    values = getattr(yaware, name), getattr(importlib.import_module(package), name)
    kinds[name] = sorted({{type(value).__name__ for value in values}})
print(json.dumps(kinds))
"""
    return python(code)


def test_import_yaware_loads_no_other_library():
    code = "import json, sys; before = set(sys.modules); import yaware; print(json.dumps(sorted(set(sys.modules) - before)))"
    loaded = {name.split(".")[0] for name in python(code)}
    assert loaded - set(sys.stdlib_module_names) == {"yaware"}


def test_import_of_a_package_loads_no_heavy_library():
    code = f"""
import json, sys
import {", ".join(PACKAGES)}
heavy = ["torch", "numpy", "pandas", "sklearn", "scipy", "matplotlib", "ray", "mlflow", "deepspeed", "monai", "nvidia"]
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    assert python(code) == []


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param([], id="none"),
        pytest.param(["evaluation.comparison.comparison"], id="one"),
        pytest.param(SUBMODULES, id="all", marks=pytest.mark.jobs),
        pytest.param(SUBMODULES[::-1], id="reverse", marks=pytest.mark.jobs),
    ],
)
def test_a_function_is_a_function_whatever_was_imported_before(imports):
    assert kinds_after(imports) == {name: ["function"] for name in FUNCTIONS}


def test_every_public_name_is_listed_and_is_that_of_its_package():
    names = [name for names in PACKAGES.values() for name in names]
    assert sorted(yaware.__all__) == sorted(names)
    assert set(names) <= set(dir(yaware))
    for package, members in PACKAGES.items():
        module = __import__(package)
        assert set(members) <= set(dir(module))
        for name in members:
            assert getattr(yaware, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="module 'yaware' has no attribute 'pretrian'"):
        yaware.pretrian  # noqa: B018


def test_scikit_learn_is_loaded_for_the_embedder_only():
    code = "import json, sys, yaware; yaware.Encoder; loaded = 'sklearn' in sys.modules; yaware.Embedder; "
    assert python(code + "print(json.dumps([loaded, 'sklearn' in sys.modules]))") == [False, True]


def test_type_checkers_see_every_public_name():
    for package, members in PACKAGES.items():
        assert (ROOT / package / "py.typed").is_file()
        facade, inside = (ROOT / "yaware.py").read_text(), (ROOT / package / "__init__.py").read_text()
        for name in members:
            assert f"from {package} import {name} as {name}\n" in facade
            assert f" import {name} as {name}\n" in inside
