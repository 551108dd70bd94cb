"""A connection ends with the process that made it, even where processes that it has forked live on.

A ``DataLoader`` forks its loading processes, and they inherit what is open. When their parent is killed they notice it
only after seconds, and until then their copies keep its connections open: the other side would learn of the death late.
So a forked process closes its copies at once; nothing in it uses them.
"""

from __future__ import annotations

import os
from contextlib import suppress

_sockets: dict[int, int] = {}
"""Inode of each socket by its descriptor. A descriptor whose inode is another one has been closed and used again."""


def close_in_children(descriptor: int) -> None:
    """The socket with that descriptor is closed in processes that are forked from now on."""
    with suppress(OSError):  # It has been closed already.
        _sockets[descriptor] = os.fstat(descriptor).st_ino


def _close_copies() -> None:
    for descriptor, inode in _sockets.items():
        with suppress(OSError):
            if os.fstat(descriptor).st_ino == inode:
                os.close(descriptor)
    _sockets.clear()


if hasattr(os, "register_at_fork"):  # Windows has no fork.
    os.register_at_fork(after_in_child=_close_copies)
