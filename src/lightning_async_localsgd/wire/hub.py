"""The server's handling of messages from workers: their sessions, uploads and downloads.

Runs in one thread, that of :class:`.WireServer`, and never waits for a peer. Only authenticated peers get this far.
Their messages are checked nevertheless, so that a broken worker cannot affect other workers.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

import zmq

from lightning_async_localsgd.protocol.messages import Hello, MessageError, Push, Share, worker_name
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import proof
from lightning_async_localsgd.wire.control import ControlMessages
from lightning_async_localsgd.wire.frames import Welcome
from lightning_async_localsgd.wire.listener import ConnectionKey, Listener, RefusalLog, source_of
from lightning_async_localsgd.wire.peer import Download, Peer, Upload
from lightning_async_localsgd.wire.presence import Presences

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_async_localsgd.protocol.buffers import PooledBuffer
    from lightning_async_localsgd.protocol.messages import Reply
    from lightning_async_localsgd.protocol.ports import ServerPort

_log = logging.getLogger(__name__)

_CREDIT_SECONDS = 1.0
"""Seconds between two credits to a worker whose upload moves, at least."""


class Hub:
    """Reads messages, acts on them, and sends the answers.

    Args:
        server: decides what to answer.
        token: secret of the run.
        silence_timeout: seconds of silence after which a worker is lost, see :class:`.AdaptiveTimeout`.
        post: runs a call in the hub's thread. Used by the peers, whose methods other threads call.

    Attributes:
        sent: bytes sent.
        received: bytes received.
        rejected: counts invalid messages.

    """

    def __init__(
        self, server: ServerPort, token: str, silence_timeout: float, post: Callable[[Callable[[], None]], None]
    ) -> None:
        self.sent = 0
        self.received = 0
        self.rejected = RefusalLog("messages refused")
        self._server = server
        self._token = token
        self._silence_timeout = silence_timeout
        self._post = post
        self._presences = Presences(server, silence_timeout, self._disconnect)
        self._control = ControlMessages(server, token, post, self._send)
        self._peers: dict[ConnectionKey, Peer] = {}
        self._connections: dict[tuple[Listener, int], ConnectionKey] = {}
        self._closed: list[ConnectionKey] = []
        self._waiting: deque[Peer] = deque()
        self._cancelled_downloads: list[Download] = []
        self._ticked_at = time.monotonic()

    # ----------------------------------------------------------------- receiving

    def receive(self, listener: Listener) -> bool:
        """Read one message and act on it. Return whether there was a message."""
        socket = listener.socket
        try:
            identity = socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return False
        frame = socket.recv(zmq.NOBLOCK, copy=False)
        header = frame.bytes
        self.received += len(header)
        key = (listener, identity)
        kind = header[:1]
        try:
            if kind == frames.DATA:
                self._on_data(self._peers.get(key), key, header)
            elif kind == frames.PING:
                self._on_ping(key, source_of(frame), header)
            elif kind == frames.LEASE_REQUEST:
                self._control.on_lease_request(key, header)
            elif kind == frames.JOIN_REQUEST:
                listener.mark_authenticated(source_of(frame))
                self._control.on_join_request(key, header)
            elif kind == frames.HELLO:
                self._on_hello(key, source_of(frame), header)
            else:
                self._on_worker_message(self._peer_of(key), kind, header)
        except MessageError as error:
            self._on_invalid_message(key, str(error))
        while socket.getsockopt(zmq.RCVMORE):
            self.received += len(socket.recv(zmq.NOBLOCK))
        return True

    def collect_closed(self, listener: Listener) -> None:
        """Collect the connections that have ended. Messages that came over them before are still to be read."""
        for descriptor in listener.read_events():
            key = self._connections.pop((listener, descriptor), None)
            if key is not None:
                self._closed.append(key)

    def handle_closed(self) -> None:
        """Act on the ends of the collected connections."""
        for key in self._closed:
            peer = self._peers.pop(key, None)
            if peer is not None:
                self._end_connection(peer, "its connection ended")
            self._control.on_closed(key)
            self._presences.on_heartbeat_closed(key)
        self._closed.clear()

    def _peer_of(self, key: ConnectionKey) -> Peer:
        peer = self._peers.get(key)
        if peer is None:
            raise MessageError("a message without a hello before")
        peer.presence.timeout.record_activity(time.monotonic())
        return peer

    def _on_hello(self, key: ConnectionKey, descriptor: int, header: bytes) -> None:
        listener, identity = key
        nonce = self._next_part(listener)
        listener.mark_authenticated(descriptor)
        refused = frames.protocol_mismatch(header[1:], "this worker")
        if refused is not None:
            self._send(key, frames.REFUSE + refused.encode(), b"")
            return
        hello = Hello.decode(header[1:])
        if len(nonce) != frames.NONCE_BYTES:
            raise MessageError(f"a hello with a nonce of {len(nonce)} bytes, expected {frames.NONCE_BYTES}")
        if hello.worker < 0:
            raise MessageError(f"a hello of {worker_name(hello.worker)}")
        if hello.fingerprint != self._server.layout.fingerprint:
            reason = (
                f"the model of {worker_name(hello.worker)} differs from rank 0's; every rank must build the same model"
            )
            self.rejected.add(reason)
            self._send(key, frames.REFUSE + reason.encode(), frames.pack_layout(self._server.layout))
            return
        incarnation = self._server.incarnation
        welcome = Welcome(incarnation, proof(self._token, nonce, incarnation))
        if not self._register(key, descriptor, frames.WELCOME + welcome.encode()):
            return
        older = self._peers.get(key)
        presence = self._presences.on_hello(hello, time.monotonic())
        # The session has said hello before, over an older connection or over this one. The older peer is obsolete. Its
        # download would hold a buffer until the end of its connection is noticed.
        if presence.peer is not None:
            same = (presence.peer.listener, presence.peer.identity) == key
            (self._deactivate if same else self._disconnect)(presence.peer)
        presence.peer = peer = Peer(
            listener, identity, descriptor, presence, hello.reconnecting, self._post, self._start_download, self._refuse
        )
        self._peers[key] = peer
        if older is not None:
            self._end_connection(older, "its connection now belongs to another session")
        self._server.join(hello, peer)

    def _on_ping(self, key: ConnectionKey, descriptor: int, header: bytes) -> None:
        ping, answer = self._control.on_ping(header)
        key[0].mark_authenticated(descriptor)
        if self._register(key, descriptor, answer):
            self._control.add_connection(key, ping)
            self._presences.on_ping(key, ping, time.monotonic())

    def _on_worker_message(self, peer: Peer, kind: bytes, header: bytes) -> None:
        if kind == frames.PUSH:
            self._on_push(peer, Push.decode(header[1:]))
        elif kind == frames.SHARE:
            self._on_share(peer, Share.decode(header[1:]))
        elif kind == frames.CREDIT:
            self._on_credit(peer, *frames.unpack_part(header))
        elif kind == frames.BYE:
            self._end_session(peer, frames.unpack_reason(header) or "it said goodbye")
        else:
            raise MessageError(f"unknown kind {kind!r}")

    def _on_push(self, peer: Peer, push: Push) -> None:
        if not self._begin_request(peer, push):
            return
        if not push.has_data or push.steps < 0 or push.incarnation != self._server.incarnation:
            self._server.push(push, None, peer)
            return
        size = None if push.contents == "round" else self._server.layout.model_bytes
        self._await_upload(peer, Upload(push, self._server.push_buffers(push), time.monotonic(), size))

    def _on_share(self, peer: Peer, share: Share) -> None:
        pool = self._server.share_buffers(share)
        if self._begin_request(peer, share):
            self._await_upload(peer, Upload(share, pool, time.monotonic()))

    def _begin_request(self, peer: Peer, header: Push | Share) -> bool:
        """Note that a worker awaits an answer to a header. Return False if its connection has ended meanwhile."""
        if (header.worker, header.session) != (peer.worker, peer.session):
            raise MessageError(f"a message of {worker_name(header.worker)} over the connection of {peer}")
        if not peer.active:
            # The peer was deactivated. The worker says hello again, and learns what has become of its session.
            self._send_to_peer(peer, frames.UNKNOWN)
            return False
        self._cancel_transfers(peer)
        peer.awaited_sequence = header.sequence
        return True

    def _await_upload(self, peer: Peer, upload: Upload) -> None:
        peer.upload = upload
        self._waiting.append(peer)
        self.assign_buffers()

    def _on_data(self, peer: Peer | None, key: ConnectionKey, header: bytes) -> None:
        peer = peer if peer is not None else self._peer_of(key)
        transfer, offset = frames.unpack_part(header)
        upload = peer.upload
        if upload is None or upload.header.sequence != transfer:
            if transfer != peer.cancelled_sequence:
                raise MessageError("data without a push")
            return
        part = upload.next_part()
        if upload.buffer is None or offset != upload.received or not key[0].socket.getsockopt(zmq.RCVMORE):
            raise MessageError(f"data for offset {offset}, expected offset {upload.received}")
        size = key[0].socket.recv_into(part, flags=zmq.NOBLOCK) if len(part) else 0
        self.received += size
        if size != len(part) or key[0].socket.getsockopt(zmq.RCVMORE):
            raise MessageError(f"{size} bytes of data for offset {offset}, expected {len(part)}")
        now = time.monotonic()
        peer.presence.timeout.record_activity(now)
        upload.advance(size, now)
        if upload.complete:
            self._complete_upload(peer, upload)
        elif now - upload.acknowledged_at > _CREDIT_SECONDS:
            upload.acknowledged_at = now
            self._send_to_peer(peer, frames.pack_part(frames.CREDIT, transfer, frames.frame_count(upload.received)))

    def _on_credit(self, peer: Peer, transfer: int, received: int) -> None:
        download = peer.download
        if download is None or transfer != download.transfer:
            if transfer > peer.transfer_count:
                raise MessageError("a credit for a transfer that was never started")
            return
        if not download.confirm(received, time.monotonic()):
            raise MessageError(
                f"a credit for {received} frames, {download.sent} were sent and {download.confirmed} confirmed"
            )
        self._send_model(peer)

    def _on_invalid_message(self, key: ConnectionKey, reason: str) -> None:
        peer = self._peers.get(key)
        self.rejected.add(f"{reason} ({peer or 'unknown sender'})")
        if peer is None:
            self._send(key, frames.UNKNOWN)
        elif peer.active:
            # The worker is broken. End its session, so that it stops.
            reason = f"it broke the protocol: {reason}"
            self._end_session(peer, reason)
            ended = f"the server ended the session of {worker_name(peer.worker)}: {reason}"
            self._send(key, frames.REFUSE + ended.encode(), b"")

    def _register(self, key: ConnectionKey, descriptor: int, *answer: bytes) -> bool:
        """Answer the first message over a connection, and record the connection's descriptor to notice its end.

        Returns:
            Whether the connection is still there. A message may come from a connection that has ended, and whose
            descriptor belongs to another connection now.

        """
        listener = key[0]
        self.collect_closed(listener)
        if not listener.is_open(descriptor) or not self._send(key, *answer):
            return False
        older = self._connections.get((listener, descriptor))
        if older is not None and older != key:
            self._closed.append(older)
        self._connections[listener, descriptor] = key
        return True

    def _next_part(self, listener: Listener) -> bytes:
        if not listener.socket.getsockopt(zmq.RCVMORE):
            return b""
        part = listener.socket.recv(zmq.NOBLOCK)
        self.received += len(part)
        return part

    # ------------------------------------------------------------------- sending

    def _start_download(self, peer: Peer, reply: Reply, buffer: PooledBuffer) -> None:
        if not peer.active or reply.sequence != peer.awaited_sequence:
            # The worker no longer awaits this reply: it is gone, or has pushed again and will get another reply.
            buffer.release()
            return
        self._cancel_transfers(peer)
        peer.awaited_sequence = None
        peer.transfer_count += 1
        size = self._server.layout.model_bytes if reply.encoding == "mean" else None
        peer.download = Download(peer.transfer_count, buffer, time.monotonic(), size)
        if self._send_to_peer(peer, frames.pack_transfer(frames.REPLY, peer.transfer_count), reply.encode()):
            self._send_model(peer)

    def _send_model(self, peer: Peer) -> None:
        """Send as many frames of the model as the worker has given credit for."""
        download = peer.download
        if download is None:
            return
        try:
            while download.has_credit:
                self.sent += download.send_next(peer.listener.socket, peer.identity)
        except zmq.Again:
            pass  # Try again after the next credit, or at the next tick.
        except zmq.ZMQError as error:
            self._end_connection(peer, f"its connection ended ({error})")
            return
        if download.complete:
            download.buffer.release()
            peer.download = None

    def _refuse(self, peer: Peer, reason: str) -> None:
        # An inactive peer has lost its connection. Its worker is refused when it says hello again.
        if peer.active:
            self._end_session(peer)
            self._send((peer.listener, peer.identity), frames.REFUSE + reason.encode(errors="replace"), b"")

    def _send_to_peer(self, peer: Peer, *parts: bytes) -> bool:
        error = self._try_send((peer.listener, peer.identity), *parts)
        if error is None:
            return True
        if error == zmq.EAGAIN:
            # The connection is full. That never happens if the worker follows the protocol.
            self._disconnect(peer)
        self._end_connection(peer, "its connection ended")
        return False

    def _send(self, key: ConnectionKey, *parts: bytes) -> bool:
        return self._try_send(key, *parts) is None

    def _try_send(self, key: ConnectionKey, *parts: bytes) -> int | None:
        """Send a message. Return the error number if the connection is gone or full."""
        listener, identity = key
        try:
            listener.socket.send_multipart([identity, *parts], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            return error.errno
        self.sent += sum(map(len, parts))
        return None

    # ------------------------------------------------------------------- upkeep

    @property
    def has_waiting_uploads(self) -> bool:
        """Whether an upload waits for a buffer."""
        return bool(self._waiting)

    @property
    def has_downloads(self) -> bool:
        """Whether a model is being sent to a worker."""
        return any(peer.download is not None for peer in self._peers.values())

    def assign_buffers(self) -> None:
        """Assign buffers to the uploads that wait for one, first come, first served."""
        while self._waiting:
            peer = self._waiting[0]
            upload = peer.upload
            if upload is None or upload.buffer is not None:
                self._waiting.popleft()
                continue
            buffer = upload.pool.try_acquire()
            if buffer is None:
                return
            self._waiting.popleft()
            upload.assign_buffer(buffer, time.monotonic())
            if upload.complete:
                self._complete_upload(peer, upload)
            else:
                self._send_to_peer(peer, frames.pack_transfer(frames.GO, upload.header.sequence))

    def tick(self) -> None:
        """Check timeouts, continue downloads, free the buffers of cancelled downloads, and send recalls."""
        now = time.monotonic()
        if now - self._ticked_at > self._silence_timeout / 2:
            # This process was suspended, or too busy to read messages. The workers may not have been silent.
            self._presences.restart_timeouts(now)
            for peer in self._peers.values():
                for transfer in (peer.upload, peer.download):
                    if transfer is not None:
                        transfer.progress_at = now
        self._ticked_at = now
        self._presences.check_timeouts(now)
        for peer in list(self._peers.values()):
            if peer.active:
                self._send_model(peer)
                self._check_stall(peer, now, peer.presence.timeout.limit)
        for download in [download for download in self._cancelled_downloads if download.is_unreferenced]:
            self._cancelled_downloads.remove(download)
            download.buffer.release()
        self.send_recalls()

    def send_recalls(self) -> None:
        """Send a message to every worker whose recall has changed."""
        self._control.send_recalls()

    def drop_stalled_downloads(self, seconds: float) -> None:
        """Drop workers that have confirmed no frame of their download for ``seconds``."""
        for peer in list(self._peers.values()):
            if peer.download is not None:
                self._check_stall(peer, time.monotonic(), seconds)

    def lose_all(self, reason: str) -> None:
        """Tell the server that no worker can be reached any more."""
        for presence in self._presences:
            self._presences.end_session(presence, reason)

    def deactivate_all(self) -> None:
        """Deactivate all peers and release all buffers. From now on peers only release the buffers they are given."""
        for peer in self._peers.values():
            self._deactivate(peer)
        for download in self._cancelled_downloads:
            download.buffer.release()
        self._cancelled_downloads.clear()
        self._peers.clear()

    def _check_stall(self, peer: Peer, now: float, limit: float) -> None:
        for transfer, what in ((peer.upload, "upload"), (peer.download, "download")):
            waits = isinstance(transfer, Upload) and transfer.buffer is None
            if transfer is not None and not waits and now - transfer.progress_at > limit:
                reason = f"its {what} stalled for {now - transfer.progress_at:.0f} s"
                self._presences.mark_lost(peer.presence, reason, stalled=True)
                return

    def _complete_upload(self, peer: Peer, upload: Upload) -> None:
        peer.upload = None
        if isinstance(upload.header, Push):
            self._server.push(upload.header, upload.buffer, peer)
        else:
            assert upload.buffer is not None
            self._server.share(upload.header, upload.buffer, peer)

    def _end_connection(self, peer: Peer, reason: str) -> None:
        """Handle the end of a peer's connection."""
        self._deactivate(peer)
        self._presences.detach(peer, reason)

    def _end_session(self, peer: Peer, reason: str | None = None) -> None:
        """End the session for good. If there is a reason, tell it to the server."""
        if peer.active:
            self._deactivate(peer)
            self._presences.end_session(peer.presence, reason)

    def _disconnect(self, peer: Peer) -> None:
        """Cancel the peer's transfers and close its connection. The worker's process, if alive, reconnects.

        Otherwise a connection whose other end is frozen would hold a buffer for as long as the connection lasts.
        """
        self._deactivate(peer)
        key = (peer.listener, peer.identity)
        # The descriptor may belong to another connection now.
        if self._connections.get((peer.listener, peer.descriptor)) == key and peer.listener.disconnect(peer.descriptor):
            return
        self._send(key, frames.UNKNOWN)

    def _deactivate(self, peer: Peer) -> None:
        """Cancel the peer's transfers and ignore it from now on. Its connection stays registered until it ends."""
        peer.active = False
        self._cancel_transfers(peer)

    def _cancel_transfers(self, peer: Peer) -> None:
        upload, download = peer.upload, peer.download
        peer.upload = peer.download = None
        if upload is not None:
            peer.cancelled_sequence = upload.header.sequence
            if upload.buffer is not None:
                upload.buffer.release()
        if download is not None:
            # libzmq may still read from the buffer for a moment.
            self._cancelled_downloads.append(download)
