"""A server, its workers and the network between them, for the search for pushes that are lost or count twice.

The gradients of a push are all equal to its number, and the server's model is minus the sum of what was applied. So the
model itself says which pushes count.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from lightning_async_localsgd.outer import TorchOptimizer
from lightning_async_localsgd.policies.guard import UpdateGuard
from lightning_async_localsgd.policies.worker_minimum import WorkerMinimum
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.protocol.messages import ALREADY_APPLIED, Hello, Push, Reply
from lightning_async_localsgd.server.coordinator import Coordinator
from lightning_async_localsgd.server.merge_policy import MergePolicy
from lightning_async_localsgd.server.merging import HeldPush
from lightning_async_localsgd.server.run_stats import PushOutcome
from tests.harness import hello, make_coordinator, push_header
from tests.observing import RecordingObserver

LAYOUT = Layout.of(torch.nn.Linear(2, 1))
COHORT = 3
ITEMS = 12
EPOCHS = 40
TOO_LARGE = 1e5

Key = tuple[int, str, int]


class InTurn(TorchOptimizer):
    """Takes the pushes of a group one by one."""

    @property
    def averages_pushes(self) -> bool:
        return True


def build(
    total: int | None,
    grace: float | str,
    incarnation: str,
    groups: dict[str, Any],
    overlap: bool = False,
    min_workers: int = 1,
) -> Coordinator:
    """Make a server whose model is minus the sum of all applied pushes."""
    return make_coordinator(
        COHORT,
        InTurn(torch.optim.SGD, lr=1.0),
        policy=MergePolicy(**groups),
        total=total,
        grace=grace,
        local_steps=5,
        layout=LAYOUT,
        guard=UpdateGuard(TOO_LARGE),
        incarnation=incarnation,
        overlap=overlap,
        minimum=WorkerMinimum(min_workers),
    )


class WorkerProcess:
    """One process of a worker, which does what a sound worker does."""

    def __init__(self, worker: int, session: str) -> None:
        self.worker = worker
        self.session = session
        self.connected = True
        self.reply: Reply | None = None
        self.pending: Push | None = None
        self.sent: list[Push] = []
        self.rejection: str | None = None
        """Why the session was refused for good."""
        self.away = False
        """Whether the server lost the worker since its last push."""
        self.items: list[tuple[int, int]] = []
        self.begun = 0
        """Steps of the next round that the worker takes while its push is in flight."""
        self.steps = 0
        """Steps of the round: those that were granted, or those in flight if they are more."""
        self.used = 0
        self.requests = 0
        self.epoch = 0

    @property
    def stopped(self) -> bool:
        return self.reply is not None and self.reply.stop

    @property
    def computing(self) -> bool:
        return self.rejection is None and self.reply is not None and self.pending is None and not self.stopped

    def hello(self, reconnecting: bool = False) -> Hello:
        return hello(self.worker, self.session, LAYOUT, reconnecting=reconnecting)

    def next_push(self, steps: int, items: int, final: bool = False, **changes: Any) -> Push:
        assert self.reply is not None
        push = push_header(self.worker, self.session, len(self.sent) + 1, self.reply)
        push = dataclasses.replace(
            push, steps=steps, samples=steps, timed_steps=steps, compute_seconds=0.1 * steps, exchange_seconds=0.01,
            final=final, items_used=json.dumps({"0": items}) if items else "",
        )  # fmt: skip
        return dataclasses.replace(push, **changes)

    def receive(self, reply: Reply) -> None:
        """Receive a reply. As on the wire, only the reply to the pending message is let through."""
        if self.connected and reply.sequence == (0 if self.reply is None else self.pending and self.pending.sequence):
            goes_on = not reply.stop and reply.refused in (None, ALREADY_APPLIED)
            self.steps = max(reply.local_steps, self.begun if goes_on else 0)
            self.reply, self.pending, self.begun = reply, None, 0


class Network(RuleBasedStateMachine):
    """The server, the workers and the network between them, with everything that must always hold."""

    groups: ClassVar[list[dict[str, Any]]] = [{}]
    """Merge policies to choose from."""

    overlap: ClassVar[bool] = False
    """Whether workers go on training while their pushes are in flight."""

    min_workers: ClassVar[int] = 1
    """Fewest live workers with which training goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.names = (f"name{number}" for number in itertools.count())
        self.processes: list[WorkerProcess] = []
        self.ended: list[WorkerProcess] = []
        self.gradients: dict[Key, float] = {}
        self.items_of: dict[Key, list[tuple[int, int]]] = {}
        self.applied: dict[Key, int] = {}
        self.counted_steps = 0
        self.acknowledged: set[Key] = set()
        self.trained: set[tuple[int, int]] = set()
        self.numbers: set[int] = set()
        self.last: PushOutcome | None = None
        self.checkpoint: tuple[Any, ...] | None = None

    @initialize(total=st.sampled_from([40, 200, None]), grace=st.sampled_from([0.0, 1.0, "auto"]), data=st.data())
    def begin(self, total: int | None, grace: float | str, data: st.DataObject) -> None:
        self.total, self.grace = total, grace
        self.group = data.draw(st.sampled_from(self.groups))
        self.open(self.build())
        self.save()

    def build(self) -> Coordinator:
        return build(self.total, self.grace, next(self.names), self.group, self.overlap, self.min_workers)

    def open(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        coordinator.observers.add([RecordingObserver(self.on_outcome)])
        self.processes = [WorkerProcess(worker, next(self.names)) for worker in range(COHORT)]
        for process in self.processes:
            self.join(process)
        self.flush()

    # ------------------------------------------------------------------ network

    def on_outcome(self, outcome: PushOutcome) -> None:
        self.last = outcome
        key = (outcome.worker, outcome.session, outcome.sequence)
        assert outcome.version == self.coordinator.model.version
        if outcome.refused is not None:
            return
        assert key not in self.applied, "a push was applied twice"
        self.applied[key] = outcome.steps
        if outcome.steps > 0:
            items = set(self.items_of[key])
            assert not items & self.trained, "an item is in two applied pushes"
            self.trained |= items

    def flush(self) -> None:
        while self.coordinator.ready(self.now):
            for worker, reply in self.coordinator.dispatch(self.now).items():
                process = next(p for p in self.processes if p.worker == worker)
                # Steps that a worker was granted ahead are its own, also while others are missing.
                enough = len(self.coordinator.live) >= self.min_workers
                assert reply.stop or enough or process.begun > 0, "training is paused"
                waited = process.pending
                process.receive(reply)
                if waited is not None and process.pending is None and reply.refused in (None, ALREADY_APPLIED):
                    self.acknowledged.add((worker, process.session, waited.sequence))

    def join(self, process: WorkerProcess, reconnecting: bool = False) -> None:
        refused = self.coordinator.join(process.hello(reconnecting), self.now)
        if refused is not None:
            self.end(process, refused)

    def end(self, process: WorkerProcess, reason: str) -> None:
        process.rejection = reason
        if process in self.processes:
            self.processes.remove(process)
        self.ended.append(process)

    def send(self, process: WorkerProcess, push: Push, gradient: float) -> None:
        """Send a push, over a new connection if the old one is lost."""
        if not process.connected:
            process.connected = True
            self.join(process, reconnecting=True)
            self.flush()
        if process.rejection is not None:
            return
        key = (push.worker, push.session, push.sequence)
        done, version = self.coordinator.budget.done, self.coordinator.model.version
        refused = self.coordinator.push(push, torch.full((LAYOUT.numel,), gradient), self.now)
        self.counted_steps += self.coordinator.budget.done - done
        assert self.coordinator.budget.done - done in (0, push.steps)
        held = self.held.get(push.worker)
        if held is not None and held.push is push:
            self.last = PushOutcome.of(push, None, version, 0, self.now)  # So the worker is told.
            assert self.coordinator.model.version == version
        else:
            assert (self.coordinator.model.version > version) == (
                self.last is not None and self.last.refused is None and push.steps > 0
            )
        assert key not in self.acknowledged or self.coordinator.model.version == version
        if refused is not None:
            self.end(process, refused)

    def send_new(self, process: WorkerProcess, push: Push, gradient: float, items: list[tuple[int, int]]) -> None:
        """Send a push for the first time, and remember what belongs to it."""
        key = (push.worker, push.session, push.sequence)
        self.gradients[key] = gradient
        self.items_of[key] = items
        assert process.reply is not None
        process.sent.append(push)
        process.pending = push
        process.begun = 0 if push.final else process.reply.overlap_steps
        self.send(process, push, gradient)

    @property
    def held(self) -> dict[int, HeldPush]:
        return self.coordinator._merging.held

    def is_forgotten(self, process: WorkerProcess) -> bool:
        """Return whether the process is of a late joiner that left so long ago that the server has forgotten it."""
        return process.worker >= COHORT and process.worker not in self.coordinator.totals

    def gradient_of(self, push: Push) -> float:
        return self.gradients[push.worker, push.session, push.sequence]

    def pick(self, number: int) -> WorkerProcess | None:
        return self.processes[number % len(self.processes)] if self.processes else None

    # --------------------------------------------------------------- invariants

    @invariant()
    def accounts_are_consistent(self) -> None:
        if not hasattr(self, "coordinator"):
            return
        coordinator = self.coordinator
        real = [key for key, steps in self.applied.items() if steps > 0]
        assert coordinator.model.version == len(real)
        expected = -sum(self.gradients[key] for key in real)
        assert torch.equal(coordinator.model.theta, torch.full((LAYOUT.numel,), expected) + 0.0)
        assert self.acknowledged <= self.applied.keys(), "a push was acknowledged, but not applied"
        assert coordinator.budget.done == self.counted_steps
        totals = coordinator.totals.values()
        waiting = [one.push.steps for one in self.held.values()]
        assert sum(worker.rounds for worker in totals) == len(real) + len(waiting)
        assert sum(worker.steps for worker in totals) == sum(self.applied.values()) + sum(waiting)

    @invariant()
    def only_members_count(self) -> None:
        if not hasattr(self, "coordinator"):
            return
        coordinator = self.coordinator
        if coordinator.live and not coordinator.membership.missing and not coordinator.finished:
            assert coordinator.model.workers == len(coordinator.live)
        known = {process.worker: process.session for process in self.processes}
        for worker in coordinator.live:
            assert coordinator.session_of(worker) == known[worker]
        members = coordinator.membership.live
        held = coordinator.budget._reservations.keys()
        assert held <= {worker for worker, member in members.items() if not member.resting}
        assert not coordinator.ready(self.now), "a worker that is due was not dispatched"
        assert coordinator.membership._sessions.departed.isdisjoint(members)

    def teardown(self) -> None:
        """Let the live workers go on until training ends."""
        if not hasattr(self, "coordinator"):
            return
        coordinator = self.coordinator
        if self.total is None:
            coordinator.stop(self.now)
        for _ in range(2 * (self.total or 0) + 20):
            self.now += 100.0
            self.flush()
            for worker in coordinator.live:
                process = next(process for process in self.processes if process.worker == worker)
                self.proceed(process)
            self.only_members_count()
        assert not self.held or not coordinator.live, "a push is held for ever"
        stopped = [process for process in self.processes if coordinator.session_of(process.worker) == process.session]
        assert all(process.stopped for process in stopped)
        if stopped:
            assert coordinator.finished
            final = coordinator.model.theta.clone()
            # Workers that were away come back, and are sent the final model.
            for process in list(self.processes):
                for _ in range(3):
                    if process.rejection is None and not process.stopped:
                        self.proceed(process)
                assert process.stopped or process.rejection is not None
            assert torch.equal(coordinator.model.theta, final)
        self.accounts_are_consistent()

    def proceed(self, process: WorkerProcess) -> None:
        if process.stopped:
            return
        if process.pending is not None:
            self.send(process, process.pending, self.gradient_of(process.pending))
        elif process.reply is None:
            process.connected = True
            self.join(process)
        else:
            push = process.next_push(process.steps, process.used)
            self.send_new(process, push, float(len(self.gradients) + 1), [])
        self.flush()
