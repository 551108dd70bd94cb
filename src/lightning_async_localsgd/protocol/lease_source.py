"""The interface through which a worker gets leases of training data, from a server or from the log of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import TimeoutError as FutureTimeoutError  # The builtin TimeoutError only since Python 3.11.
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future

    from lightning_async_localsgd.protocol.messages import Lease, LeaseRequest

_CHECK_SECONDS = 0.2
"""Seconds between two checks of the server while an answer is awaited."""


class LeaseSource(ABC):
    """Answers the lease requests of one worker. Used by one thread."""

    @abstractmethod
    def request_lease(self, request: LeaseRequest) -> Future[Lease]:
        """Request training data without waiting for the answer.

        Returns:
            The answer. Any thread may set it.

        Raises:
            ExchangeError: the connection to the server is not open yet, or is closed.

        """

    @abstractmethod
    def check(self) -> None:
        """Raise an error if no answer can arrive any more. Called repeatedly while an answer is awaited.

        Raises:
            ExchangeError: the server is gone.

        """


def wait_for_lease(source: LeaseSource, answer: Future[Lease]) -> Lease:
    """Wait for the answer to a lease request.

    Args:
        source: was sent the request, and is checked while the answer is awaited.
        answer: the future that :meth:`LeaseSource.request_lease` returned.

    Raises:
        ExchangeError: the server is gone.

    """
    while not answer.done():
        try:
            answer.result(timeout=_CHECK_SECONDS)
        except FutureTimeoutError:
            source.check()
    return answer.result()
