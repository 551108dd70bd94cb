"""One machine of a virtual cluster: a worker like any other, but its clock says what it is told."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from typing import TYPE_CHECKING

from lightning_async_localsgd.leases import LeaseDesk
from lightning_async_localsgd.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_async_localsgd.exchange import Exchange
    from lightning_async_localsgd.layout import Binding
    from lightning_async_localsgd.messages import Reply
    from lightning_async_localsgd.simulation.devices import Cluster


class VirtualClock:
    """Seconds since the start of training, as far as they have been played.

    Attributes:
        now: the time.

    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """The time, as whoever needs a clock asks for it."""
        return self.now


class VirtualWorker(Worker):
    """A worker whose rounds are played one after the other with those of others.

    Args:
        number: the worker's number.
        session: its session.
        binding: the module's tensors, which it has while its round is played.
        exchange: the way to the server.
        gradient: memory for pseudo-gradients, shared by all workers.
        clock: its own clock.

    Attributes:
        clock: likewise.
        desk: its leases of training data.
        plan: the round that it has been dispatched and not handed in; None while it waits.
        answer: the reply that it has not adopted yet.
        steps: the progress that its schedulers have followed, in global steps.

    """

    def __init__(
        self, number: int, session: str, binding: Binding, exchange: Exchange, gradient: Tensor, clock: VirtualClock
    ) -> None:
        super().__init__(number, binding, exchange, clock, gradient)
        self.session = session
        self.clock = clock
        self.desk = LeaseDesk(exchange, number, self.session)
        self.used = self.desk.used
        self.plan: Turn | None = None
        self.answer: Reply | None = None
        self.steps = 0

    def interrupt(self) -> None:
        """Validating and saving take no virtual time."""


class Turn(ABC):
    """A round that a worker has been dispatched and not handed in, while it is played.

    Attributes:
        over: all its steps have been played.

    """

    over: bool

    @property
    @abstractmethod
    def now(self) -> float:
        """When the last step that was played has ended; before the first one when the model was there."""

    @abstractmethod
    def take(self, done: int) -> None:
        """A step has been played; ``done`` of them have been taken by then, since an optimizer may skip some."""


class PlannedRound(Turn):
    """The times of a round that a machine has been dispatched.

    Args:
        begin: when the model has reached the machine.
        steps: local steps to take.
        upload: seconds that the pseudo-gradient takes to the server.
        draw: gives the time of a step that begins at a time.

    Attributes:
        serial: number of the event that its arrival is; another number's event is of the past.
        steps: optimizer steps to take.

    """

    def __init__(self, begin: float, steps: int, upload: float, draw: Callable[[float], float]) -> None:
        self.serial = -1
        self.steps = steps
        self.over = False
        self._played = 0
        self._upload = upload
        self._draw = draw
        self._ends = [begin]
        self._extend(steps)

    @property
    def now(self) -> float:
        """See :attr:`Turn.now`."""
        return self._ends[self._played]

    @property
    def arrives(self) -> float:
        """When the server gets what comes of it."""
        return self.arrives_so_far if self.over else self._ends[self.steps] + self._upload

    @property
    def arrives_so_far(self) -> float:
        """When the server gets what has been played, if the round ends with that."""
        return self.now + self._upload

    def cut(self, now: float) -> bool:
        """The machine learns at ``now`` that what it has is wanted: it hands in at the end of the step it is at.

        Returns:
            Whether that changes anything.

        """
        steps = max(1, bisect_right(self._ends, now))
        if steps >= self.steps:
            return False
        self.steps = steps
        return True

    def take(self, done: int) -> None:
        """See :meth:`Turn.take`."""
        self._played += 1
        self.over = done >= self.steps
        self._extend(self._played if self.over else self._played + self.steps - done)

    def _extend(self, steps: int) -> None:
        while len(self._ends) <= steps:
            self._ends.append(self._ends[-1] + self._draw(self._ends[-1]))


class Machine:
    """The hardware that a worker runs on: it stays when the worker dies and comes back.

    Args:
        number: the worker's number.
        cluster: its speed and its link.
        seed: of the times of its steps.
        model_bytes: size of the model on its link.

    Attributes:
        transfer: seconds that a model takes, one way.
        latency: seconds that a short message takes.

    """

    def __init__(self, number: int, cluster: Cluster, seed: int, model_bytes: int) -> None:
        self.number = number
        self.transfer = cluster.links[number].seconds(model_bytes)
        self.latency = cluster.links[number].latency
        self._cluster = cluster
        self._device = cluster.devices[number]
        self.generator = random.Random(f"{seed}/{number}")

    def plan(self, dispatched_at: float, steps: int) -> PlannedRound:
        """A round of so many steps."""
        return PlannedRound(dispatched_at + self.transfer, steps, self.transfer, self._step_seconds)

    def _step_seconds(self, now: float) -> float:
        return self._device.draw(self.generator) * self._cluster.factor(self.number, now)
