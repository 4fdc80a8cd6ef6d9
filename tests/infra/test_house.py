"""The house rules hold for this project, and each rule finds a violation in a small bad source."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

from tests.infra import house_rules

ROOT = Path(__file__).resolve().parents[2]
# A package may import those before it; yaware.py is a module that re-exports from all.
PACKAGES = ["infra", "data_pipeline", "pretrain", "evaluation", "yaware"]
ALLOWED = [*PACKAGES[:4], "yaware.py", "tests", "docs"]
LIBRARY_ROOMS = {
    "nvidia": "data_pipeline/loading",
    "deepspeed": "pretrain/engine",
    "ray": "infra/ray_cluster.py",
    "mlflow": "infra/tracking",
    "monai": "pretrain/encoders",
    "statsmodels": "evaluation/retest/variance.py",
    "fairlearn": "evaluation/statistics/fairness.py",
    "ants": "data_pipeline/prepare/steps/antspy.py",
    "deepbet": "data_pipeline/prepare/steps/extraction.py",
    "huggingface_hub": "pretrain/hub/download.py",
    "pydicom": "data_pipeline/prepare/steps/dicom.py",
}
# Modules that import others by a text, and the table of these texts: the command line imports the module of the command that
# is called, and the packages import a public name at its first use (the rule of circles follows those names).
IMPORTS_BY_TABLE = {
    "infra/cli.py": "SUBCOMMANDS",
    "data_pipeline/__init__.py": "_MODULES",
    "pretrain/__init__.py": "_MODULES",
    "evaluation/__init__.py": "_MODULES",
    "yaware.py": "_PACKAGES",
}
OPTIONAL_LIBRARIES = {"umap", "deepmriprep"}  # used if the user has installed it


def none_of(violations):
    """Fail with one line per violation."""
    violations = list(violations)
    assert not violations, "\n" + "\n".join(violations)


@pytest.fixture(scope="module")
def paths():
    """Every Python file of the checkout that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in listed if (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def every_module(paths):
    return house_rules.read_modules(ROOT, paths)


@pytest.fixture(scope="module")
def packaged(every_module):
    """The modules of the packages, and yaware.py."""
    return [module for module in every_module if module.name.split(".")[0] in PACKAGES]


def test_no_module_imports_itself_through_others(packaged):
    none_of(house_rules.circles(house_rules.import_graph(packaged)))


def test_no_room_imports_itself_through_others(packaged):
    none_of(house_rules.circles(house_rules.room_graph(packaged)))


def test_packages_import_in_one_direction(packaged):
    none_of(house_rules.upward_imports(packaged, PACKAGES))


def test_only_the_named_tables_hide_an_import(packaged):
    none_of(house_rules.unnamed_imports(packaged, IMPORTS_BY_TABLE))


def test_each_heavy_library_is_imported_in_one_room(packaged):
    none_of(house_rules.misplaced_libraries(packaged, LIBRARY_ROOMS))


def test_no_folder_has_too_many_modules(every_module):
    none_of(house_rules.crowded_folders(every_module))


def test_no_file_is_too_long(every_module):
    none_of(house_rules.long_files(every_module))


def test_no_function_is_too_long(every_module):
    none_of(house_rules.long_functions(every_module))


def test_no_call_has_too_many_positional_arguments(every_module):
    none_of(house_rules.positional_calls(every_module))


def test_everything_public_has_a_docstring(every_module):
    public = [module for module in every_module if not module.path.startswith(("tests/", "docs/"))]
    none_of(house_rules.missing_docstrings(public))


def test_no_code_lies_outside_the_packages_tests_and_docs(paths):
    none_of(house_rules.other_code(paths, ALLOWED))


def test_contributing_names_every_room():
    rows = [line.split("|") for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| `")]
    named = {package.strip(" `"): set(re.findall(r"`(\w+)`", rooms)) for _, package, _, rooms, _ in rows}
    for package in PACKAGES[:4]:
        folders = {path.parent.relative_to(ROOT / package) for path in (ROOT / package).glob("*/*") if path.is_file()}
        assert named[package] == {folder.name for folder in folders} - {"__pycache__", "recipes"}, package


def test_every_imported_library_is_a_declared_dependency(packaged):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["remote"], *extras["prepare"]]
    declared = {normalised(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}
    imported = {source.partition(".")[0] for module in packaged for source, _ in house_rules.imported_names(module)}
    distributions = {"ants": ["antspyx"], **metadata.packages_distributions()}  # also where that extra is not installed
    none_of(
        f"{library} is imported, but not in the dependencies of pyproject.toml"
        for library in sorted(imported - sys.stdlib_module_names - {*PACKAGES, *OPTIONAL_LIBRARIES})
        if declared.isdisjoint(normalised(name) for name in distributions.get(library, [library]))
    )


def normalised(name):
    """Return a distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_packages_import_without_heavy_libraries():
    code = (
        f"import sys; import {', '.join(PACKAGES)}, infra.cli; "
        f"print([m for m in {['torch', 'pandas', *LIBRARY_ROOMS]} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_subcommand_resolves():
    from importlib import import_module

    from infra.cli import SUBCOMMANDS

    for name, (module, _) in SUBCOMMANDS.items():
        assert name in import_module(module).COMMANDS


# Each rule on a small bad source.


def write(root, sources):
    """Write a source tree (path -> text) and read its modules."""
    for path, text in sources.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(textwrap.dedent(text))
    return house_rules.read_modules(root, sources)


def test_a_circle_through_a_lazy_import_is_found(tmp_path):
    modules = write(
        tmp_path,
        {
            "p/__init__.py": "",
            "p/a.py": "from p import b\n",
            "p/b.py": "import p.c\n",
            "p/c.py": "def f():\n    from p.a import g\n",
            "p/d.py": "import p.a\n",
        },
    )
    assert house_rules.circles(house_rules.import_graph(modules)) == ["circle: p.a <-> p.b <-> p.c"]


def test_imports_for_type_checking_make_no_circle(tmp_path):
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.b\n"
    modules = write(tmp_path, {"p/a.py": guarded, "p/b.py": "import p.a\n"})
    none_of(house_rules.circles(house_rules.import_graph(modules)))


@pytest.mark.parametrize(
    "back",
    [
        "from . import a\n",
        "from .a import x\n",
        "from ..q import a\n",
        "from importlib import import_module\nimport_module('p.q.a')\n",
        "from importlib import import_module as load\nload('p.q.a')\n",
        "import importlib\ndef f():\n    importlib.import_module('.a', __package__)\n",
        "import importlib\nload = importlib.import_module\nload(name='p.q.a')\n",
        "__import__('p.q.a')\n",
        "from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    import p.q.a\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import os\nelse:\n    import p.q.a\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING or True:\n    import p.q.a\n",
        "class A:\n    from p.q.a import x\n",
    ],
)
def test_a_circle_through_any_kind_of_import_is_found(tmp_path, back):
    modules = write(tmp_path, {"p/q/__init__.py": "", "p/q/a.py": "import p.q.b\nx = 1\n", "p/q/b.py": back})
    assert house_rules.circles(house_rules.import_graph(modules)) == ["circle: p.q.a <-> p.q.b"]


@pytest.mark.parametrize("back", ["from p import f\n", "import p\n", "from p import *\n", "from . import f\n"])
def test_a_circle_through_a_lazy_package_is_found(tmp_path, back):
    lazy = """
    from importlib import import_module
    _MODULES = {"f": "p.a", "g": "p.c"}
    def __getattr__(name):
        return getattr(import_module(_MODULES[name]), name)
    """
    modules = write(tmp_path, {"p/__init__.py": lazy, "p/a.py": "import p.b\nf = 1\n", "p/b.py": back, "p/c.py": ""})
    assert house_rules.circles(house_rules.import_graph(modules)) == ["circle: p.a <-> p.b"]


def test_an_import_of_another_name_of_a_lazy_package_makes_no_circle(tmp_path):
    lazy = "_MODULES = {'f': 'p.a', 'g': 'p.c'}\ndef __getattr__(name): ...\n"
    sources = {"p/__init__.py": lazy, "p/a.py": "import p.b\n", "p/b.py": "from p import g\n", "p/c.py": ""}
    none_of(house_rules.circles(house_rules.import_graph(write(tmp_path, sources))))


def test_an_import_by_a_text_that_is_not_constant_is_found(tmp_path):
    sources = {
        "p/a.py": "from importlib import import_module\nimport_module(TABLE[x])\n",
        "p/b.py": "import importlib\nimportlib.import_module(name)\n",
        "p/c.py": "__import__(f'{name}.x')\n",
        "p/d.py": "__import__(f'ray.{name}')\n__import__('ray')\n",
        "p/e.py": "import importlib\nimportlib.import_module(OTHER[x])\n",
    }
    exceptions = {"p/a.py": "TABLE", "p/d.py": "TABLE", "p/e.py": "TABLE"}
    assert house_rules.unnamed_imports(write(tmp_path, sources), exceptions) == [
        "p/b.py:2 imports a module whose name is not constant",
        "p/c.py:1 imports a module whose name is not constant",
        "p/e.py:2 imports a module whose name is not constant",
        "p/d.py imports no module by TABLE",
        "p/e.py imports no module by TABLE",
    ]


def test_rooms_that_import_each_other_are_found(tmp_path):
    modules = write(
        tmp_path,
        {"p/one/a.py": "", "p/one/b.py": "import p.two.c\n", "p/two/c.py": "", "p/two/d.py": "import p.one.a\n"},
    )
    assert house_rules.circles(house_rules.import_graph(modules)) == []
    assert house_rules.circles(house_rules.room_graph(modules)) == ["circle: p.one <-> p.two"]


def test_an_import_against_the_direction_is_found(tmp_path):
    sources = {
        "low/a.py": "def f():\n    from high.b import g\n",
        "low/c.py": "from importlib import import_module\nimport_module('high.b')\n",
        "high/b.py": "import low.a\n",
    }
    assert house_rules.upward_imports(write(tmp_path, sources), ["low", "high"]) == [
        "low/a.py imports high.b", "low/c.py imports high.b",
    ]  # fmt: skip


def test_a_heavy_library_outside_its_room_is_found(tmp_path):
    sources = {
        "p/room/a.py": "import ray.tune\n",
        "p/room/deep/b.py": "import ray\n",
        "p/c.py": "def f():\n    from ray import tune\n",
        "p/d.py": "__import__('ray')\n",
        "p/e.py": "from importlib import import_module\nimport_module(f'ray.{name}')\n",
        "p/f.py": "from .ray import x\n",
    }
    assert house_rules.misplaced_libraries(write(tmp_path, sources), {"ray": "p/room", "mlflow": "p/room"}) == [
        "p/c.py imports ray; only p/room may",
        "p/d.py imports ray; only p/room may",
        "p/e.py imports ray; only p/room may",
        "p/room does not import mlflow",
    ]


def test_a_heavy_library_beside_its_file_is_found(tmp_path):
    modules = write(tmp_path, {"p/a.py": "import ray\n", "p/b.py": "import ray\n"})
    assert house_rules.misplaced_libraries(modules, {"ray": "p/a.py"}) == ["p/b.py imports ray; only p/a.py may"]


def test_a_crowded_folder_is_found(tmp_path):
    modules = write(tmp_path, {f"p/m{i}.py": "" for i in range(17)})
    assert house_rules.crowded_folders(modules[:16]) == []
    assert house_rules.crowded_folders(modules) == ["p: 17 modules, allowed 16"]


def test_a_long_file_is_found(tmp_path):
    modules = write(tmp_path, {"a.py": "x = 1\n" * 350, "b.py": "x = 1\n" * 351})
    assert house_rules.long_files(modules) == ["b.py: 351 lines, allowed 350"]


def test_a_long_function_is_found_by_its_code_lines(tmp_path):
    def function(code_lines):
        return 'def f():\n    """Text\n    of two lines."""\n\n    # comment\n' + "    x = 1\n" * (code_lines - 1)

    modules = write(tmp_path, {"a.py": function(50), "b.py": function(51)})
    assert house_rules.long_functions(modules) == ["b.py:1 f: 51 code lines, allowed 50"]


def test_a_call_with_many_positional_arguments_is_found(tmp_path):
    modules = write(tmp_path, {"a.py": "f(1, 2, 3, 4, 5, 6, *x, y=7)\n", "b.py": "f(1, 2, 3, 4, 5, 6, 7)\n"})
    assert house_rules.positional_calls(modules) == ["b.py:1 7 positional arguments, allowed 6"]


def test_missing_docstrings_are_found(tmp_path):
    source = '''
    class A:
        """Text."""

        def method(self): ...
        def _private(self): ...
    async def f():
        def nested(): ...
    def _private(): ...
    if True:
        def g(): ...
    else:
        try:
            class B:
                """Text."""
                if True:
                    def method(self): ...
        except OSError:
            def h(): ...
    '''
    modules = write(tmp_path, {"a.py": source})
    assert house_rules.missing_docstrings(modules) == [
        "a.py: no docstring", "a.py:5 A.method: no docstring", "a.py:7 f: no docstring", "a.py:11 g: no docstring",
        "a.py:17 B.method: no docstring", "a.py:19 h: no docstring",
    ]  # fmt: skip


def test_code_in_another_folder_is_found():
    assert house_rules.other_code(["p/a.py", "scripts/b.py", "setup.py"], ["p", "tests"]) == [
        "scripts/b.py: no code outside p, tests", "setup.py: no code outside p, tests",
    ]  # fmt: skip
