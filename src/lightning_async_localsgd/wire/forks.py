"""Closes the sockets of connections in forked processes, so that a connection ends with the process that opened it.

A ``DataLoader`` forks its loading processes, which inherit open sockets. When their parent is killed, they notice that
only after seconds, and until then their copies would keep the parent's connections open. The other side would notice
the parent's death late. So a forked process closes its copies at once. It does not use them.
"""

from __future__ import annotations

import os
from contextlib import suppress

_sockets: dict[int, int] = {}
"""Inode of each socket by its descriptor. If the inode has changed, the descriptor was closed and reused."""


def close_in_children(descriptor: int) -> None:
    """Close the socket with this descriptor in processes that are forked from now on."""
    with suppress(OSError):  # The socket is closed already.
        _sockets[descriptor] = os.fstat(descriptor).st_ino


def _close_copies() -> None:
    for descriptor, inode in _sockets.items():
        with suppress(OSError):
            if os.fstat(descriptor).st_ino == inode:
                os.close(descriptor)
    _sockets.clear()


if hasattr(os, "register_at_fork"):  # Not on Windows, which has no fork.
    os.register_at_fork(after_in_child=_close_copies)
