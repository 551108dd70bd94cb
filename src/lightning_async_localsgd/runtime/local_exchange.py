"""The exchange of the worker in the server's own process: the same as other workers' exchange, but without the wire."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_async_localsgd.protocol.exchange import Exchange, ExchangeError, TooFewWorkersError
from lightning_async_localsgd.protocol.lease_source import LeaseSource
from lightning_async_localsgd.protocol.ports import LocalReplyChannel

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.protocol.messages import Hello, Lease, LeaseRequest, Push, Reply, Share
    from lightning_async_localsgd.server.server import Server


class _AwaitedReply(LocalReplyChannel):
    """Receives the reply for a worker that waits for it in another thread.

    Args:
        out: receives the model.

    """

    def __init__(self, out: Tensor) -> None:
        self._out = out
        self._answered = threading.Event()
        self._reply: Reply | None = None
        self._refused: str | None = None

    @override
    def answer(self, reply: Reply, copy: Callable[[Tensor], None]) -> None:
        if not self._answered.is_set():
            copy(self._out)
            self._reply = reply
            self._answered.set()

    @override
    def refuse(self, reason: str) -> None:
        if not self._answered.is_set():
            self._refused = reason
            self._answered.set()

    def wait(self, server: Server, check: Callable[[], None]) -> Reply:
        while not self._answered.wait(timeout=0.5):
            server.raise_failure()
            check()
        if self._reply is None:
            raise (ExchangeError if server.gave_up is None else TooFewWorkersError)(self._refused)
        return self._reply


class LocalExchange(Exchange, LeaseSource):
    """The exchange of the worker in the server's own process: no wire, no copy of the pseudo-gradient.

    Args:
        server: the server.
        read_weights: writes the local weights to the tensor it is given. Used for a single worker whose outer step is
            plain ``theta - g`` (see :attr:`~lightning_async_localsgd.outer.OuterOptimizer.replaces_model`): the local
            weights become the global model as they are, without the rounding errors of two subtractions.
        check_wait: see :class:`.RuntimeSettings`.

    """

    def __init__(
        self,
        server: Server,
        read_weights: Callable[[Tensor], None] | None = None,
        check_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self._server = server
        self._check_wait = check_wait
        self._read_weights = read_weights
        self._worker = -1
        self._awaited: _AwaitedReply | None = None

    @override
    def join(self, hello: Hello, model: Tensor) -> Reply:
        channel = _AwaitedReply(model)
        self._worker = hello.worker
        self._server.join(hello, channel)
        return channel.wait(self._server, self._check_wait)

    @override
    def push(self, push: Push, gradient: Tensor, model: Tensor, packed: Tensor | None = None) -> Reply:
        channel = self._awaited = _AwaitedReply(model)
        result = None
        if self._read_weights is not None and push.steps > 0:
            result = model
            self._read_weights(result)
        self._server.push_here(push, gradient if push.has_data else None, channel, result)
        return channel.wait(self._server, self._check_wait)

    @override
    def share(self, share: Share, values: Tensor) -> Reply:
        channel = _AwaitedReply(values)
        self._server.share_here(share, values, channel)
        return channel.wait(self._server, self._check_wait)

    @override
    def request_lease(self, request: LeaseRequest) -> Future[Lease]:
        answer: Future[Lease] = Future()
        self._server.request_lease(request, answer.set_result)
        return answer

    @property
    @override
    def recalled_version(self) -> int:
        return self._server.recalled.get(self._worker, -1)

    @override
    def check(self) -> None:
        try:
            self._server.raise_failure()
        except ExchangeError:
            raise
        except RuntimeError as error:
            raise ExchangeError(str(error)) from error

    @override
    def close(self, reason: str = "") -> None:
        # The server belongs to its owner. Another thread may wait for a reply.
        if self._awaited is not None:
            self._awaited.refuse("the exchange is closed")
