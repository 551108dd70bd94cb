"""Simulates a cluster with the live server's decisions and a clock that jumps from one event to the next.

The server is the one that runs on rank 0, without its thread. Each event reaches the server with the virtual time at
which the event happens. A worker's round is computed as a whole when its push reaches the server: nothing that happens
in between can change the round, except that the worker may be recalled earlier.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_async_localsgd.runtime.local_exchange import LocalExchange
from lightning_async_localsgd.simulation.machine import (
    SESSION_PREFIX,
    Machine,
    SimulatedRound,
    VirtualClock,
    VirtualWorker,
)
from lightning_async_localsgd.simulation.simulator import Simulator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lightning_async_localsgd.protocol.frozen import FrozenParameters
    from lightning_async_localsgd.protocol.layout import Binding
    from lightning_async_localsgd.protocol.messages import Push, Reply
    from lightning_async_localsgd.protocol.options import ExchangeOptions
    from lightning_async_localsgd.server.server import Server
    from lightning_async_localsgd.simulation.devices import Arrival, Cluster, Death

_log = logging.getLogger(__name__)

_SCHEDULED, _PUSH = 0, 1
"""Kinds of events in the order in which they happen at the same time. Pushes then come in the order of worker numbers.
"""


class LatePush:
    """A push in transit. Its round was already computed, because the round took longer than expected."""

    def __init__(self, worker: VirtualWorker, push: Push, gradient: Tensor | None) -> None:
        self.worker = worker
        self.push = push
        self.gradient = None if gradient is None else gradient.clone()


class ClusterSimulator(Simulator):
    """Simulates workers on machines of given speeds.

    Args:
        server: server without a thread. Its clock is ``clock``.
        clock: the server's clock.
        cluster: the machines.
        binding: exchanged tensors of the module in which all rounds are computed.
        seed: seed of the step times.
        restored: state to resume from, see :meth:`state_dict`; empty for a new run.
        frozen: see :class:`.Simulator`.
        exchange_options: see :class:`.Simulator`.

    """

    def __init__(
        self,
        server: Server,
        clock: VirtualClock,
        cluster: Cluster,
        binding: Binding,
        seed: int,
        restored: Mapping[str, Any],
        frozen: FrozenParameters | None = None,
        exchange_options: ExchangeOptions | None = None,
    ) -> None:
        super().__init__(server, clock, binding, frozen, exchange_options)
        self._cluster = cluster
        self._machines = [
            Machine(n, cluster, seed, self._push_bytes, self._model_bytes) for n in range(len(cluster.devices))
        ]
        for machine, state in zip(self._machines, restored.get("generators", ()), strict=False):
            version, words, gauss = state
            machine.generator.setstate((version, tuple(words), gauss))
        # Each worker of a resumed run continues from its own residual. A worker that comes back later has none.
        self._residuals: dict[str, Tensor] = dict(restored.get("residuals", {}))
        self._sessions = [0] * len(self._machines)
        # With overlap: when a worker's last push left its machine, and how many steps it may take until the answer.
        self._flights: dict[int, tuple[float, int]] = {}
        self._dead: set[int] = set()
        self._event_ids = itertools.count()
        # Heap of (time, kind, worker, event ID, what happens). A worker stands for the push of its current round.
        self._events: list[tuple[float, int, int, int, Callable[[], None] | LatePush | VirtualWorker]] = []

    @override
    def start(self) -> None:
        """Let the workers join that are present at this time, and add the events of the schedule.

        A resumed run needs all initial workers first, like a live run. Workers that are dead according to the schedule
        die again after that.
        """
        begin, present = self.clock.now, self._cluster.initial_workers
        for arrival in self._cluster.arrivals:
            if begin > 0.0 and arrival.at <= begin:
                present += 1
            else:
                self._add_event(arrival.at, _SCHEDULED, present, partial(self._on_arrival, arrival))
        for number in range(present):
            self._join(number)
        for death in self._cluster.deaths:
            if begin == 0.0 or death.at > begin:
                self._add_event(death.at, _SCHEDULED, death.worker, partial(self._on_death, death))
            elif death.back_at is None or death.back_at > begin:
                self._on_death(death)

    @override
    def state_dict(self) -> dict[str, Any]:
        states = [machine.generator.getstate() for machine in self._machines]
        return {
            **super().state_dict(),
            "generators": [[version, list(words), gauss] for version, words, gauss in states],
        }

    @property
    @override
    def steps_in_transit(self) -> int:
        late = [event[-1] for event in self._events if isinstance(event[-1], LatePush)]
        return sum(one.push.samples if one.worker.step_samples else one.push.steps for one in late)

    @property
    @override
    def permanently_lost(self) -> frozenset[int]:
        return super().permanently_lost | self._dead

    @override
    def close(self) -> None:
        missed = self._cluster.events_after(self.clock.now)
        if missed:
            _log.warning(
                "The simulated run ended at %g virtual seconds, before these entries of its schedule: %s. Give them "
                "earlier times, or give the run more steps.",
                self.clock.now, ", ".join(map(str, missed)),
            )  # fmt: skip

    @override
    def next_worker(self, until: Callable[[], bool] = lambda: False) -> VirtualWorker | None:
        while not self._server.finished and not until():
            self._server.raise_failure()
            deadline = self._server.deadline
            if self._events and (deadline is None or deadline <= self.clock.now or self._events[0][0] <= deadline):
                time, _, _, event_id, event = heapq.heappop(self._events)
                if isinstance(event, VirtualWorker):
                    current = (
                        isinstance(event.current_round, SimulatedRound) and event.current_round.event_id == event_id
                    )
                    if not current or self.live.get(event.number) is not event:
                        continue  # The worker has died, or its push arrives at another time.
                    self._push_time = time
                    return event
                self.clock.now = max(self.clock.now, time)
                if isinstance(event, LatePush):
                    if self.live.get(event.worker.number) is event.worker:
                        self._deliver(event.worker, event.push, event.gradient)
                else:
                    event()
            elif deadline is not None and deadline > self.clock.now:
                self.clock.now = deadline
                self._server.dispatch_due()
                self._recall_workers()
            else:
                raise RuntimeError(
                    f"at {self.clock.now:g} virtual seconds no worker is left to continue the simulated run; see the "
                    "warnings above and the strategy's schedule for what has happened to the workers"
                )
        return None

    @override
    def push_round(
        self, worker: VirtualWorker, final: bool = False, stop: bool = False, factor: float | None = None
    ) -> None:
        self.adopt_answer(worker)
        current_round, worker.current_round = worker.current_round, None
        assert isinstance(current_round, SimulatedRound)
        # If training or the worker's data ends before the round does, the push arrives earlier.
        arrival_time = current_round.arrival_time_if_ended
        self.clock.now = max(self.clock.now, min(arrival_time, self._push_time))
        push = worker.make_push(final=final, stop=stop) if factor is None else worker.make_gradient_push(factor)
        gradient = worker.gradient if push.has_data else None
        if worker.overlaps and not final:
            assert worker.reply is not None
            self._flights[worker.number] = worker.clock.now, worker.reply.overlap_steps
        if arrival_time > self._push_time:
            # Steps that the optimizer has skipped make a round longer than expected.
            self._add_event(arrival_time, _PUSH, worker.number, LatePush(worker, push, gradient))
        else:
            self._deliver(worker, push, gradient)

    @override
    def awaited(self, worker: VirtualWorker) -> list[VirtualWorker]:
        return [
            other
            for other in self.live.values()
            if other is not worker
            and isinstance(other.current_round, SimulatedRound)
            and not any(
                death.worker == other.number and self.clock.now <= death.at <= other.current_round.arrival_time
                for death in self._cluster.deaths
            )
        ]

    @override
    def finish(self, worker: VirtualWorker, stop: bool) -> None:
        if not self._server.finished and worker.current_round is not None:
            self.push_round(worker, final=True, stop=stop)
        while not self._server.finished:
            other = self.next_worker()
            if other is not None:
                self.begin_round(other)
                self.push_round(other, final=True, stop=stop)

    # ------------------------------------------------------------------ internal

    def _add_event(
        self, time: float, kind: int, worker: int, event: Callable[[], None] | LatePush | VirtualWorker
    ) -> int:
        event_id = next(self._event_ids)
        heapq.heappush(self._events, (time, kind, worker, event_id, event))
        return event_id

    def _join(self, number: int) -> None:
        session, self._sessions[number] = self._sessions[number], self._sessions[number] + 1
        worker = self._new_worker(number, f"{SESSION_PREFIX}{number}-{session}", LocalExchange(self._server))
        if worker.uplink is not None:
            worker.uplink.restore(self._residuals.pop(str(number), None))
        self.live[number] = worker
        self._flights.pop(number, None)
        self._server.join(worker.hello, self._channel_of(worker))
        self._recall_workers()

    def _on_arrival(self, arrival: Arrival) -> None:
        number = self._server.new_number()
        _log.info("worker %d joins the simulated run at %g virtual seconds", number, arrival.at)
        self._join(number)

    def _on_death(self, death: Death) -> None:
        worker = self.live.pop(death.worker, None)
        if worker is not None:
            worker.current_round = None
            self._remove_events(worker)
            self._server.lost(worker.number, worker.session, "it died, as scheduled")
            self._recall_workers()
        if death.back_at is None:
            self._dead.add(death.worker)
        else:
            self._add_event(death.back_at, _SCHEDULED, death.worker, partial(self._join, death.worker))

    def _remove_events(self, worker: VirtualWorker) -> None:
        """Remove a dead worker's pushes from the events, which frees their memory."""
        self._events = [
            event for event in self._events
            if event[4] is not worker and not (isinstance(event[4], LatePush) and event[4].worker is worker)
        ]  # fmt: skip
        heapq.heapify(self._events)

    @override
    def _deliver(self, worker: VirtualWorker, push: Push, gradient: Tensor | None) -> None:
        super()._deliver(worker, push, gradient)
        self._recall_workers()

    @override
    def _on_dispatch(self, worker: VirtualWorker, reply: Reply) -> None:
        super()._on_dispatch(worker, reply)
        if reply.synchronous and reply.local_steps == 0:
            machine = self._machines[worker.number]
            at = self.clock.now + machine.download_seconds[reply.encoding] + machine.latency
            self._add_event(at, _PUSH, worker.number, partial(self._hand_over, worker))
        elif not reply.stop:
            begin, limit = self._flights.pop(worker.number, (None, 0)) if worker.accepts(reply) else (None, 0)
            machine = self._machines[worker.number]
            new_round = machine.start_round(
                self.clock.now, reply.local_steps, begin, limit, reply.encoding, of_gradients=reply.synchronous
            )
            worker.current_round = new_round
            new_round.event_id = self._add_event(new_round.arrival_time, _PUSH, worker.number, worker)

    def _recall_workers(self) -> None:
        """Let recalled workers push at the end of their current step."""
        for number, version in self._server.recalled.items():
            worker = self.live.get(number)
            current_round = None if worker is None else worker.current_round
            if worker is None or worker.pending_reply is None or worker.pending_reply.version != version:
                continue
            recalled_at = self.clock.now + self._machines[number].latency
            if isinstance(current_round, SimulatedRound) and current_round.recall(recalled_at):
                current_round.event_id = self._add_event(current_round.arrival_time, _PUSH, number, worker)
