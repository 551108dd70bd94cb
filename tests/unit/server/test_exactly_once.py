"""Each push counts once, and training ends, whatever happens to workers, connections and the server.

Hypothesis plays workers that train, lose connections and replies, send pushes twice, die, come back, join late and are
replaced but go on, and a server that restarts from an earlier checkpoint. Invariants are checked after each event. At
the end the live workers go on, and training has to finish.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from lightning_async_localsgd.protocol.messages import ALREADY_APPLIED, Lease, LeaseRequest, Push
from lightning_async_localsgd.protocol.rejections import TOO_LATE
from lightning_async_localsgd.server import membership
from lightning_async_localsgd.server.merge_policy import MergeOptions
from tests.unit.server.exactly_once import COHORT, EPOCHS, ITEMS, LAYOUT, TOO_LARGE, Network, WorkerProcess


class Run(Network):
    """The events. Each acts on one of the workers' processes, or on the server."""

    @rule(number=st.integers(0, 9), count=st.sampled_from([1, 2, 3, ITEMS]))
    def take_items(self, number: int, count: int) -> None:
        """A worker asks for data. It does so beside its pushes, so a departed worker may ask, too."""
        self.lease_items(self.pick(number), count)

    def lease_items(self, process: WorkerProcess | None, count: int) -> None:
        if process is None or not process.computing:
            return
        for _ in range(count):
            process.requests += 1
            request = LeaseRequest(
                process.worker, process.session, process.requests, "0", ITEMS, 1, process.epoch, False
            )
            lease = self.coordinator.lease(request)
            assert self.coordinator.lease(request) == lease, "a repeated request gets the same answer"
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
        reply_arrives=st.booleans(),
    )
    def push(self, number: int, kind: str, seconds: float, reply_arrives: bool) -> None:
        """A worker pushes its round. The reply may be lost."""
        self.now += seconds
        self.flush()
        self.push_round(self.pick(number), kind, reply_arrives)

    @rule(number=st.integers(0, 9), kind=st.sampled_from(["nan", "large", "items"]))
    def push_until_quarantined(self, number: int, kind: str) -> None:
        """All pushes of a worker are bad, until it is quarantined."""
        process = self.pick(number)
        if process is None or self.is_forgotten(process):
            return
        for _ in range(5):
            if process.rejection is None and process.computing:
                self.push_round(process, kind, reply_arrives=True)
                self.now += 100.0
                self.flush()
        if process.rejection is not None:
            assert "quarantined" in process.rejection
            other = WorkerProcess(process.worker, next(self.names))
            self.join(other)
            assert other.rejection == process.rejection
            self.ended.remove(other)

    @rule(number=st.integers(0, 9), reply_arrives=st.booleans())
    def push_final(self, number: int, reply_arrives: bool) -> None:
        """A worker pushes its last round, because its data has ended."""
        self.push_round(self.pick(number), "part", reply_arrives, final=True)

    def push_round(self, process: WorkerProcess | None, kind: str, reply_arrives: bool, final: bool = False) -> None:
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
            changes["items_used"] = json.dumps({"0": process.used + 1})
        elif kind == "size":
            changes["samples"] = -1
        push = process.next_push(steps, process.used, final, **changes)
        gradient = {"nan": float("nan"), "large": 10 * TOO_LARGE}.get(kind, float(len(self.gradients) + 1))
        finished = self.coordinator.finished
        self.send_new(process, push, gradient, items)
        if process.rejection is None and self.last is not None:
            refused = self.last.refused
            if kind in ("good", "part", "empty"):
                honest = refused is None or (process.away and "leased to other workers" in refused)
                assert honest or (finished and refused == TOO_LATE.text), refused
            else:
                assert refused is not None
            if kind != "items":  # A wrong claim settles no items, so those that were leased again stay lost.
                process.away = False
        process.connected = reply_arrives
        self.flush()

    @rule(number=st.integers(0, 9), reply_arrives=st.booleans())
    def send_again(self, number: int, reply_arrives: bool) -> None:
        """A worker without a reply sends its message again."""
        process = self.pick(number)
        if process is None:
            return
        version = self.coordinator.model.version
        if process.pending is not None:
            before = self.answer_of(process)
            self.send(process, process.pending, self.gradient_of(process.pending))
            if process.rejection is None:
                assert self.answer_of(process) == (before or ALREADY_APPLIED), "a repeated push gets the same answer"
        elif process.reply is None:
            process.connected = True
            self.join(process)
        process.connected = process.connected and reply_arrives
        self.flush()
        # A worker that is back may complete a group.
        assert self.group or self.coordinator.model.version == version

    def answer_of(self, process: WorkerProcess) -> str | None:
        """Return why the latest push of a session was rejected; None if it was not."""
        member = self.coordinator.membership._sessions.find(process.worker, process.session)
        if member is None:
            member = self.coordinator.membership._sessions.find_departed(process.worker, process.session)
        return None if member is None or member.rejection is None else member.rejection.text

    @rule(number=st.integers(0, 9), which=st.integers(0, 50))
    def duplicate(self, number: int, which: int) -> None:
        """The network delivers an old push a second time."""
        process = self.pick(number)
        if process is None or not process.sent or not process.connected:
            return
        push = process.sent[which % len(process.sent)]
        version, done = self.coordinator.model.version, self.coordinator.budget.done
        self.send(process, push, self.gradient_of(push))
        self.flush()
        assert self.coordinator.budget.done == done
        # A worker that is back may complete a group.
        assert self.group or self.coordinator.model.version == version

    @rule(number=st.integers(0, 9), noticed=st.booleans())
    def cut(self, number: int, noticed: bool) -> None:
        """A connection breaks. The server may notice."""
        self.disconnect(self.pick(number), noticed)

    def disconnect(self, process: WorkerProcess | None, noticed: bool) -> None:
        if process is None or process.rejection is not None:
            return
        process.connected = False
        if noticed:
            process.away = True
            self.coordinator.leave(process.worker, process.session, self.now, "test")
            self.flush()

    @rule(number=st.integers(0, 9))
    def ping(self, number: int) -> None:
        """A worker pings. The server may have lost it before."""
        self.send_ping(self.pick(number))

    def send_ping(self, process: WorkerProcess | None) -> None:
        if process is None or process.reply is None or process.rejection is not None:
            return
        if not self.coordinator.revive(process.worker, process.session, self.now):
            self.end(process, "forgotten")
        self.flush()

    @rule(number=st.integers(0, 9), other=st.integers(0, 9))
    def lose_items_while_away(self, number: int, other: int) -> None:
        """Items of a lost worker are leased to another worker. Then the lost worker comes back."""
        self.take_items(number, 2)
        self.cut(number, noticed=True)
        self.take_items(other, ITEMS)
        self.push_round(self.pick(number), "good", reply_arrives=True)

    @rule(number=st.integers(0, COHORT - 1), died=st.booleans())
    def restart_worker(self, number: int, died: bool) -> None:
        """A worker is restarted. Its process of before may still be alive."""
        older = next((process for process in self.processes if process.worker == number), None)
        if older is not None and died:
            older.connected = False
            older.away = True
            self.coordinator.leave(number, older.session, self.now, "test")
        process = WorkerProcess(number, next(self.names))
        self.join(process)
        if process.rejection is None:
            self.processes.append(process)
            if older is not None:
                self.processes.remove(older)
                self.ended.append(older)
        self.flush()

    @rule()
    def late_joiner(self) -> None:
        """A worker joins the running training."""
        if len(self.processes) <= 6:
            self.join_late()

    @rule(count=st.integers(1, 4), comes_back=st.booleans())
    def late_joiners_come_and_go(self, count: int, comes_back: bool) -> None:
        """Several late joiners take part for one round each, more than are remembered. They may come back."""
        joined = [self.join_late() for _ in range(count)]
        for process in joined:
            self.lease_items(process, 2)
            self.push_round(process, "good", reply_arrives=True)
            self.disconnect(process, noticed=True)
        for process in joined if comes_back else []:
            self.send_ping(process)
            self.push_round(process, "good", reply_arrives=True)

    def join_late(self) -> WorkerProcess:
        number = self.coordinator.membership.new_number(self.now)
        assert number >= COHORT
        assert number not in self.numbers, "a number was given twice"
        self.numbers.add(number)
        process = WorkerProcess(number, next(self.names))
        self.processes.append(process)
        self.join(process)
        self.flush()
        return process

    @rule(number=st.integers(0, 99), act=st.sampled_from(["hello", "rejoin", "push", "again", "lease", "ping"]))
    def send_from_ended_process(self, number: int, act: str) -> None:
        """A process whose session has ended sends something."""
        if not self.ended:
            return
        process = self.ended[number % len(self.ended)]
        session = self.coordinator.session_of(process.worker)
        version, done = self.coordinator.model.version, self.coordinator.budget.done
        free = self.coordinator.state_dict()["leases"]
        if act == "rejoin" or (act == "hello" and not self.is_unknown(process)):
            assert self.coordinator.join(process.hello(act == "rejoin"), self.now) is not None
        elif act == "lease":
            lease = self.coordinator.lease(LeaseRequest(process.worker, process.session, 99, "0", ITEMS, 1, 0, False))
            assert isinstance(lease, Lease)
            assert lease.refused is not None
        elif act == "ping":
            assert not self.coordinator.revive(process.worker, process.session, self.now)
        elif process.sent and act in ("push", "again"):
            push = process.sent[-1]
            if act == "push":
                push = dataclasses.replace(push, sequence=push.sequence + 1, base_version=version)
            assert self.coordinator.push(push, torch.ones(LAYOUT.numel), self.now) is not None
        self.flush()
        assert self.coordinator.session_of(process.worker) == session
        assert (self.coordinator.model.version, self.coordinator.budget.done) == (version, done)
        assert self.coordinator.state_dict()["leases"] == free

    def is_unknown(self, process: WorkerProcess) -> bool:
        """Return whether the server cannot tell the process from a new one: it never dispatched or has forgotten it."""
        if self.is_forgotten(process):
            return True
        return process.reply is None or process.reply.incarnation != self.coordinator.incarnation

    @rule(number=st.integers(0, 9), begins=st.booleans())
    def interrupt(self, number: int, begins: bool) -> None:
        process = self.pick(number)
        if process is not None:
            (self.coordinator.interrupt if begins else self.coordinator.continue_round)(process.worker, self.now)
            self.flush()

    @rule(seconds=st.floats(0.0, 4000.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.flush()

    @rule()
    def save(self) -> None:
        """The server saves its state."""
        self.checkpoint = (
            self.coordinator.state_dict(), dict(self.applied), set(self.trained), self.counted_steps, set(self.numbers),
        )  # fmt: skip

    @rule()
    def restart_server(self) -> None:
        """The server dies and restarts from its checkpoint. The sessions of all earlier processes have ended."""
        assert self.checkpoint is not None
        state, applied, trained, self.counted_steps, numbers = self.checkpoint
        self.applied, self.trained, self.numbers = dict(applied), set(trained), set(numbers)
        self.acknowledged.clear()
        self.ended = [*self.ended, *self.processes][-10:]
        before = self.processes
        coordinator = self.build()
        coordinator.load_state_dict(state)
        self.open(coordinator)
        # A process of the lost timeline can join, because it looks like a new process. Its push is refused.
        for stale in before:
            if stale.sent and stale.worker < COHORT and not coordinator.finished:
                refused = self.join_as_new(
                    stale,
                    lambda version, old=stale.sent[-1]: dataclasses.replace(
                        old, sequence=1, base_version=version, items_used="", steps=1, samples=1
                    ),
                )
                assert "another incarnation" in refused

    @rule(number=st.integers(0, 99))
    def forgotten_process_joins_again(self, number: int) -> None:
        """A forgotten late joiner looks like a new process. Its old push, which was applied, is refused."""
        forgotten = [
            process
            for process in dict.fromkeys([*self.processes, *self.ended])
            if self.is_forgotten(process)
            and process.reply is not None
            and process.reply.incarnation == self.coordinator.incarnation
            and any(self.applied.get((push.worker, push.session, push.sequence)) for push in process.sent)
        ]
        if not forgotten or self.coordinator.finished:
            return
        process = forgotten[number % len(forgotten)]
        old = next(p for p in process.sent if self.applied.get((p.worker, p.session, p.sequence)))
        if process in self.processes:
            self.end(process, "forgotten")
        self.join_as_new(process, lambda version: old)

    def join_as_new(self, stale: WorkerProcess, make_push: Callable[[int], Push]) -> str:
        """Let a process join that looks like a new one, and push. Then a new process replaces it.

        Args:
            stale: the process.
            make_push: makes the push from the version that the process is dispatched with.

        Returns:
            Why the push was refused.

        """
        assert self.coordinator.join(stale.hello(), self.now) is None
        while self.coordinator.ready(self.now):
            self.coordinator.dispatch(self.now)
        version = self.coordinator.model.version
        assert self.coordinator.push(make_push(version), torch.ones(LAYOUT.numel), self.now) is None
        assert self.last is not None
        assert self.last.refused is not None
        assert self.coordinator.model.version == version
        self.processes = [process for process in self.processes if process.worker != stale.worker]
        process = WorkerProcess(stale.worker, next(self.names))
        self.processes.append(process)
        refused = self.last.refused
        self.join(process)
        self.flush()
        return refused

    @precondition(lambda self: len(self.gradients) > 10)
    @rule()
    def stop(self) -> None:
        self.coordinator.stop(self.now)
        self.flush()


@pytest.fixture(autouse=True)
def few_late_joiners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MAX_LATE_JOINERS", 2)


TestRun = Run.TestCase
TestRun.settings = settings(max_examples=150, stateful_step_count=50, suppress_health_check=list(HealthCheck))


class GroupRun(Run):
    """The same events with pushes that wait for each other."""

    groups: ClassVar[list[dict[str, Any]]] = [
        {"quorum": 2},
        {"quorum": "all"},
        {"quorum": 2, "options": MergeOptions(quorum_seconds=2.0)},
    ]


TestGroupRun = GroupRun.TestCase
TestGroupRun.settings = TestRun.settings


class OverlapRun(GroupRun):
    """The same events with workers that go on training while their pushes are in flight."""

    groups: ClassVar[list[dict[str, Any]]] = [{}, {}, {"quorum": 2}]
    overlap = True


TestOverlapRun = OverlapRun.TestCase
TestOverlapRun.settings = TestRun.settings


class PausedRun(GroupRun):
    """The same events with pauses while workers are missing. At the end, workers join instead of the missing ones."""

    groups: ClassVar[list[dict[str, Any]]] = [{}, {}, {"quorum": 2, "options": MergeOptions(quorum_seconds=2.0)}]
    min_workers = 3

    def teardown(self) -> None:
        if hasattr(self, "coordinator"):
            while len(self.coordinator.live) < self.min_workers and not self.coordinator.finished:
                self.join_late()
        super().teardown()


class PausedOverlapRun(PausedRun):
    """The same events with pauses and overlap."""

    overlap = True


TestPausedRun = PausedRun.TestCase
TestPausedOverlapRun = PausedOverlapRun.TestCase
TestPausedRun.settings = TestPausedOverlapRun.settings = settings(TestRun.settings, max_examples=75)
