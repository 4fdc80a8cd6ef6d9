"""The import of DeepSpeed's launcher of one host, without the rest of DeepSpeed and without torch.

``deepspeed.launcher.launch`` starts processes and needs neither, but it lies in a package whose import takes three seconds, in
which no rank has started yet.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# Where the GPUs of the ranks are passed on in this variable.
ACCELERATORS = ("cpu", "cuda")
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


class VisibleDevices:
    """The two methods of DeepSpeed's accelerators for CPUs and for CUDA that its launcher calls; they do the same there."""

    def visible_devices_envs(self) -> list[str]:
        """Return the environment variables that name the devices which a process may use."""
        return [VISIBLE_DEVICES]

    def set_visible_devices_envs(self, environment: MutableMapping[str, str], devices: Sequence[int | str]) -> None:
        """Let the processes of an environment use some devices."""
        environment[VISIBLE_DEVICES] = ",".join(map(str, devices))


def import_launcher() -> Callable[[], None]:
    """Return ``main`` of ``deepspeed.launcher.launch``, in a process that needs no other part of DeepSpeed.

    The packages above the launcher are replaced by ones that hold what it takes from them. If the device is not known to be a
    CPU or CUDA (``DS_ACCELERATOR``), or if this version of the launcher takes more, DeepSpeed is imported whole.
    """
    if os.environ.get("DS_ACCELERATOR") in ACCELERATORS and "deepspeed" not in sys.modules:
        try:
            return _import_alone()
        except (ImportError, AttributeError):
            for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
                del sys.modules[name]
    from pretrain.engine.importing import import_deepspeed

    import_deepspeed()
    main: Callable[[], None] = import_module("deepspeed.launcher.launch").main
    return main


def _import_alone() -> Callable[[], None]:
    spec = find_spec("deepspeed")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("deepspeed is not installed")
    (folder,) = spec.submodule_search_locations
    devices = VisibleDevices()
    _put("deepspeed", {"__path__": [folder]})
    _put("deepspeed.accelerator", {"get_accelerator": lambda: devices})
    utils = _put("deepspeed.utils", {"__path__": [os.path.join(folder, "utils")]})
    logger = _logger()
    utils |= {
        "logger": logger,
        "get_numactl_cmd": import_module("deepspeed.utils.numa").get_numactl_cmd,
        "set_log_level_from_string": lambda name: logger.setLevel(name.upper()),
    }
    main: Callable[[], None] = import_module("deepspeed.launcher.launch").main
    return main


def _put(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Let a new module have this name and content; return the dictionary of its names."""
    module = sys.modules[name] = ModuleType(name)
    names = vars(module)
    names.update(content)
    return names


def _logger() -> logging.Logger:
    """Return a logger that writes to the standard output, as DeepSpeed's does."""
    logger = logging.getLogger("DeepSpeed")
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d] %(message)s"))
        logger.addHandler(handler)
    return logger
