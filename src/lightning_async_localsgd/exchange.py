"""How a worker reaches the server: one interface, whether the server is in the same process or across a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # Only from Python 3.11 on the builtin one.
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.messages import Hello, Lease, LeaseRequest, Push, Reply

_LOOK_SECONDS = 0.2
"""How often a worker that waits for a lease looks whether the server is still there."""


class ExchangeError(RuntimeError):
    """The server cannot be reached any more, or has refused this worker for good. The text says what to do."""


class Exchange(ABC):
    """A worker's end of the exchange. Used by one thread; calls block until they are answered.

    Attributes:
        bytes_sent: bytes that have left this worker so far, headers and heartbeats included (0 within a process).
        bytes_received: bytes that have reached this worker so far.

    """

    bytes_sent: int = 0
    bytes_received: int = 0

    def __init__(self) -> None:
        self._leases: dict[int, Future[Lease]] = {}

    @abstractmethod
    def join(self, hello: Hello, model: Tensor) -> Reply:
        """Introduces this worker and waits for its first dispatch.

        Args:
            hello: who this worker is.
            model: flat fp32 tensor that receives the global model.

        Raises:
            ExchangeError: the server refused this worker, or cannot be reached.

        """

    @abstractmethod
    def push(self, push: Push, gradient: Tensor, model: Tensor) -> Reply:
        """Hands in a pseudo-gradient and waits for the next dispatch.

        A push that the server refuses is no error: the reply says so in ``refused`` and brings a fresh model.

        Args:
            push: the header.
            gradient: flat fp32 pseudo-gradient; not changed, and free again when this returns. With ``push.steps``
                of 0 its contents are not looked at.
            model: flat fp32 tensor that receives the global model; must not share memory with ``gradient``.

        Raises:
            ExchangeError: the server cannot be reached any more, or this session was superseded.

        """

    def request_lease(self, request: LeaseRequest) -> None:
        """Asks for training data and returns at once; :meth:`take_lease` has the answer.

        Raises:
            ExchangeError: there is no connection to the server any more, or not yet.

        """
        answer: Future[Lease] = Future()
        self._send_request(request, answer)
        self._leases[request.number] = answer

    def take_lease(self, number: int) -> Lease:
        """The answer to the request of that number, which is waited for.

        Raises:
            ExchangeError: the server is gone.

        """
        answer = self._leases[number]
        while not answer.done():
            try:
                answer.result(timeout=_LOOK_SECONDS)
            except FutureTimeoutError:
                self.check()
        del self._leases[number]
        return answer.result()

    @abstractmethod
    def _send_request(self, request: LeaseRequest, answer: Future[Lease]) -> None:
        """Has the server asked, without waiting, and ``answer`` set from any thread."""

    @property
    @abstractmethod
    def wanted_version(self) -> int:
        """The version that this worker was dispatched, if the server wants that round handed in at the next step.

        It does when training ends, and where it does not know yet how slow this worker is. -1: it does not. The answer
        may be older than the last dispatch; it is then about another version.
        """

    @abstractmethod
    def check(self) -> None:
        """Cheap look at the connection, made at every local step.

        Raises:
            ExchangeError: the server has been silent or gone for too long.

        """

    @abstractmethod
    def close(self) -> None:
        """Says goodbye and frees everything; may be called twice, and after an error."""
