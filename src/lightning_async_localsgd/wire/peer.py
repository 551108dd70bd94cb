"""The server's state of a worker's connection: the upload from the worker, and the download to it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import zmq
from typing_extensions import override

from lightning_async_localsgd.protocol.messages import worker_name
from lightning_async_localsgd.protocol.ports import ReplyChannel
from lightning_async_localsgd.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from lightning_async_localsgd.protocol.buffers import BufferPool, PooledBuffer
    from lightning_async_localsgd.protocol.messages import Push, Reply, Share
    from lightning_async_localsgd.wire.adaptive_timeout import AdaptiveTimeout
    from lightning_async_localsgd.wire.listener import Listener


class Upload:
    """A pseudo-gradient, or shared values, that are received, in order, into a buffer.

    Args:
        header: the message before the data.
        pool: where the buffer comes from.
        now: the time in seconds.
        size: bytes that are received, if they do not fill the buffer.

    Attributes:
        buffer: the buffer; None until one is assigned.
        received: bytes received so far.
        progress_at: when the upload last moved.
        acknowledged_at: when the worker was last sent a credit for it.

    """

    def __init__(self, header: Push | Share, pool: BufferPool, now: float, size: int | None = None) -> None:
        self.header = header
        self.pool = pool
        self.buffer: PooledBuffer | None = None
        self.memory = memoryview(b"")
        self.received = 0
        self.progress_at = self.acknowledged_at = now
        self._size = size

    def assign_buffer(self, buffer: PooledBuffer, now: float) -> None:
        """Begin to receive into ``buffer``."""
        self.buffer = buffer
        self.memory = frames.memory_of(buffer.tensor)[: self._size]
        self.progress_at = self.acknowledged_at = now

    def next_part(self) -> memoryview:
        """Return the memory that the next part is received into."""
        return self.memory[self.received : self.received + frames.FRAME_BYTES]

    def advance(self, size: int, now: float) -> None:
        """Record that a part has arrived."""
        assert self.buffer is not None
        self.received += size
        self.progress_at = now
        self.buffer.record_progress()

    @property
    def complete(self) -> bool:
        """Whether all bytes have arrived."""
        return self.buffer is not None and self.received == len(self.memory)


class Download:
    """A model that is sent to a worker, at most a window ahead of what the worker has confirmed.

    Args:
        transfer: number of the transfer.
        buffer: holds the model.
        now: the time in seconds.
        size: bytes that are sent; all of the buffer if None.

    Attributes:
        sent: frames given to libzmq.
        confirmed: frames that the worker has confirmed.
        progress_at: when the worker last confirmed frames.

    """

    def __init__(self, transfer: int, buffer: PooledBuffer, now: float, size: int | None = None) -> None:
        self.transfer = transfer
        self.buffer = buffer
        self.memory = frames.memory_of(buffer.tensor)[:size]
        self.count = frames.frame_count(len(self.memory))
        self.sent = 0
        self.confirmed = 0
        self.progress_at = now
        self._trackers: deque[zmq.MessageTracker] = deque(maxlen=frames.WINDOW)

    @property
    def complete(self) -> bool:
        """Whether the worker has confirmed all frames."""
        return self.confirmed == self.count

    @property
    def has_credit(self) -> bool:
        """Whether another frame may be sent."""
        return self.sent < min(self.count, self.confirmed + frames.WINDOW)

    @property
    def is_unreferenced(self) -> bool:
        """Whether libzmq no longer reads from the buffer."""
        return all(tracker.done for tracker in self._trackers)

    def confirm(self, received: int, now: float) -> bool:
        """Record that the worker has ``received`` frames. Return False if that is not possible."""
        if not self.confirmed < received <= self.sent:
            return False
        self.confirmed = received
        self.progress_at = now
        self.buffer.record_progress()
        return True

    def send_next(self, socket: zmq.Socket[bytes], identity: bytes) -> int:
        """Send the next frame straight from the buffer. Return the number of bytes sent.

        Raises:
            zmq.ZMQError: the connection is full for now, or is gone.

        """
        offset = self.sent * frames.FRAME_BYTES
        part = self.memory[offset : offset + frames.FRAME_BYTES]
        header = frames.pack_part(frames.MODEL, self.transfer, offset)
        socket.send(identity, zmq.NOBLOCK | zmq.SNDMORE)
        socket.send(header, zmq.NOBLOCK | zmq.SNDMORE)
        self._trackers.append(socket.send(part, zmq.NOBLOCK, copy=False, track=True))
        self.sent += 1
        return len(header) + len(part)


class Presence:
    """The state of one worker session, as seen over its connections.

    Args:
        worker: the worker's number.
        session: the session's name.
        timeout: the session's timeout.

    Attributes:
        peer: the session's bulk connection; None while there is none.
        heartbeats: the connections of its heartbeat, and when the last ping came over each. A replaced connection may
            stay half open for long.
        lost: the server was told that the session is lost.
        stalled: the session was lost because a transfer stalled, though its pings came. Only a new hello revives it.

    """

    def __init__(self, worker: int, session: str, timeout: AdaptiveTimeout) -> None:
        self.worker = worker
        self.session = session
        self.timeout = timeout
        self.peer: Peer | None = None
        self.heartbeats: dict[Hashable, float] = {}
        self.lost = False
        self.stalled = False


class Peer(ReplyChannel):
    """One worker's bulk connection, through which the server answers the worker.

    :meth:`dispatch` and :meth:`refuse` may be called from any thread. Everything else belongs to the wire's thread.

    Args:
        listener: the listener that accepted the connection.
        identity: libzmq's routing id of the connection.
        descriptor: the connection's descriptor.
        presence: the worker session.
        reconnecting: see :class:`.Hello`.
        post: runs a call in the wire's thread.
        start_download: starts a download to this peer.
        send_refusal: refuses this peer.

    Attributes:
        active: this is the session's connection: not ended, refused, or replaced by a newer connection.
        awaited_sequence: sequence number of the push that the worker awaits an answer to (0: its hello); None if it
            awaits no answer.
        cancelled_sequence: sequence number of the upload that was cancelled last. Parts of it may still arrive.
        transfer_count: downloads started so far.

    """

    def __init__(
        self,
        listener: Listener,
        identity: bytes,
        descriptor: int,
        presence: Presence,
        reconnecting: bool,
        post: Callable[[Callable[[], None]], None],
        start_download: Callable[[Peer, Reply, PooledBuffer], None],
        send_refusal: Callable[[Peer, str], None],
    ) -> None:
        self.listener = listener
        self.identity = identity
        self.descriptor = descriptor
        self.presence = presence
        self.worker = presence.worker
        self.session = presence.session
        self.active = True
        self.awaited_sequence: int | None = None if reconnecting else 0
        self.cancelled_sequence: int | None = None
        self.upload: Upload | None = None
        self.download: Download | None = None
        self.transfer_count = 0
        self._post = post
        self._start_download = start_download
        self._send_refusal = send_refusal

    def __repr__(self) -> str:
        return f"{worker_name(self.worker)} (session {self.session[:8]})"

    @override
    def dispatch(self, reply: Reply, buffer: PooledBuffer) -> None:
        self._post(lambda: self._start_download(self, reply, buffer))

    @override
    def refuse(self, reason: str) -> None:
        self._post(lambda: self._send_refusal(self, reason))
