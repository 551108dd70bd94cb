"""The exchange of the worker in the server's own process: the same path as the others', without the wire."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from lightning_async_localsgd.exchange import Exchange, ExchangeError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.messages import Hello, Lease, LeaseRequest, Push, Reply
    from lightning_async_localsgd.server import Server


class LocalOutlet(ABC):
    """The way back to a worker in the server's own process, which copies the model straight to where it wants it."""

    @abstractmethod
    def answer(self, reply: Reply, copy: Callable[[Tensor], None]) -> None:
        """The worker is dispatched.

        Args:
            reply: the header.
            copy: copies the model that goes with it to a flat tensor; to be called before this returns.

        """

    @abstractmethod
    def refuse(self, reason: str) -> None:
        """The worker is refused for good."""


class _AwaitedOutlet(LocalOutlet):
    """Holds the answer for a worker that waits for it in another thread.

    Args:
        out: where the worker wants the model.

    """

    def __init__(self, out: Tensor) -> None:
        self._out = out
        self._answered = threading.Event()
        self._reply: Reply | None = None
        self._refused: str | None = None

    def answer(self, reply: Reply, copy: Callable[[Tensor], None]) -> None:
        if not self._answered.is_set():
            copy(self._out)
            self._reply = reply
            self._answered.set()

    def refuse(self, reason: str) -> None:
        if not self._answered.is_set():
            self._refused = reason
            self._answered.set()

    def wait(self, server: Server, watch: Callable[[], None] = lambda: None) -> Reply:
        while not self._answered.wait(timeout=0.5):
            server.raise_failure()
            watch()
        if self._reply is None:
            raise ExchangeError(self._refused)
        return self._reply


class LocalExchange(Exchange):
    """The exchange of the worker in the server's own process: no wire, no copy of the pseudo-gradient.

    Args:
        server: the server.
        result: where a single worker's outer step is plain ``theta - g`` (see
            :attr:`~lightning_async_localsgd.outer.OuterOptimizer.replaces_model`): writes the local weights to the
            tensor it is given, which then become the global model as they are, free of the rounding of two
            subtractions.
        watch: called while waiting for the first dispatch, which needs all workers; raises if one will not come.

    """

    def __init__(
        self,
        server: Server,
        result: Callable[[Tensor], None] | None = None,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._server = server
        self._watch = watch
        self._result = result
        self._worker = -1

    def join(self, hello: Hello, model: Tensor) -> Reply:
        """See :meth:`Exchange.join`."""
        outlet = _AwaitedOutlet(model)
        self._worker = hello.worker
        self._server.join(hello, outlet)
        return outlet.wait(self._server, self._watch)

    def push(self, push: Push, gradient: Tensor, model: Tensor) -> Reply:
        """See :meth:`Exchange.push`."""
        outlet = _AwaitedOutlet(model)
        result = None
        if self._result is not None and push.steps > 0:
            result = model
            self._result(result)
        self._server.push_here(push, gradient if push.steps > 0 else None, outlet, result)
        return outlet.wait(self._server)

    @property
    def wanted_version(self) -> int:
        """See :attr:`Exchange.wanted_version`."""
        return self._server.wanted.get(self._worker, -1)

    def check(self) -> None:
        """See :meth:`Exchange.check`."""
        try:
            self._server.raise_failure()
        except RuntimeError as error:
            raise ExchangeError(str(error)) from error

    def _send_request(self, request: LeaseRequest, answer: Future[Lease]) -> None:
        self._server.lease(request, answer.set_result)

    def close(self) -> None:
        """Nothing to close: the server is its owner's."""
