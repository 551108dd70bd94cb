"""A worker's end of the wire.

Bulk data is streamed straight from and into the worker's own tensors, or packed ones. If the connection breaks, the
worker reconnects, continues its session over the new connection, and sends an unanswered push again with the same
sequence number and the same bytes. The server knows whether it has applied that push.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from typing import TYPE_CHECKING

import zmq
from typing_extensions import override

from lightning_async_localsgd.protocol.exchange import Exchange, ExchangeError
from lightning_async_localsgd.protocol.lease_source import LeaseSource
from lightning_async_localsgd.protocol.messages import Hello, MessageError, Push, Reply
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import is_proof
from lightning_async_localsgd.wire.connection import Connection, ConnectionLost, dial_with_retries
from lightning_async_localsgd.wire.frames import Welcome
from lightning_async_localsgd.wire.heartbeat import REFUSED_SECONDS, Heartbeat
from lightning_async_localsgd.wire.received_models import ReceivedModels

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from torch import Tensor

    from lightning_async_localsgd.protocol.codecs import Codec
    from lightning_async_localsgd.protocol.layout import Layout
    from lightning_async_localsgd.protocol.messages import Lease, LeaseRequest, Share
    from lightning_async_localsgd.protocol.ports import Moment
    from lightning_async_localsgd.wire.auth import Endpoints

_log = logging.getLogger(__name__)

_CHECK_SECONDS = 0.2
"""Seconds between two checks of the server while the worker waits."""

_HELLO_SECONDS = 10.0
"""Seconds that the answer to a hello may take, unless a longer silence is allowed."""

_LINGER_SECONDS = 0.5
"""Seconds that a goodbye may take to be sent."""


class WireExchange(Exchange, LeaseSource):
    """An exchange with a :class:`.WireServer` in another process. It connects in :meth:`join`.

    Args:
        endpoints: the address of the server, with credentials.
        layout: the layout of the exchanged model.
        silence_timeout: seconds without a sign of life from the server after which it counts as gone, see
            :class:`.AdaptiveTimeout`. Only silence is timed, never a whole transfer or the wait for an answer.
        connect_timeout: seconds for connecting to the server for the first time.
        download: unpacks models; None if they never travel packed.
        check_wait: called while the worker waits. Raises an error if waiting has become pointless.

    Raises:
        ValueError: a timeout is not positive.

    Attributes:
        observer: called with the moment and the connection before every part is sent ("mid-push") or received
            ("mid-pull"), and when an answer has arrived ("before reply"). May raise :class:`.ConnectionLost`.

    """

    sends_packed = True
    observer: Callable[[Moment, Connection], None] | None = None

    def __init__(
        self,
        endpoints: Endpoints,
        layout: Layout,
        *,
        silence_timeout: float,
        connect_timeout: float,
        download: Codec | None = None,
        check_wait: Callable[[], None] = lambda: None,
    ) -> None:
        for name, value in (("silence_timeout", silence_timeout), ("connect_timeout", connect_timeout)):
            if not value > 0:
                raise ValueError(f"{name}={value!r} must be a positive number of seconds")
        frames.keep_freed_memory()
        self._endpoints = endpoints
        self._layout = layout
        self._models = ReceivedModels(layout, download)
        self._check_wait = check_wait
        self._silence_timeout = silence_timeout
        self._connect_timeout = connect_timeout
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._connection: Connection | None = None
        self._heartbeat: Heartbeat | None = None
        self._hello: Hello | None = None
        self._dispatched = False
        self._progress_at = 0.0
        self._closed_sent = 0
        self._closed_received = 0
        self._closed = False
        # Held by the thread that uses the connection.
        self._in_use = threading.Lock()

    # ---------------------------------------------------------------- interface

    @override
    def join(self, hello: Hello, model: Tensor) -> Reply:
        self._hello = hello
        return self._receive_model(0, memoryview(b""), model)

    @override
    def push(self, push: Push, gradient: Tensor, model: Tensor, packed: Tensor | None = None) -> Reply:
        source = memoryview(b"")
        if push.has_data:
            source = self._bytes_of(gradient) if packed is None else frames.memory_of(packed)
            if push.contents != "round":
                source = source[: self._layout.model_bytes]
        return self._receive_model(push.sequence, source, model, frames.PUSH + push.encode())

    @override
    def share(self, share: Share, values: Tensor) -> Reply:
        source, memory = frames.memory_of(values.clone()), frames.memory_of(values)

        def send_share(connection: Connection) -> Reply:
            self._send(connection, frames.SHARE + share.encode())
            return self._exchange(connection, share.sequence, source, lambda _: memory)

        return self._run_with_reconnects(send_share)

    @property
    def address(self) -> str:
        """Address of the server."""
        return self._endpoints.address

    @property
    @override
    def recalled_version(self) -> int:
        return -1 if self._heartbeat is None else self._heartbeat.recalled_version

    @override
    def check(self) -> None:
        if self._in_use.acquire(blocking=False):
            try:
                self._read_unasked()
                self._update_byte_counts()
            finally:
                self._in_use.release()
        self._check_server()

    @override
    def close(self, reason: str = "") -> None:
        if self._closed:
            return
        self._closed = True
        # A push in another thread ends soon, because the exchange is closed.
        with self._in_use:
            if self._heartbeat is not None:
                self._heartbeat.close()
            if self._connection is not None:
                self._connection.send(frames.BYE + frames.pack_reason(reason))
                self._drop_connection(linger=_LINGER_SECONDS)
            self._update_byte_counts()
        self._context.term()

    @override
    def request_lease(self, request: LeaseRequest) -> Future[Lease]:
        if self._closed or self._heartbeat is None:
            raise ExchangeError("the exchange is closed" if self._closed else "call join() before request_lease()")
        return self._heartbeat.request_lease(request)

    # --------------------------------------------------------------- connection

    def _run_with_reconnects(self, action: Callable[[Connection], Reply]) -> Reply:
        """Run ``action``. If the connection breaks, reconnect and run it again from its start."""
        if self._closed or self._hello is None:
            raise ExchangeError("the exchange is closed" if self._closed else "call join() before push()")
        with self._in_use:
            return self._run_with_connection(action)

    def _run_with_connection(self, action: Callable[[Connection], Reply]) -> Reply:
        failing_since: float | None = None
        try:
            while True:
                try:
                    reply = action(self._get_connection())
                except ConnectionLost as lost:
                    self._drop_connection()
                    now = time.monotonic()
                    if failing_since is None or self._progress_at > failing_since:
                        failing_since = now
                    if now - failing_since > self._patience:
                        raise ExchangeError(self._unreachable(str(lost), self._patience)) from lost
                    _log.warning("the connection to %s broke (%s); reconnecting", self._endpoints.address, lost)
                    self._sleep(0.1)
                    continue
                self._dispatched = True
                return reply
        except MessageError as error:
            self._drop_connection()
            raise ExchangeError(f"the server at {self._endpoints.address} broke the protocol: {error}") from error
        finally:
            self._update_byte_counts()

    def _read_unasked(self) -> None:
        """Read what the server has sent without being asked: it may refuse this worker."""
        if self._connection is None:
            return
        try:
            while self._connection.wait(0):
                self._read(self._connection)
                self._connection.skip_rest()
        except ConnectionLost as lost:
            _log.info("the connection to %s broke while it was not in use: %s", self._endpoints.address, lost)
            self._drop_connection()

    def _get_connection(self) -> Connection:
        if self._connection is None:
            seconds = self._patience
            refused_seconds = min(REFUSED_SECONDS, seconds) if self._dispatched else seconds
            try:
                self._connection = dial_with_retries(self._dial, seconds, refused_seconds, self._sleep, self.address)
            except ConnectionLost as lost:
                waited = refused_seconds if lost.refused else seconds
                raise ExchangeError(self._unreachable(str(lost), waited)) from lost
            self._say_hello(self._connection, seconds)
        return self._connection

    def _dial(self, seconds: float) -> Connection:
        return Connection(self._context, self._endpoints, self._silence_limit, seconds)

    def _say_hello(self, connection: Connection, seconds: float) -> None:
        """Say hello, and check that the server is the expected one."""
        assert self._hello is not None
        nonce = secrets.token_bytes(frames.NONCE_BYTES)
        hello = dataclasses.replace(self._hello, reconnecting=self._dispatched)
        self._send(connection, frames.HELLO + hello.encode(), nonce)
        # A server answers a hello at once. If no answer comes, try another connection.
        seconds = min(seconds, max(_HELLO_SECONDS, self._silence_limit))
        until = time.monotonic() + seconds
        header = b""
        while header[:1] != frames.WELCOME:
            if time.monotonic() > until:
                raise ConnectionLost(f"no answer to the hello within {seconds:g} s")
            if self._wait(connection):
                header = self._read(connection)
                connection.skip_rest()
        welcome = Welcome.decode(header[1:])
        address = self._endpoints.address
        if not is_proof(welcome.proof, self._endpoints.token, nonce, welcome.incarnation):
            raise ExchangeError(
                f"the program that listens at {address} is not this run's server: it does not know the token"
            )
        if welcome.incarnation != self._endpoints.incarnation:
            raise ExchangeError(f"the server at {address} has been restarted; restart this worker to join it")
        if self._heartbeat is None:
            self._heartbeat = Heartbeat(
                self._context, self._endpoints, hello.worker, hello.session, self._silence_timeout
            )

    def _unreachable(self, reason: str, waited: float) -> str:
        if self._dispatched:
            return (
                f"the server at {self._endpoints.address} is gone: {reason}, for {round(waited, 1):g} s; "
                "check why rank 0 ended"
            )
        return (
            f"the server at {self._endpoints.address} could not be reached within {waited:g} s: {reason}; check that "
            "rank 0 is running, and that its address and port (exchange.port) can be reached from this machine"
        )

    @property
    def _silence_limit(self) -> float:
        return self._silence_timeout if self._heartbeat is None else self._heartbeat.timeout.limit

    @property
    def _patience(self) -> float:
        """Seconds after which the exchange gives up connecting, or using connections that move no data."""
        return self._silence_limit if self._dispatched else self._connect_timeout

    def _drop_connection(self, linger: float = 0.0) -> None:
        if self._connection is not None:
            self._connection.close(linger)
            self._closed_sent += self._connection.sent
            self._closed_received += self._connection.received
            self._connection = None

    def _update_byte_counts(self) -> None:
        parts = [part for part in (self._connection, self._heartbeat) if part is not None]
        self.bytes_sent = self._closed_sent + sum(part.sent for part in parts)
        self.bytes_received = self._closed_received + sum(part.received for part in parts)

    # ---------------------------------------------------------------- transfers

    def _receive_model(self, sequence: int, source: memoryview, model: Tensor, header: bytes | None = None) -> Reply:
        """Send a message with bulk data, and receive the reply to ``sequence`` and its model.

        Args:
            sequence: number of the push; 0 for the first dispatch.
            source: bulk data that is sent if the server asks for it.
            model: receives the model.
            header: header of the message; None to send nothing.

        """
        self._bytes_of(model)  # Checks its size.

        def send(connection: Connection) -> Reply:
            if header is not None:
                self._send(connection, header)
            return self._exchange(connection, sequence, source, lambda reply: self._models.memory(reply, model))

        reply = self._run_with_reconnects(send)
        self._models.complete(reply, model)
        return reply

    def _exchange(
        self, connection: Connection, sequence: int, source: memoryview, memory: Callable[[Reply], memoryview]
    ) -> Reply:
        """Upload ``source`` if the server asks for it, and receive the reply to ``sequence`` with the model.

        ``memory`` returns where the bytes are received that come with the reply.
        """
        may_upload = False
        sent = 0
        while True:
            uploading = may_upload and sent < len(source)
            while uploading and sent < len(source):
                self._observe("mid-push", connection)
                part = source[sent : sent + frames.FRAME_BYTES]
                if not connection.send_bulk(frames.pack_part(frames.DATA, sequence, sent), part):
                    break
                sent += len(part)
                self._progress_at = time.monotonic()
            if not self._wait(connection, writing=uploading and sent < len(source)):
                if uploading and sent < len(source):
                    self._check_stall()
                continue
            header = self._read(connection)
            if header[:1] == frames.GO and frames.unpack_transfer(header) == sequence:
                may_upload = True
                self._progress_at = time.monotonic()
            elif header[:1] == frames.CREDIT:
                # Sent parts may wait in libzmq's queue for long, but they arrive.
                self._progress_at = time.monotonic()
            elif header[:1] == frames.REPLY:
                reply = Reply.decode(connection.receive() if connection.more else b"")
                if reply.sequence == sequence:
                    self._observe("before reply", connection)
                    # If the push had arrived before its connection broke, the answer comes before a second upload.
                    self._download(connection, frames.unpack_transfer(header), memory(reply))
                    return reply
            connection.skip_rest()

    def _download(self, connection: Connection, transfer: int, memory: memoryview) -> None:
        received = 0
        count = frames.frame_count(len(memory))
        self._progress_at = confirmed_at = time.monotonic()
        while received < count:
            self._observe("mid-pull", connection)
            if not self._wait(connection):
                self._check_stall()
                continue
            header = self._read(connection)
            if header[:1] == frames.MODEL and frames.unpack_part(header)[0] == transfer:
                offset = frames.unpack_part(header)[1]
                part = memory[offset : offset + frames.FRAME_BYTES]
                if (
                    offset != received * frames.FRAME_BYTES
                    or not connection.more
                    or connection.receive_into(part) != len(part)
                ):
                    raise MessageError(f"part {received} of the model has offset {offset} or a wrong size")
                received += 1
                self._progress_at = now = time.monotonic()
                late = now - confirmed_at > frames.CONFIRM_SECONDS
                if received % frames.CONFIRM_EVERY == 0 or received == count or late:
                    confirmed_at = now
                    self._send(connection, frames.pack_part(frames.CREDIT, transfer, received))
            connection.skip_rest()

    def _observe(self, moment: Moment, connection: Connection) -> None:
        if self.observer is not None:
            self.observer(moment, connection)

    def _read(self, connection: Connection) -> bytes:
        """Return the first frame of the next message.

        Raises:
            ExchangeError: the message is a refusal.
            ConnectionLost: the server does not know this connection.

        """
        header = connection.receive()
        if header[:1] == frames.REFUSE:
            description = connection.receive() if connection.more else b""
            connection.skip_rest()
            self._drop_connection()
            raise ExchangeError(self._refusal(header[1:].decode(errors="replace"), description))
        if header[:1] == frames.UNKNOWN:
            connection.skip_rest()
            raise ConnectionLost("the server has closed this connection")
        return header

    def _refusal(self, reason: str, description: bytes) -> str:
        try:
            server_layout = frames.unpack_layout(description)
        except MessageError:
            server_layout = None  # The reason is enough.
        return reason if server_layout is None else f"{reason}\n{self._layout.difference(server_layout)}"

    def _send(self, connection: Connection, *parts: bytes) -> None:
        while not connection.send(*parts):
            self._wait(connection, writing=True)

    def _wait(self, connection: Connection, writing: bool = False) -> bool:
        ready = connection.wait(_CHECK_SECONDS, writing)
        if not ready:
            self._check_server()
            self._check_wait()
        return ready

    def _check_server(self) -> None:
        if self._closed:
            raise ExchangeError("the exchange is closed")
        if self._heartbeat is not None and self._heartbeat.failure is not None:
            raise ExchangeError(self._heartbeat.failure)

    def _check_stall(self) -> None:
        silent = time.monotonic() - self._progress_at
        if silent > self._silence_limit:
            raise ConnectionLost(f"the transfer has not moved for {silent:.0f} s")

    def _sleep(self, seconds: float) -> None:
        self._check_server()
        self._check_wait()
        time.sleep(seconds)

    def _bytes_of(self, tensor: Tensor) -> memoryview:
        memory = frames.memory_of(tensor)
        if len(memory) != 4 * self._layout.numel:
            raise ValueError(f"the tensor has {tensor.numel()} elements, the layout needs {self._layout.numel}")
        return memory
