"""Whatever happens to workers, connections and the server: each push counts once, and training comes to its end.

Hypothesis plays workers that train, lose connections and answers, send things twice, die, come back, are replaced and
come back all the same, and a server that starts again from an earlier checkpoint. After every event it looks at what
must always hold; at the end the workers that are left go on, and training has to finish.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightning_async_localsgd import attendance
from lightning_async_localsgd.budget import Budget
from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.global_model import GlobalModel
from lightning_async_localsgd.grace import GraceWindow
from lightning_async_localsgd.guard import UpdateGuard
from lightning_async_localsgd.layout import Layout
from lightning_async_localsgd.merging import Held, MergeOptions, Merging
from lightning_async_localsgd.messages import (
    ALREADY_APPLIED,
    PROTOCOL_VERSION,
    Hello,
    Lease,
    LeaseRequest,
    Push,
    Reply,
)
from lightning_async_localsgd.objections import TOO_LATE
from lightning_async_localsgd.outer import TorchOptimizer
from lightning_async_localsgd.pacing import SpeedAwareSteps
from lightning_async_localsgd.records import Settled, settled

LAYOUT = Layout.of(torch.nn.Linear(2, 1))
COHORT = 3
ITEMS = 12
EPOCHS = 40
TOO_LARGE = 1e5

Key = tuple[int, str, int]


class InTurn(TorchOptimizer):
    """Wants each push of a group by itself."""

    @property
    def collects(self) -> bool:
        return True


def build(total: int | None, grace: float | str, incarnation: str, groups: dict[str, Any]) -> Coordinator:
    """A server whose model is minus the sum of all that was ever applied to it."""
    model = GlobalModel(LAYOUT, InTurn(torch.optim.SGD, lr=1.0), COHORT)
    return Coordinator(
        model,
        SpeedAwareSteps(5),
        GraceWindow(grace),
        Budget(total),
        cohort=COHORT,
        incarnation=incarnation,
        guard=UpdateGuard(TOO_LARGE),
        merging=Merging(model, COHORT, **groups),
    )


class Process:
    """One life of a worker, as honest as they come."""

    def __init__(self, worker: int, session: str) -> None:
        self.worker = worker
        self.session = session
        self.connected = True
        self.reply: Reply | None = None
        self.pending: Push | None = None
        self.sent: list[Push] = []
        self.gone: str | None = None
        """Why it was refused for good."""
        self.away = False
        """It was given up since its last push."""
        self.items: list[tuple[int, int]] = []
        self.used = 0
        self.requests = 0
        self.epoch = 0

    @property
    def stopped(self) -> bool:
        return self.reply is not None and self.reply.stop

    @property
    def computing(self) -> bool:
        return self.gone is None and self.reply is not None and self.pending is None and not self.stopped

    def hello(self, rejoining: bool = False) -> Hello:
        return Hello(PROTOCOL_VERSION, self.worker, self.session, LAYOUT.fingerprint, rejoining)

    def next_push(self, steps: int, items: int, final: bool = False, **changes: Any) -> Push:
        assert self.reply is not None
        claim = json.dumps({"0": items}) if items else ""
        push = Push(
            self.worker, self.session, len(self.sent) + 1, self.reply.incarnation, self.reply.version, steps, steps,
            steps, 0.1 * steps, 0.01, final, False, claim,
        )  # fmt: skip
        return dataclasses.replace(push, **changes)

    def hear(self, reply: Reply) -> None:
        """As the wire does it: only the answer to what was asked is let through."""
        if self.connected and reply.sequence == (0 if self.reply is None else self.pending and self.pending.sequence):
            self.reply, self.pending = reply, None


class Run(RuleBasedStateMachine):
    """The server, the workers and the network between them."""

    groups: ClassVar[list[dict[str, Any]]] = [{}]
    """How pushes may be grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.names = (f"name{number}" for number in itertools.count())
        self.processes: list[Process] = []
        self.ghosts: list[Process] = []
        self.gradients: dict[Key, float] = {}
        self.items_of: dict[Key, list[tuple[int, int]]] = {}
        self.applied: dict[Key, int] = {}
        self.counted_steps = 0
        self.acknowledged: set[Key] = set()
        self.trained: set[tuple[int, int]] = set()
        self.numbers: set[int] = set()
        self.last: Settled | None = None
        self.checkpoint: tuple[Any, ...] | None = None

    @initialize(total=st.sampled_from([40, 200, None]), grace=st.sampled_from([0.0, 1.0, "auto"]), data=st.data())
    def begin(self, total: int | None, grace: float | str, data: st.DataObject) -> None:
        self.total, self.grace = total, grace
        self.group = data.draw(st.sampled_from(self.groups))
        self.open(build(total, grace, next(self.names), self.group))
        self.save()

    def open(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        coordinator.on_settled = self.note
        self.processes = [Process(worker, next(self.names)) for worker in range(COHORT)]
        for process in self.processes:
            self.join(process)
        self.flush()

    # ------------------------------------------------------------------ network

    def note(self, settled: Settled) -> None:
        self.last = settled
        key = (settled.worker, settled.session, settled.sequence)
        assert settled.version == self.coordinator.model.version
        if settled.refused is not None:
            return
        assert key not in self.applied, "applied twice"
        self.applied[key] = settled.steps
        if settled.steps > 0:
            items = set(self.items_of[key])
            assert not items & self.trained, "an item in two applied pushes"
            self.trained |= items

    def flush(self) -> None:
        while self.coordinator.ready(self.now):
            for worker, reply in self.coordinator.dispatch(self.now).items():
                process = next(p for p in self.processes if p.worker == worker)
                waited = process.pending
                process.hear(reply)
                if waited is not None and process.pending is None and reply.refused in (None, ALREADY_APPLIED):
                    self.acknowledged.add((worker, process.session, waited.sequence))

    def join(self, process: Process, rejoining: bool = False) -> None:
        refused = self.coordinator.join(process.hello(rejoining), self.now)
        if refused is not None:
            self.bury(process, refused)

    def bury(self, process: Process, reason: str) -> None:
        process.gone = reason
        if process in self.processes:
            self.processes.remove(process)
        self.ghosts.append(process)

    def send(self, process: Process, push: Push, gradient: float) -> None:
        """Hands a push in, over a new connection if the old one is gone."""
        if not process.connected:
            process.connected = True
            self.join(process, rejoining=True)
            self.flush()
        if process.gone is not None:
            return
        key = (push.worker, push.session, push.sequence)
        done, version = self.coordinator.budget.done, self.coordinator.model.version
        refused = self.coordinator.push(push, torch.full((LAYOUT.numel,), gradient), self.now)
        self.counted_steps += self.coordinator.budget.done - done
        assert self.coordinator.budget.done - done in (0, push.steps)
        held = self.held.get(push.worker)
        if held is not None and held.push is push:
            self.last = settled(push, None, version, 0, self.now)  # As far as its worker is concerned.
            assert self.coordinator.model.version == version
        else:
            assert (self.coordinator.model.version > version) == (
                self.last is not None and self.last.refused is None and push.steps > 0
            )
        assert key not in self.acknowledged or self.coordinator.model.version == version
        if refused is not None:
            self.bury(process, refused)

    @property
    def held(self) -> dict[int, Held]:
        return self.coordinator._merging.held

    def gradient_of(self, push: Push) -> float:
        return self.gradients[push.worker, push.session, push.sequence]

    def pick(self, number: int) -> Process | None:
        return self.processes[number % len(self.processes)] if self.processes else None

    # ------------------------------------------------------------------- events

    @rule(number=st.integers(0, 9), count=st.sampled_from([1, 2, 3, ITEMS]))
    def take_items(self, number: int, count: int) -> None:
        """A worker asks for data, over its heart's connection, so that one that was given up may do so, too."""
        process = self.pick(number)
        if process is None or not process.computing:
            return
        for _ in range(count):
            process.requests += 1
            request = LeaseRequest(
                process.worker, process.session, process.requests, "0", ITEMS, 1, process.epoch, False
            )
            lease = self.coordinator.lease(request)
            assert self.coordinator.lease(request) == lease, "the same question, the same answer"
            if lease.refused is not None:
                assert self.coordinator.session_of(process.worker) != process.session
                return
            process.items += [(lease.epoch, item) for item in range(lease.start, lease.stop)]
            if lease.start == lease.stop and process.epoch < EPOCHS:
                process.epoch += 1

    @rule(
        number=st.integers(0, 9),
        kind=st.sampled_from(["good", "good", "good", "part", "empty", "nan", "nan", "large", "base", "items", "size"]),
        seconds=st.floats(0.0, 3.0),
        heard=st.booleans(),
    )
    def push(self, number: int, kind: str, seconds: float, heard: bool) -> None:
        """A worker hands in its round; the answer may be lost on the way."""
        self.now += seconds
        self.flush()
        self.hand_in(number, kind, heard)

    @rule(number=st.integers(0, 9), kind=st.sampled_from(["nan", "large", "items"]))
    def push_only(self, number: int, kind: str) -> None:
        """A worker has gone wrong for good."""
        process = self.pick(number)
        if process is None:
            return
        for _ in range(5):
            if process.gone is None and process.computing:
                self.hand_in(self.processes.index(process), kind, heard=True)
                self.now += 100.0
                self.flush()
        if process.gone is not None:
            assert "quarantined" in process.gone
            other = Process(process.worker, next(self.names))
            self.join(other)
            assert other.gone == process.gone
            self.ghosts.remove(other)

    @rule(number=st.integers(0, 9), heard=st.booleans())
    def push_for_good(self, number: int, heard: bool) -> None:
        """A worker has no data any more."""
        self.hand_in(number, "part", heard, final=True)

    def hand_in(self, number: int, kind: str, heard: bool, final: bool = False) -> None:
        process = self.pick(number)
        if process is None or not process.computing:
            return
        assert process.reply is not None
        steps = {"part": 1, "empty": 0}.get(kind, process.reply.local_steps)
        items = process.items[process.used :]
        process.used = len(process.items)
        changes: dict[str, Any] = {}
        if kind == "base":
            changes["base_version"] = process.reply.version + 1000
        elif kind == "items":
            changes["used"] = json.dumps({"0": process.used + 1})
        elif kind == "size":
            changes["samples"] = -1
        push = process.next_push(steps, process.used, final, **changes)
        key = (push.worker, push.session, push.sequence)
        number_of_push = len(self.gradients) + 1
        poison = {"nan": float("nan"), "large": 10 * TOO_LARGE}
        self.gradients[key] = poison.get(kind, float(number_of_push))
        self.items_of[key] = items
        finished = self.coordinator.finished
        process.sent.append(push)
        process.pending = push
        self.send(process, push, self.gradients[key])
        if process.gone is None and self.last is not None:
            refused = self.last.refused
            if kind in ("good", "part", "empty"):
                honest = refused is None or (process.away and "went to others" in refused)
                assert honest or (finished and refused == TOO_LATE.text), refused
            else:
                assert refused is not None
            process.away = False
        process.connected = heard
        self.flush()

    @rule(number=st.integers(0, 9), heard=st.booleans())
    def send_again(self, number: int, heard: bool) -> None:
        """A worker without an answer asks once more."""
        process = self.pick(number)
        if process is None:
            return
        version = self.coordinator.model.version
        if process.pending is not None:
            before = self.answer_of(process)
            self.send(process, process.pending, self.gradient_of(process.pending))
            if process.gone is None:
                assert self.answer_of(process) == (before or ALREADY_APPLIED), "what was refused is refused for that"
        elif process.reply is None:
            process.connected = True
            self.join(process)
        process.connected = process.connected and heard
        self.flush()
        # One that is back may complete a group.
        assert self.group or self.coordinator.model.version == version

    def answer_of(self, process: Process) -> str | None:
        """What the latest push of a session was answered."""
        member = self.coordinator.attendance._membership.find(process.worker, process.session)
        if member is None:
            member = self.coordinator.attendance._membership.find_departed(process.worker, process.session)
        return None if member is None or member.answer is None else member.answer.text

    @rule(number=st.integers(0, 9), which=st.integers(0, 50))
    def duplicate(self, number: int, which: int) -> None:
        """The network brings something a second time, however old it is."""
        process = self.pick(number)
        if process is None or not process.sent or not process.connected:
            return
        push = process.sent[which % len(process.sent)]
        version, done = self.coordinator.model.version, self.coordinator.budget.done
        self.send(process, push, self.gradient_of(push))
        self.flush()
        assert (self.coordinator.model.version, self.coordinator.budget.done) == (version, done)

    @rule(number=st.integers(0, 9), told=st.booleans())
    def cut(self, number: int, told: bool) -> None:
        """A connection breaks; the server may notice."""
        process = self.pick(number)
        if process is None:
            return
        process.connected = False
        if told:
            process.away = True
            self.coordinator.leave(process.worker, process.session, self.now, "test")
            self.flush()

    @rule(number=st.integers(0, 9))
    def beat(self, number: int) -> None:
        """The heart of a worker beats, which may have been given up."""
        process = self.pick(number)
        if process is None or process.reply is None:
            return
        if not self.coordinator.revive(process.worker, process.session, self.now):
            self.bury(process, "forgotten")
        self.flush()

    @rule(number=st.integers(0, 9), other=st.integers(0, 9))
    def away_for_long(self, number: int, other: int) -> None:
        """What a worker that was given up had in hand goes to another one, who needs it; then it comes back."""
        self.take_items(number, 2)
        self.cut(number, told=True)
        self.take_items(other, ITEMS)
        self.hand_in(number, "good", heard=True)

    @rule(number=st.integers(0, COHORT - 1), died=st.booleans())
    def restart(self, number: int, died: bool) -> None:
        """A worker is started again; the process before it may be alive all the same."""
        older = next((process for process in self.processes if process.worker == number), None)
        if older is not None and died:
            older.connected = False
            older.away = True
            self.coordinator.leave(number, older.session, self.now, "test")
        process = Process(number, next(self.names))
        self.join(process)
        if process.gone is None:
            self.processes.append(process)
            if older is not None:
                self.processes.remove(older)
                self.ghosts.append(older)
        self.flush()

    @rule()
    def stranger(self) -> None:
        """Somebody joins who was not there at the beginning."""
        if len(self.processes) > 6:
            return
        number = self.coordinator.attendance.new_number()
        assert number >= COHORT
        assert number not in self.numbers
        self.numbers.add(number)
        process = Process(number, next(self.names))
        self.processes.append(process)
        self.join(process)
        self.flush()

    @rule(number=st.integers(0, 99), act=st.sampled_from(["hello", "rejoin", "push", "again", "lease", "beat"]))
    def haunt(self, number: int, act: str) -> None:
        """A process that has no place in the run any more acts as if it had."""
        if not self.ghosts:
            return
        ghost = self.ghosts[number % len(self.ghosts)]
        session = self.coordinator.session_of(ghost.worker)
        version, done = self.coordinator.model.version, self.coordinator.budget.done
        free = self.coordinator.state_dict()["leases"]
        if act in ("hello", "rejoin") and not self.is_foreign(ghost):
            assert self.coordinator.join(ghost.hello(act == "rejoin"), self.now) is not None
        elif act == "lease":
            lease = self.coordinator.lease(LeaseRequest(ghost.worker, ghost.session, 99, "0", ITEMS, 1, 0, False))
            assert isinstance(lease, Lease)
            assert lease.refused is not None
        elif act == "beat":
            assert not self.coordinator.revive(ghost.worker, ghost.session, self.now)
        elif ghost.sent and act in ("push", "again"):
            push = ghost.sent[-1]
            if act == "push":
                push = dataclasses.replace(push, sequence=push.sequence + 1, base_version=version)
            assert self.coordinator.push(push, torch.ones(LAYOUT.numel), self.now) is not None
        self.flush()
        assert self.coordinator.session_of(ghost.worker) == session
        assert (self.coordinator.model.version, self.coordinator.budget.done) == (version, done)
        assert self.coordinator.state_dict()["leases"] == free

    def is_foreign(self, ghost: Process) -> bool:
        """Whether this server has never met the ghost: it cannot tell it from a new process."""
        return ghost.reply is None or ghost.reply.incarnation != self.coordinator.incarnation

    @rule(number=st.integers(0, 9), pause=st.booleans())
    def pause(self, number: int, pause: bool) -> None:
        process = self.pick(number)
        if process is not None:
            (self.coordinator.pause if pause else self.coordinator.resume)(process.worker, self.now)
            self.flush()

    @rule(seconds=st.floats(0.0, 4000.0))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds
        self.flush()

    @rule()
    def save(self) -> None:
        """The server's state is saved, and what belongs to it here."""
        self.checkpoint = (
            self.coordinator.state_dict(), dict(self.applied), set(self.trained), self.counted_steps, set(self.numbers),
        )  # fmt: skip

    @rule()
    def start_again(self) -> None:
        """The server dies and starts from its checkpoint; whoever was there before is a ghost."""
        assert self.checkpoint is not None
        state, applied, trained, self.counted_steps, numbers = self.checkpoint
        self.applied, self.trained, self.numbers = dict(applied), set(trained), set(numbers)
        self.acknowledged.clear()
        self.ghosts = [*self.ghosts, *self.processes][-10:]
        before = self.processes
        coordinator = build(self.total, self.grace, next(self.names), self.group)
        coordinator.load_state_dict(state)
        self.open(coordinator)
        # Somebody of the lost timeline gets in: it cannot be told from a new process. Its push can.
        for stale in before:
            if stale.sent and stale.worker < COHORT and not coordinator.finished:
                assert coordinator.join(stale.hello(), self.now) is None
                self.flush_to_nobody()
                version = coordinator.model.version
                push = dataclasses.replace(
                    stale.sent[-1], sequence=1, base_version=version, used="", steps=1, samples=1
                )
                assert coordinator.push(push, torch.ones(LAYOUT.numel), self.now) is None
                assert self.last is not None
                assert "another incarnation" in (self.last.refused or "")
                assert coordinator.model.version == version
                self.processes = [process for process in self.processes if process.worker != stale.worker]
                process = Process(stale.worker, next(self.names))
                self.processes.append(process)
                self.join(process)
                self.flush()

    def flush_to_nobody(self) -> None:
        while self.coordinator.ready(self.now):
            self.coordinator.dispatch(self.now)

    @precondition(lambda self: len(self.gradients) > 10)
    @rule()
    def stop(self) -> None:
        self.coordinator.stop()
        self.flush()

    # ---------------------------------------------------------- what always holds

    @invariant()
    def books_are_in_order(self) -> None:
        if not hasattr(self, "coordinator"):
            return
        coordinator = self.coordinator
        real = [key for key, steps in self.applied.items() if steps > 0]
        assert coordinator.model.version == len(real)
        expected = -sum(self.gradients[key] for key in real)
        assert torch.equal(coordinator.model.theta, torch.full((LAYOUT.numel,), expected) + 0.0)
        assert self.acknowledged <= self.applied.keys(), "acknowledged, but not applied"
        assert coordinator.budget.done == self.counted_steps
        totals = coordinator.totals.values()
        waiting = [one.push.steps for one in self.held.values()]
        assert sum(worker.rounds for worker in totals) == len(real) + len(waiting)
        assert sum(worker.steps for worker in totals) == sum(self.applied.values()) + sum(waiting)

    @invariant()
    def members_count(self) -> None:
        if not hasattr(self, "coordinator"):
            return
        coordinator = self.coordinator
        if coordinator.live and not coordinator.missing and not coordinator.finished:
            assert coordinator.model.workers == len(coordinator.live)
        known = {process.worker: process.session for process in self.processes}
        for worker in coordinator.live:
            assert coordinator.session_of(worker) == known[worker]
        members = coordinator.attendance.live
        held = coordinator.budget._reservations.keys()
        assert held <= {worker for worker, member in members.items() if member.state != "resting"}
        assert not coordinator.ready(self.now), "somebody who is due was not dispatched"
        assert coordinator.attendance._membership.departed.isdisjoint(members)

    def teardown(self) -> None:
        """Those who are left go on, and training comes to its end for them."""
        if not hasattr(self, "coordinator"):
            return
        coordinator = self.coordinator
        if self.total is None:
            coordinator.stop()
        for _ in range(2 * (self.total or 0) + 20):
            self.now += 100.0
            self.flush()
            for worker in coordinator.live:
                process = next(process for process in self.processes if process.worker == worker)
                self.go_on(process)
            self.members_count()
        assert not self.held or not coordinator.live, "held for ever"
        stopped = [process for process in self.processes if coordinator.session_of(process.worker) == process.session]
        assert all(process.stopped for process in stopped)
        if stopped:
            assert coordinator.finished
            final = coordinator.model.theta.clone()
            # Whoever was away comes back, and goes home with the final model.
            for process in list(self.processes):
                for _ in range(3):
                    if process.gone is None and not process.stopped:
                        self.go_on(process)
                assert process.stopped or process.gone is not None
            assert torch.equal(coordinator.model.theta, final)
        self.books_are_in_order()

    def go_on(self, process: Process) -> None:
        if process.stopped:
            return
        if process.pending is not None:
            self.send(process, process.pending, self.gradient_of(process.pending))
        elif process.reply is None:
            process.connected = True
            self.join(process)
        else:
            push = process.next_push(process.reply.local_steps, process.used)
            key = (push.worker, push.session, push.sequence)
            self.gradients[key] = float(len(self.gradients) + 1)
            self.items_of[key] = []
            process.sent.append(push)
            process.pending = push
            self.send(process, push, self.gradients[key])
        self.flush()


@pytest.fixture(autouse=True)
def few_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "MOST_STRANGERS", 2)


TestRun = Run.TestCase
TestRun.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


class GroupRun(Run):
    """The same with pushes that wait for each other."""

    groups: ClassVar[list[dict[str, Any]]] = [
        {"quorum": 2},
        {"quorum": "all"},
        {"quorum": 2, "options": MergeOptions(quorum_seconds=2.0)},
        {"warmup_steps": 20},
    ]


TestGroupRun = GroupRun.TestCase
TestGroupRun.settings = TestRun.settings
