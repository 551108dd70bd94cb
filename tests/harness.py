"""Plays workers against a coordinator, without threads, sockets or a clock."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_async_localsgd.outer import DelayedNesterov, OuterOptimizer
from lightning_async_localsgd.policies.budget import Budget
from lightning_async_localsgd.policies.grace import GraceWindow
from lightning_async_localsgd.policies.guard import UpdateGuard
from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
from lightning_async_localsgd.policies.step_sizes import StepSizes
from lightning_async_localsgd.policies.synchronous_beginning import SynchronousBeginning
from lightning_async_localsgd.policies.worker_minimum import WorkerMinimum
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, Hello, Push, Reply
from lightning_async_localsgd.server.coordinator import Coordinator
from lightning_async_localsgd.server.global_model import GlobalModel
from lightning_async_localsgd.server.merge_policy import MergePolicy
from lightning_async_localsgd.server.merging import Merging
from tests.observing import RecordingObserver

LAYOUT = Layout.of(torch.nn.Linear(3, 2))
"""Layout of the model if a test does not care which it is."""


def make_coordinator(
    workers: int = 2,
    outer_optimizer: OuterOptimizer | None = None,
    *,
    policy: MergePolicy | None = None,
    total: int | None = 1000,
    grace: Any = 0.0,
    local_steps: int = 10,
    dynamic: bool = True,
    layout: Layout = LAYOUT,
    guard: UpdateGuard | None = None,
    incarnation: str = "this",
    overlap: bool = False,
    beginning: int = 0,
    minimum: WorkerMinimum | None = None,
    expected: int = 0,
    reference: int = 0,
) -> Coordinator:
    """Make a coordinator with simple defaults. Its model is zero. With a ``reference``, it counts samples."""
    model = GlobalModel(layout, outer_optimizer or DelayedNesterov(), workers)
    pacing = SpeedAwareSteps(local_steps, dynamic)
    pacing.sizes = StepSizes(reference)
    return Coordinator(
        model,
        pacing,
        GraceWindow(grace),
        Budget(total, unit=pacing.sizes.unit),
        cohort=workers,
        incarnation=incarnation,
        guard=guard,
        merging=Merging(model, policy, pacing.sizes.counts_samples),
        overlap=overlap,
        beginning=SynchronousBeginning(beginning, workers, pacing.sizes.unit),
        minimum=minimum,
        expected=expected,
    )


def hello(worker: int, session: str | None = None, layout: Layout = LAYOUT, **changes: Any) -> Hello:
    """Make the hello of a worker; ``s<worker>`` is its session if none is given."""
    return dataclasses.replace(Hello(PROTOCOL_VERSION, worker, session or f"s{worker}", layout.fingerprint), **changes)


def push_header(worker: int, session: str, sequence: int, reply: Reply) -> Push:
    """Make the header of a push with all the steps of a dispatch. Nothing in it was measured."""
    steps = reply.local_steps
    return Push(
        worker, session, sequence, reply.incarnation, reply.version, steps, samples=steps, timed_steps=0,
        compute_seconds=0.0, exchange_seconds=0.0, final=False, stop=False,
    )  # fmt: skip


class Workers:
    """The workers of one coordinator.

    Attributes:
        replies: last reply of each worker.
        sessions: present session of each worker that joined with :meth:`join`; the default is ``s<worker>``.
        sequences: number of the last push of each worker's session.
        refused: why the session of the last push was refused for good; None if it was not.
        outcomes: outcomes of all pushes.

    """

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.layout = coordinator.model.layout
        recorder = RecordingObserver()
        coordinator.observers.add([recorder])
        self.outcomes = recorder.pushes
        self.replies: dict[int, Reply] = {}
        self.sequences: dict[int, int] = defaultdict(int)
        self.sessions: dict[int, str] = {}
        self.refused: str | None = None
        self._names: dict[int, Iterator[str]] = {}

    @property
    def model(self) -> GlobalModel:
        return self.coordinator.model

    @property
    def theta(self) -> Tensor:
        return self.coordinator.model.theta

    def join_all(self, workers: int, now: float = 0.0) -> dict[int, Reply]:
        """Join the workers 0, 1, ..., and return their replies."""
        for worker in range(workers):
            self.join(worker, now, dispatch=False)
        return self.dispatch(now)

    def join(self, worker: int, now: float, dispatch: bool = True) -> dict[int, Reply]:
        """Join with a new session: ``s<worker>``, then ``s<worker>.1``, ``s<worker>.2``, ..."""
        names = self._names.setdefault(
            worker, itertools.chain([f"s{worker}"], (f"s{worker}.{life}" for life in itertools.count(1)))
        )
        self.sessions[worker] = next(names)
        self.sequences[worker] = 0
        assert self.coordinator.join(hello(worker, self.sessions[worker], self.layout), now) is None
        return self.dispatch(now) if dispatch else {}

    def dispatch(self, now: float) -> dict[int, Reply]:
        """Dispatch the workers that are due. Like in the server, one call after each event must be enough."""
        replies = self.coordinator.dispatch(now) if self.coordinator.ready(now) else {}
        assert not self.coordinator.ready(now)
        deadline = self.coordinator.deadline()
        assert deadline is None or deadline > now
        self.replies.update(replies)
        return replies

    def send(self, worker: int, now: float, gradient: Tensor | float = 1.0, **changes: Any) -> Push:
        """Push a worker's round, and dispatch no worker. Afterwards the gradient's memory is overwritten."""
        self.sequences[worker] += 1
        session = self.sessions.get(worker, f"s{worker}")
        push = push_header(worker, session, self.sequences[worker], self.replies[worker])
        push = dataclasses.replace(push, **changes)
        if not isinstance(gradient, Tensor):
            gradient = torch.full((self.layout.numel,), gradient)
        before = gradient.clone()
        self.refused = self.coordinator.push(push, gradient, now)
        assert torch.equal(gradient.view(torch.int32), before.view(torch.int32))
        gradient.fill_(float("nan"))
        return push

    def push(self, worker: int, now: float, gradient: Tensor | float = 1.0, **changes: Any) -> dict[int, Reply]:
        """Push a worker's round, and return the replies of the workers that are dispatched then."""
        self.send(worker, now, gradient, **changes)
        return self.dispatch(now)

    def leave(self, worker: int, now: float) -> dict[int, Reply]:
        """Lose a worker, and return the replies of the workers that are dispatched then."""
        self.coordinator.leave(worker, self.sessions[worker], now, "test")
        return self.dispatch(now)
