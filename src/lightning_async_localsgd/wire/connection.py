"""One connection of a worker to the server. A broken connection ends for good.

By default libzmq would reconnect by itself and send queued messages to a server that does not know this peer any more.
Here the user of a connection learns that it broke, and decides what to send over the next connection.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from typing import TYPE_CHECKING, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import Endpoints, set_credentials
from lightning_async_localsgd.wire.forks import close_in_children

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

_NO_RECONNECT = 1_000_000_000
"""Milliseconds until libzmq would reconnect: days after a broken connection was closed. With -1, which means never,
libzmq drops messages that have arrived but were not read when the connection ended, such as a refusal."""

_ATTEMPT_SECONDS = 5.0
"""Seconds that one attempt to connect may take: name lookup, connection and handshake."""

_HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_END_EVENTS = zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED
_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | _HANDSHAKE_FAILURES | _END_EVENTS
"""After the handshake, each of these events means that the connection has ended."""


_LOG_AFTER_SECONDS = 5.0
"""Seconds after which failed attempts are logged. At the start of a run, processes start one after another."""

dial_hooks: list[Callable[[], None]] = []
"""Called before every attempt to connect. May raise :class:`ConnectionLost`. Used by :mod:`.faults` only."""


class ConnectionLost(Exception):
    """The connection broke or could not be made. Another attempt may succeed.

    Args:
        reason: what happened.
        refused: no process listens at the address, which is on this machine: the server's process has ended.

    """

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class Pollable(Protocol):
    """Something with a file descriptor."""

    def fileno(self) -> int:
        """Return the descriptor."""


def enable_keepalive(socket: zmq.Socket[bytes], interval: float, timeout: float) -> None:
    """Make libzmq close connections whose other end is unreachable or frozen, which frees the messages queued for it.

    libzmq's own threads send and answer these ZMTP heartbeats, so they do not show whether the program on the other end
    still works.

    Args:
        socket: a socket that is not bound or connected yet.
        interval: seconds between two ZMTP heartbeats.
        timeout: seconds without anything from the other end after a ZMTP heartbeat.

    """
    socket.setsockopt(zmq.HEARTBEAT_IVL, max(1, int(interval * 1000)))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, max(1, int(timeout * 1000)))


class Connection:
    """A connection to the server. The constructor connects and waits for the handshake.

    Args:
        context: context of the socket.
        endpoints: the server's address, with credentials.
        silence_timeout: seconds without a sign of life from the other machine after which the connection ends.
        timeout: seconds that connecting may take.
        waker: interrupts connecting, and ends :meth:`wait`.

    Raises:
        ConnectionLost: the connection could not be made.
        ExchangeError: the server does not accept the credentials.

    Attributes:
        sent: bytes sent.
        received: bytes received.

    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: Endpoints,
        silence_timeout: float,
        timeout: float = _ATTEMPT_SECONDS,
        waker: Pollable | None = None,
    ) -> None:
        self.sent = 0
        self.received = 0
        self.socket = context.socket(zmq.DEALER)
        self._address = endpoints.address
        self._same_host = endpoints.same_host
        self._connected = False
        self._closed = False
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RECONNECT_IVL, _NO_RECONNECT),
            # Queued parts of a pseudo-gradient are not copied, so they need no memory.
            (zmq.SNDHWM, 2 * frames.WINDOW),
            (zmq.RCVHWM, 2 * frames.WINDOW),
            (zmq.MAXMSGSIZE, frames.MAX_FRAME_BYTES),
            (zmq.HANDSHAKE_IVL, int(timeout * 1000)),
            # Set for literal IPv6 addresses only: with it, a name lookup may return addresses of either kind.
            (zmq.IPV6, int(endpoints.address.startswith("tcp://["))),
        ):
            self.socket.setsockopt(option, value)
        enable_keepalive(self.socket, silence_timeout / 4, silence_timeout)
        set_credentials(self.socket, endpoints)
        self._monitor = self.socket.get_monitor_socket(_EVENTS)
        self._poller = zmq.Poller()
        self._poller.register(self._monitor, zmq.POLLIN)
        self._waker = waker
        if waker is not None:
            self._poller.register(waker.fileno(), zmq.POLLIN)
        try:
            self._dial(timeout)
        except BaseException:
            self.close()
            raise
        self._poller.register(self.socket, zmq.POLLIN)

    def _dial(self, timeout: float) -> None:
        for hook in dial_hooks:
            hook()
        try:
            self.socket.connect(self._address)
        except zmq.ZMQError as error:
            raise ConnectionLost(str(error)) from None
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            ready = dict(self._poller.poll(frames.milliseconds(left)))
            if self._monitor in ready and self._is_handshake_done():
                return
            if self._waker is not None and self._waker.fileno() in ready:
                raise ConnectionLost("interrupted")
        raise ConnectionLost(f"no answer within {timeout:g} s")

    def _is_handshake_done(self) -> bool:
        event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
        kind, value = event["event"], event["value"]
        if kind == zmq.EVENT_CONNECTED:
            close_in_children(value)
            self._connected = True
            return False
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return True
        if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise ExchangeError(
                f"the server at {self._address} does not accept this worker's token; start every rank with the same "
                "token, and check whether another job uses the address"
            )
        if kind & _HANDSHAKE_FAILURES:
            detail = f"code {value:#x}"
            if value in errno.errorcode:
                detail = "timed out" if value == errno.EAGAIN else os.strerror(value)
            raise ConnectionLost(
                f"the handshake failed ({detail}): the server has another token, or one side is encrypted and the "
                "other is not, or the program that listens there is not this run's server"
            )
        # The socket is closed before it has connected only if connecting failed at once. Slow attempts time out.
        if self._connected:
            raise ConnectionLost("the connection was closed before the handshake")
        # Over a network this may also mean that the network is down for the moment.
        raise ConnectionLost("no process listens there, or the host is unreachable", refused=self._same_host)

    def wait(self, timeout: float, writing: bool = False) -> bool:
        """Wait until a message can be read or the waker was woken, or, with ``writing``, until a message can be sent.

        Returns:
            Whether a message can be read.

        Raises:
            ConnectionLost: the connection is gone, and every message that arrived over it has been read.

        """
        self._poller.register(self.socket, zmq.POLLIN | zmq.POLLOUT if writing else zmq.POLLIN)
        ready = dict(self._poller.poll(frames.milliseconds(timeout)))
        if ready.get(self.socket, 0) & zmq.POLLIN:
            return True
        if self._monitor in ready:
            # Messages that came before the end may have become readable only after the poll.
            if self.socket.poll(0):
                return True
            recv_monitor_message(self._monitor, zmq.NOBLOCK)
            raise ConnectionLost("the connection was closed by the other side")
        return False

    def send(self, *parts: bytes) -> bool:
        """Send a message unless that would block. Return whether it was sent."""
        try:
            self.socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return False
        self.sent += sum(map(len, parts))
        return True

    def send_bulk(self, header: bytes, part: memoryview) -> bool:
        """Send like :meth:`send`, without copying ``part``, which must not change until the other side confirms it."""
        try:
            self.socket.send(header, zmq.NOBLOCK | zmq.SNDMORE)
        except zmq.Again:
            return False
        self.socket.send(part, zmq.NOBLOCK, copy=False)
        self.sent += len(header) + len(part)
        return True

    def receive(self) -> bytes:
        """Return the next frame of the message that :meth:`wait` has announced."""
        frame = self.socket.recv(zmq.NOBLOCK)
        self.received += len(frame)
        return frame

    def receive_into(self, memory: memoryview) -> int:
        """Receive the next frame into ``memory``. Return the frame's size, which may be larger than ``memory``."""
        size = self.socket.recv_into(memory, flags=zmq.NOBLOCK)
        self.received += size
        return size

    @property
    def more(self) -> bool:
        """Whether the message has further frames."""
        return bool(self.socket.getsockopt(zmq.RCVMORE))

    def skip_rest(self) -> None:
        """Read the rest of the message and discard it."""
        while self.more:
            self.received += len(self.socket.recv(zmq.NOBLOCK))

    def close(self, linger: float = 0.0) -> None:
        """End the connection.

        Args:
            linger: seconds for which queued messages may still be sent after this has returned.

        """
        if self._closed:
            return
        self._closed = True
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(int(linger * 1000))


def dial_with_retries(
    dial: Callable[[float], Connection],
    seconds: float,
    refused_seconds: float,
    pause: Callable[[float], None],
    address: str,
) -> Connection:
    """Try to connect until it works. Log a warning if it takes long.

    Args:
        dial: makes one attempt, which may take the given seconds.
        seconds: seconds for all attempts together.
        refused_seconds: seconds for attempts that are refused at once, because no process listens there.
        pause: waits the given seconds between two attempts. May raise to give up.
        address: the address, for the log.

    Raises:
        ConnectionLost: no attempt worked in time. The reason is that of the last attempt.
        ExchangeError: the server does not accept the credentials.

    """
    spent = 0.0
    wait = 0.05
    logged = False
    while True:
        began = time.monotonic()
        try:
            return dial(max(0.1, min(_ATTEMPT_SECONDS, seconds - spent)))
        except ConnectionLost as lost:
            # An attempt that took longer than its timeout was suspended meanwhile.
            spent += min(time.monotonic() - began, 2 * _ATTEMPT_SECONDS)
            limit = refused_seconds if lost.refused else seconds
            if spent >= limit:
                raise
            if spent > _LOG_AFTER_SECONDS and not logged:
                logged = True
                _log.warning("cannot connect to the server at %s yet: %s; trying for up to %g s", address, lost, limit)
        pause(wait)
        spent += wait
        wait = min(1.0, 2 * wait)
