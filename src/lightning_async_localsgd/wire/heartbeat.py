"""A worker's heartbeat: a thread with a connection of its own, so that pings never queue behind bulk data.

Lease requests use the same connection.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

import zmq

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.messages import Lease, MessageError, worker_name
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.adaptive_timeout import AdaptiveTimeout
from lightning_async_localsgd.wire.auth import is_proof
from lightning_async_localsgd.wire.connection import Connection, ConnectionLost
from lightning_async_localsgd.wire.frames import Ping, Pong, Waker

if TYPE_CHECKING:
    from lightning_async_localsgd.protocol.messages import LeaseRequest
    from lightning_async_localsgd.wire.auth import Endpoints

_log = logging.getLogger(__name__)

PING_SECONDS = 1.0
"""Seconds between two pings."""

REFUSED_SECONDS = 3.0
"""Seconds after which a server on this machine counts as gone if no process listens at its address. A restarted server
has another address."""

_MAX_NONCES = 1000
"""Unanswered pings whose nonces are kept. The answer must prove the server's knowledge of the token on one of them."""


class Heartbeat:
    """Pings the server until :meth:`close`, and watches its answers.

    Args:
        context: context of the socket.
        endpoints: the server.
        worker: the worker's number.
        session: the worker's session.
        silence_timeout: seconds without an answer after which the server counts as gone, see
            :class:`.AdaptiveTimeout`.

    Attributes:
        timeout: the timeout of the server. Other threads may read its limit.
        recalled_version: version of the dispatch whose round the server wants at the next step; -1 for none.
        failure: why the server counts as gone; None while it is there.

    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: Endpoints,
        worker: int,
        session: str,
        silence_timeout: float,
    ) -> None:
        self.recalled_version = -1
        self.failure: str | None = None
        self._connection: Connection | None = None
        self._sent = 0
        self._received = 0
        self._context = context
        self._endpoints = endpoints
        self._worker = worker
        self._session = session
        self._attempt_seconds = min(5.0, silence_timeout)
        self._ping_seconds = min(PING_SECONDS, silence_timeout / 4)
        self._due_at = time.monotonic()
        self.timeout = AdaptiveTimeout(silence_timeout, self._due_at)
        self._refused_at: float | None = None
        self._nonces: list[str] = []
        # Unanswered requests by number. The worker's thread adds them, this thread removes them.
        self._requests: dict[int, tuple[LeaseRequest, Future[Lease]]] = {}
        self._sent_requests: set[int] = set()
        self._pinging = False
        self._proven = False
        self._closing = threading.Event()
        self._waker = Waker()
        self._thread = threading.Thread(target=self._run, name="async_localsgd-heartbeat", daemon=True)
        self._thread.start()

    def request_lease(self, request: LeaseRequest) -> Future[Lease]:
        """Request training data. If the connection breaks, the request is sent again over a new connection."""
        answer: Future[Lease] = Future()
        self._requests[request.number] = (request, answer)
        if self._pinging:  # Otherwise the thread is connecting, which a wake-up would interrupt.
            self._waker.wake()
        return answer

    def close(self) -> None:
        """End the thread and fail unanswered lease requests. May be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._waker.wake()
        self._thread.join()
        self._waker.close()
        for _, answer in self._requests.values():
            answer.set_exception(ExchangeError("the exchange is closed"))

    def _run(self) -> None:
        try:
            while not self._closing.is_set() and self.failure is None:
                self._run_connection()
        except ExchangeError as error:
            self.failure = str(error)
        except zmq.ContextTerminated:
            pass
        except Exception as error:
            _log.exception("the heartbeat of %s failed", worker_name(self._worker))
            self.failure = f"this worker's heartbeat failed: {error}"

    @property
    def sent(self) -> int:
        """Bytes sent."""
        return self._sent + (self._connection.sent if self._connection is not None else 0)

    @property
    def received(self) -> int:
        """Bytes received."""
        return self._received + (self._connection.received if self._connection is not None else 0)

    def _run_connection(self) -> None:
        self._waker.clear()  # Of late requests. Only close() may interrupt connecting.
        if self._closing.is_set():
            return
        attempt = self._attempt_seconds
        self._due_at = time.monotonic() + attempt
        try:
            self._connection = Connection(self._context, self._endpoints, self.timeout.limit, attempt, self._waker)
            self._refused_at = None
            # The server's thread itself has authenticated us.
            self.timeout.record_activity(time.monotonic())
            self._ping_over(self._connection)
        except ConnectionLost as lost:
            self._record_refusal(lost)
            self._check_server()
            self._sleep(min(0.2, self._ping_seconds))
        finally:
            self._pinging = False
            self._proven = False
            self._sent_requests.clear()
            if self._connection is not None:
                self._connection.close()
                self._sent, self._received, self._connection = self.sent, self.received, None

    def _ping_over(self, connection: Connection) -> None:
        self._due_at = time.monotonic()
        self._nonces.clear()
        self._pinging = True
        while not self._closing.is_set() and self.failure is None:
            self._restart_timeout_if_suspended()
            now = time.monotonic()
            if now >= self._due_at:
                nonce = secrets.token_hex(frames.NONCE_BYTES)
                if connection.send(frames.PING + Ping(self._worker, self._session, nonce).encode()):
                    # Keep the nonces: answers may take as long as the server may be silent.
                    self._nonces = [*self._nonces[1 - _MAX_NONCES :], nonce]
                self._due_at = now + self._ping_seconds
            self._waker.clear()
            self._send_requests(connection)
            while not self._closing.is_set() and connection.wait(max(0.0, self._due_at - time.monotonic())):
                self._restart_timeout_if_suspended()
                self._read(connection)
            self._check_server()

    def _send_requests(self, connection: Connection) -> None:
        for number, (request, _) in list(self._requests.items()):
            if number not in self._sent_requests and connection.send(frames.LEASE_REQUEST + request.encode()):
                self._sent_requests.add(number)

    def _read(self, connection: Connection) -> None:
        message = connection.receive()
        connection.skip_rest()
        try:
            if message[:1] == frames.PONG:
                self._on_pong(Pong.decode(message[1:]))
            elif message[:1] == frames.LEASE and self._proven:
                self._on_lease(Lease.decode(message[1:]))
            else:
                raise MessageError(f"unexpected message of kind {message[:1]!r}")
        except MessageError as error:
            _log.warning(
                "%s received an invalid message over its heartbeat's connection: %s", worker_name(self._worker), error
            )

    def _on_lease(self, lease: Lease) -> None:
        _, answer = self._requests.pop(lease.number, (None, None))
        self._sent_requests.discard(lease.number)
        if answer is not None:
            answer.set_result(lease)

    def _on_pong(self, pong: Pong) -> None:
        statement = f"{pong.incarnation} {pong.recalled_version}"
        token = self._endpoints.token
        # Pings are answered in order, and the latest one may be answered more than once.
        while self._nonces and not is_proof(pong.proof, token, self._nonces[0].encode(), statement):
            del self._nonces[0]
        if not self._nonces:
            self.failure = (
                f"the program that listens at {self._endpoints.address} is not this run's server: it does not know the "
                "token"
            )
        elif pong.incarnation != self._endpoints.incarnation:
            self.failure = f"the server at {self._endpoints.address} has been restarted; restart this worker to join it"
        else:
            self._proven = True
            self.timeout.record_activity(time.monotonic())
            self.recalled_version = pong.recalled_version

    def _record_refusal(self, lost: ConnectionLost) -> None:
        if not lost.refused:
            self._refused_at = None
        elif self._refused_at is None:
            self._refused_at = time.monotonic()

    def _restart_timeout_if_suspended(self) -> None:
        """Restart the server's timeout if this process itself was suspended, or too busy to ping."""
        now = time.monotonic()
        if now - self._due_at > 2 * self._ping_seconds:
            self.timeout.restart(now)

    def _check_server(self) -> None:
        self._restart_timeout_if_suspended()
        now = time.monotonic()
        address = self._endpoints.address
        if self._refused_at is not None and now - self._refused_at > min(REFUSED_SECONDS, self.timeout.limit):
            self.failure = f"the server at {address} is gone: its process has ended, or it has stopped serving"
        elif self.timeout.expired(now):
            self.failure = (
                f"the server at {address} has been silent for {self.timeout.elapsed(now):.0f} s; check rank 0 and the "
                f"network, or raise exchange.silence_timeout (the limit is {round(self.timeout.limit, 1):g} s now)"
            )

    def _sleep(self, seconds: float) -> None:
        self._due_at = time.monotonic() + seconds
        poller = zmq.Poller()
        poller.register(self._waker.fileno(), zmq.POLLIN)
        poller.poll(frames.milliseconds(seconds))
