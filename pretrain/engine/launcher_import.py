"""The import of DeepSpeed's launcher of one host, without the rest of DeepSpeed and without torch.

``deepspeed.launcher.launch`` starts processes and needs neither, but it lies in a package whose import takes three seconds, in
which no rank has started yet.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from infra.internals import set_internal

# Where the GPUs of the ranks are passed on in this variable.
ACCELERATORS = ("cpu", "cuda")
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
LOOK_SECONDS = 0.05


class VisibleDevices:
    """The two methods of DeepSpeed's accelerators for CPUs and for CUDA that its launcher calls; they do the same there."""

    def visible_devices_envs(self) -> list[str]:
        """Return the environment variables that name the devices which a process may use."""
        return [VISIBLE_DEVICES]

    def set_visible_devices_envs(self, environment: MutableMapping[str, str], devices: Sequence[int | str]) -> None:
        """Let the processes of an environment use some devices."""
        environment[VISIBLE_DEVICES] = ",".join(map(str, devices))


class Clock:
    """The ``time`` of the launcher: it sleeps for a second between two looks at the ranks, and here only until one is done.

    A rank that has failed is noticed after the whole second, as before: the launcher then ends the others, which may still be
    saying why.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Sleep for ``seconds``, or until a child of this process has ended with status 0, or there is none left."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
            if _child_done():
                return


def _child_done() -> bool:
    """Return whether a child has ended with status 0 and was not waited for, or all were waited for."""
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # there is no child
        return True
    return ended is not None and ended.si_code == os.CLD_EXITED and ended.si_status == 0


def import_launcher() -> Callable[[], None]:
    """Return ``main`` of ``deepspeed.launcher.launch``, in a process that needs no other part of DeepSpeed.

    The packages above the launcher are replaced by ones that hold what it takes from them. If the device is not known to be a
    CPU or CUDA (``DS_ACCELERATOR``), or if this version of the launcher takes more, DeepSpeed is imported whole.
    """
    launcher = None
    if os.environ.get("DS_ACCELERATOR") in ACCELERATORS and "deepspeed" not in sys.modules:
        try:
            launcher = _import_alone()
        except (ImportError, AttributeError):
            for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
                del sys.modules[name]
    if launcher is None:
        from pretrain.engine.importing import import_deepspeed

        import_deepspeed()
        launcher = import_module("deepspeed.launcher.launch")
    if hasattr(os, "waitid"):
        set_internal("deepspeed", launcher, "time", Clock())
    main: Callable[[], None] = launcher.main
    return main


def _import_alone() -> ModuleType:
    spec = find_spec("deepspeed")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("deepspeed is not installed")
    (folder,) = spec.submodule_search_locations
    devices = VisibleDevices()
    _put("deepspeed", {"__path__": [folder]})
    _put("deepspeed.accelerator", {"get_accelerator": lambda: devices})
    utils = _put("deepspeed.utils", {"__path__": [str(Path(folder, "utils"))]})
    get_numactl_cmd = import_module("deepspeed.utils.numa").get_numactl_cmd
    logger = logging.getLogger("DeepSpeed")
    utils |= {
        "logger": logger,
        "get_numactl_cmd": get_numactl_cmd,
        "set_log_level_from_string": lambda name: logger.setLevel(name.upper()),
    }
    launcher = import_module("deepspeed.launcher.launch")
    # Last: DeepSpeed's own import, if one of those above fails, gives the logger a handler, too.
    logger.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        logging.Formatter("[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d:%(funcName)s] %(message)s")
    )
    logger.addHandler(handler)
    return launcher


def _put(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Let a new module have this name and content; return the dictionary of its names."""
    module = sys.modules[name] = ModuleType(name)
    names = vars(module)
    names.update(content)
    return names
