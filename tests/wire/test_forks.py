"""Forked processes don't keep connections of their parent open."""

from __future__ import annotations

import os
import socket

from lightning_async_localsgd.wire.forks import close_in_children


def open_in_child(descriptor: int) -> bool:
    process = os.fork()
    if process == 0:
        try:
            os.fstat(descriptor)
        except OSError:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) == 0


def test_a_child_closes_its_copy() -> None:
    mine, other = socket.socketpair()
    with mine, other:
        assert open_in_child(mine.fileno())
        close_in_children(mine.fileno())
        assert not open_in_child(mine.fileno())
        assert open_in_child(other.fileno())
        mine.send(b"still open here")
        assert other.recv(100) == b"still open here"


def test_a_descriptor_that_is_used_again_is_left_alone() -> None:
    first, second = socket.socketpair()
    close_in_children(first.fileno())
    descriptor = os.dup2(second.fileno(), first.fileno())  # Closes the first, and takes its number.
    with second:
        assert open_in_child(descriptor)
    first.close()
    close_in_children(descriptor)  # Closed: nothing to note.
