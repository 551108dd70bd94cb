"""The interfaces between the server and the code that connects workers to it. No sockets, no threads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lightning_async_localsgd.protocol.buffers import BufferPool, PooledBuffer
    from lightning_async_localsgd.protocol.layout import Layout
    from lightning_async_localsgd.protocol.messages import Hello, JoinInfo, Lease, LeaseRequest, Push, Reply, Share


Moment = Literal["before round", "computing", "mid-push", "before reply", "mid-pull", "saving"]
"""Moments of a round at which faults can be injected."""


class ReplyChannel(Protocol):
    """Sends a server's replies to one worker over one connection. Any thread may call it, and no call blocks.

    Once the connection is gone, calls do nothing except release the buffers they are given. A worker that reconnects
    has a new channel.
    """

    def dispatch(self, reply: Reply, buffer: PooledBuffer) -> None:
        """Answer the worker's :class:`Hello` or :class:`Push` and send it the model.

        Args:
            reply: the header.
            buffer: holds the model, which must not change from now on. The channel becomes one of the buffer's holders,
                and releases it when the worker has received everything or is gone.

        """

    def refuse(self, reason: str) -> None:
        """Refuse the worker for good: its call raises ``ExchangeError(reason)``, and its messages are ignored.

        :meth:`ServerPort.lost` is not called for this connection afterwards.
        """


class ServerPort(Protocol):
    """What the wire needs of a server. The wire's threads make every call, and every call must return at once."""

    @property
    def incarnation(self) -> str:
        """Random name of this start of the server."""

    @property
    def layout(self) -> Layout:
        """Layout of the exchanged model. A worker with another layout is refused before :meth:`join`."""

    def push_buffers(self, push: Push) -> BufferPool:
        """Return the pool of the buffers that the vector after a :class:`.Push` is received into."""

    @property
    def recalled(self) -> Mapping[int, int]:
        """Workers that must push at their next step, and the versions that their rounds started from.

        Heartbeats carry this to the workers.
        """

    def join(self, hello: Hello, channel: ReplyChannel) -> None:
        """Handle the hello of a worker with the same protocol and layout.

        Called again with the same session after a lost connection, whether or not :meth:`lost` was called: answer it
        again. The worker then sends its unanswered push again with the same sequence number, and a push that was
        applied already is refused.
        """

    def push(self, push: Push, buffer: PooledBuffer | None, channel: ReplyChannel) -> None:
        """Handle a worker's push.

        Args:
            push: the header. Its worker and session are those of this connection's hello.
            buffer: holds the complete pseudo-gradient, or what else the header names. The server releases it. None if
                nothing was uploaded, because the push has no data or is based on another incarnation's model.
            channel: sends the answer.

        """

    def share_buffers(self, share: Share) -> BufferPool:
        """Return the pool of the buffers that the values after a :class:`.Share` are received into.

        Raises:
            MessageError: the header names parameters that the model does not have.

        """

    def share(self, share: Share, buffer: PooledBuffer, channel: ReplyChannel) -> None:
        """Handle a worker's values of frozen parameters that have changed.

        Args:
            share: the header. Its worker and session are those of this connection's hello.
            buffer: holds the complete values. The server answers with the run's values in the same buffer.
            channel: sends the answer.

        """

    def request_lease(self, request: LeaseRequest, answer: Callable[[Lease], None]) -> None:
        """Handle a worker's request for training data.

        The worker may be one whose connection is lost, and whose session is about to reconnect.

        Args:
            request: the request. Its worker and session are those of this connection's heartbeat.
            answer: to be called once, from any thread.

        """

    def request_join_info(self, worker: int, answer: Callable[[JoinInfo], None]) -> None:
        """Handle a request for what is needed to join, from a process that knows the token.

        Args:
            worker: number of the worker whose earlier process is replaced; -1 requests a new number.
            answer: to be called once, from any thread. The wire fills in the proof.

        """

    def request_status(self, answer: Callable[[str], None]) -> None:
        """Handle a request for the state of the run, from a process that knows the token.

        Args:
            answer: to be called once with a JSON object, from any thread.

        """

    def lost(self, worker: int, session: str, reason: str) -> None:
        """Handle the loss of a session: it has no connection, said goodbye, was silent too long, or broke the protocol.

        Not called again for the session before :meth:`join` or :meth:`revive`, and never for a refused session. What is
        sent to the session's channel after this call does not reach the worker.
        """

    def revive(self, worker: int, session: str) -> None:
        """Handle a heartbeat of a session that was :meth:`lost`.

        The worker opens a connection for its push when it needs one, and then says hello with ``reconnecting``.
        """


class LocalReplyChannel(ABC):
    """Sends replies to a worker in the server's own process. The model is copied straight to the worker's tensor."""

    @abstractmethod
    def answer(self, reply: Reply, copy: Callable[[Tensor], None]) -> None:
        """Dispatch the worker.

        Args:
            reply: the header.
            copy: copies the dispatched model to a flat tensor. To be called before this returns.

        """

    @abstractmethod
    def refuse(self, reason: str) -> None:
        """Refuse the worker for good."""
