"""A run that has happened, played again from the log of its events: its rounds are computed anew, nothing else is.

Every event reaches the same coordinator at the time at which it did then, and every worker trains on the items that it
was leased. So the decisions are the same ones, and with a module that computes the same from the same weights and
batches so is the global model, to the last bit. What is decided is compared with what was: a replay that is not the
logged run ends with an error that says where it has parted from it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_async_localsgd.events import Event, fingerprint, read_events
from lightning_async_localsgd.exchange import Exchange
from lightning_async_localsgd.server import Server
from lightning_async_localsgd.simulation.machine import Turn, VirtualClock, VirtualWorker
from lightning_async_localsgd.simulation.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Future
    from os import PathLike

    from torch import Tensor

    from lightning_async_localsgd.layout import Binding
    from lightning_async_localsgd.messages import Hello, Lease, LeaseRequest, Push, Reply

_log = logging.getLogger(__name__)

_OTHER_OPTIONS = "give the trainer, the strategy, the module and the data what they had then"


class Recording:
    """The log of a run.

    Args:
        path: of the file that :class:`.AsyncLocalSGDCallback` has written.

    Attributes:
        path: as given.
        initial: workers that the run was started with.
        numbers: of all its workers, those that have joined later included.
        events: all of them, in order.

    Raises:
        ValueError: it is no such file, or of a run that cannot be played from its beginning.
        OSError: it cannot be read.

    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = str(path)
        if not Path(path).is_file():
            raise ValueError(
                f"replay={self.path!r} is no file; AsyncLocalSGDCallback(events=...) writes one while a run is trained"
            )
        self.events = read_events(path)
        begin = self.events[0].content
        self.initial = int(begin["workers"])
        self.numbers = sorted({event.content["hello"].worker for event in self.events if event.kind == "join"})
        self.incarnation = str(begin["incarnation"])
        self._total = begin["total"]
        self._layout = begin["fingerprint"]
        if begin["version"] or begin["done"]:
            raise ValueError(
                f"replay={self.path!r} is of a run that went on from a checkpoint, after {begin['version']} pushes; "
                "only a run that is logged from its beginning can be replayed"
            )

    @property
    def start(self) -> float:
        """The server's time when it began."""
        seconds = self.events[0].seconds
        assert seconds is not None
        return seconds

    def check(self, binding: Binding, total: int | None) -> None:
        """Whether the run can be played with a model and a budget.

        Raises:
            ValueError: it cannot.

        """
        if binding.layout.fingerprint != self._layout:
            raise ValueError(
                f"replay={self.path!r} is of a run with other parameters or buffers than this module's; give it the "
                "module of that run"
            )
        if total != self._total:
            raise ValueError(
                f"replay={self.path!r} is of a run of {self._total} local steps of all {self.initial} workers, and this"
                f" trainer's limits come to {total}; give it the max_steps or max_epochs of that run"
            )


class ReplayServer(Server):
    """A server that dispatches when it is told, and not by itself."""

    def _flush(self) -> None:
        self._view = self._coordinator.view()
        self._wanted = self._coordinator.wanted()

    def make_known(self, worker: int) -> None:
        """The worker's number has been given to somebody."""
        attendance = self._coordinator.attendance
        while attendance.refuses(worker) is not None and not attendance.finished and attendance.new_number() < worker:
            pass

    def dispatch(self, now: float) -> Mapping[int, Reply]:
        """Dispatches whoever is due."""
        replies = self._coordinator.dispatch(now)
        self._dispatch(replies)
        self._flush()
        return replies


class _Answers(Exchange):
    """Gives a worker the leases that it was given then."""

    def __init__(self) -> None:
        super().__init__()
        self.leases: dict[int, Lease] = {}

    def request_lease(self, request: LeaseRequest) -> None:
        """The log has the request, too."""

    def take_lease(self, number: int) -> Lease:
        """The answer that the log has by now."""
        lease = self.leases.pop(number, None)
        if lease is None:
            raise RuntimeError(
                f"the replay has parted from its log: a worker needs training data (request {number}) that it had not "
                f"been leased when it handed its round in; {_OTHER_OPTIONS}"
            )
        return lease

    def join(self, hello: Hello, model: Tensor) -> Reply:
        """Not used: the log says who joins."""
        raise NotImplementedError

    def push(self, push: Push, gradient: Tensor, model: Tensor) -> Reply:
        """Not used: the log says when a push arrives."""
        raise NotImplementedError

    def _send_request(self, request: LeaseRequest, answer: Future[Lease]) -> None:
        raise NotImplementedError

    @property
    def wanted_version(self) -> int:
        """Not used: the log says how many steps a round had."""
        return -1

    def check(self) -> None:
        """Nothing can be lost."""

    def close(self) -> None:
        """Nothing to close."""


class _LoggedRound(Turn):
    """A round whose length is known."""

    def __init__(self, push: Push, seconds: float) -> None:
        self.push = push
        self.over = False
        self._seconds = seconds

    @property
    def now(self) -> float:
        """When it was handed in."""
        return self._seconds

    def take(self, done: int) -> None:
        """See :meth:`.Turn.take`."""
        self.over = done >= self.push.steps


class Replay(Turns):
    """The workers of a recorded run.

    Args:
        server: dispatches when it is told.
        clock: its clock.
        recording: the run.
        binding: the module's tensors, in which rounds are played.

    """

    def __init__(self, server: ReplayServer, clock: VirtualClock, recording: Recording, binding: Binding) -> None:
        super().__init__(server, clock, binding)
        self._replaying = server
        self._recording = recording
        self._next = 1
        self._sessions: dict[str, tuple[VirtualWorker, _Answers]] = {}

    def begin(self) -> None:
        """The log says who joins."""

    def advance(self) -> VirtualWorker | None:
        """See :meth:`.Turns.advance`."""
        events = self._recording.events
        while not self._server.finished:
            if self._next >= len(events) or events[self._next].kind == "end":
                raise RuntimeError(
                    f"the log {self._recording.path} ends at {self.clock.now - self._recording.start:g} s, before "
                    "training does: the run was broken off, or its last lines were not written"
                )
            event = events[self._next]
            self._next += 1
            self._due = self.clock.now if event.seconds is None else event.seconds
            if event.kind == "push":
                worker = self._play(event.content["push"])
                if worker is not None:
                    return worker
            else:
                self.clock.now = self._due
                self._apply(event)
        self._compare_end()
        return None

    def hand_in(self, worker: VirtualWorker, final: bool = False, stop: bool = False) -> None:
        """See :meth:`.Turns.hand_in`; the push is the logged one."""
        plan, worker.plan = worker.plan, None
        assert isinstance(plan, _LoggedRound)
        self.clock.now = self._due
        logged, computed = plan.push, worker.hand_in(final=final, stop=stop)
        for name in ("steps", "samples", "tokens", "used"):
            then, now = getattr(logged, name), getattr(computed, name)
            if then != now:
                which = f"round {logged.sequence} of worker {worker.number}"
                raise self._parted(f"{which} had {name}={then!r}, not {now!r}")
        self._deliver(worker, logged, worker.gradient)

    def end(self, worker: VirtualWorker, stop: bool) -> None:
        """A log is played to its end.

        Raises:
            RuntimeError: the trainer has stopped before.

        """
        raise self._parted("the trainer has stopped before the logged run ended")

    # ------------------------------------------------------------------ internal

    def _play(self, push: Push) -> VirtualWorker | None:
        """The worker whose round is to be computed for a push; None if the push needs none, and was handed in."""
        found = self._sessions.get(push.session)
        if found is None:
            raise self._parted(f"worker {push.worker} hands in a round and has never joined")
        worker, _ = found
        if push.steps == 0 or push.sequence != worker.round:
            if push.sequence == worker.round:
                # It had nothing to hand in; its count of pushes goes on.
                self.adopt(worker)
                worker.hand_in(final=push.final, stop=push.stop)
            worker.plan = None
            self.clock.now = self._due
            self._deliver(worker, push, None)
            return None
        if worker.answer is None or worker.answer.version != push.base_version:
            raise self._parted(
                f"worker {push.worker} went on from version {push.base_version} of the model after a lost answer, "
                "which cannot be played again"
            )
        worker.plan = _LoggedRound(push, self._due)
        return worker

    def _apply(self, event: Event) -> None:
        content = event.content
        if event.kind == "join":
            self._join(content["hello"])
        elif event.kind == "lease":
            self._lease(content["request"], content["lease"])
        elif event.kind == "dispatch":
            self._dispatch(content["replies"])
        elif event.kind == "leave":
            self._server.lost(content["worker"], content["session"], content["reason"])
        elif event.kind == "revive":
            self._server.revive(content["worker"], content["session"])
        elif event.kind == "pause":
            self._server.pause(content["worker"])
        elif event.kind == "resume":
            self._server.resume(content["worker"])
        elif event.kind == "replan":
            self._server.replan(content["total"], content["at_most"])
        elif event.kind == "stop":
            self._server.stop()

    def _join(self, hello: Hello) -> None:
        if hello.session not in self._sessions:
            answers = _Answers()
            clock = VirtualClock(self.clock.now)
            worker = VirtualWorker(hello.worker, hello.session, self._binding, answers, self._gradient, clock)
            self._sessions[hello.session] = worker, answers
        worker, _ = self._sessions[hello.session]
        self.live[hello.worker] = worker
        self._replaying.make_known(hello.worker)
        self._server.join(hello, self._outlet_of(worker))

    def _lease(self, request: LeaseRequest, logged: Lease) -> None:
        def compare(lease: Lease) -> None:
            if lease != logged:
                raise self._parted(f"worker {request.worker} was leased {logged}, not {lease}")

        self._server.lease(request, compare)
        if request.session in self._sessions:
            self._sessions[request.session][1].leases[request.number] = logged

    def _dispatch(self, logged: Mapping[int, Reply]) -> None:
        replies = self._replaying.dispatch(self.clock.now)
        if replies.keys() != logged.keys():
            raise self._parted(f"workers {sorted(logged)} were dispatched, not {sorted(replies)}")
        for worker, reply in replies.items():
            # What rank 0 has told the others besides is no decision of the coordinator's.
            then, now = vars(logged[worker]), vars(replace(reply, shared=logged[worker].shared, asked=0))
            for name, value in now.items():
                if name != "asked" and value != then[name]:
                    raise self._parted(f"worker {worker} was dispatched with {name}={then[name]!r}, not {value!r}")

    def _compare_end(self) -> None:
        """Whether the global model is the very one that the log ends with."""
        end = next((event.content for event in self._recording.events[self._next :] if event.kind == "end"), None)
        if end is None:
            _log.warning("%s does not say what the run came to: nothing to compare with", self._recording.path)
            return
        theta = torch.empty(self._binding.layout.numel, dtype=torch.float32)
        self._server.copy_model(theta)
        if fingerprint(theta) == end["theta"]:
            _log.warning("the global model is that of %s to the last bit", self._recording.path)
        else:
            _log.warning(
                "every decision was that of %s, but the global model is not the same to the last bit: the module has "
                "computed something else (other weights at the start, random numbers, threads, another machine)",
                self._recording.path,
            )

    def _parted(self, what: str) -> RuntimeError:
        event = self._next - 1
        return RuntimeError(
            f"the replay has parted from its log {self._recording.path} at line {event + 1}: {what}; {_OTHER_OPTIONS}"
        )
