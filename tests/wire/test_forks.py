"""Forked processes close the connections of their parent."""

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


def test_child_closes_its_copy_of_a_socket() -> None:
    registered, kept = socket.socketpair()
    with registered, kept:
        assert open_in_child(registered.fileno())
        close_in_children(registered.fileno())
        assert not open_in_child(registered.fileno())
        assert open_in_child(kept.fileno())
        registered.send(b"still open here")
        assert kept.recv(100) == b"still open here"


def test_reused_descriptor_is_not_closed() -> None:
    first, second = socket.socketpair()
    close_in_children(first.fileno())
    descriptor = os.dup2(second.fileno(), first.fileno())  # Closes the first socket and reuses its descriptor.
    with second:
        assert open_in_child(descriptor)
    first.close()
    close_in_children(descriptor)  # The descriptor is closed, so this does nothing.
