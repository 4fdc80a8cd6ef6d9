"""Where the ranks of one host meet: a store that listens on 127.0.0.1 only.

torch's own store listens on all addresses of the host, so other hosts could connect to it.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store, TCPStore  # torch.distributed does not export them for the type checker
from torch.distributed import DistNetworkError
from torch.distributed.rendezvous import register_rendezvous_handler

from infra.distributed import is_loopback, rank, world_size
from infra.errors import UserError

SCHEME = "yaware-loopback"
LOOPBACK = "127.0.0.1"


def init_method() -> str | None:
    """Return the ``init_method`` of ``torch.distributed``; None, which means torch's own, if there are several hosts.

    A launcher with a store of its own (torchrun) keeps it.
    """
    own_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"{SCHEME}://" if is_loopback(os.environ["MASTER_ADDR"]) and not own_store else None


@contextmanager
def taken_port_is_named() -> Iterator[None]:
    """Raise UserError within the block if another program listens on ``MASTER_PORT``, as a second job of this host would."""
    try:
        yield
    except (OSError, DistNetworkError) as error:
        if getattr(error, "errno", None) != errno.EADDRINUSE and "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT={os.environ.get('MASTER_PORT')}: another program of this host listens on it, perhaps another job; "
            "give the launcher a free port, such as --master_port=29517"
        ) from error


def _meet(url: str, timeout: timedelta = timedelta(minutes=10), **_: Any) -> Iterator[tuple[Store, int, int]]:
    """Give the store, this rank and the number of ranks, as torch's handlers of rendezvous do.

    Raises OSError if ``MASTER_PORT`` is taken.
    """
    port, handle = int(os.environ["MASTER_PORT"]), None
    if rank() == 0:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(socket.SOMAXCONN)
        handle = listener.detach()  # the store closes it
    yield (
        TCPStore(LOOPBACK, port, world_size(), rank() == 0, timeout, master_listen_fd=handle),
        rank(),
        world_size(),
    )


register_rendezvous_handler(SCHEME, _meet)  # type: ignore[no-untyped-call]
