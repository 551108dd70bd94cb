"""What the wire asks of the server, and what it offers it: the two sides of one contract, without a socket in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning_async_localsgd.buffers import BufferLease, BufferPool
    from lightning_async_localsgd.layout import Layout
    from lightning_async_localsgd.messages import Hello, Lease, LeaseRequest, Push, Reply


class Outlet(Protocol):
    """The way back to one worker, over one connection. Any thread may use it; no call blocks.

    Once the connection is gone, calls do nothing (a lease is released at once). A worker that comes back has a new
    outlet.
    """

    def dispatch(self, reply: Reply, lease: BufferLease) -> None:
        """Answers the worker's :class:`Hello` or :class:`Push` and sends it the model.

        Args:
            reply: the header.
            lease: holds the model; one share of it is the outlet's from now on, which releases it when the worker
                has everything, or is gone. The tensor must not change until then.

        """

    def refuse(self, reason: str) -> None:
        """Final: the worker's call raises ``ExchangeError(reason)``, and nothing it says is listened to any more.

        :meth:`ServerPort.lost` is not called for this connection afterwards.
        """


class ServerPort(Protocol):
    """What the wire needs of a server. Every call comes from the wire's own threads and must return at once."""

    @property
    def incarnation(self) -> str:
        """Random name of this start of the server."""

    @property
    def layout(self) -> Layout:
        """Of the model that is exchanged. A worker with another one is refused before :meth:`join`."""

    @property
    def buffers(self) -> BufferPool:
        """Where uploads get their memory from."""

    @property
    def wanted(self) -> Mapping[int, int]:
        """The workers that are to hand in their rounds now, and the versions these began with; heartbeats tell them."""

    def join(self, hello: Hello, outlet: Outlet) -> None:
        """A worker that speaks the same protocol and has the same layout has said hello.

        Called again with the same session after a lost connection: answer it again. The worker then sends the push
        that it had no answer to once more, with the same sequence number, so one that was applied already is refused.
        """

    def push(self, push: Push, lease: BufferLease | None, outlet: Outlet) -> None:
        """A worker has handed in its round.

        Args:
            push: the header; its worker and session are those of this connection's hello.
            lease: holds the complete pseudo-gradient and belongs to the server from now on, which releases it. None
                if nothing was uploaded: the push has no steps, or another server's incarnation.
            outlet: where the answer goes.

        """

    def lease(self, request: LeaseRequest, answer: Callable[[Lease], None]) -> None:
        """A worker asks for training data. So may one whose connection is lost, and whose session is about to rejoin.

        Args:
            request: its worker and session are those of the heartbeat of this connection.
            answer: to be called once, from any thread.

        """

    def lost(self, worker: int, session: str, reason: str) -> None:
        """The worker's connection is gone, it said goodbye, or it was silent for too long.

        Called at most once per connection, never for one whose worker is back already with the same session over a
        newer one, and never for a refused one.
        """
