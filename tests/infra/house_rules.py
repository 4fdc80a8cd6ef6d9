"""The house rules as functions. Each takes the modules of a source tree and returns one line per violation."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_POSITIONAL, MAX_MODULES = 350, 50, 6, 16
Graph = dict[str, set[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A Python file: its path below the root of the tree, its dotted name and its text."""

    path: str
    name: str
    text: str = field(repr=False)

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def folder(self) -> str:
        return str(Path(self.path).parent)

    @property
    def package(self) -> str:
        """The dotted name of the package to which the module's relative imports refer."""
        return self.name if Path(self.path).name == "__init__.py" else self.name.rpartition(".")[0]


def read_modules(root: Path, paths: Iterable[str]) -> list[Module]:
    """Read the Python files ``paths`` (relative to ``root``)."""
    modules = []
    for path in sorted(paths):
        parts = Path(path).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(path, name, (root / path).read_text(encoding="utf-8")))
    return modules


def imported_names(module: Module) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of every import: in functions, relative, and of ``import_module`` with a constant text too.

    Of a formatted text such as ``import_module(f"ray.{part}")`` the constant beginning counts (``ray``). Only the body of
    ``if TYPE_CHECKING:`` is left out; its ``else`` and the body of ``if not TYPE_CHECKING:`` count.
    """
    tree = module.tree
    importers = _importers(tree)
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = _absolute("." * node.level + (node.module or ""), module.package)
            yield from ((source, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and _last_name(node.func) in importers:
            source = _absolute(_constant_beginning(_first_argument(node)), module.package)
            if source:
                yield source, None
        waiting += ast.iter_child_nodes(node)


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name | ast.Attribute) and _last_name(test) == "TYPE_CHECKING"


def _last_name(node: ast.expr) -> str | None:
    """Return ``c`` for the expressions ``c`` and ``a.b.c``."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _importers(tree: ast.Module) -> set[str]:
    """Return the names of the functions that import a module by a text: Python's own, and new names for them."""
    names = {"import_module", "__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "importlib":
            names |= {alias.asname for alias in node.names if alias.name in names and alias.asname}
        elif isinstance(node, ast.Assign) and _last_name(node.value) in names:
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _first_argument(call: ast.Call) -> ast.expr | None:
    return call.args[0] if call.args else next((word.value for word in call.keywords if word.arg == "name"), None)


def _constant_beginning(node: ast.expr | None) -> str:
    """Return a constant text, the whole parts of a module's name that a formatted text begins with, or an empty text."""
    if isinstance(node, ast.JoinedStr) and node.values and isinstance(node.values[0], ast.Constant):
        return str(node.values[0].value).rpartition(".")[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _absolute(source: str, package: str) -> str:
    """Return the absolute name of a module that is imported in ``package``: ``..a`` in ``p.q`` is ``p.a``."""
    name = source.lstrip(".")
    level = len(source) - len(name)
    if level == 0:
        return name
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - level + 1], *([name] if name else [])])


def unnamed_imports(modules: Sequence[Module], exceptions: Mapping[str, str]) -> list[str]:
    """Return imports by a text that is not constant, and exceptions (path -> table of modules) that are not needed.

    These imports are seen by no other rule, except those of a lazy package (`lazy_names`).
    """
    violations, used = [], set()
    for module in modules:
        tree = module.tree
        importers = _importers(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or _last_name(node.func) not in importers:
                continue
            argument = _first_argument(node)
            if _constant_beginning(argument):
                continue
            table = exceptions.get(module.path)
            if table is not None and any(_last_name(part) == table for part in ast.walk(argument or node)):
                used.add(module.path)
            else:
                violations.append(f"{module.path}:{node.lineno} imports a module whose name is not constant")
    return violations + [f"{path} imports no module by {exceptions[path]}" for path in exceptions if path not in used]


def lazy_names(module: Module) -> dict[str, str]:
    """Return public name -> module of a package that imports its names at their first use; empty if it does not do that."""
    body = module.tree.body
    if not any(isinstance(node, Function) and node.name == "__getattr__" for node in body):
        return {}
    names = {}
    for node in body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        for key, target in zip(value.keys, value.values, strict=True) if isinstance(value, ast.Dict) else ():
            if isinstance(key, ast.Constant) and isinstance(target, ast.Constant):
                names[str(key.value)] = str(target.value)
    return names


def import_graph(modules: Sequence[Module]) -> Graph:
    """Return, for every module, the modules of the tree that it imports.

    ``from p import f`` of a lazy package p also imports the module that has f; ``import p`` may import all that p names.
    """
    names = {module.name for module in modules}
    lazy = {module.name: found for module in modules if (found := lazy_names(module))}

    def imported(source: str, name: str | None) -> set[str]:
        if f"{source}.{name}" in names:
            return {f"{source}.{name}"}
        if source not in lazy:
            return {source} & names
        if name in lazy[source]:
            return {source} | imported(lazy[source][name], name)
        return {source} | (set(lazy[source].values()) & names if name in (None, "*") else set())

    return {
        module.name: set().union(*(imported(*found) for found in imported_names(module))) - {module.name}
        for module in modules
    }


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the groups of nodes that reach each other."""

    def reachable(start: str) -> set[str]:
        reached: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - reached
            reached |= new
            waiting += new
        return reached

    reached = {node: reachable(node) for node in graph}
    groups = {
        frozenset(other for other in reached[node] if node in reached.get(other, ()))
        for node in graph
        if node in reached[node]
    }
    return sorted("circle: " + " <-> ".join(sorted(group)) for group in groups)


def room_graph(modules: Sequence[Module]) -> Graph:
    """Return the imports between rooms. A room is a folder directly in a package; a module beside them is its own room."""
    folders = {module.folder.replace("/", ".") for module in modules}

    def room(name: str) -> str:
        top_two = ".".join(name.split(".")[:2])
        return top_two if top_two in folders else name

    rooms: Graph = {}
    for name, targets in import_graph(modules).items():
        rooms.setdefault(room(name), set()).update(room(target) for target in targets)
    return {name: targets - {name} for name, targets in rooms.items()}


def upward_imports(modules: Sequence[Module], packages: Sequence[str]) -> list[str]:
    """Return imports against the order of ``packages``: a package may import only itself and packages before it."""
    violations = []
    for module in modules:
        package = module.name.partition(".")[0]
        above = packages[packages.index(package) + 1 :]
        for source, _ in imported_names(module):
            if source.partition(".")[0] in above:
                violations.append(f"{module.path} imports {source}")
    return violations


def misplaced_libraries(modules: Sequence[Module], rooms: Mapping[str, str]) -> list[str]:
    """Return imports of libraries outside their folder or file in ``rooms``, and those that do not import their library."""
    violations, used = [], set()
    for module in modules:
        for source, _ in imported_names(module):
            library = source.partition(".")[0]
            if library not in rooms:
                continue
            if f"{module.path}/".startswith(f"{rooms[library]}/"):
                used.add(library)
            else:
                violations.append(f"{module.path} imports {library}; only {rooms[library]} may")
    return violations + [f"{rooms[library]} does not import {library}" for library in rooms if library not in used]


def crowded_folders(modules: Sequence[Module]) -> list[str]:
    """Return folders with too many modules."""
    counts = Counter(module.folder for module in modules)
    return [f"{folder}: {n} modules, allowed {MAX_MODULES}" for folder, n in counts.items() if n > MAX_MODULES]


def long_files(modules: Sequence[Module]) -> list[str]:
    """Return files with too many lines."""
    counts = {module.path: len(module.text.splitlines()) for module in modules}
    return [f"{path}: {n} lines, allowed {MAX_FILE_LINES}" for path, n in counts.items() if n > MAX_FILE_LINES]


def long_functions(modules: Sequence[Module]) -> list[str]:
    """Return functions with too many code lines; docstrings, comments and blank lines are not counted."""
    violations = []
    for module in modules:
        lines = module.text.splitlines()
        for node in ast.walk(module.tree):
            if isinstance(node, Function) and (n := _code_lines(node, lines)) > MAX_FUNCTION_LINES:
                violations.append(
                    f"{module.path}:{node.lineno} {node.name}: {n} code lines, allowed {MAX_FUNCTION_LINES}"
                )
    return violations


def _code_lines(function: Function, lines: Sequence[str]) -> int:
    docstrings: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, (*Function.__args__, ast.ClassDef)) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    numbers = set(range(function.lineno, (function.end_lineno or 0) + 1)) - docstrings
    code = [lines[number - 1].strip() for number in numbers]
    return sum(1 for line in code if line and not line.startswith("#"))


def positional_calls(modules: Sequence[Module]) -> list[str]:
    """Return calls with too many positional arguments; ``*arguments`` are not counted."""
    violations = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call):
                n = sum(not isinstance(argument, ast.Starred) for argument in node.args)
                if n > MAX_POSITIONAL:
                    violations.append(f"{module.path}:{node.lineno} {n} positional arguments, allowed {MAX_POSITIONAL}")
    return violations


def missing_docstrings(modules: Sequence[Module]) -> list[str]:
    """Return modules, and public classes, functions and methods, that have no docstring."""
    violations = []
    for module in modules:
        if ast.get_docstring(module.tree) is None:
            violations.append(f"{module.path}: no docstring")
        violations += [f"{module.path}:{line} {name}: no docstring" for line, name in _undocumented(module.tree, "")]
    return violations


def _undocumented(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[int, str]]:
    for node in _statements(parent):
        if not isinstance(node, (*Function.__args__, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield node.lineno, prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(node, f"{prefix}{node.name}.")


def _statements(parent: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements of a module or class, those inside ``if``, ``try``, ``with`` and loops too."""
    for node in ast.iter_child_nodes(parent):
        yield node
        if not isinstance(node, (*Function.__args__, ast.ClassDef)):
            yield from _statements(node)


def other_code(paths: Iterable[str], allowed: Sequence[str]) -> list[str]:
    """Return Python files outside the ``allowed`` top-level folders and files."""
    return [f"{path}: no code outside {', '.join(allowed)}" for path in paths if path.split("/")[0] not in allowed]
