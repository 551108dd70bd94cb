"""The conversation with the workers: who is who, who uploads, who downloads, who is gone.

Belongs to one thread, that of :class:`.WireServer`, and never waits for a peer. What a peer says is checked here even
though only authenticated ones get this far: whatever a worker that has gone wrong sends, the others notice nothing.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from typing import TYPE_CHECKING

import zmq

from lightning_async_localsgd.messages import PROTOCOL_VERSION, Hello, Lease, LeaseRequest, MessageError, Push
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import proof
from lightning_async_localsgd.wire.frames import Answer, Beat, Welcome
from lightning_async_localsgd.wire.peer import Download, Peer, Upload
from lightning_async_localsgd.wire.way import Tally, Way, source_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning_async_localsgd.buffers import BufferLease
    from lightning_async_localsgd.messages import Reply
    from lightning_async_localsgd.wire.protocol import ServerPort

_log = logging.getLogger(__name__)

_Key = tuple[Way, bytes]

_MOST_ASKED = 64
"""A worker that asks for more leases than this before it has an answer has gone wrong."""


class Hub:
    """Reads messages and acts on them.

    Args:
        server: is told what happens.
        token: secret of the run.
        silence_timeout: seconds of silence after which a worker is lost.
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
        self._peers: dict[_Key, Peer] = {}
        self._sessions: dict[tuple[int, str], Peer] = {}
        self._pulses: dict[_Key, Beat] = {}
        self._asking: dict[_Key, int] = {}
        self._connections: dict[tuple[Way, int], _Key] = {}
        self._ended: list[_Key] = []
        self._waiting: deque[Peer] = deque()
        self._abandoned: list[Download] = []
        self._wanted_told: Mapping[int, int] = {}
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
                self._on_ask(key, header)
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
            self._pulses.pop(key, None)
            self._asking.pop(key, None)
            peer = self._peers.pop(key, None)
            if peer is not None:
                self._lose(peer, "its connection ended")
        self._ended.clear()

    def _known(self, key: _Key) -> Peer:
        peer = self._peers.get(key)
        if peer is None:
            raise MessageError("came from somebody who has not said hello")
        peer.heard_at = time.monotonic()
        return peer

    def _on_hello(self, key: _Key, descriptor: int, header: bytes) -> None:
        way, identity = key
        nonce = self._next_part(way)
        self._meet(key, descriptor)
        version = _protocol_of(header[1:])
        if version is not None and version != PROTOCOL_VERSION:
            self._say(
                key,
                frames.REFUSE
                + f"this worker speaks protocol {version}, the server {PROTOCOL_VERSION}: install the same version of "
                "lightning-async-localsgd on every machine".encode(),
                b"",
            )
            return
        hello = Hello.decode(header[1:])
        if len(nonce) != frames.NONCE_BYTES:
            raise MessageError(f"a hello with a nonce of {len(nonce)} bytes")
        if hello.fingerprint != self._server.layout.fingerprint:
            reason = f"the model of worker {hello.worker} is not that of rank 0; every rank must build the same one"
            self._say(key, frames.REFUSE + reason.encode(), frames.pack_layout(self._server.layout))
            return
        # The same session over a newer connection, or once more over this one: the older peer has no say any more.
        for older in (self._peers.get(key), self._sessions.get((hello.worker, hello.session))):
            if older is not None:
                self._retire(older)
        peer = Peer(way, identity, hello, time.monotonic(), post=self._post, deliver=self._deliver, reject=self._reject)
        self._peers[key] = self._sessions[hello.worker, hello.session] = peer
        incarnation = self._server.incarnation
        welcome = Welcome(incarnation, proof(self._token, nonce, incarnation))
        if self._tell(peer, frames.WELCOME + welcome.encode()):
            self._server.join(hello, peer)

    def _on_beat(self, key: _Key, descriptor: int, header: bytes) -> None:
        beat = Beat.decode(header[1:])
        self._meet(key, descriptor)
        self._pulses[key] = beat
        peer = self._sessions.get((beat.worker, beat.session))
        if peer is not None:
            peer.heard_at = time.monotonic()
        self._answer(key, beat)

    def _on_ask(self, key: _Key, header: bytes) -> None:
        request = LeaseRequest.decode(header[1:])
        beat = self._pulses.get(key)
        if beat is None:
            raise MessageError("asks for data without a heartbeat")
        if (request.worker, request.session) != (beat.worker, beat.session):
            raise MessageError(f"asks for data of worker {request.worker} with the heartbeat of worker {beat.worker}")
        if self._asking.get(key, 0) >= _MOST_ASKED:
            raise MessageError(f"asks for data {_MOST_ASKED} times without waiting for an answer")
        self._asking[key] = self._asking.get(key, 0) + 1

        def answer(lease: Lease) -> None:
            self._post(lambda: self._hand_lease(key, lease))

        self._server.lease(request, answer)

    def _on_word(self, peer: Peer, kind: bytes, header: bytes) -> None:
        if kind == frames.PUSH:
            self._on_push(peer, Push.decode(header[1:]))
        elif kind == frames.CREDIT:
            self._on_credit(peer, *frames.unpack_part(header))
        elif kind == frames.BYE:
            self._lose(peer, "it said goodbye")
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

    def _on_data(self, peer: Peer | None, key: _Key, header: bytes) -> None:
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
        now = peer.heard_at = time.monotonic()
        upload.advance(size, now)
        if upload.complete:
            self._hand_over(peer, upload)

    def _on_credit(self, peer: Peer, transfer: int, received: int) -> None:
        download = peer.download
        if download is None or transfer != download.transfer:
            if transfer > peer.transfers:
                raise MessageError("a confirmation of what was never sent")
            return
        if not download.confirm(received, peer.heard_at):
            raise MessageError(f"a confirmation of {received} frames when {download.sent} were sent")
        self._pump(peer)

    def _on_nonsense(self, key: _Key, reason: str) -> None:
        peer = self._peers.get(key)
        self.rejected.add(f"{reason} ({peer or 'no worker that is known'})")
        if peer is None:
            self._say(key, frames.UNKNOWN)
        elif peer.live:
            # Something is broken over there. Better it stops than that it goes on like this.
            reason = f"it sent nonsense: {reason}"
            self._lose(peer, reason)
            self._say(key, frames.REFUSE + f"the server gave worker {peer.worker} up: {reason}".encode(), b"")

    def _meet(self, key: _Key, descriptor: int) -> None:
        """Notes whose connection it is, so that its end can be told."""
        way = key[0]
        # Earlier reports first: the descriptor may have been that of another connection a moment ago.
        self.note_ends(way)
        way.introduce(descriptor)
        older = self._connections.get((way, descriptor))
        if older is not None and older != key:
            self._ended.append(older)
        self._connections[way, descriptor] = key

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
            self._lose(peer, f"its connection ended ({error})")
            return
        if download.complete:
            download.lease.release()
            peer.download = None

    def _reject(self, peer: Peer, reason: str) -> None:
        if self._peers.get((peer.way, peer.identity)) is peer:
            self._say((peer.way, peer.identity), frames.REFUSE + reason.encode(), b"")
        self._retire(peer)

    def _answer(self, key: _Key, beat: Beat) -> None:
        incarnation, wanted = self._server.incarnation, self._server.wanted.get(beat.worker, -1)
        said = proof(self._token, beat.nonce.encode(), f"{incarnation} {wanted}")
        self._say(key, frames.ANSWER + Answer(incarnation, wanted, said).encode())

    def _hand_lease(self, key: _Key, lease: Lease) -> None:
        if key in self._asking:
            self._asking[key] -= 1
        self._say(key, frames.LEASE + lease.encode())  # If the connection is gone, it is asked for again.

    def _tell(self, peer: Peer, *parts: bytes) -> bool:
        if self._say((peer.way, peer.identity), *parts):
            return True
        self._lose(peer, "its connection ended")
        return False

    def _say(self, key: _Key, *parts: bytes) -> bool:
        way, identity = key
        try:
            way.socket.send_multipart([identity, *parts], zmq.NOBLOCK)
        except zmq.ZMQError:
            # Gone, or so far behind that it takes nothing more: a worker that keeps to the protocol never is.
            return False
        self.sent += sum(map(len, parts))
        return True

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
            for peer in self._peers.values():
                peer.heard_at = now
                for transfer in (peer.upload, peer.download):
                    if transfer is not None:
                        transfer.moved_at = now
        self._awake_at = now
        for peer in list(self._peers.values()):
            if peer.live:
                self._pump(peer)
                self._judge(peer, now, self._silence_timeout)
        for download in [download for download in self._abandoned if download.untouched]:
            self._abandoned.remove(download)
            download.lease.release()
        wanted = self._server.wanted
        if wanted is not self._wanted_told:  # Not only at the next beat: a round may be short.
            for key, beat in self._pulses.items():
                if wanted.get(beat.worker, -1) != self._wanted_told.get(beat.worker, -1):
                    self._answer(key, beat)
            self._wanted_told = wanted

    def drop_silent_downloads(self, seconds: float) -> None:
        """Gives up workers that have confirmed nothing of their model for ``seconds``."""
        for peer in list(self._peers.values()):
            if peer.download is not None:
                self._judge(peer, time.monotonic(), seconds)

    def lose_all(self, reason: str) -> None:
        """The server learns that no worker can be reached any more."""
        for peer in list(self._sessions.values()):
            self._lose(peer, reason)

    def retire_all(self) -> None:
        """The end: buffers go back, and whatever the outlets are told from now on only frees what it brings."""
        for peer in [*self._peers.values(), *self._sessions.values()]:
            self._retire(peer)
        for download in self._abandoned:
            download.lease.release()
        self._abandoned.clear()
        self._peers.clear()

    def _judge(self, peer: Peer, now: float, silence_timeout: float) -> None:
        if now - peer.heard_at > silence_timeout:
            self._lose(peer, f"it was silent for {now - peer.heard_at:.0f} s")
        for transfer, what in ((peer.upload, "upload"), (peer.download, "download")):
            waits = isinstance(transfer, Upload) and transfer.lease is None
            if transfer is not None and not waits and now - transfer.moved_at > silence_timeout:
                self._lose(peer, f"it stalled in mid-{what} for {now - transfer.moved_at:.0f} s")
                return

    def _hand_over(self, peer: Peer, upload: Upload) -> None:
        peer.upload = None
        self._server.push(upload.push, upload.lease, peer)

    def _lose(self, peer: Peer, reason: str) -> None:
        """A live worker's connection is of no use any more: the server learns it."""
        if peer.live:
            self._retire(peer)
            self._server.lost(peer.worker, peer.session, reason)

    def _retire(self, peer: Peer) -> None:
        """Ends what ``peer`` was doing. Its connection stays known until it ends, so that it can still be told why."""
        peer.live = False
        self._end_transfers(peer)
        if self._sessions.get((peer.worker, peer.session)) is peer:
            del self._sessions[peer.worker, peer.session]

    def _end_transfers(self, peer: Peer) -> None:
        upload, download = peer.upload, peer.download
        peer.upload = peer.download = None
        if upload is not None:
            peer.cancelled = upload.push.sequence
            if upload.lease is not None:
                upload.lease.release()
        if download is not None:
            # libzmq may still read from the buffer for a moment, or for as long as a frozen peer stays connected.
            self._abandoned.append(download)


def _protocol_of(data: bytes) -> int | None:
    """The protocol version of a hello that may have other fields than ours."""
    try:
        values = json.loads(data[: frames.FRAME_BYTES])
    except (ValueError, RecursionError):
        return None
    version = values.get("protocol") if isinstance(values, dict) else None
    return version if type(version) is int else None
