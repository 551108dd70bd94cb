"""One connection of a worker to the server, which ends for good when it breaks.

libzmq would dial again by itself and send what was queued to a server that does not know this peer any more. A link
does not: whoever uses it learns that it broke, and decides what to say over the next one.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from typing import TYPE_CHECKING, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import Endpoints, introduce
from lightning_async_localsgd.wire.forks import close_in_children

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

_ATTEMPT_SECONDS = 5.0
"""How long one attempt to dial may take: name look-up, connection and handshake."""

_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_ENDS = zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED
_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | _HANDSHAKE_FAILED | _ENDS
"""After the handshake, any of them is the end of the link."""


_QUIET_SECONDS = 5.0
"""For so long nothing is said about attempts that fail: at the start processes come one after the other."""

gates: list[Callable[[], None]] = []
"""Called before anything is dialled; may raise :class:`LinkLost`. Empty but in rehearsals, see :mod:`.injection`."""


class LinkLost(Exception):
    """The connection broke or did not come about; another attempt may succeed.

    Args:
        reason: what happened.
        refused: nobody listens at the address, on this machine: the server's process has ended.

    """

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class Pollable(Protocol):
    """Something with a file descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


def heartbeat_options(socket: zmq.Socket[bytes], interval: float, timeout: float) -> None:
    """Makes libzmq itself find out that a connection's other end is unreachable or frozen.

    It then closes the connection, which frees what was queued for it. Its beats are answered by libzmq's own thread, so
    they say nothing about whether the program behind it still works.

    Args:
        socket: not yet bound or connected.
        interval: seconds between two beats.
        timeout: seconds without anything from the other end after a beat.

    """
    socket.setsockopt(zmq.HEARTBEAT_IVL, max(1, int(interval * 1000)))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, max(1, int(timeout * 1000)))


class Link:
    """Dials and waits for the handshake.

    Args:
        context: of the socket.
        endpoints: whom to dial, and with which secrets.
        silence_timeout: seconds without a sign of life from the other machine that end the link.
        timeout: seconds for the attempt.
        waker: ends the wait for the handshake, see :meth:`wait`.

    Raises:
        LinkLost: the connection did not come about.
        ExchangeError: the server does not let us in.

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
        self._nearby = endpoints.nearby
        self._connected = False
        self._closed = False
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RECONNECT_IVL, -1),
            # Parts of a pseudo-gradient, which are not copied and so cost nothing while they wait.
            (zmq.SNDHWM, 2 * frames.WINDOW),
            (zmq.RCVHWM, 2 * frames.WINDOW),
            (zmq.MAXMSGSIZE, frames.MAX_FRAME_BYTES),
            (zmq.HANDSHAKE_IVL, int(timeout * 1000)),
            # A name look-up may give addresses of either kind.
            (zmq.IPV6, int(endpoints.address.startswith("tcp://["))),
        ):
            self.socket.setsockopt(option, value)
        heartbeat_options(self.socket, silence_timeout / 4, silence_timeout)
        introduce(self.socket, endpoints)
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
        for gate in gates:
            gate()
        try:
            self.socket.connect(self._address)
        except zmq.ZMQError as error:
            raise LinkLost(str(error)) from None
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            ready = dict(self._poller.poll(frames.milliseconds(left)))
            if self._monitor in ready and self._shaken():
                return
            if self._waker is not None and self._waker.fileno() in ready:
                raise LinkLost("interrupted")
        raise LinkLost(f"no answer within {timeout:g} s")

    def _shaken(self) -> bool:
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
                "token, and look whether another job uses the address"
            )
        if kind & _HANDSHAKE_FAILED:
            detail = f"code {value:#x}"
            if value in errno.errorcode:
                detail = "timed out" if value == errno.EAGAIN else os.strerror(value)
            raise LinkLost(
                f"the handshake failed ({detail}): the token there is another one, or one side is encrypted and the "
                "other is not, or it is not this run's server that listens there"
            )
        # An attempt that has not connected is only closed where it failed at once; a slow one runs into the time-out.
        if self._connected:
            raise LinkLost("the connection was closed before the handshake")
        # Over a network it may as well be the way that is closed for the moment.
        raise LinkLost("nobody listens there, or there is no way to it", refused=self._nearby)

    def wait(self, timeout: float, writing: bool = False) -> bool:
        """Waits until a message is there to read, or the waker was woken (or, if ``writing``, until one can be sent).

        Returns:
            Whether there is a message to read.

        Raises:
            LinkLost: the connection is gone, and everything that came over it has been read.

        """
        self._poller.register(self.socket, zmq.POLLIN | zmq.POLLOUT if writing else zmq.POLLIN)
        ready = dict(self._poller.poll(frames.milliseconds(timeout)))
        if ready.get(self.socket, 0) & zmq.POLLIN:
            return True
        if self._monitor in ready:
            # What came before the end may have become readable only after the poll had looked.
            if self.socket.poll(0):
                return True
            recv_monitor_message(self._monitor, zmq.NOBLOCK)
            raise LinkLost("the connection was closed by the other side")
        return False

    def send(self, *parts: bytes) -> bool:
        """Sends a message unless that would block; returns whether it was sent."""
        try:
            self.socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return False
        self.sent += sum(map(len, parts))
        return True

    def send_bulk(self, header: bytes, part: memoryview) -> bool:
        """Like :meth:`send`, without copying ``part``, which must not change until the other side confirms it."""
        try:
            self.socket.send(header, zmq.NOBLOCK | zmq.SNDMORE)
        except zmq.Again:
            return False
        self.socket.send(part, zmq.NOBLOCK, copy=False)
        self.sent += len(header) + len(part)
        return True

    def receive(self) -> bytes:
        """Next frame of the message that :meth:`wait` has announced."""
        frame = self.socket.recv(zmq.NOBLOCK)
        self.received += len(frame)
        return frame

    def receive_into(self, memory: memoryview) -> int:
        """Next frame, straight into ``memory``; returns its true size, which may be larger."""
        size = self.socket.recv_into(memory, flags=zmq.NOBLOCK)
        self.received += size
        return size

    @property
    def more(self) -> bool:
        """Whether the message has further frames."""
        return bool(self.socket.getsockopt(zmq.RCVMORE))

    def skip(self) -> None:
        """Reads the rest of the message and forgets it."""
        while self.more:
            self.received += len(self.socket.recv(zmq.NOBLOCK))

    def close(self, linger: float = 0.0) -> None:
        """Ends the link.

        Args:
            linger: seconds for which what was sent may still go out, after this has returned.

        """
        if self._closed:
            return
        self._closed = True
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(int(linger * 1000))


def retry(
    dial: Callable[[float], Link],
    seconds: float,
    refused_seconds: float,
    pause: Callable[[float], None],
    address: str,
) -> Link:
    """Dials until it works, and says so if that takes long.

    Args:
        dial: one attempt, given the seconds that it may take.
        seconds: for all attempts together.
        refused_seconds: for attempts that are refused at once, because nobody listens there.
        pause: waits between two attempts; may raise to give up.
        address: that is dialled.

    Raises:
        LinkLost: none worked in time; the reason is that of the last one.
        ExchangeError: the server does not let us in.

    """
    spent = 0.0
    wait = 0.05
    told = False
    while True:
        began = time.monotonic()
        try:
            return dial(max(0.1, min(_ATTEMPT_SECONDS, seconds - spent)))
        except LinkLost as lost:
            # What took longer than an attempt can take was spent suspended.
            spent += min(time.monotonic() - began, 2 * _ATTEMPT_SECONDS)
            limit = refused_seconds if lost.refused else seconds
            if spent >= limit:
                raise
            if spent > _QUIET_SECONDS and not told:
                told = True
                _log.warning("no way to the server at %s yet: %s; it is tried for up to %g s", address, lost, limit)
        pause(wait)
        spent += wait
        wait = min(1.0, 2 * wait)
