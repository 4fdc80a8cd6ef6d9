"""Versions: Python, compiler, packages that fit each other, the compiled collectives, and the same code on every node."""

from __future__ import annotations

import re
import shutil
import sys
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.extensions import extensions_folder
from infra.files import read_text, sha256_of
from infra.machine import code_version, git_tags
from pretrain.doctor.row import FAIL, OK, WARN, Found, Request, Row

PACKAGES = ("torch", "deepspeed", "webdataset", "nibabel", "mlflow", "ray", "monai", "nvidia-dali-cuda130")
DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
TOOLS = ("g++", "ninja")
# Oldest driver of each CUDA release, from NVIDIA's table of compatibility.
DRIVERS = {12: 525, 13: 580}
SHOWN = 3


def look_python(request: Request) -> str:
    """Return Python's version."""
    return ".".join(map(str, sys.version_info[:3]))


def judge_python(version: str) -> tuple[str, str, str]:
    """Fail below Python 3.10."""
    enough = tuple(map(int, version.split(".")))[:2] >= (3, 10)
    return (OK, version, "") if enough else (FAIL, version, "install Python 3.10 or newer")


def look_compiler(request: Request) -> list[str]:
    """Return the missing programs that DeepSpeed needs to compile its CPU collectives."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def judge_compiler(missing: list[str]) -> tuple[str, str, str]:
    """Fail if a program is missing."""
    if missing:
        return FAIL, f"missing: {', '.join(missing)}", "install g++ (Debian: g++), and ninja by `make setup`"
    return OK, "g++ and ninja found", ""


def installed() -> dict[str, str]:
    """Return the version of every installed package, by its normalised name."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] if distribution.metadata else None
        if name:  # the first one on the path is the one that is imported
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def look_packages(request: Request) -> dict[str, Any]:
    """Return all packages, CUDA's version of torch, and what yaware requires."""
    requirements: list[str] = []
    with suppress(metadata.PackageNotFoundError):
        requirements = metadata.requires("yaware") or []
    return {
        "installed": installed(),
        "cuda": torch_cuda(),
        "requires": [r for r in requirements if "extra ==" not in r],
    }


def torch_cuda() -> str:
    """Return the CUDA version that torch was built for, without importing it; empty for a CPU build or without torch."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    match = (
        re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", read_text(file), re.MULTILINE)
        if file and file.is_file()
        else None
    )
    return match[1] if match else ""


def judge_packages(found: dict[str, Any]) -> tuple[str, str, str]:
    """Fail if a package is missing, outside the limits of pyproject.toml, or made for another CUDA than torch."""
    versions: dict[str, str] = found["installed"]
    wanted = [name for name in PACKAGES if name not in DALI]
    missing = [name for name in wanted if name not in versions]
    dali = [name for name in DALI if name in versions]
    if not dali:
        missing.append(DALI[-1])
    if missing:
        return FAIL, f"missing: {', '.join(missing)}", "run `make setup`"
    outside = [
        f"{name} {versions[name]} (needs {needed.specifier})"
        for needed in map(Requirement, found["requires"])
        if (name := canonicalize_name(needed.name)) in versions
        and not needed.specifier.contains(versions[name], prereleases=True)
    ]
    if outside:
        return FAIL, f"outside the limits of pyproject.toml: {', '.join(outside[:SHOWN])}", "run `make setup`"
    if len(dali) > 1:
        return (
            FAIL,
            f"{' and '.join(dali)} are both installed",
            f"uninstall {dali[0]} or {dali[1]}: they overwrite each other",
        )
    cuda = found["cuda"].partition(".")[0]
    if cuda and f"cuda{cuda}0" not in dali[0]:
        return FAIL, f"torch is built for CUDA {found['cuda']}, DALI is {dali[0]}", f"install yaware[cuda{cuda}]"
    if cuda and not any(name.startswith("nvidia-nccl") for name in versions):
        return (
            WARN,
            f"torch is built for CUDA {found['cuda']}, but no nvidia-nccl package is installed",
            "check `torch.cuda.nccl.version()`",
        )
    other = [name for name in versions if name.startswith("nvidia-nccl") and name != f"nvidia-nccl-cu{cuda}"]
    if cuda and other:
        return (
            FAIL,
            f"torch is built for CUDA {found['cuda']}, NCCL is {other[0]}",
            f"uninstall {other[0]}, run `make setup`",
        )
    nccl = next((f", NCCL {v}" for name, v in versions.items() if name.startswith("nvidia-nccl")), "")
    shown = ", ".join(f"{name} {versions[name]}" for name in (*wanted, dali[0]))
    return OK, f"{shown}, CUDA {found['cuda'] or 'none (CPU build)'}{nccl}", ""


def judge_same_packages(found: Found, request: Request) -> list[Row]:
    """Fail if a node has another version of a package than the first node."""
    (first, reference), *others = ((node, value["installed"]) for node, value in found.items())
    rows = []
    for node, versions in others:
        different = sorted(name for name in {*reference, *versions} if reference.get(name) != versions.get(name))
        if different:
            shown = ", ".join(
                f"{name} {versions.get(name, 'not installed')} ({reference.get(name, 'not installed')} on {first})"
                for name in different[:SHOWN]
            )
            more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
            rows.append(Row("", FAIL, f"{shown}{more}", "install the same environment on every node", node))
    return rows or [Row("", OK, f"{len(reference)} packages, equal on every node", node="all")] if others else []


def look_collectives(request: Request) -> dict[str, Any]:
    """Return the folder of DeepSpeed's compiled collectives, whether they are there, and whether a build was left."""
    folder = extensions_folder()
    objects = sorted(folder.glob("deepspeed_shm_comm/*.so"))
    digest = sha256_of(objects[0])[:8] if objects else ""
    empty = bool(objects) and objects[0].stat().st_size == 0
    return {"folder": str(folder), "digest": "" if empty else digest, "left": any(folder.glob("*/lock"))}


def judge_collectives(found: dict[str, Any]) -> tuple[str, str, str]:
    """Warn if the collectives are not compiled yet, which the first run does."""
    if not found["digest"]:
        return (
            WARN,
            f"not compiled in {found['folder']}",
            "the first run takes a minute longer; `make setup` compiles them",
        )
    return OK, f"compiled in {found['folder']}", ""


def look_checkout(request: Request) -> dict[str, str]:
    """Return the code's version, its commit and its folder."""
    folder = Path(__file__).resolve().parents[2]
    tags = git_tags(folder)
    commit = tags.get("mlflow.source.git.commit", "")[:9]
    changed = ", changed" if tags.get("yaware.git_dirty") == "true" else ""
    return {
        "code": code_version(),
        "commit": f"commit {commit}{changed}" if commit else "no git",
        "folder": str(folder),
    }


def judge_checkout(found: Found, request: Request) -> list[Row]:
    """Fail if a node has other source files than the first, warn if they lie in another folder."""
    (first, reference), *others = found.items()
    rows = []
    for node, value in others:
        if value["code"] != reference["code"]:
            told = (
                f"{value['code']} ({value['commit']}) in {value['folder']} differs from {reference['code']} on {first}"
            )
            rows.append(Row("", FAIL, told, "check out the same commit on every node", node))
        elif value["folder"] != reference["folder"]:
            told = f"{value['folder']}, on {first} {reference['folder']}"
            rows.append(Row("", WARN, told, "the launchers start the same path on every node", node))
    everywhere = "all" if others else ""
    text = f"{reference['code']}, {reference['commit']}, {reference['folder']}"
    return rows or [Row("", OK, text, node=everywhere)]
