"""The tutorials run in a fresh folder, and their committed outputs are those of a run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
NAMES = ["01_first_run", "02_own_scans"]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: ``stdout``, ``stderr``, or the richest type of each displayed object."""
    shown = set()
    for output in cell.outputs:
        if output.output_type == "stream":
            shown.add(output.name)
        elif output.output_type == "error":
            shown.add(f"error: {output.ename}: {output.evalue}")
        else:
            shown.add(next(kind for kind in ("image/png", "text/html", "text/plain") if kind in output.data))
    return shown


def printed(cell, folder):
    """The lines that a cell prints in a folder, each number and each id of a run as #.

    Lines of progress are left out: how many there are depends on the speed of the machine.
    """
    text = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
    lines = [line for line in text.splitlines() if not re.search(r": \d+/\d+ \w+, \S+ \w+/s", line)]
    lines = [re.sub(r"\b[0-9a-f]{32}\b", "#", line.replace(f"{folder}/", "")) for line in lines]
    lines = [
        re.sub(r"(\d+ (h|min) )?\d+ (s|min)\b", "# s", line) for line in lines
    ]  # 33 s; 1 min 4 s on a busy machine
    return [re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", line) for line in lines]


@pytest.mark.jobs
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_a_tutorial_runs_and_shows_what_its_committed_copy_shows(name, tmp_path):
    committed = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    notebook = nbformat.from_dict(committed)
    for cell in code_cells(notebook):
        cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    for before, after in zip(code_cells(committed), code_cells(notebook), strict=True):
        assert kinds(after) - {"stdout"} == kinds(before) - {"stdout"}, after.source
        assert printed(after, tmp_path) == printed(before, tmp_path), after.source


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_tutorial_has_outputs_and_neither_warnings_nor_paths_of_a_machine(name):
    notebook = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    cells = code_cells(notebook)
    assert all(cell.execution_count for cell in cells)
    shown = [kinds(cell) for cell in cells]
    assert sum("image/png" in kind for kind in shown) >= 1
    assert not any("stderr" in kind or any(k.startswith("error") for k in kind) for kind in shown)
    texts = " ".join(str(output) for cell in cells for output in cell.outputs if output.output_type == "stream")
    texts += " ".join(
        str(output.data.get("text/plain", "")) for cell in cells for output in cell.outputs if "data" in output
    )
    assert not re.search(r"/(work|home|root|tmp|Users)/", texts)
