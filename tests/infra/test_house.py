"""The shape of the house: imports run one way, heavy libraries stand behind one module each, --help is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["infra", "data_pipeline", "pretrain", "evaluation"]  # a package may import those before it
HEAVY = {
    "nvidia": "data_pipeline/loading/dali_graph.py",
    "deepspeed": "pretrain/engine/engine.py",
    "ray": "infra/ray_cluster.py",
    "mlflow": "infra/tracking/mlflow_store.py",
    "monai": "pretrain/encoders/networks.py",
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_imports_run_one_way():
    wrong = []
    for path in sources():
        package = path.relative_to(ROOT).parts[0]
        above = set(PACKAGES[PACKAGES.index(package) + 1 :])
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in imports(path) & above]
    assert not wrong


def test_heavy_libraries_have_one_door_each():
    wrong = []
    for path in sources():
        name = str(path.relative_to(ROOT))
        wrong += [f"{name} imports {library}" for library in imports(path) & HEAVY.keys() if HEAVY[library] != name]
    assert not wrong
    for library, door in HEAVY.items():
        assert library in imports(ROOT / door), f"{door} no longer uses {library}"


def test_packages_import_without_heavy_libraries():
    code = (
        f"import sys; import {', '.join(PACKAGES)}, infra.cli; "
        f"print([m for m in {['torch', 'pandas', *HEAVY]} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_subcommand_resolves():
    from importlib import import_module

    from infra.cli import SUBCOMMANDS

    for name, (module, _) in SUBCOMMANDS.items():
        assert name in import_module(module).COMMANDS
