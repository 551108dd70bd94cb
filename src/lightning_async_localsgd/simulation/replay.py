"""Replays a run from the log of its events: rounds are computed again, everything else is taken from the log.

Each event reaches the same coordinator at its recorded time, and each worker trains on the data that it was leased in
the recorded run. The decisions are therefore the same. If the module computes the same from the same weights and
batches, the global model is also the same, to the last bit. The replay compares all decisions with the recording, and
ends with an error at the first line at which it differs.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from lightning_async_localsgd.protocol.lease_source import LeaseSource
from lightning_async_localsgd.protocol.options import ExchangeOptions
from lightning_async_localsgd.server.events import Event, fingerprint, read_events
from lightning_async_localsgd.server.server import Server
from lightning_async_localsgd.simulation.machine import SESSION_PREFIX, VirtualClock, VirtualRound, VirtualWorker
from lightning_async_localsgd.simulation.simulator import Simulator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    from lightning_async_localsgd.protocol.frozen import FrozenParameters
    from lightning_async_localsgd.protocol.layout import Binding
    from lightning_async_localsgd.protocol.messages import Hello, Lease, LeaseRequest, Push, Reply

_log = logging.getLogger(__name__)

_OTHER_OPTIONS = "use the options of the trainer and the strategy, the module and the data of the recorded run"


class Recording:
    """The recording of a run.

    Args:
        path: file that :class:`.AsyncLocalSGDCallback` has written.

    Attributes:
        path: path of the file.
        initial_workers: number of workers that the run was started with.
        ranks: how many of these have the numbers 0, 1, ...; the others had joined before training began.
        worker_numbers: numbers of all workers, including those that joined later.
        is_live: whether the recorded run was live, not simulated.
        incarnation: name of the server.
        events: all events in order.

    Raises:
        ValueError: The file is not a recording, or the recorded run was resumed from a checkpoint.
        OSError: The file cannot be read.

    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = str(path)
        if not Path(path).is_file():
            raise ValueError(
                f"replay={self.path!r} is not a file; train a run with AsyncLocalSGDCallback(recording=...) to write "
                "one"
            )
        self.events = read_events(path)
        begin = self.events[0].content
        self.initial_workers = int(begin["workers"])
        self.ranks = int(begin.get("ranks", self.initial_workers))
        hellos = [event.content["hello"] for event in self.events if event.kind == "join"]
        self.worker_numbers = sorted({hello.worker for hello in hellos})
        self.is_live = not any(hello.session.startswith(SESSION_PREFIX) for hello in hellos)
        self.incarnation = str(begin["incarnation"])
        self._upload = hellos[0].upload if hellos else "fp32"
        self._download = hellos[0].download if hellos else "fp32"
        precisions = sorted({hello.precision for hello in hellos if hello.precision})
        if len(precisions) > 1:
            raise ValueError(
                f"replay={self.path!r} records a run whose workers had unequal precision ({', '.join(precisions)}), "
                "but a replay computes all workers with one; record a run with equal precision"
            )
        self._precision = precisions[0] if precisions else ""
        self._dtypes = hellos[0].dtypes if hellos else ""
        self._min_workers = int(begin.get("min_workers", 1))
        self._step_samples = int(begin.get("step_samples", 0))
        self._total = begin["total"]
        self._fingerprint = begin["fingerprint"]
        if begin["version"] or begin["done"]:
            raise ValueError(
                f"replay={self.path!r} records a run that was resumed from a checkpoint, after "
                f"{begin['version']} pushes; only runs that are logged from their beginning can be replayed"
            )

    @property
    def start_time(self) -> float:
        """The server's time at the beginning of the run."""
        seconds = self.events[0].seconds
        assert seconds is not None
        return seconds

    def check(
        self,
        binding: Binding,
        total: int | None,
        options: ExchangeOptions | None = None,
        min_workers: int = 1,
        step_samples: int = 0,
    ) -> None:
        """Check that a module and a budget match the recorded run.

        Args:
            binding: exchanged tensors of the module.
            total: budget in local steps of all workers together; None if the run has no end.
            options: how pushes and models travel; without rounding if not given.
            min_workers: fewest live workers with which training goes on.
            step_samples: samples in a step of the script's own batch size, if workers have batch sizes of their own.

        Raises:
            ValueError: They do not match.

        """
        if binding.layout.fingerprint != self._fingerprint:
            raise ValueError(
                f"replay={self.path!r} records a run whose module had other parameters or buffers; use the "
                "module of that run"
            )
        if step_samples != self._step_samples:
            texts = [
                f"steps of {samples} samples" if samples else "none" for samples in (self._step_samples, step_samples)
            ]
            raise ValueError(
                f"replay={self.path!r} records a run whose workers' own batch sizes refer to {texts[0]}, but "
                f"those of this strategy refer to {texts[1]}; use the option batch_size and the data loader of that run"
            )
        if self._dtypes not in ("", binding.layout.dtypes):
            precision = f" (precision={self._precision!r})" if self._precision else ""
            raise ValueError(
                f"replay={self.path!r} records a run whose module had tensors of {self._dtypes}{precision}, but "
                f"this module has {binding.layout.dtypes}; use the precision of that run"
            )
        if total != self._total:
            raise ValueError(
                f"replay={self.path!r} records a run with {self._total} local steps of all "
                f"{self.initial_workers} workers together, but this trainer's limits allow {total}; use the max_steps "
                "or max_epochs of that run"
            )
        options = options if options is not None else ExchangeOptions()
        given = {"upload": options.upload, "download": options.download, "min_workers": min_workers}
        for name, value in given.items():
            if value != getattr(self, f"_{name}"):
                raise ValueError(
                    f"replay={self.path!r} records a run with {name}={getattr(self, f'_{name}')!r}, but this "
                    f"strategy has {name}={value!r}; use that of the run"
                )


class ReplayServer(Server):
    """A server that dispatches only when :meth:`dispatch` is called."""

    @override
    def _dispatch_due(self) -> None:
        self._publish()

    def reserve_number(self, worker: int) -> None:
        """Reserve a worker's number, as the recorded run did for a worker that joined later."""
        membership = self._coordinator.membership
        while membership.check_number(worker) is not None and not membership.finished and self.new_number() < worker:
            pass

    def dispatch(self, now: float) -> Mapping[int, Reply]:
        """Dispatch the workers that are due, and return their replies."""
        replies = self._coordinator.dispatch(now)
        self._send_replies(replies)
        self._publish()
        return replies


class _LoggedLeases(LeaseSource):
    """Answers a worker's lease requests with the leases in the log of the run."""

    def __init__(self) -> None:
        self._granted: dict[int, Lease] = {}
        self._waiting: dict[int, Future[Lease]] = {}

    @override
    def request_lease(self, request: LeaseRequest) -> Future[Lease]:
        answer: Future[Lease] = Future()
        lease = self._granted.pop(request.number, None)
        if lease is not None:
            answer.set_result(lease)
        else:
            # A lease requested ahead of need may be granted after the push of the round in which it was requested.
            self._waiting[request.number] = answer
        return answer

    def grant(self, lease: Lease) -> None:
        """Grant a lease that the worker has requested, or will request in its next round."""
        answer = self._waiting.pop(lease.number, None)
        if answer is not None:
            answer.set_result(lease)
        else:
            self._granted[lease.number] = lease

    @override
    def check(self) -> None:
        # The log is not read while a round is computed, so no answer can arrive.
        raise RuntimeError(
            f"the replay has parted from its log: a worker needs training data (request {min(self._waiting)}) that "
            f"was not leased to it before its push; {_OTHER_OPTIONS}"
        )


class _LoggedRound(VirtualRound):
    """A round whose length is logged."""

    def __init__(self, push: Push, push_time: float) -> None:
        self.push = push
        self.steps = push.steps
        self.over = False
        self.overlap_steps = push.overlap_steps
        self._push_time = push_time

    @property
    @override
    def now(self) -> float:
        # Times of single steps are not logged.
        return self._push_time

    @property
    @override
    def answered_at(self) -> float:
        return self._push_time

    @override
    def record_step(self, optimizer_steps: int) -> None:
        self.computed += 1
        self.over = optimizer_steps >= self.push.steps


class ReplaySimulator(Simulator):
    """The workers of a logged run.

    Args:
        server: dispatches only on request.
        clock: the server's clock.
        recording: the recorded run.
        binding: exchanged tensors of the module in which all rounds are computed.
        frozen: see :class:`.Simulator`.
        exchange_options: see :class:`.Simulator`.

    """

    def __init__(
        self,
        server: ReplayServer,
        clock: VirtualClock,
        recording: Recording,
        binding: Binding,
        frozen: FrozenParameters | None = None,
        exchange_options: ExchangeOptions | None = None,
    ) -> None:
        super().__init__(server, clock, binding, frozen, exchange_options)
        self._replay_server = server
        self._recording = recording
        self._next_event = 1
        self._sessions: dict[str, tuple[VirtualWorker, _LoggedLeases]] = {}

    @override
    def start(self) -> None:
        # The log contains the joins of all workers, so there is nothing to do.
        return

    @override
    def next_worker(self, until: Callable[[], bool] = lambda: False) -> VirtualWorker | None:
        events = self._recording.events
        while not self._server.finished and not until():
            if self._next_event >= len(events) or events[self._next_event].kind == "end":
                raise RuntimeError(
                    f"the log {self._recording.path} ends at {self.clock.now - self._recording.start_time:g} s, before "
                    "the end of training: the run was interrupted, or the last lines of the log were not written"
                )
            event = events[self._next_event]
            self._next_event += 1
            self._push_time = self.clock.now if event.seconds is None else event.seconds
            if event.kind == "push":
                worker = self._prepare_round(event.content["push"])
                if worker is not None:
                    return worker
            else:
                self.clock.now = self._push_time
                self._apply_event(event)
        if self._server.finished:
            self._compare_final_model()
        return None

    @override
    def push_round(
        self, worker: VirtualWorker, final: bool = False, stop: bool = False, factor: float | None = None
    ) -> None:
        # The server gets the logged push, with the pseudo-gradient that was computed now.
        current_round, worker.current_round = worker.current_round, None
        assert isinstance(current_round, _LoggedRound)
        self.clock.now = self._push_time
        logged = current_round.push
        computed = worker.make_push(final=final, stop=stop) if factor is None else worker.make_gradient_push(factor)
        for name in ("contents", "absent", "steps", "overlap_steps", "samples", "tokens", "items_used"):
            then, now = getattr(logged, name), getattr(computed, name)
            if then != now:
                raise self._difference(
                    f"round {logged.sequence} of worker {worker.number} had {name}={then!r}, not {now!r}"
                )
        self._deliver(worker, logged, worker.gradient)

    @override
    def awaited(self, worker: VirtualWorker) -> list[VirtualWorker]:
        assert worker.pending_reply is not None
        found = []
        for event in self._recording.events[self._next_event :]:
            if event.kind == "dispatch" and any(reply.averaged for reply in event.content["replies"].values()):
                break
            if event.kind == "push" and self._contributes(push := event.content["push"]):
                found.append(self._sessions[push.session][0])
        return found

    def _contributes(self, push: Push) -> bool:
        """Return whether the gradients of a logged push are those of a member of the present synchronous step."""
        session = self._sessions.get(push.session)
        return (
            push.contents == "gradient"
            and push.steps > 0
            and session is not None
            and push.sequence == session[0].round
            and push.base_version == self._server.snapshot.version
        )

    @override
    def finish(self, worker: VirtualWorker, stop: bool) -> None:
        raise self._difference("the trainer stopped before the end of the recorded run")

    # ------------------------------------------------------------------ internal

    def _prepare_round(self, push: Push) -> VirtualWorker | None:
        """Return the worker whose round is to be computed for a push; None if the push needs no round."""
        session = self._sessions.get(push.session)
        if session is None:
            raise self._difference(f"worker {push.worker} pushed a round but never joined")
        worker, _ = session
        missed = push.contents == "gradient" and push.steps > 0 and not self._contributes(push)
        if push.steps == 0 or push.sequence != worker.round or missed:
            if push.sequence == worker.round:
                # The push needs no computing, but it counts in the sequence of the worker's pushes.
                if worker.pending_reply is None or not worker.pending_reply.synchronous:
                    self.begin_round(worker)
                elif worker.reply is not worker.pending_reply:
                    worker.begin_step(worker.pending_reply)
                worker.make_push(final=push.final, stop=push.stop)
            worker.current_round = None
            self.clock.now = self._push_time
            self._deliver(worker, push, worker.gradient if push.contents == "weights" else None)
            return None
        if worker.pending_reply is None or worker.pending_reply.version != push.base_version:
            raise self._difference(
                f"worker {push.worker} continued from version {push.base_version} of the model after a lost reply, "
                "which cannot be replayed"
            )
        worker.current_round = _LoggedRound(push, self._push_time)
        return worker

    def _apply_event(self, event: Event) -> None:
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
        elif event.kind == "recall":
            self._server.recall()
        elif event.kind == "interrupt":
            self._server.interrupt(content["worker"])
        elif event.kind == "continue":
            self._server.continue_round(content["worker"])
        elif event.kind == "replan":
            self._server.replan(content["total"], content["upper_bound"])
        elif event.kind == "stop":
            self._server.stop()

    def _join(self, hello: Hello) -> None:
        if hello.session not in self._sessions:
            leases = _LoggedLeases()
            worker = self._new_worker(hello.worker, hello.session, leases)
            self._sessions[hello.session] = worker, leases
        worker, _ = self._sessions[hello.session]
        self.live[hello.worker] = worker
        self._replay_server.reserve_number(hello.worker)
        self._server.join(hello, self._channel_of(worker))

    def _lease(self, request: LeaseRequest, logged: Lease) -> None:
        def compare(lease: Lease) -> None:
            if lease != logged:
                raise self._difference(f"worker {request.worker} was leased {logged}, not {lease}")

        self._server.request_lease(request, compare)
        if request.session in self._sessions:
            self._sessions[request.session][1].grant(logged)

    def _dispatch(self, logged: Mapping[int, Reply]) -> None:
        replies = self._replay_server.dispatch(self.clock.now)
        if replies.keys() != logged.keys():
            raise self._difference(f"workers {sorted(logged)} were dispatched, not {sorted(replies)}")
        for worker, reply in replies.items():
            # Broadcasts and save requests come from rank 0's trainer, not from the coordinator's decisions.
            then = vars(logged[worker])
            now = vars(replace(reply, broadcast=logged[worker].broadcast, save_request=0))
            for name, value in now.items():
                if name != "save_request" and value != then[name]:
                    raise self._difference(f"worker {worker} was dispatched with {name}={then[name]!r}, not {value!r}")

    def _compare_final_model(self) -> None:
        """Compare the final global model with the hash at the end of the log."""
        path, events = self._recording.path, self._recording.events
        end = next((event.content for event in events[self._next_event :] if event.kind == "end"), None)
        if end is None:
            _log.warning("%s does not contain the final model's hash, so the replay cannot be compared with it", path)
            return
        theta = torch.empty(self._binding.layout.numel, dtype=torch.float32)
        self._server.copy_model(theta)
        if fingerprint(theta) == end["theta"]:
            _log.warning("the global model is equal to that of %s to the last bit", path)
        else:
            _log.warning(
                "all decisions are equal to those of %s, but the global model is not: the module computed something "
                "else (other initial weights, random numbers, number of threads, or another machine)", path,
            )  # fmt: skip

    def _difference(self, what: str) -> RuntimeError:
        line = self._next_event
        return RuntimeError(
            f"the replay differs from its log {self._recording.path} at line {line}: {what}; {_OTHER_OPTIONS}"
        )
