"""What the wire asks of the server, and what it offers it: the two sides of one contract, without a socket in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning_async_localsgd.buffers import BufferLease, BufferPool
    from lightning_async_localsgd.layout import Layout
    from lightning_async_localsgd.messages import Facts, Hello, Lease, LeaseRequest, Push, Reply


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

        Called again with the same session after a lost connection, :meth:`lost` or not: answer it again. The worker
        then sends the push that it had no answer to once more, with the same sequence number, so one that was applied
        already is refused.
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

    def introduce(self, worker: int, answer: Callable[[Facts], None]) -> None:
        """Somebody who knows the token wants to know what is needed to join.

        Args:
            worker: the number of a worker in whose place it comes; -1 asks for a new number.
            answer: to be called once, from any thread. The wire fills in the proof.

        """

    def lost(self, worker: int, session: str, reason: str) -> None:
        """All connections of the session are gone, it said goodbye, was silent for too long, or sent nonsense.

        Not called again before the session is back (:meth:`join` or :meth:`revive`), and never for a refused one. The
        session's outlet is of no use any more; nothing that it is told reaches the worker.
        """

    def revive(self, worker: int, session: str) -> None:
        """The heart of a session that was :meth:`lost` beats again.

        It has a connection for its push as soon as it needs one, and then says hello as one that rejoins.
        """
