"""A bound socket of the server, and the connections to it that libzmq reports."""

from __future__ import annotations

import ipaddress
import logging
import os
import platform
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq
from zmq.utils.monitor import recv_monitor_message

from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.adaptive_timeout import MAX_GROWTH
from lightning_async_localsgd.wire.connection import enable_keepalive
from lightning_async_localsgd.wire.forks import close_in_children

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_async_localsgd.wire.auth import Secrets

_log = logging.getLogger(__name__)

_HANDSHAKE_MS = 5000
"""Milliseconds that a peer's handshake may take before its connection is dropped."""

_MAX_UNAUTHENTICATED = 64
"""Most unauthenticated connections. When there are more, the oldest of them are closed."""

_LOG_SECONDS = 10.0
"""Seconds in which refusals are logged at most once."""

_FAILURES: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "wrong token or key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "broke the protocol",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "handshake not completed",
}
_EVENTS = zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | sum(_FAILURES)


class RefusalLog:
    """Counts refusals, and logs them from time to time.

    Args:
        what: what is counted, in the plural.
        clock: seconds, monotonic.

    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        self._what = what
        self._clock = clock
        self._logged_at: float | None = None
        self._logged_count = 0

    def add(self, reason: str) -> None:
        """Count a refusal."""
        self.count += 1
        now = self._clock()
        if self._logged_at is not None and now - self._logged_at < _LOG_SECONDS:
            return
        more = self.count - self._logged_count - 1
        _log.warning("%s: %s%s; %d so far", self._what, reason, f" (and {more} others)" if more else "", self.count)
        self._logged_at = now
        self._logged_count = self.count


@dataclass(frozen=True)
class Address:
    """The address of a listener.

    Args:
        bind: address that the server's socket is bound to.
        host: host in the address that workers connect to; empty if they connect to the bound address.

    """

    bind: str
    host: str = ""


def local_address() -> Address:
    """Return the address for workers on this machine: an abstract Unix socket on Linux, loopback elsewhere.

    An abstract socket has no file, so nothing is left behind, however a process ends. It has no permissions either:
    access is controlled by the token alone.
    """
    if platform.system() == "Linux":
        return Address(f"ipc://@async_localsgd_{uuid.uuid4().hex}")
    return Address("tcp://127.0.0.1:*", "127.0.0.1")


def network_address(host: str, port: int) -> Address:
    """Return the address for workers on other machines, which reach this machine as ``host``.

    All interfaces are bound unless ``host`` is this machine's loopback. Other machines may use an address that is not
    one of this machine's own, and on many machines the own host name resolves to loopback.
    """
    try:
        literal = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        loopback, six = host == "localhost", False
    else:
        loopback, six = literal.is_loopback, literal.version == 6
        host = f"[{literal}]" if six else str(literal)
    interface = "*" if not loopback else "[::1]" if six else "127.0.0.1"
    return Address(f"tcp://{interface}:{port or '*'}", "127.0.0.1" if host == "localhost" else host)


class Listener:
    """A bound ROUTER socket and its monitor.

    Args:
        context: context of the sockets.
        address: the address to bind, and the one that workers connect to.
        secrets_: what peers must know.
        encrypted: whether traffic is encrypted.
        silence_timeout: seconds of silence that are allowed at first. libzmq closes a connection whose other end is
            frozen or unreachable only after the longest timeout that a session can reach.
        rejected: counts connections that ended unauthenticated.

    Raises:
        RuntimeError: the port is in use, or may not be used.

    Attributes:
        address: the address that workers connect to.

    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: Address,
        secrets_: Secrets,
        encrypted: bool,
        silence_timeout: float,
        rejected: RefusalLog,
    ) -> None:
        self.encrypted = encrypted
        self.socket = context.socket(zmq.ROUTER)
        self._rejected = rejected
        self._unauthenticated: set[int] = set()
        self._pending: dict[int, None] = {}  # Unauthenticated connections not closed yet, oldest first.
        self._inodes: dict[int, int] = {}
        self._failure = ""
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.ROUTER_MANDATORY, 1),
            # Twice the window: libzmq updates its count of what a peer has read in steps of half the limit.
            (zmq.SNDHWM, 2 * frames.WINDOW + 8),
            (zmq.RCVHWM, frames.WINDOW // 2),
            (zmq.MAXMSGSIZE, frames.MAX_FRAME_BYTES),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
            (zmq.IPV6, int("[" in address.bind or "[" in address.host)),
        ):
            self.socket.setsockopt(option, value)
        enable_keepalive(self.socket, silence_timeout / 4, MAX_GROWTH * silence_timeout)
        secrets_.require_credentials(self.socket, encrypted)
        # No event may be lost, however many connections come at once, so the queue of events has no limit.
        watched = f"inproc://async_localsgd_{uuid.uuid4().hex}"
        self.socket.monitor(watched, _EVENTS)
        self.monitor = context.socket(zmq.PAIR)
        self.monitor.setsockopt(zmq.RCVHWM, 0)
        self.monitor.connect(watched)
        try:
            self.socket.bind(address.bind)
        except zmq.ZMQError as error:
            self.close()
            raise RuntimeError(_cannot_bind(address, error)) from error
        bound = self.socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self.address = f"tcp://{address.host}:{bound.rpartition(':')[2]}" if address.host else bound

    def read_events(self) -> list[int]:
        """Read libzmq's reports. Return the descriptors of authenticated connections that have closed."""
        closed = []
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor, zmq.NOBLOCK)
            kind, descriptor = event["event"], event["value"]
            if kind in (zmq.EVENT_LISTENING, zmq.EVENT_ACCEPTED):
                close_in_children(descriptor)
            if kind == zmq.EVENT_ACCEPTED:
                self._accept(descriptor)
            elif kind in _FAILURES:
                # libzmq reports a failed handshake right before the end of the same connection.
                self._failure = _FAILURES[kind]
            if kind != zmq.EVENT_DISCONNECTED:
                continue
            self._inodes.pop(descriptor, None)
            if descriptor in self._unauthenticated:
                self.mark_authenticated(descriptor)
                reason = self._failure or "did not speak the protocol"
                self._rejected.add(f"a connection to {self.address} was dropped: {reason}")
                self._failure = ""
            else:
                closed.append(descriptor)
        return closed

    def mark_authenticated(self, descriptor: int) -> None:
        """Stop counting a connection as unauthenticated: it has sent a worker's message, or has ended."""
        self._unauthenticated.discard(descriptor)
        self._pending.pop(descriptor, None)

    def is_open(self, descriptor: int) -> bool:
        """Return whether a connection is open as of the last :meth:`read_events`. True for descriptor -1 (unknown)."""
        return descriptor == -1 or descriptor in self._inodes

    def disconnect(self, descriptor: int) -> bool:
        """Close a connection and discard the messages queued for it. Return whether the connection was there."""
        try:
            copy = os.dup(descriptor)
        except OSError:
            return False
        # The descriptor may have been closed and reused. The inode tells.
        if os.fstat(copy).st_ino != self._inodes.get(descriptor):
            os.close(copy)
            return False
        with socket.socket(fileno=copy) as connection, suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        return True

    def _accept(self, descriptor: int) -> None:
        with suppress(OSError):  # The connection is closed already.
            self._inodes[descriptor] = os.fstat(descriptor).st_ino
        self._unauthenticated.add(descriptor)
        self._pending.pop(descriptor, None)
        self._pending[descriptor] = None
        if len(self._pending) > _MAX_UNAUTHENTICATED:
            oldest = next(iter(self._pending))
            del self._pending[oldest]
            self.disconnect(oldest)

    def close(self, linger: float = 0.0) -> None:
        """Free the sockets. Queued messages may still be sent for ``linger`` seconds."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(int(linger * 1000))


ConnectionKey = tuple[Listener, bytes]
"""A connection to the server: its listener, and libzmq's routing id for it."""


def _cannot_bind(address: Address, error: zmq.ZMQError) -> str:
    port = address.bind.rpartition(":")[2]
    if error.errno == zmq.EADDRINUSE:
        return (
            f"exchange.port={port} is in use by another program on this machine; set another port, or exchange.port=0 "
            "for a free one"
        )
    return (
        f"the server cannot listen at {address.bind} (exchange.port={port}): {os.strerror(error.errno or 0)}; set "
        "another port, or exchange.port=0 for a free one"
    )


def source_of(frame: zmq.Frame) -> int:
    """Return the descriptor of the connection over which ``frame`` came; -1 if libzmq does not know."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return -1
