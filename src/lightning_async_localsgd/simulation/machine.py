"""A machine of a virtual cluster and its worker, whose clock shows virtual time."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_async_localsgd.runtime.leases import LeaseClient
from lightning_async_localsgd.runtime.worker_base import WorkerBase

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lightning_async_localsgd.protocol.layout import Binding
    from lightning_async_localsgd.protocol.lease_source import LeaseSource
    from lightning_async_localsgd.protocol.messages import Reply
    from lightning_async_localsgd.protocol.options import ExchangeOptions
    from lightning_async_localsgd.simulation.devices import Cluster


SESSION_PREFIX = "virtual-"
"""Begin of the session names of virtual workers. It tells the log of a simulated run from that of a live run."""


class VirtualClock:
    """A clock that is set by the simulator.

    Args:
        now: the time, in virtual seconds since the start of training.

    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class VirtualWorker(WorkerBase):
    """A worker that shares the module with the other virtual workers.

    Args:
        number: the worker's number.
        session: name of the worker's session.
        binding: exchanged tensors of the module.
        source: answers the worker's lease requests.
        gradient: flat fp32 memory for pseudo-gradients, shared by all workers.
        clock: the worker's own clock.
        exchange_options: how pushes and models travel.
        packed: memory for packed pushes, shared by all workers; None if they travel as fp32.

    Attributes:
        clock: the worker's own clock.
        lease_client: the worker's leases of training data.
        current_round: the round that the worker was dispatched and has not pushed; None while the worker waits.
        pending_reply: the reply that the worker adopts when its round is computed.
        scheduler_steps: global steps that the worker's learning-rate schedulers have followed.

    """

    def __init__(
        self,
        number: int,
        session: str,
        binding: Binding,
        source: LeaseSource,
        gradient: Tensor,
        clock: VirtualClock,
        exchange_options: ExchangeOptions | None = None,
        packed: Tensor | None = None,
    ) -> None:
        super().__init__(number, binding, clock, gradient, exchange_options, packed)
        self.session = session
        self.clock = clock
        self.lease_client = LeaseClient(source, number, self.session)
        self.items_used = self.lease_client.items_used
        self.current_round: VirtualRound | None = None
        self.pending_reply: Reply | None = None
        self.scheduler_steps = 0

    def continue_local(self) -> None:
        """Begin a round before its model has arrived: load the local model that was pushed into the module."""
        assert self._local_progress is not None
        self._local_progress.restore()

    @override
    def _load_moments(self) -> None:
        # The optimizers still have the state of another worker. See load_moments().
        return

    def load_moments(self) -> None:
        """Load the second moments of the last dispatch, once the optimizers have this worker's state."""
        super()._load_moments()

    @override
    def leave_out_step(self) -> None:
        # Validation and saving take no virtual time.
        return


class VirtualRound(ABC):
    """Virtual times of a worker's round while the round is computed.

    Attributes:
        over: whether all steps of the round are computed.
        steps: optimizer steps to take; in the synchronous beginning, local steps whose gradients are accumulated.
        overlap_steps: steps that are computed before the answer to the push before the round is adopted.
        computed: steps that are computed, including those that the optimizer has skipped.

    """

    over: bool
    steps: int
    overlap_steps: int = 0
    computed: int = 0

    @property
    @abstractmethod
    def now(self) -> float:
        """End of the last computed step. Before the first step, the time at which the round begins."""

    @property
    @abstractmethod
    def answered_at(self) -> float:
        """Time at which the worker received the model. It adopts the model when a step ends."""

    @abstractmethod
    def record_step(self, optimizer_steps: int) -> None:
        """Record that a step was computed.

        Args:
            optimizer_steps: optimizer steps of the round so far. An optimizer may skip steps.

        """


class SimulatedRound(VirtualRound):
    """A round whose step times are drawn when the round is dispatched.

    Args:
        answered_at: time at which the model reaches the machine.
        steps: optimizer steps to take.
        upload_seconds: seconds until a push reaches the server.
        draw_seconds: returns the duration of a step that begins at a given time.
        begin: time at which the round begins, if the machine does not wait for the model: that of the push before.
        limit: steps that the machine takes at most before the model has arrived.

    Attributes:
        event_id: number of the current event at which the push arrives. Events with other numbers are outdated.
        steps: optimizer steps to take.

    """

    def __init__(
        self,
        answered_at: float,
        steps: int,
        upload_seconds: float,
        draw_seconds: Callable[[float], float],
        begin: float | None = None,
        limit: int = 0,
    ) -> None:
        self.event_id = -1
        self.over = False
        self._answered_at = answered_at
        self._upload_seconds = upload_seconds
        self._draw_seconds = draw_seconds
        # Element n is the end of step n, element 0 the begin of the round.
        self._step_ends = [answered_at if begin is None else begin]
        while self.overlap_steps < limit and self._step_ends[-1] < answered_at:
            self._draw_steps(self.overlap_steps + 1, wait=False)
            self.overlap_steps += 1
        self.steps = max(steps, self.overlap_steps)
        self._draw_steps(self.steps)

    @property
    @override
    def now(self) -> float:
        return self._step_ends[self.computed]

    @property
    @override
    def answered_at(self) -> float:
        return self._answered_at

    @property
    def arrival_time(self) -> float:
        """Time at which the push reaches the server, if no more steps are skipped."""
        return self.arrival_time_if_ended if self.over else self._end_of(self.steps) + self._upload_seconds

    @property
    def arrival_time_if_ended(self) -> float:
        """Time at which the push reaches the server, if the round ends with the last computed step."""
        return self._end_of(self.computed) + self._upload_seconds

    def recall(self, now: float) -> bool:
        """Shorten the round: the machine learns at ``now`` that it is recalled, and pushes after its current step.

        Returns:
            Whether the round has become shorter.

        """
        steps = max(1, self.overlap_steps, bisect_right(self._step_ends, now))
        if steps >= self.steps:
            return False
        self.steps = steps
        return True

    @override
    def record_step(self, optimizer_steps: int) -> None:
        self.computed += 1
        self.over = optimizer_steps >= self.steps
        self._draw_steps(self.computed if self.over else self.computed + self.steps - optimizer_steps)

    def _end_of(self, step: int) -> float:
        """Return when a step has ended and, if no further step may begin without the model, the model is there."""
        end = self._step_ends[step]
        return max(end, self._answered_at) if step <= self.overlap_steps else end

    def _draw_steps(self, count: int, wait: bool = True) -> None:
        while len(self._step_ends) <= count:
            begin = self._end_of(len(self._step_ends) - 1) if wait else self._step_ends[-1]
            self._step_ends.append(begin + self._draw_seconds(begin))


class Machine:
    """The hardware of a worker. It stays the same if the worker dies and comes back.

    Args:
        number: the worker's number.
        cluster: the cluster, which has the machine's speed and link.
        seed: seed of the step times.
        push_bytes: size of a push on the link.
        model_bytes: size of a model on the link, for each encoding, see :attr:`.Reply.encoding`.

    Attributes:
        number: the worker's number.
        upload_seconds: seconds that a push needs.
        download_seconds: seconds that a model needs, for each encoding.
        latency: seconds that a short message needs in one direction.
        generator: random generator of the step times.

    """

    def __init__(
        self, number: int, cluster: Cluster, seed: int, push_bytes: int, model_bytes: Mapping[str, int]
    ) -> None:
        self.number = number
        self.upload_seconds = cluster.links[number].seconds(push_bytes)
        self.download_seconds = {name: cluster.links[number].seconds(size) for name, size in model_bytes.items()}
        self.latency = cluster.links[number].latency
        self.generator = random.Random(f"{seed}/{number}")
        self._cluster = cluster
        self._device = cluster.devices[number]

    def start_round(
        self,
        dispatched_at: float,
        steps: int,
        begin: float | None = None,
        limit: int = 0,
        encoding: str = "fp32",
        of_gradients: bool = False,
    ) -> SimulatedRound:
        """Draw the times of a round of ``steps`` steps, whose model leaves the server at ``dispatched_at``.

        With overlap, the round begins at ``begin`` with at most ``limit`` steps, before the model has arrived. If it is
        a round ``of_gradients``, those travel at its end.
        """
        answered_at = dispatched_at + self.download_seconds[encoding]
        upload_seconds = self.download_seconds["mean"] if of_gradients else self.upload_seconds
        return SimulatedRound(answered_at, steps, upload_seconds, self._step_seconds, begin, limit)

    def _step_seconds(self, now: float) -> float:
        return self._device.draw(self.generator) * self._cluster.slowdown_factor(self.number, now)
