"""In the synchronous beginning each gradient counts once and members stay equal, whatever happens to connections.

Hypothesis plays workers that hand in gradients, lose connections and answers, send messages twice, die, come back, are
restarted, join late and end, and a server that restarts from a checkpoint. A worker's weights are minus the sum of the
means that it was answered with. At the end the live workers go on, and training has to finish.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightning_async_localsgd.outer import TorchOptimizer
from lightning_async_localsgd.policies.guard import UpdateGuard
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.protocol.messages import NOT_FINITE, Push, Reply
from lightning_async_localsgd.server.coordinator import Coordinator
from lightning_async_localsgd.server.run_stats import PushOutcome
from tests.harness import hello, make_coordinator, push_header
from tests.observing import RecordingObserver

LAYOUT = Layout.of(torch.nn.Linear(2, 1))
COHORT = 3
LENGTH = 5


class Process:
    """One process of a worker."""

    def __init__(self, worker: int, session: str) -> None:
        self.worker = worker
        self.session = session
        self.connected = True
        self.reply: Reply | None = None
        self.pending: tuple[Push, float] | None = None
        self.sent: list[tuple[Push, float]] = []
        self.weights = 0.0
        self.means = 0
        """Number of means that the worker was answered with, those before a restart of the server included."""
        self.ended = False

    @property
    def stopped(self) -> bool:
        return self.reply is not None and self.reply.stop


class Run(RuleBasedStateMachine):
    """The events. Each acts on one of the workers' processes, or on the server."""

    @initialize(
        total=st.sampled_from([8, 30, 100]), dynamic=st.booleans(), unreached=st.sets(st.integers(1, COHORT - 1))
    )
    def begin(self, total: int, dynamic: bool, unreached: set[int]) -> None:
        """Begin a run. The first dispatch of some workers is lost."""
        self.now = 0.0
        self.total = total
        self.dynamic = dynamic
        self.names = (f"name{number}" for number in itertools.count())
        self.values = itertools.count(1)
        self.open(self.build(), steps=0, weights=0.0, unreached=unreached)
        self.checkpoint: tuple[Any, ...] = (self.coordinator.state_dict(), 0, 0.0, [], 0)

    def build(self) -> Coordinator:
        return make_coordinator(
            COHORT, TorchOptimizer(torch.optim.SGD, lr=1.0), total=self.total, local_steps=3, layout=LAYOUT,
            beginning=LENGTH, dynamic=self.dynamic, incarnation=next(self.names), guard=UpdateGuard(None),
        )  # fmt: skip

    def open(
        self, coordinator: Coordinator, steps: int, weights: float, waiting: Any = (), counted: int = 0,
        unreached: Any = (),
    ) -> None:  # fmt: skip
        """Start workers with the weights of a checkpoint."""
        self.coordinator = coordinator
        coordinator.observers.add([RecordingObserver(self.on_outcome)])
        self.history = [weights] * steps
        self.waiting: list[tuple[float, int]] = list(waiting)
        self.counted = counted
        self.accepted: set[tuple[int, str, int]] = set()
        self.diverged: set[tuple[int, str, int]] = set()
        self.processes = [Process(worker, next(self.names)) for worker in range(COHORT)]
        for process in self.processes:
            process.weights, process.means = weights, steps
            self.join(process)
            process.connected = process.worker not in unreached
        self.flush()

    def on_outcome(self, outcome: PushOutcome) -> None:
        self.last = outcome
        key = (outcome.worker, outcome.session, outcome.sequence)
        if outcome.refused is not None and outcome.refused.startswith(NOT_FINITE) and key not in self.diverged:
            self.diverged.add(key)
            self.counted += outcome.steps  # The steps were taken, though they change nothing.
        if outcome.refused is None and outcome.steps > 0:
            assert key not in self.accepted, "a push counted twice"
            self.accepted.add(key)
            self.counted += outcome.steps

    @property
    def on(self) -> bool:
        return self.coordinator.beginning.on

    def is_member(self, process: Process) -> bool:
        return self.on and self.coordinator.beginning.is_member(process.worker, process.session)

    def flush(self) -> None:
        while self.coordinator.ready(self.now):
            completed, version = self.coordinator.beginning.completed, self.coordinator.model.version
            live = [p for p in self.processes if self.coordinator.session_of(p.worker) == p.session]
            has_members = any(self.is_member(process) for process in live)
            replies = self.coordinator.dispatch(self.now)
            if has_members and not self.on:
                weights = self.history[-1] if self.history else 0.0
                assert float(self.coordinator.model.theta[0]) == weights, "the model has the members' weights"
            if self.coordinator.beginning.completed > completed:
                self.complete_step(version)
            for worker, reply in replies.items():
                process = next(p for p in self.processes if p.worker == worker)
                self.receive(process, reply)

    def complete_step(self, version: int) -> None:
        """Compare the mean of a step with the gradients that were accepted for it."""
        mean = self.coordinator.beginning.averages.mean
        assert mean is not None
        assert self.coordinator.model.version == version + len(self.waiting)
        total = sum(steps for _, steps in self.waiting)
        wanted = sum(value * steps for value, steps in self.waiting) / total if total else 0.0
        assert float(mean[0]) == pytest.approx(wanted), "each accepted gradient is in one mean"
        self.waiting.clear()
        weights = torch.tensor(self.history[-1] if self.history else 0.0) - mean[0]
        self.history.append(float(weights))

    def receive(self, process: Process, reply: Reply) -> None:
        awaited = 0 if process.reply is None else process.pending and process.pending[0].sequence
        if not process.connected or reply.sequence != awaited:
            return
        assert process.reply is not None or not reply.averaged, "the answer to a hello has a mean instead of a model"
        process.reply, process.pending = reply, None
        if reply.averaged:
            process.means += 1
            assert process.means == len(self.history), "a member has missed a step, or got a mean twice"
            process.weights = self.history[-1]
        elif not reply.synchronous:
            process.weights = float(self.coordinator.model.theta[0])

    def join(self, process: Process, reconnecting: bool = False) -> None:
        if self.coordinator.join(hello(process.worker, process.session, LAYOUT, reconnecting=reconnecting), self.now):
            process.ended = True

    def send(self, process: Process, push: Push, value: float) -> None:
        if not process.connected:
            process.connected = True
            self.join(process, reconnecting=process.reply is not None)
            self.flush()
        if process.ended:
            return
        self.last: PushOutcome | None = None
        fresh = (push.worker, push.session, push.sequence) not in self.accepted
        refused = self.coordinator.push(push, torch.full((LAYOUT.numel,), value), self.now)
        if refused is not None:
            process.ended = True
        is_gradient = fresh and push.contents == "gradient" and push.steps > 0
        if is_gradient and refused is None and self.last is not None and self.last.refused is None:
            self.waiting.append((value, push.steps))
        self.flush()

    def pick(self, number: int) -> Process:
        return self.processes[number % len(self.processes)]

    def proceed(self, process: Process, final: bool = False, nan: bool = False) -> None:
        """Do what a worker does next."""
        if process.ended or process.stopped:
            return
        if process.pending is not None:
            self.send(process, *process.pending)
            return
        if process.reply is None:
            process.connected = True
            self.join(process)
            self.flush()
            return
        reply = process.reply
        push = push_header(process.worker, process.session, len(process.sent) + 1, reply)
        push = dataclasses.replace(push, final=final, timed_steps=push.steps, compute_seconds=0.1 * push.steps)
        value = float(next(self.values))
        if reply.synchronous and (final or reply.local_steps == 0):
            contents = "weights" if final or reply.send_weights else "gradient"
            push, value = dataclasses.replace(push, steps=0, samples=0, contents=contents), process.weights
        elif reply.synchronous:
            push = dataclasses.replace(push, contents="gradient")
        elif final:
            push = dataclasses.replace(push, steps=0, samples=0)
        value = float("nan") if nan and push.steps > 0 else value
        process.pending = push, value
        process.sent.append(process.pending)
        self.send(process, push, value)

    # --------------------------------------------------------------------- rules

    @rule(
        number=st.integers(0, 9), arrives=st.sampled_from([True, True, False]), seconds=st.sampled_from([0.0, 1.0, 8.0])
    )
    def go_on(self, number: int, arrives: bool, seconds: float) -> None:
        """A worker does what it does next. The answer may be lost."""
        self.now += seconds
        process = self.pick(number)
        self.proceed(process)
        process.connected = process.connected and arrives

    @rule()
    def all_go_on(self) -> None:
        for process in list(self.processes):
            self.proceed(process)

    @rule(number=st.integers(0, 9))
    def diverge(self, number: int) -> None:
        """A worker hands in a gradient that is not finite."""
        self.proceed(self.pick(number), nan=True)

    @rule(number=st.integers(1, 9))
    def end(self, number: int) -> None:
        """A worker takes no more steps."""
        if len([p for p in self.processes if not p.ended]) > 2:
            self.proceed(self.pick(number), final=True)

    @rule(number=st.integers(0, 9), which=st.integers(0, 20))
    def duplicate(self, number: int, which: int) -> None:
        """The network delivers an old push a second time."""
        process = self.pick(number)
        if process.sent and process.connected and not process.ended:
            push, value = process.sent[which % len(process.sent)]
            if process.pending is None or process.pending[0] is not push:
                done = self.coordinator.budget.done
                self.coordinator.push(push, torch.full((LAYOUT.numel,), value), self.now)
                self.flush()
                assert self.coordinator.budget.done == done

    @rule(number=st.integers(0, 9), noticed=st.booleans())
    def cut(self, number: int, noticed: bool) -> None:
        """A connection breaks. The server may notice."""
        process = self.pick(number)
        process.connected = False
        if noticed:
            self.coordinator.leave(process.worker, process.session, self.now, "test")
            self.flush()

    @rule(number=st.integers(0, COHORT - 1))
    def restart(self, number: int) -> None:
        """A worker dies, and another process takes its place."""
        older = next((p for p in self.processes if p.worker == number), None)
        if older is None:
            return
        self.coordinator.leave(number, older.session, self.now, "test")
        self.flush()
        self.processes.remove(older)
        process = Process(number, next(self.names))
        self.processes.append(process)
        self.join(process)
        self.flush()

    @rule()
    def join_late(self) -> None:
        if len(self.processes) < 6:
            process = Process(self.coordinator.membership.new_number(self.now), next(self.names))
            self.processes.append(process)
            self.join(process)
            self.flush()

    @rule()
    def save(self) -> None:
        """Rank 0 saves, between two of its steps."""
        host = next((p for p in self.processes if p.worker == 0), None)
        if host is None or host.ended or host.pending is not None or host.reply is None:
            return
        if self.is_member(host):
            self.coordinator.beginning.load_weights(0, torch.full((LAYOUT.numel,), host.weights))
        self.checkpoint = (
            self.coordinator.state_dict(), len(self.history), float(self.coordinator.model.theta[0]),
            list(self.waiting) if self.on else [], self.counted,
        )  # fmt: skip

    @rule()
    def restart_server(self) -> None:
        """The server dies, and restarts from its checkpoint with new processes."""
        state, steps, weights, waiting, counted = self.checkpoint
        coordinator = self.build()
        coordinator.load_state_dict(state)
        self.open(coordinator, steps, weights, waiting, counted)

    # ---------------------------------------------------------------- invariants

    @invariant()
    def members_are_equal_and_gradients_count_once(self) -> None:
        if not hasattr(self, "coordinator"):
            return
        assert self.coordinator.budget.done == self.counted
        assert not self.coordinator.ready(self.now)
        for process in self.processes:
            if self.is_member(process) and process.reply is not None and process.pending is None:
                assert process.means == len(self.history)
                assert process.weights == (self.history[-1] if self.history else 0.0)

    def teardown(self) -> None:
        """Let the live workers go on until training ends."""
        if not hasattr(self, "coordinator"):
            return
        for _ in range(2 * self.total + 40):
            self.now += 100.0
            self.flush()
            for process in list(self.processes):
                self.proceed(process)
            self.members_are_equal_and_gradients_count_once()
        live = [p for p in self.processes if self.coordinator.session_of(p.worker) == p.session]
        assert all(process.stopped for process in live)
        assert not live or self.coordinator.finished


TestRun = Run.TestCase
TestRun.settings = settings(max_examples=150, stateful_step_count=40, suppress_health_check=list(HealthCheck))
