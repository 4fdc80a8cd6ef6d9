"""DeepSpeed's launcher of this host's ranks: ``python -m pretrain.engine.local_ranks --world_info=... --module NAME ...``.

It is ``deepspeed.launcher.launch``, which the ``deepspeed`` command starts on every host, without imports that it does not use,
and with another answer to SIGTERM: the ranks are asked to save and end. DeepSpeed's handler would kill ranks that need more
than 30 s.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil

from pretrain.engine.launcher_import import import_launcher


def stop_ranks(number: int, frame: Any) -> None:
    """Handle SIGTERM: pass it to the ranks as SIGUSR1 and wait on for their end; without ranks, end this process."""
    ranks = psutil.Process().children()
    if not ranks:
        os._exit(128 + number)
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)


def keep_handler(kept: int) -> None:
    """Let no code that runs later replace this process's handler of the signal ``kept``."""
    install = signal.signal

    def install_others(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number == kept else install(number, handler)

    signal.signal = install_others  # type: ignore[assignment]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop_ranks)
    keep_handler(signal.SIGTERM)
    import_launcher()()
