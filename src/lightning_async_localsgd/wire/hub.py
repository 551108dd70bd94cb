"""The conversation with the workers: who is who, who uploads, who downloads, who is gone.

Belongs to one thread, that of :class:`.WireServer`, and never waits for a peer. What a peer says is checked here even
though only authenticated ones get this far: whatever a worker that has gone wrong sends, the others notice nothing.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

import zmq

from lightning_async_localsgd.messages import Hello, MessageError, Push
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import proof
from lightning_async_localsgd.wire.frames import Welcome
from lightning_async_localsgd.wire.peer import Download, Peer, Upload
from lightning_async_localsgd.wire.presence import Presences
from lightning_async_localsgd.wire.small_talk import SmallTalk
from lightning_async_localsgd.wire.way import Key, Tally, Way, source_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_async_localsgd.buffers import BufferLease
    from lightning_async_localsgd.messages import Reply
    from lightning_async_localsgd.wire.protocol import ServerPort

_log = logging.getLogger(__name__)

_TELL_SECONDS = 1.0
"""How often a worker whose upload moves is told so, at most."""


class Hub:
    """Reads messages and acts on them.

    Args:
        server: is told what happens.
        token: secret of the run.
        silence_timeout: seconds of silence after which a worker is lost, see :class:`.Silence`.
        post: has a call made by the hub's thread; for the outlets, which other threads use.

    Attributes:
        sent: bytes sent.
        received: bytes received.
        rejected: counts messages that should not have been sent.

    """

    def __init__(
        self, server: ServerPort, token: str, silence_timeout: float, post: Callable[[Callable[[], None]], None]
    ) -> None:
        self.sent = 0
        self.received = 0
        self.rejected = Tally("messages refused")
        self._server = server
        self._token = token
        self._silence_timeout = silence_timeout
        self._post = post
        self._presences = Presences(server, silence_timeout, self._hang_up)
        self._small_talk = SmallTalk(server, token, post, self._say)
        self._peers: dict[Key, Peer] = {}
        self._connections: dict[tuple[Way, int], Key] = {}
        self._ended: list[Key] = []
        self._waiting: deque[Peer] = deque()
        self._abandoned: list[Download] = []
        self._awake_at = time.monotonic()

    # ------------------------------------------------------------ what comes in

    def receive(self, way: Way) -> bool:
        """Reads one message; returns whether there was one."""
        socket = way.socket
        try:
            identity = socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return False
        frame = socket.recv(zmq.NOBLOCK, copy=False)
        header = frame.bytes
        self.received += len(header)
        key = (way, identity)
        kind = header[:1]
        try:
            if kind == frames.DATA:
                self._on_data(self._peers.get(key), key, header)
            elif kind == frames.BEAT:
                self._on_beat(key, source_of(frame), header)
            elif kind == frames.ASK:
                self._small_talk.ask(key, header)
            elif kind == frames.KNOCK:
                way.introduce(source_of(frame))
                self._small_talk.knock(key, header)
            elif kind == frames.HELLO:
                self._on_hello(key, source_of(frame), header)
            else:
                self._on_word(self._known(key), kind, header)
        except MessageError as error:
            self._on_nonsense(key, str(error))
        while socket.getsockopt(zmq.RCVMORE):
            self.received += len(socket.recv(zmq.NOBLOCK))
        return True

    def note_ends(self, way: Way) -> None:
        """Finds out which connections have ended. What they had brought before is still to be read."""
        for descriptor in way.events():
            key = self._connections.pop((way, descriptor), None)
            if key is not None:
                self._ended.append(key)

    def forget_ended(self) -> None:
        """Acts on the ends noted before."""
        for key in self._ended:
            peer = self._peers.pop(key, None)
            if peer is not None:
                self._end(peer, "its connection ended")
            self._small_talk.end(key)
            self._presences.end_pulse(key)
        self._ended.clear()

    def _known(self, key: Key) -> Peer:
        peer = self._peers.get(key)
        if peer is None:
            raise MessageError("came from somebody who has not said hello")
        peer.presence.silence.hear(time.monotonic())
        return peer

    def _on_hello(self, key: Key, descriptor: int, header: bytes) -> None:
        way, identity = key
        nonce = self._next_part(way)
        way.introduce(descriptor)
        refused = frames.other_protocol(header[1:], "this worker")
        if refused is not None:
            self._say(key, frames.REFUSE + refused.encode(), b"")
            return
        hello = Hello.decode(header[1:])
        if len(nonce) != frames.NONCE_BYTES:
            raise MessageError(f"a hello with a nonce of {len(nonce)} bytes")
        if hello.worker < 0:
            raise MessageError(f"a hello of worker {hello.worker}")
        if hello.fingerprint != self._server.layout.fingerprint:
            reason = f"the model of worker {hello.worker} is not that of rank 0; every rank must build the same one"
            self.rejected.add(reason)
            self._say(key, frames.REFUSE + reason.encode(), frames.pack_layout(self._server.layout))
            return
        incarnation = self._server.incarnation
        welcome = Welcome(incarnation, proof(self._token, nonce, incarnation))
        if not self._meet(key, descriptor, frames.WELCOME + welcome.encode()):
            return
        older = self._peers.get(key)
        presence = self._presences.greet(hello, time.monotonic())
        # The same session over a newer connection, or once more over this one: the older peer has no say any more. What
        # was on its way to it holds a buffer for as long as nobody knows that its connection is gone.
        if presence.peer is not None:
            same = (presence.peer.way, presence.peer.identity) == key
            (self._retire if same else self._hang_up)(presence.peer)
        presence.peer = peer = Peer(
            way, identity, descriptor, presence, hello.rejoining, self._post, self._deliver, self._reject
        )
        self._peers[key] = peer
        if older is not None:
            self._end(older, "its connection says that it is another one's")
        self._server.join(hello, peer)

    def _on_beat(self, key: Key, descriptor: int, header: bytes) -> None:
        beat, answer = self._small_talk.hear(header)
        key[0].introduce(descriptor)
        if self._meet(key, descriptor, answer):
            self._small_talk.note(key, beat)
            self._presences.beat(key, beat, time.monotonic())

    def _on_word(self, peer: Peer, kind: bytes, header: bytes) -> None:
        if kind == frames.PUSH:
            self._on_push(peer, Push.decode(header[1:]))
        elif kind == frames.CREDIT:
            self._on_credit(peer, *frames.unpack_part(header))
        elif kind == frames.BYE:
            self._dismiss(peer, "it said goodbye")
        else:
            raise MessageError(f"unknown kind {kind!r}")

    def _on_push(self, peer: Peer, push: Push) -> None:
        if (push.worker, push.session) != (peer.worker, peer.session):
            raise MessageError(f"a push of worker {push.worker} over the connection of {peer}")
        if not peer.live:
            # It was given up while it was silent. Saying hello again, it learns what has become of its session.
            self._tell(peer, frames.UNKNOWN)
            return
        self._end_transfers(peer)
        peer.awaiting = push.sequence
        if push.steps <= 0 or push.incarnation != self._server.incarnation:
            self._server.push(push, None, peer)
            return
        peer.upload = Upload(push, time.monotonic())
        self._waiting.append(peer)
        self.serve_waiting()

    def _on_data(self, peer: Peer | None, key: Key, header: bytes) -> None:
        peer = peer if peer is not None else self._known(key)
        transfer, offset = frames.unpack_part(header)
        upload = peer.upload
        if upload is None or upload.push.sequence != transfer:
            if transfer != peer.cancelled:
                raise MessageError("data without a push")
            return
        room = upload.room()
        if upload.lease is None or offset != upload.received or not key[0].socket.getsockopt(zmq.RCVMORE):
            raise MessageError(f"data for offset {offset} when {upload.received} bytes were there")
        size = key[0].socket.recv_into(room, flags=zmq.NOBLOCK) if len(room) else 0
        self.received += size
        if size != len(room) or key[0].socket.getsockopt(zmq.RCVMORE):
            raise MessageError(f"{size} bytes of data for offset {offset}, expected {len(room)}")
        now = time.monotonic()
        peer.presence.silence.hear(now)
        upload.advance(size, now)
        if upload.complete:
            self._hand_over(peer, upload)
        elif now - upload.told_at > _TELL_SECONDS:
            upload.told_at = now
            self._tell(peer, frames.pack_part(frames.CREDIT, transfer, frames.frame_count(upload.received)))

    def _on_credit(self, peer: Peer, transfer: int, received: int) -> None:
        download = peer.download
        if download is None or transfer != download.transfer:
            if transfer > peer.transfers:
                raise MessageError("a confirmation of what was never sent")
            return
        if not download.confirm(received, time.monotonic()):
            raise MessageError(f"a confirmation of {received} frames when {download.sent} were sent")
        self._pump(peer)

    def _on_nonsense(self, key: Key, reason: str) -> None:
        peer = self._peers.get(key)
        self.rejected.add(f"{reason} ({peer or 'no worker that is known'})")
        if peer is None:
            self._say(key, frames.UNKNOWN)
        elif peer.live:
            # Something is broken over there. Better it stops than that it goes on like this.
            reason = f"it sent nonsense: {reason}"
            self._dismiss(peer, reason)
            self._say(key, frames.REFUSE + f"the server gave worker {peer.worker} up: {reason}".encode(), b"")

    def _meet(self, key: Key, descriptor: int, *answer: bytes) -> bool:
        """Answers who is heard for the first time, and notes whose connection it is, so that its end can be told.

        Returns:
            Whether it is still there. What is read may come from a connection that has ended, and whose descriptor is
            that of another one by now.

        """
        way = key[0]
        self.note_ends(way)
        if not way.is_open(descriptor) or not self._say(key, *answer):
            return False
        older = self._connections.get((way, descriptor))
        if older is not None and older != key:
            self._ended.append(older)
        self._connections[way, descriptor] = key
        return True

    def _next_part(self, way: Way) -> bytes:
        if not way.socket.getsockopt(zmq.RCVMORE):
            return b""
        part = way.socket.recv(zmq.NOBLOCK)
        self.received += len(part)
        return part

    # ------------------------------------------------------------ what goes out

    def _deliver(self, peer: Peer, reply: Reply, lease: BufferLease) -> None:
        if not peer.live or reply.sequence != peer.awaiting:
            # Nobody waits for this one (any more): its worker is gone, or has asked again and gets another answer.
            lease.release()
            return
        self._end_transfers(peer)
        peer.awaiting = None
        peer.transfers += 1
        peer.download = Download(peer.transfers, lease, time.monotonic())
        if self._tell(peer, frames.pack_transfer(frames.REPLY, peer.transfers), reply.encode()):
            self._pump(peer)

    def _pump(self, peer: Peer) -> None:
        """Sends as much of the model as the worker has given credit for."""
        download = peer.download
        if download is None:
            return
        try:
            while download.has_credit:
                self.sent += download.send_next(peer.way.socket, peer.identity)
        except zmq.Again:
            pass  # Tried again with the next confirmation, or at the next tick.
        except zmq.ZMQError as error:
            self._end(peer, f"its connection ended ({error})")
            return
        if download.complete:
            download.lease.release()
            peer.download = None

    def _reject(self, peer: Peer, reason: str) -> None:
        # Who is not live has lost this connection and learns what has become of its session when it says hello again.
        if peer.live:
            self._dismiss(peer)
            self._say((peer.way, peer.identity), frames.REFUSE + reason.encode(errors="replace"), b"")

    def _tell(self, peer: Peer, *parts: bytes) -> bool:
        error = self._send((peer.way, peer.identity), *parts)
        if error is None:
            return True
        if error == zmq.EAGAIN:
            # It is so far behind that it takes nothing more, which a worker that keeps to the protocol never is.
            self._hang_up(peer)
        self._end(peer, "its connection ended")
        return False

    def _say(self, key: Key, *parts: bytes) -> bool:
        return self._send(key, *parts) is None

    def _send(self, key: Key, *parts: bytes) -> int | None:
        """Sends a message, unless the connection is gone or full; returns the error in that case."""
        way, identity = key
        try:
            way.socket.send_multipart([identity, *parts], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            return error.errno
        self.sent += sum(map(len, parts))
        return None

    # ------------------------------------------------------------------- upkeep

    @property
    def waiting(self) -> bool:
        """Whether an upload waits for a buffer."""
        return bool(self._waiting)

    @property
    def delivering(self) -> bool:
        """Whether a model is on its way to somebody."""
        return any(peer.download is not None for peer in self._peers.values())

    def serve_waiting(self) -> None:
        """Gives buffers to the uploads that wait for one, first come, first served."""
        while self._waiting:
            peer = self._waiting[0]
            upload = peer.upload
            if upload is None or upload.lease is not None:
                self._waiting.popleft()
                continue
            lease = self._server.buffers.try_acquire()
            if lease is None:
                return
            self._waiting.popleft()
            upload.begin(lease, time.monotonic())
            if upload.complete:
                self._hand_over(peer, upload)
            else:
                self._tell(peer, frames.pack_transfer(frames.GO, upload.push.sequence))

    def tick(self) -> None:
        """Looks at the clock and at the server's wish to stop."""
        now = time.monotonic()
        if now - self._awake_at > self._silence_timeout / 2:
            # This process was suspended, or too busy to listen. The silence was its own.
            self._presences.excuse(now)
            for peer in self._peers.values():
                for transfer in (peer.upload, peer.download):
                    if transfer is not None:
                        transfer.moved_at = now
        self._awake_at = now
        self._presences.judge(now)
        for peer in list(self._peers.values()):
            if peer.live:
                self._pump(peer)
                self._judge(peer, now, peer.presence.silence.limit)
        for download in [download for download in self._abandoned if download.untouched]:
            self._abandoned.remove(download)
            download.lease.release()
        self._small_talk.tell_wanted()

    def drop_silent_downloads(self, seconds: float) -> None:
        """Gives up workers that have confirmed nothing of their model for ``seconds``."""
        for peer in list(self._peers.values()):
            if peer.download is not None:
                self._judge(peer, time.monotonic(), seconds)

    def lose_all(self, reason: str) -> None:
        """The server learns that no worker can be reached any more."""
        for presence in self._presences:
            self._presences.dismiss(presence, reason)

    def retire_all(self) -> None:
        """The end: buffers go back, and whatever the outlets are told from now on only frees what it brings."""
        for peer in self._peers.values():
            self._retire(peer)
        for download in self._abandoned:
            download.lease.release()
        self._abandoned.clear()
        self._peers.clear()

    def _judge(self, peer: Peer, now: float, limit: float) -> None:
        for transfer, what in ((peer.upload, "upload"), (peer.download, "download")):
            waits = isinstance(transfer, Upload) and transfer.lease is None
            if transfer is not None and not waits and now - transfer.moved_at > limit:
                reason = f"it stalled in mid-{what} for {now - transfer.moved_at:.0f} s"
                self._presences.depart(peer.presence, reason, stalled=True)
                return

    def _hand_over(self, peer: Peer, upload: Upload) -> None:
        peer.upload = None
        self._server.push(upload.push, upload.lease, peer)

    def _end(self, peer: Peer, reason: str) -> None:
        """A connection has ended, or is of no use any more."""
        self._retire(peer)
        self._presences.detach(peer, reason)

    def _dismiss(self, peer: Peer, reason: str | None = None) -> None:
        """The session ends for good; the server learns the reason if there is one."""
        if peer.live:
            self._retire(peer)
            self._presences.dismiss(peer.presence, reason)

    def _hang_up(self, peer: Peer) -> None:
        """The session has departed. Its process, if there is one, dials again; what is on its way to it is taken back.

        A connection whose other end is frozen would otherwise keep a buffer for as long as it lasts.
        """
        self._retire(peer)
        key = (peer.way, peer.identity)
        # The descriptor may be another connection's by now.
        if self._connections.get((peer.way, peer.descriptor)) == key and peer.way.hang_up(peer.descriptor):
            return
        self._say(key, frames.UNKNOWN)

    def _retire(self, peer: Peer) -> None:
        """Ends what ``peer`` was doing. Its connection stays known until it ends."""
        peer.live = False
        self._end_transfers(peer)

    def _end_transfers(self, peer: Peer) -> None:
        upload, download = peer.upload, peer.download
        peer.upload = peer.download = None
        if upload is not None:
            peer.cancelled = upload.push.sequence
            if upload.lease is not None:
                upload.lease.release()
        if download is not None:
            # libzmq may still read from the buffer for a moment.
            self._abandoned.append(download)
