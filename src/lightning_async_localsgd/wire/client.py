"""A worker's end of the wire.

Bulk data is streamed straight out of and into the worker's own tensors. A broken connection is dialled again, the
session goes on over the new one, and the push that had no answer is sent again under its old number: the server knows
whether it has applied it.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from typing import TYPE_CHECKING

import zmq

from lightning_async_localsgd.exchange import Exchange, ExchangeError
from lightning_async_localsgd.messages import Hello, MessageError, Push, Reply
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import is_proof
from lightning_async_localsgd.wire.frames import Welcome
from lightning_async_localsgd.wire.heart import GONE_SECONDS, Heart
from lightning_async_localsgd.wire.link import Link, LinkLost, retry

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from torch import Tensor

    from lightning_async_localsgd.injection import Moment
    from lightning_async_localsgd.layout import Layout
    from lightning_async_localsgd.messages import Lease, LeaseRequest
    from lightning_async_localsgd.wire.auth import Endpoints

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
"""How often a waiting worker looks whether the server is still there."""

_GREETING_SECONDS = 10.0
"""How long the answer to a greeting may take, unless more silence is allowed."""

_GOODBYE_SECONDS = 0.5
"""How long a goodbye may take to leave."""


class WireExchange(Exchange):
    """Reaches a :class:`.WireServer` in another process. Nothing happens before :meth:`join`.

    Args:
        endpoints: the way to the server.
        layout: of the model that is exchanged.
        silence_timeout: seconds without a sign of life from the server after which it counts as gone, see
            :class:`.Silence`. Only silence is timed, never a transfer as a whole, nor the wait for an answer.
        connect_timeout: seconds for reaching the server for the first time.

    Raises:
        ValueError: a time-out is not positive.

    Attributes:
        observer: called with the moment's name and the link before every part that is sent ("mid-push") or received
            ("mid-pull"), and when an answer is there ("before reply"). May raise :class:`.LinkLost`.

    """

    observer: Callable[[Moment, Link], None] | None = None

    def __init__(self, endpoints: Endpoints, layout: Layout, *, silence_timeout: float, connect_timeout: float) -> None:
        for name, value in (("silence_timeout", silence_timeout), ("connect_timeout", connect_timeout)):
            if not value > 0:
                raise ValueError(f"{name}={value!r} must be a positive number of seconds")
        super().__init__()
        frames.keep_freed_memory()
        self._endpoints = endpoints
        self._layout = layout
        self._silence_timeout = silence_timeout
        self._connect_timeout = connect_timeout
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link: Link | None = None
        self._heart: Heart | None = None
        self._hello: Hello | None = None
        self._dispatched = False
        self._moved_at = 0.0
        self._past_sent = 0
        self._past_received = 0
        self._closed = False

    # ------------------------------------------------------------ the interface

    def join(self, hello: Hello, model: Tensor) -> Reply:
        """See :meth:`.Exchange.join`."""
        self._hello = hello
        memory = self._memory(model)
        return self._persist(lambda link: self._converse(link, 0, memoryview(b""), memory))

    def push(self, push: Push, gradient: Tensor, model: Tensor) -> Reply:
        """See :meth:`.Exchange.push`."""
        source = self._memory(gradient) if push.steps > 0 else memoryview(b"")
        memory = self._memory(model)

        def hand_in(link: Link) -> Reply:
            self._send(link, frames.PUSH + push.encode())
            return self._converse(link, push.sequence, source, memory)

        return self._persist(hand_in)

    @property
    def address(self) -> str:
        """Of the server."""
        return self._endpoints.address

    @property
    def wanted_version(self) -> int:
        """See :attr:`.Exchange.wanted_version`."""
        return -1 if self._heart is None else self._heart.wanted_version

    def check(self) -> None:
        """See :meth:`.Exchange.check`."""
        if self._link is not None:
            try:
                while self._link.wait(0):
                    self._read(self._link)
                    self._link.skip()
            except LinkLost as lost:
                _log.info("the connection to %s broke between two exchanges: %s", self._endpoints.address, lost)
                self._drop_link()
        self._look_after_server()
        self._tally()

    def close(self) -> None:
        """See :meth:`.Exchange.close`."""
        if self._closed:
            return
        self._closed = True
        if self._heart is not None:
            self._heart.close()
        for answer in self._leases.values():
            if not answer.done():
                answer.set_exception(ExchangeError("the exchange is closed"))
        if self._link is not None:
            self._link.send(frames.BYE)
            self._drop_link(linger=_GOODBYE_SECONDS)
        self._tally()
        self._context.term()

    def _send_request(self, request: LeaseRequest, answer: Future[Lease]) -> None:
        if self._closed or self._heart is None:
            raise ExchangeError("the exchange is closed" if self._closed else "request_lease() comes after join()")
        self._heart.ask(request, answer)

    # --------------------------------------------------------------- connection

    def _persist(self, action: Callable[[Link], Reply]) -> Reply:
        """Carries ``action`` out, from its beginning over a new link whenever the present one breaks."""
        if self._closed or self._hello is None:
            raise ExchangeError("the exchange is closed" if self._closed else "push() comes after join()")
        trouble_since: float | None = None
        try:
            while True:
                try:
                    reply = action(self._connected())
                except LinkLost as lost:
                    self._drop_link()
                    now = time.monotonic()
                    if trouble_since is None or self._moved_at > trouble_since:
                        trouble_since = now
                    if now - trouble_since > self._patience:
                        raise ExchangeError(self._unreachable(str(lost), self._patience)) from lost
                    _log.warning("the connection to %s broke (%s); dialling again", self._endpoints.address, lost)
                    self._pause(0.1)
                    continue
                self._dispatched = True
                return reply
        except MessageError as error:
            self._drop_link()
            raise ExchangeError(f"the server at {self._endpoints.address} sent nonsense: {error}") from error
        finally:
            self._tally()

    def _connected(self) -> Link:
        if self._link is None:
            seconds = self._patience
            refused_seconds = min(GONE_SECONDS, seconds) if self._dispatched else seconds
            try:
                self._link = retry(self._dial, seconds, refused_seconds, self._pause, self.address)
            except LinkLost as lost:
                waited = refused_seconds if lost.refused else seconds
                raise ExchangeError(self._unreachable(str(lost), waited)) from lost
            self._greet(self._link, seconds)
        return self._link

    def _dial(self, seconds: float) -> Link:
        return Link(self._context, self._endpoints, self._silence_limit, seconds)

    def _greet(self, link: Link, seconds: float) -> None:
        """Says hello, and makes sure that it is our server that listens."""
        assert self._hello is not None
        nonce = secrets.token_bytes(frames.NONCE_BYTES)
        hello = dataclasses.replace(self._hello, rejoining=self._dispatched)
        self._send(link, frames.HELLO + hello.encode(), nonce)
        # It answers at once, so another connection may be luckier.
        seconds = min(seconds, max(_GREETING_SECONDS, self._silence_limit))
        until = time.monotonic() + seconds
        header = b""
        while header[:1] != frames.WELCOME:
            if time.monotonic() > until:
                raise LinkLost(f"no answer to the greeting within {seconds:g} s")
            if self._await(link):
                header = self._read(link)
                link.skip()
        welcome = Welcome.decode(header[1:])
        address = self._endpoints.address
        if not is_proof(welcome.proof, self._endpoints.token, nonce, welcome.incarnation):
            raise ExchangeError(f"another program has taken the place of the server at {address}")
        if welcome.incarnation != self._endpoints.incarnation:
            raise ExchangeError(f"the server at {address} was started anew; start this worker again to join it")
        if self._heart is None:
            self._heart = Heart(self._context, self._endpoints, hello.worker, hello.session, self._silence_timeout)

    def _unreachable(self, reason: str, waited: float) -> str:
        if self._dispatched:
            return f"the server at {self._endpoints.address} is gone: {reason}, for {waited:g} s; see how rank 0 ended"
        return (
            f"the server at {self._endpoints.address} could not be reached within {waited:g} s: {reason}; see whether"
            " rank 0 runs, and whether its address and port (exchange.port) can be reached from this machine"
        )

    @property
    def _silence_limit(self) -> float:
        return self._silence_timeout if self._heart is None else self._heart.silence.limit

    @property
    def _patience(self) -> float:
        """Seconds for which a connection is tried that cannot be made, or that carries nothing."""
        return self._silence_limit if self._dispatched else self._connect_timeout

    def _drop_link(self, linger: float = 0.0) -> None:
        if self._link is not None:
            self._link.close(linger)
            self._past_sent += self._link.sent
            self._past_received += self._link.received
            self._link = None

    def _tally(self) -> None:
        parts = [part for part in (self._link, self._heart) if part is not None]
        self.bytes_sent = self._past_sent + sum(part.sent for part in parts)
        self.bytes_received = self._past_received + sum(part.received for part in parts)

    # ------------------------------------------------------------- conversation

    def _converse(self, link: Link, sequence: int, source: memoryview, memory: memoryview) -> Reply:
        """Uploads ``source`` if the server asks for it, and takes the reply to ``sequence``, model included."""
        going = False
        sent = 0
        while True:
            uploading = going and sent < len(source)
            while uploading and sent < len(source):
                self._observe("mid-push", link)
                part = source[sent : sent + frames.FRAME_BYTES]
                if not link.send_bulk(frames.pack_part(frames.DATA, sequence, sent), part):
                    break
                sent += len(part)
                self._moved_at = time.monotonic()
            if not self._await(link, writing=uploading and sent < len(source)):
                if uploading and sent < len(source):
                    self._look_for_stall()
                continue
            header = self._read(link)
            if header[:1] == frames.GO and frames.unpack_transfer(header) == sequence:
                going = True
                self._moved_at = time.monotonic()
            elif header[:1] == frames.CREDIT:
                # What was sent may be queued in here for long, but it arrives.
                self._moved_at = time.monotonic()
            elif header[:1] == frames.REPLY:
                reply = Reply.decode(link.receive() if link.more else b"")
                if reply.sequence == sequence:
                    self._observe("before reply", link)
                    # The answer to a push that had arrived before its connection broke makes the upload needless.
                    self._download(link, frames.unpack_transfer(header), memory)
                    return reply
            link.skip()

    def _download(self, link: Link, transfer: int, memory: memoryview) -> None:
        received = 0
        count = frames.frame_count(len(memory))
        self._moved_at = confirmed_at = time.monotonic()
        while received < count:
            self._observe("mid-pull", link)
            if not self._await(link):
                self._look_for_stall()
                continue
            header = self._read(link)
            if header[:1] == frames.MODEL and frames.unpack_part(header)[0] == transfer:
                offset = frames.unpack_part(header)[1]
                part = memory[offset : offset + frames.FRAME_BYTES]
                if offset != received * frames.FRAME_BYTES or not link.more or link.receive_into(part) != len(part):
                    raise MessageError(f"a part of the model at offset {offset} after {received} parts")
                received += 1
                self._moved_at = now = time.monotonic()
                late = now - confirmed_at > frames.CONFIRM_SECONDS
                if received % frames.CONFIRM_EVERY == 0 or received == count or late:
                    confirmed_at = now
                    self._send(link, frames.pack_part(frames.CREDIT, transfer, received))
            link.skip()

    def _observe(self, moment: Moment, link: Link) -> None:
        if self.observer is not None:
            self.observer(moment, link)

    def _read(self, link: Link) -> bytes:
        """First frame of the next message.

        Raises:
            ExchangeError: it is a refusal.
            LinkLost: the server does not know this connection.

        """
        header = link.receive()
        if header[:1] == frames.REFUSE:
            described = link.receive() if link.more else b""
            link.skip()
            self._drop_link()
            raise ExchangeError(self._refusal(header[1:].decode(errors="replace"), described))
        if header[:1] == frames.UNKNOWN:
            link.skip()
            raise LinkLost("the server had given this connection up")
        return header

    def _refusal(self, reason: str, described: bytes) -> str:
        try:
            theirs = frames.unpack_layout(described)
        except MessageError:
            theirs = None  # The reason stands without it.
        return reason if theirs is None else f"{reason}\n{self._layout.difference(theirs)}"

    def _send(self, link: Link, *parts: bytes) -> None:
        while not link.send(*parts):
            self._await(link, writing=True)

    def _await(self, link: Link, writing: bool = False) -> bool:
        ready = link.wait(_LOOK_SECONDS, writing)
        if not ready:
            self._look_after_server()
        return ready

    def _look_after_server(self) -> None:
        if self._heart is not None and self._heart.gone is not None:
            raise ExchangeError(self._heart.gone)

    def _look_for_stall(self) -> None:
        silent = time.monotonic() - self._moved_at
        if silent > self._silence_limit:
            raise LinkLost(f"a transfer has not moved for {silent:.0f} s")

    def _pause(self, seconds: float) -> None:
        self._look_after_server()
        time.sleep(seconds)

    def _memory(self, tensor: Tensor) -> memoryview:
        memory = frames.memory_of(tensor)
        if len(memory) != 4 * self._layout.numel:
            raise ValueError(f"the tensor has {tensor.numel()} elements, the layout {self._layout.numel}")
        return memory
