"""The server's view of one worker's connection: what is being received from it, and what is on its way to it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import zmq

from lightning_async_localsgd.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_async_localsgd.buffers import BufferLease
    from lightning_async_localsgd.messages import Push, Reply
    from lightning_async_localsgd.wire.presence import Presence
    from lightning_async_localsgd.wire.way import Way


class Upload:
    """A pseudo-gradient that is being received, in order, into its buffer.

    Args:
        push: its header.
        now: seconds.

    Attributes:
        lease: the buffer; None until there is one.
        received: bytes so far.
        moved_at: when it last moved.
        told_at: when the worker was last told so.

    """

    def __init__(self, push: Push, now: float) -> None:
        self.push = push
        self.lease: BufferLease | None = None
        self.memory = memoryview(b"")
        self.received = 0
        self.moved_at = self.told_at = now

    def begin(self, lease: BufferLease, now: float) -> None:
        """There is a buffer."""
        self.lease = lease
        self.memory = frames.memory_of(lease.tensor)
        self.moved_at = self.told_at = now

    def room(self) -> memoryview:
        """Where the next part goes."""
        return self.memory[self.received : self.received + frames.FRAME_BYTES]

    def advance(self, size: int, now: float) -> None:
        """A part has arrived."""
        assert self.lease is not None
        self.received += size
        self.moved_at = now
        self.lease.touch()

    @property
    def complete(self) -> bool:
        """Whether everything is there."""
        return self.lease is not None and self.received == len(self.memory)


class Download:
    """A model on its way, at most a window ahead of what the worker has confirmed.

    Args:
        transfer: its number.
        lease: holds the model.
        now: seconds.

    Attributes:
        sent: frames handed to libzmq.
        confirmed: frames that the worker has.
        moved_at: when the worker last confirmed some.

    """

    def __init__(self, transfer: int, lease: BufferLease, now: float) -> None:
        self.transfer = transfer
        self.lease = lease
        self.memory = frames.memory_of(lease.tensor)
        self.count = frames.frame_count(len(self.memory))
        self.sent = 0
        self.confirmed = 0
        self.moved_at = now
        self._trackers: deque[zmq.MessageTracker] = deque(maxlen=frames.WINDOW)

    @property
    def complete(self) -> bool:
        """Whether the worker has everything."""
        return self.confirmed == self.count

    @property
    def has_credit(self) -> bool:
        """Whether another frame may be sent."""
        return self.sent < min(self.count, self.confirmed + frames.WINDOW)

    @property
    def untouched(self) -> bool:
        """Whether libzmq reads nothing of the buffer any more."""
        return all(tracker.done for tracker in self._trackers)

    def confirm(self, received: int, now: float) -> bool:
        """The worker has ``received`` frames; returns whether that can be."""
        if not self.confirmed < received <= self.sent:
            return False
        self.confirmed = received
        self.moved_at = now
        self.lease.touch()
        return True

    def send_next(self, socket: zmq.Socket[bytes], identity: bytes) -> int:
        """Sends a frame straight from the buffer; returns the bytes sent.

        Raises:
            zmq.ZMQError: the connection takes none now, or is gone.

        """
        offset = self.sent * frames.FRAME_BYTES
        part = self.memory[offset : offset + frames.FRAME_BYTES]
        header = frames.pack_part(frames.MODEL, self.transfer, offset)
        socket.send(identity, zmq.NOBLOCK | zmq.SNDMORE)
        socket.send(header, zmq.NOBLOCK | zmq.SNDMORE)
        self._trackers.append(socket.send(part, zmq.NOBLOCK, copy=False, track=True))
        self.sent += 1
        return len(header) + len(part)


class Peer:
    """One worker's connection; the :class:`.Outlet` that the server answers it through.

    Everything but :meth:`dispatch` and :meth:`refuse` belongs to the wire's thread.

    Args:
        way: over which it came.
        identity: that libzmq gave the connection.
        descriptor: of the connection.
        presence: of its session.
        rejoining: see :class:`.Hello`.
        post: has a call made by the wire's thread.
        deliver: starts a download.
        reject: sends a refusal.

    Attributes:
        live: it is its session's connection: neither ended nor refused, nor replaced by a newer one.
        awaiting: sequence number of what it wants an answer to; None if nothing.

    """

    def __init__(
        self,
        way: Way,
        identity: bytes,
        descriptor: int,
        presence: Presence,
        rejoining: bool,
        post: Callable[[Callable[[], None]], None],
        deliver: Callable[[Peer, Reply, BufferLease], None],
        reject: Callable[[Peer, str], None],
    ) -> None:
        self.way = way
        self.identity = identity
        self.descriptor = descriptor
        self.presence = presence
        self.worker = presence.worker
        self.session = presence.session
        self.live = True
        self.awaiting: int | None = None if rejoining else 0
        self.cancelled: int | None = None
        self.upload: Upload | None = None
        self.download: Download | None = None
        self.transfers = 0
        self._post = post
        self._deliver = deliver
        self._reject = reject

    def __repr__(self) -> str:
        return f"worker {self.worker} (session {self.session[:8]})"

    def dispatch(self, reply: Reply, lease: BufferLease) -> None:
        """See :meth:`.Outlet.dispatch`."""
        self._post(lambda: self._deliver(self, reply, lease))

    def refuse(self, reason: str) -> None:
        """See :meth:`.Outlet.refuse`."""
        self._post(lambda: self._reject(self, reason))
