"""The import of DeepSpeed, without the parts that are not used here and take seconds of every start."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from infra.extensions import extensions_folder
from infra.internals import internal, replaced_internal
from infra.lean_imports import is_own_process, quiet_imports, without


def import_deepspeed() -> Any:
    """Import DeepSpeed with the build directory and the accelerator set, and with its INFO messages off."""
    extensions_folder()
    # Put this environment's ninja first on PATH: DeepSpeed compiles its extensions again if it finds another ninja.
    binaries = str(Path(sys.executable).parent)
    if os.environ["PATH"].split(os.pathsep)[0] != binaries:
        os.environ["PATH"] = os.pathsep.join((binaries, os.environ["PATH"]))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quiet_imports(), without("mlflow"):  # for DeepSpeed's autotuner
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed uses names that torch 2.13 has deprecated; a user cannot change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which every engine imports, without its call of torch.compile.

    That call imports torch's compiler. No recipe can choose Muon.
    """
    compiler = import_module("deepspeed.runtime.compiler")
    with replaced_internal("deepspeed", compiler, "compile", lambda *_, **__: lambda function: function):
        import_module("deepspeed.runtime.zero.muon.original_muon")


def without_compiler() -> None:
    """Let torch's optimizers run without importing torch's compiler, 1.2 s of CPU, in a process of this project.

    Functions that torch.compile must not trace are wrapped: the wrapper imports the compiler at its first call, unless it finds
    the function to call under ``__dynamo_disable``. The optimizers' ``step`` imports it for a graph break, which does nothing
    if nothing is compiled. Call this only then, and before an optimizer is made. If torch renames these two, the compiler is
    imported again; a test then fails (``tests/pretrain/engine/test_internals.py``).
    """
    if not is_own_process() or "torch._dynamo" in sys.modules:
        return
    wrapper = internal("torch", torch, "_disable_dynamo")(lambda: None).__code__  # all wrapped functions share it
    for function in vars(torch.optim.Optimizer).values():
        if getattr(function, "__code__", None) is wrapper:
            function.__wrapped__.__dynamo_disable = function.__wrapped__
    for kind in (torch.optim.Adam, torch.optim.SGD):
        if kind.step.__code__.co_name == "_use_grad":
            kind.step = torch.no_grad()(internal("torch", kind.step, "__wrapped__"))  # type: ignore[method-assign]
