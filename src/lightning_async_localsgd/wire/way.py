"""One bound address of the server: its socket, and what libzmq reports about the connections to it."""

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
from lightning_async_localsgd.wire.forks import close_in_children
from lightning_async_localsgd.wire.link import heartbeat_options
from lightning_async_localsgd.wire.silence import MOST_TIMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_async_localsgd.wire.auth import Secrets

_log = logging.getLogger(__name__)

_HANDSHAKE_MS = 5000
"""A peer that has not introduced itself by then is dropped."""

_MOST_STRANGERS = 64
"""Connections that have not introduced themselves yet; when there are more, the oldest of them are closed."""

_LOG_SECONDS = 10.0
"""At most one line about what was refused in this time."""

_FAILURES: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "wrong token or key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "broke the protocol",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "handshake not completed",
}
_EVENTS = zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | sum(_FAILURES)


class Tally:
    """Counts what was refused, with a line in the log now and then.

    Args:
        what: is counted, in the plural.
        clock: seconds, monotonic.

    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        self._what = what
        self._clock = clock
        self._logged_at: float | None = None
        self._logged_count = 0

    def add(self, reason: str) -> None:
        """One more."""
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
    """Where a way is bound and what workers dial.

    Args:
        bind: for the server's socket.
        host: the host in the address that workers dial; empty where they dial what was bound.

    """

    bind: str
    host: str = ""


def local_address() -> Address:
    """For workers on this machine: a Unix socket in Linux's abstract namespace, loopback elsewhere.

    An abstract socket has no file, so nothing is left behind, however any process ends. Nor has it permissions: who may
    talk to it is decided by the token alone.
    """
    if platform.system() == "Linux":
        return Address(f"ipc://@async_localsgd_{uuid.uuid4().hex}")
    return Address("tcp://127.0.0.1:*", "127.0.0.1")


def network_address(host: str, port: int) -> Address:
    """For workers on other machines that reach this one as ``host``.

    All interfaces are bound unless ``host`` is this machine's loopback: the address that others use need not be one of
    this machine's own, and on many machines the own name leads to loopback.
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


class Way:
    """A bound ROUTER socket and its monitor.

    Args:
        context: of the sockets.
        address: where to bind, and what workers dial.
        secrets_: what peers must know.
        encrypted: whether traffic is encrypted.
        silence_timeout: seconds of silence that are allowed at first. libzmq closes a connection whose other end is
            frozen or unreachable only when no session could be silent for so long.
        rejected: counts connections that never introduced themselves.

    Raises:
        RuntimeError: the port is taken, or may not be used.

    Attributes:
        address: what workers dial.

    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: Address,
        secrets_: Secrets,
        encrypted: bool,
        silence_timeout: float,
        rejected: Tally,
    ) -> None:
        self.encrypted = encrypted
        self.socket = context.socket(zmq.ROUTER)
        self._rejected = rejected
        self._strangers: set[int] = set()
        self._at_the_door: dict[int, None] = {}  # Of the strangers, those that were not sent away; oldest first.
        self._inodes: dict[int, int] = {}
        self._failure = ""
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.ROUTER_MANDATORY, 1),
            # Twice the window: libzmq takes back its count of what a peer has read in steps of half the limit.
            (zmq.SNDHWM, 2 * frames.WINDOW + 8),
            (zmq.RCVHWM, frames.WINDOW // 2),
            (zmq.MAXMSGSIZE, frames.MAX_FRAME_BYTES),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
            (zmq.IPV6, int("[" in address.bind or "[" in address.host)),
        ):
            self.socket.setsockopt(option, value)
        heartbeat_options(self.socket, silence_timeout / 4, MOST_TIMES * silence_timeout)
        secrets_.guard(self.socket, encrypted)
        # No event may get lost, however many strangers come at once, so there is no limit to what waits to be read.
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

    def events(self) -> list[int]:
        """Reads what libzmq has reported; returns the descriptors of introduced connections that are gone."""
        gone = []
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor, zmq.NOBLOCK)
            kind, descriptor = event["event"], event["value"]
            if kind in (zmq.EVENT_LISTENING, zmq.EVENT_ACCEPTED):
                close_in_children(descriptor)
            if kind == zmq.EVENT_ACCEPTED:
                self._accept(descriptor)
            elif kind in _FAILURES:
                # Comes from the same place in libzmq as the end of its connection, right before that.
                self._failure = _FAILURES[kind]
            if kind != zmq.EVENT_DISCONNECTED:
                continue
            self._inodes.pop(descriptor, None)
            if descriptor in self._strangers:
                self.introduce(descriptor)
                reason = self._failure or "did not speak the protocol"
                self._rejected.add(f"a connection to {self.address} was dropped: {reason}")
                self._failure = ""
            else:
                gone.append(descriptor)
        return gone

    def introduce(self, descriptor: int) -> None:
        """A connection has said something that only a worker says, or has ended before that."""
        self._strangers.discard(descriptor)
        self._at_the_door.pop(descriptor, None)

    def is_open(self, descriptor: int) -> bool:
        """Whether a connection has not ended, as far as :meth:`events` has told; so it is if nobody knows."""
        return descriptor == -1 or descriptor in self._inodes

    def hang_up(self, descriptor: int) -> bool:
        """Has a connection closed, together with what waits to go out over it; returns whether that could be done."""
        try:
            copy = os.dup(descriptor)
        except OSError:
            return False
        # The descriptor may have been closed and used again since: what it was is told by the inode.
        if os.fstat(copy).st_ino != self._inodes.get(descriptor):
            os.close(copy)
            return False
        with socket.socket(fileno=copy) as connection, suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        return True

    def _accept(self, descriptor: int) -> None:
        with suppress(OSError):  # It is closed already.
            self._inodes[descriptor] = os.fstat(descriptor).st_ino
        self._strangers.add(descriptor)
        self._at_the_door.pop(descriptor, None)
        self._at_the_door[descriptor] = None
        if len(self._at_the_door) > _MOST_STRANGERS:
            oldest = next(iter(self._at_the_door))
            del self._at_the_door[oldest]
            self.hang_up(oldest)

    def close(self, linger: float = 0.0) -> None:
        """Frees the sockets; what was sent may still go out for ``linger`` seconds."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(int(linger * 1000))


Key = tuple[Way, bytes]
"""A connection: the way over which it came, and libzmq's name for it."""


def _cannot_bind(address: Address, error: zmq.ZMQError) -> str:
    port = address.bind.rpartition(":")[2]
    if error.errno == zmq.EADDRINUSE:
        return (
            f"exchange.port={port} is in use by another program on this machine; give another port, or exchange.port=0"
            " for a free one"
        )
    return (
        f"the server cannot listen at {address.bind} (exchange.port={port}): {os.strerror(error.errno or 0)}; give"
        " another port, or exchange.port=0 for a free one"
    )


def source_of(frame: zmq.Frame) -> int:
    """Descriptor of the connection over which ``frame`` came; -1 if libzmq does not tell."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return -1
