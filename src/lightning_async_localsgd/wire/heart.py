"""A worker's heartbeat: a thread with a connection of its own, so that beats never queue behind bulk data.

Requests for training data go over the same connection.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from typing import TYPE_CHECKING

import zmq

from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.messages import Lease, MessageError
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import is_proof
from lightning_async_localsgd.wire.frames import Answer, Beat, Waker
from lightning_async_localsgd.wire.link import Link, LinkLost
from lightning_async_localsgd.wire.silence import Silence

if TYPE_CHECKING:
    from concurrent.futures import Future

    from lightning_async_localsgd.messages import LeaseRequest
    from lightning_async_localsgd.wire.auth import Endpoints

_log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
"""Between two beats."""

GONE_SECONDS = 3.0
"""A server on this machine at whose address nobody has listened for so long does not come back: another start has
another address."""

_MOST_NONCES = 1000
"""Beats on their way of which is known what their answers must prove."""


class Heart:
    """Beats until :meth:`close`, tells when the server asks to stop, and when it is gone.

    Args:
        context: of the socket.
        endpoints: the server.
        worker: the worker's number.
        session: the worker's session.
        silence_timeout: seconds without an answer after which the server counts as gone, see :class:`.Silence`.

    Attributes:
        silence: the server's; other threads may read its limit.
        wanted_version: of the dispatch whose round the server wants handed in at the next step; -1 for none.
        gone: why the server counts as gone; None as long as it does not.

    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: Endpoints,
        worker: int,
        session: str,
        silence_timeout: float,
    ) -> None:
        self.wanted_version = -1
        self.gone: str | None = None
        self._link: Link | None = None
        self._sent = 0
        self._received = 0
        self._context = context
        self._endpoints = endpoints
        self._worker = worker
        self._session = session
        self._attempt_seconds = min(5.0, silence_timeout)
        self._beat_seconds = min(BEAT_SECONDS, silence_timeout / 4)
        self._due = time.monotonic()
        self.silence = Silence(silence_timeout, self._due)
        self._refused_at: float | None = None
        self._nonces: list[str] = []
        # What has no answer yet, by number. Put in by the worker's thread, taken out by this one.
        self._requests: dict[int, tuple[LeaseRequest, Future[Lease]]] = {}
        self._asked: set[int] = set()
        self._beating = False
        self._proven = False
        self._closing = threading.Event()
        self._waker = Waker()
        self._thread = threading.Thread(target=self._run, name="async_localsgd-heartbeat", daemon=True)
        self._thread.start()

    def ask(self, request: LeaseRequest, answer: Future[Lease]) -> None:
        """Has the server asked for training data, again over a new connection if the present one breaks."""
        self._requests[request.number] = (request, answer)
        if self._beating:  # If not, a connection is being dialled, and nothing may interrupt that.
            self._waker.wake()

    def close(self) -> None:
        """Ends the thread; may be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._waker.wake()
        self._thread.join()
        self._waker.close()

    def _run(self) -> None:
        try:
            while not self._closing.is_set() and self.gone is None:
                self._live_through_a_link()
        except ExchangeError as error:
            self.gone = str(error)
        except zmq.ContextTerminated:
            pass
        except Exception as error:
            _log.exception("the heartbeat of worker %d failed", self._worker)
            self.gone = f"this worker's heartbeat failed: {error}"

    @property
    def sent(self) -> int:
        """Bytes sent."""
        return self._sent + (self._link.sent if self._link is not None else 0)

    @property
    def received(self) -> int:
        """Bytes received."""
        return self._received + (self._link.received if self._link is not None else 0)

    def _live_through_a_link(self) -> None:
        self._waker.clear()  # Of requests that came late: only the end may interrupt what follows.
        if self._closing.is_set():
            return
        attempt = self._attempt_seconds
        self._due = time.monotonic() + attempt
        try:
            self._link = Link(self._context, self._endpoints, self.silence.limit, attempt, self._waker)
            self._refused_at = None
            # The server's thread itself has let us in.
            self.silence.hear(time.monotonic())
            self._beat_over(self._link)
        except LinkLost as lost:
            self._note_refusal(lost)
            self._judge()
            self._sleep(min(0.2, self._beat_seconds))
        finally:
            self._beating = False
            self._proven = False
            self._asked.clear()
            if self._link is not None:
                self._link.close()
                self._sent, self._received, self._link = self.sent, self.received, None

    def _beat_over(self, link: Link) -> None:
        self._due = time.monotonic()
        self._nonces.clear()
        self._beating = True
        while not self._closing.is_set() and self.gone is None:
            self._excuse()
            now = time.monotonic()
            if now >= self._due:
                nonce = secrets.token_hex(frames.NONCE_BYTES)
                if link.send(frames.BEAT + Beat(self._worker, self._session, nonce).encode()):
                    # The answer may take as long as the server may be silent.
                    self._nonces = [*self._nonces[1 - _MOST_NONCES :], nonce]
                self._due = now + self._beat_seconds
            self._waker.clear()
            self._send_requests(link)
            while not self._closing.is_set() and link.wait(max(0.0, self._due - time.monotonic())):
                self._excuse()
                self._listen(link)
            self._judge()

    def _send_requests(self, link: Link) -> None:
        for number, (request, _) in list(self._requests.items()):
            if number not in self._asked and link.send(frames.ASK + request.encode()):
                self._asked.add(number)

    def _listen(self, link: Link) -> None:
        message = link.receive()
        link.skip()
        try:
            if message[:1] == frames.ANSWER:
                self._on_answer(Answer.decode(message[1:]))
            elif message[:1] == frames.LEASE and self._proven:
                self._on_lease(Lease.decode(message[1:]))
            else:
                raise MessageError(f"{message[:1]!r} was not to be expected")
        except MessageError as error:
            _log.warning("worker %d received nonsense over the connection of its heartbeat: %s", self._worker, error)

    def _on_lease(self, lease: Lease) -> None:
        _, answer = self._requests.pop(lease.number, (None, None))
        self._asked.discard(lease.number)
        if answer is not None:
            answer.set_result(lease)

    def _on_answer(self, answer: Answer) -> None:
        statement = f"{answer.incarnation} {answer.wanted}"
        token = self._endpoints.token
        # Beats are answered in their order, the latest one perhaps more than once.
        while self._nonces and not is_proof(answer.proof, token, self._nonces[0].encode(), statement):
            del self._nonces[0]
        if not self._nonces:
            self.gone = f"another program has taken the place of the server at {self._endpoints.address}"
        elif answer.incarnation != self._endpoints.incarnation:
            self.gone = f"the server at {self._endpoints.address} was started anew"
        else:
            self._proven = True
            self.silence.hear(time.monotonic())
            self.wanted_version = answer.wanted

    def _note_refusal(self, lost: LinkLost) -> None:
        if not lost.refused:
            self._refused_at = None
        elif self._refused_at is None:
            self._refused_at = time.monotonic()

    def _excuse(self) -> None:
        """If this process was suspended, or too busy to beat, the silence was its own."""
        now = time.monotonic()
        if now - self._due > 2 * self._beat_seconds:
            self.silence.excuse(now)

    def _judge(self) -> None:
        self._excuse()
        now = time.monotonic()
        address = self._endpoints.address
        if self._refused_at is not None and now - self._refused_at > min(GONE_SECONDS, self.silence.limit):
            self.gone = f"the server at {address} is gone: its process has ended, or it has stopped serving"
        elif self.silence.too_long(now):
            self.gone = (
                f"the server at {address} has been silent for {self.silence.seconds(now):.0f} s; see what rank 0 is "
                f"doing, and the network, or raise silence_timeout (it has become {self.silence.limit:g} s here)"
            )

    def _sleep(self, seconds: float) -> None:
        self._due = time.monotonic() + seconds
        poller = zmq.Poller()
        poller.register(self._waker.fileno(), zmq.POLLIN)
        poller.poll(frames.milliseconds(seconds))
