"""Whose turn it is: the order in which the rounds of virtual workers are played and handed in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.local_exchange import LocalOutlet

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_async_localsgd.layout import Binding
    from lightning_async_localsgd.messages import Push, Reply
    from lightning_async_localsgd.server import Server
    from lightning_async_localsgd.simulation.machine import VirtualClock, VirtualWorker


class Turns(ABC):
    """The workers of a run in virtual time.

    Args:
        server: without a thread of its own; its clock is ``clock``.
        clock: the server's.
        binding: the module's tensors, in which rounds are played.

    Attributes:
        clock: as given.
        live: the present worker of each number, those that wait or rest included.
        bytes_sent: what the server has sent to workers.
        bytes_received: what workers have sent to the server.

    """

    def __init__(self, server: Server, clock: VirtualClock, binding: Binding) -> None:
        self.clock = clock
        self.live: dict[int, VirtualWorker] = {}
        # When the push of the worker at turn is due. The clock stays behind until it is handed in: what is asked of the
        # server while a round is played must not have it decide anything.
        self._due = clock.now
        self.bytes_sent = 0
        self.bytes_received = 0
        self._server = server
        self._binding = binding
        self._gradient = binding.new_flat()
        self._model_bytes = 4 * binding.layout.numel

    @abstractmethod
    def begin(self) -> None:
        """The initial workers join."""

    @abstractmethod
    def advance(self) -> VirtualWorker | None:
        """Lets time pass until a worker's round is to be played.

        Returns:
            The worker, at whose turn it is; None if training is over.

        Raises:
            RuntimeError: nothing can happen any more.

        """

    @abstractmethod
    def hand_in(self, worker: VirtualWorker, final: bool = False, stop: bool = False) -> None:
        """The worker's round, as far as it was played, reaches the server.

        Args:
            worker: at whose turn it is.
            final: it takes no more steps.
            stop: it asks that training end.

        """

    @abstractmethod
    def end(self, worker: VirtualWorker, stop: bool) -> None:
        """Training ends with the worker's round; those of the others that have not been played are lost.

        Args:
            worker: at whose turn it is.
            stop: somebody has asked for it.

        """

    @property
    def steps_on_their_way(self) -> int:
        """Steps of rounds that have been handed in and have not reached the server yet."""
        return 0

    @property
    def gone(self) -> frozenset[int]:
        """The workers that take no step of this run any more, whatever happens."""
        return self._server.quarantined

    def close(self) -> None:  # noqa: B027 # A replay has nothing to say.
        """Training has come to its end."""

    def state_dict(self) -> dict[str, Any]:
        """What another :class:`Turns` needs to go on at this time, with rounds that begin anew."""
        return {"seconds": self.clock.now}

    def adopt(self, worker: VirtualWorker) -> None:
        """The worker's turn begins: the module holds what the worker was dispatched."""
        assert worker.answer is not None
        worker.clock.now = self.clock.now if worker.plan is None else worker.plan.now
        worker.adopt(worker.answer)

    def end_step(self, worker: VirtualWorker, samples: int, tokens: int) -> bool:
        """A step of the worker's round, of so many samples and tokens, has been played.

        Returns:
            Whether the round is over.

        """
        plan = worker.plan
        assert plan is not None
        plan.take(worker.round_steps)
        worker.clock.now = plan.now
        worker.end_step(samples, tokens)
        return plan.over

    def _outlet_of(self, worker: VirtualWorker) -> VirtualOutlet:
        return VirtualOutlet(worker, self._dispatched, self._refused)

    def _deliver(self, worker: VirtualWorker, push: Push, gradient: Tensor | None) -> None:
        self.bytes_received += self._model_bytes if gradient is not None else 0
        self._server.push_here(push, gradient, self._outlet_of(worker))

    def _dispatched(self, worker: VirtualWorker, reply: Reply) -> None:
        """The worker's dispatch has left the server."""
        self.bytes_sent += self._model_bytes
        worker.answer = reply

    def _refused(self, worker: VirtualWorker, reason: str) -> None:
        """The worker has no part in the run any more."""
        worker.plan = None
        if self.live.get(worker.number) is worker:
            del self.live[worker.number]


class VirtualOutlet(LocalOutlet):
    """Where a worker's answers arrive.

    Args:
        worker: whose.
        dispatched: called with the worker and its reply, after the model is in the worker's memory.
        refused: called with the worker and why it is refused for good.

    """

    def __init__(
        self,
        worker: VirtualWorker,
        dispatched: Callable[[VirtualWorker, Reply], None],
        refused: Callable[[VirtualWorker, str], None],
    ) -> None:
        self._worker = worker
        self._dispatched = dispatched
        self._refused = refused

    def answer(self, reply: Reply, copy: Callable[[Tensor], None]) -> None:
        """See :meth:`.LocalOutlet.answer`."""
        copy(self._worker.model)
        self._dispatched(self._worker, reply)

    def refuse(self, reason: str) -> None:
        """See :meth:`.LocalOutlet.refuse`."""
        self._refused(self._worker, reason)
