"""A virtual cluster over the live server's decisions: a clock that jumps from one event to the next.

The server is the very one that runs on rank 0, without its thread: every event comes with the virtual time at which it
happens. A worker's round is played as a whole at the moment when what comes of it reaches the server, since nothing
that happens meanwhile can change it, except that its end may be asked for earlier.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.local_exchange import LocalExchange
from lightning_async_localsgd.simulation.machine import Machine, PlannedRound, VirtualClock, VirtualWorker
from lightning_async_localsgd.simulation.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lightning_async_localsgd.layout import Binding
    from lightning_async_localsgd.messages import Push, Reply
    from lightning_async_localsgd.server import Server
    from lightning_async_localsgd.simulation.devices import Arrival, Cluster, Death

_log = logging.getLogger(__name__)

_HAPPENS, _ARRIVES = 0, 1
"""At the same instant what the schedule says comes first, then pushes in the order of their workers' numbers."""


class LatePush:
    """A push that is on its way though its round has been played: it took longer than was planned."""

    def __init__(self, worker: VirtualWorker, push: Push, gradient: Tensor | None) -> None:
        self.worker = worker
        self.push = push
        self.gradient = None if gradient is None else gradient.clone()


class VirtualCluster(Turns):
    """Workers on machines of given speeds.

    Args:
        server: without a thread of its own; its clock is ``clock``.
        clock: the server's.
        cluster: the machines.
        binding: the module's tensors, in which rounds are played.
        seed: of the times of steps.
        restored: see :meth:`state_dict`; empty at the beginning of a run.

    """

    def __init__(
        self,
        server: Server,
        clock: VirtualClock,
        cluster: Cluster,
        binding: Binding,
        seed: int,
        restored: Mapping[str, Any],
    ) -> None:
        super().__init__(server, clock, binding)
        self._cluster = cluster
        self._machines = [Machine(n, cluster, seed, self._model_bytes) for n in range(len(cluster.devices))]
        for machine, state in zip(self._machines, restored.get("generators", ()), strict=False):
            version, words, gauss = state
            machine.generator.setstate((version, tuple(words), gauss))
        self._lives = [0] * len(self._machines)
        self._dead: set[int] = set()
        self._serials = itertools.count()
        # (time, kind, worker, serial, what happens).
        self._events: list[tuple[float, int, int, int, Callable[[], None] | LatePush | VirtualWorker]] = []

    def begin(self) -> None:
        """The workers that are there at this time join, and what is to come is set.

        In a run that goes on from a checkpoint all initial workers are needed first, as in a live run; those that the
        schedule has had die by then do so again.
        """
        begin, present = self.clock.now, self._cluster.initial
        for arrival in self._cluster.arrivals:
            if begin > 0.0 and arrival.at <= begin:
                present += 1
            else:
                self._put(arrival.at, _HAPPENS, present, partial(self._arrive, arrival))
        for number in range(present):
            self._join(number)
        for death in self._cluster.deaths:
            if begin == 0.0 or death.at > begin:
                self._put(death.at, _HAPPENS, death.worker, partial(self._die, death))
            elif death.back_at is None or death.back_at > begin:
                self._die(death)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`.Turns.state_dict`."""
        states = [machine.generator.getstate() for machine in self._machines]
        return {
            **super().state_dict(),
            "generators": [[version, list(words), gauss] for version, words, gauss in states],
        }

    @property
    def steps_on_their_way(self) -> int:
        """See :attr:`.Turns.steps_on_their_way`."""
        late = [what for *_, what in self._events if isinstance(what, LatePush)]
        return sum(one.push.steps for one in late)

    @property
    def gone(self) -> frozenset[int]:
        """See :attr:`.Turns.gone`."""
        return super().gone | self._dead

    def close(self) -> None:
        """See :meth:`.Turns.close`."""
        missed = self._cluster.after(self.clock.now)
        if missed:
            _log.warning(
                "the simulated run ended at %g virtual seconds, before these entries of its schedule: %s; give them "
                "earlier times, or the run more steps",
                self.clock.now, ", ".join(map(str, missed)),
            )  # fmt: skip

    def advance(self) -> VirtualWorker | None:
        """Lets time pass until a worker's round is to be played.

        Returns:
            The worker, at whose turn it is; None if training is over.

        Raises:
            RuntimeError: nothing can happen any more, because no worker is left.

        """
        while not self._server.finished:
            deadline = self._server.deadline
            if self._events and (deadline is None or deadline <= self.clock.now or self._events[0][0] <= deadline):
                time, _, _, serial, what = heapq.heappop(self._events)
                if isinstance(what, VirtualWorker):
                    current = isinstance(what.plan, PlannedRound) and what.plan.serial == serial
                    if not current or self.live.get(what.number) is not what:
                        continue  # It has died, or is to arrive at another time.
                    self._due = time
                    return what
                self.clock.now = max(self.clock.now, time)
                if isinstance(what, LatePush):
                    if self.live.get(what.worker.number) is what.worker:
                        self._deliver(what.worker, what.push, what.gradient)
                else:
                    what()
            elif deadline is not None and deadline > self.clock.now:
                self.clock.now = deadline
                self._server.look()
                self._call_in()
            else:
                raise RuntimeError(
                    f"at {self.clock.now:g} virtual seconds no worker is left that could go on with the simulated run; "
                    "see the warnings above, or the strategy's schedule, for what has become of them"
                )
        return None

    def hand_in(self, worker: VirtualWorker, final: bool = False, stop: bool = False) -> None:
        """See :meth:`.Turns.hand_in`."""
        plan, worker.plan = worker.plan, None
        assert isinstance(plan, PlannedRound)
        # Training, or the worker's data, may end before the round does, and what was played arrives sooner.
        self.clock.now = max(self.clock.now, min(plan.arrives_so_far, self._due))
        push = worker.hand_in(final=final, stop=stop)
        gradient = worker.gradient if push.steps else None
        if plan.arrives_so_far > self._due:
            # Steps that the optimizer has skipped make a round longer than it was planned.
            self._put(plan.arrives_so_far, _ARRIVES, worker.number, LatePush(worker, push, gradient))
        else:
            self._deliver(worker, push, gradient)

    def end(self, worker: VirtualWorker, stop: bool) -> None:
        """See :meth:`.Turns.end`."""
        if not self._server.finished and worker.plan is not None:
            self.hand_in(worker, final=True, stop=stop)
        while not self._server.finished:
            other = self.advance()
            if other is not None:
                self.adopt(other)
                self.hand_in(other, final=True, stop=stop)

    # ------------------------------------------------------------------ internal

    def _put(self, time: float, kind: int, worker: int, what: Callable[[], None] | LatePush | VirtualWorker) -> int:
        serial = next(self._serials)
        heapq.heappush(self._events, (time, kind, worker, serial, what))
        return serial

    def _join(self, number: int) -> None:
        exchange = LocalExchange(self._server)
        life, self._lives[number] = self._lives[number], self._lives[number] + 1
        clock = VirtualClock(self.clock.now)
        session = f"virtual-{number}-{life}"
        worker = VirtualWorker(number, session, self._binding, exchange, self._gradient, clock)
        self.live[number] = worker
        self._server.join(worker.hello, self._outlet_of(worker))
        self._call_in()

    def _arrive(self, arrival: Arrival) -> None:
        number = self._server.new_number()
        _log.info("worker %d joins the simulated run at %g s", number, arrival.at)
        self._join(number)

    def _die(self, death: Death) -> None:
        worker = self.live.pop(death.worker, None)
        if worker is not None:
            worker.plan = None
            self._forget(worker)
            self._server.lost(worker.number, worker.session, "died, as the schedule says")
            self._call_in()
        if death.back_at is None:
            self._dead.add(death.worker)
        else:
            self._put(death.back_at, _HAPPENS, death.worker, partial(self._join, death.worker))

    def _forget(self, worker: VirtualWorker) -> None:
        """Nothing comes of the worker's round, nor of a push on its way: the memory that they hold is free again."""
        self._events = [
            event for event in self._events
            if event[4] is not worker and not (isinstance(event[4], LatePush) and event[4].worker is worker)
        ]  # fmt: skip
        heapq.heapify(self._events)

    def _deliver(self, worker: VirtualWorker, push: Push, gradient: Tensor | None) -> None:
        super()._deliver(worker, push, gradient)
        self._call_in()

    def _dispatched(self, worker: VirtualWorker, reply: Reply) -> None:
        super()._dispatched(worker, reply)
        if not reply.stop:
            worker.plan = plan = self._machines[worker.number].plan(self.clock.now, reply.local_steps)
            plan.serial = self._put(plan.arrives, _ARRIVES, worker.number, worker)

    def _call_in(self) -> None:
        """Those whose round is wanted at once hand it in at the end of the step that they are at."""
        for number, version in self._server.wanted.items():
            worker = self.live.get(number)
            plan = None if worker is None else worker.plan
            if worker is None or worker.answer is None or worker.answer.version != version:
                continue
            if isinstance(plan, PlannedRound) and plan.cut(self.clock.now + self._machines[number].latency):
                plan.serial = self._put(plan.arrives, _ARRIVES, number, worker)
