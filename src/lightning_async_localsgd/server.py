"""The server in rank 0: one thread owns the global model; everybody else talks to it through a queue of events.

Receiving, sending and saving happen outside the owner thread (the wire has its own), into buffers of a bounded pool.
The owner applies a push when its private buffer is complete, and copies the model once for all the workers that it
dispatches together. Rank 0's own worker uses :class:`.LocalExchange`: the same path without the wire.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # Only from Python 3.11 on the builtin one.
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.events import FORMAT, Event
from lightning_async_localsgd.local_exchange import LocalOutlet
from lightning_async_localsgd.messages import Facts, Lease
from lightning_async_localsgd.records import Settled, View, WorkerTotals

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.buffers import BufferLease, BufferPool
    from lightning_async_localsgd.layout import Layout
    from lightning_async_localsgd.messages import Hello, LeaseRequest, Push, Reply
    from lightning_async_localsgd.wire.protocol import Outlet

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_RETRY_SECONDS = 0.005
"""How soon the owner asks again for a buffer when it has something to dispatch and none is free."""

_MOST_LOST = 1000
"""Workers that were lost, of which time and reason are kept."""

_MOST_METRICS = 100_000
"""So many texts of pushes wait for rank 0 to read them, which it does at every batch."""

_MOST_SETTLED = 10_000
"""So many pushes that were settled before :meth:`Server.record` are recorded all the same."""


_MOST_EVENTS = 10_000
"""So many events of before :meth:`Server.record_events` are recorded all the same."""


@dataclass(frozen=True)
class About:
    """What the ranks of the beginning have agreed on, for whoever joins later: see :class:`~.messages.Facts`."""

    workers: int
    seed: int
    fit: int
    folder: str
    unshared: str
    epoch: int = 0
    ahead: int = 0


class Server:
    """Runs a :class:`~lightning_async_localsgd.coordinator.Coordinator` in a thread of its own.

    All methods may be called from any thread and none blocks for longer than it takes to apply a push, except
    :meth:`ask` and :meth:`close`, which wait for the owner.

    Args:
        coordinator: the decisions; from now on only the owner thread touches it.
        buffers: for uploads and snapshots.
        threaded: False runs every event at once in the caller's thread, for a world of one.
        clock: seconds, monotonic.
        about: what those who join are told; None for a run that nobody joins.

    Attributes:
        about: as given; may be replaced while the run goes on.
        steps_before: local steps of all workers that were taken before, in a run that goes on from a checkpoint.
        received_metrics: what workers have logged: their numbers and the texts of their pushes, in order of arrival.
        lost_workers: the last workers that were gone before training was over: their numbers, when, and why.

    """

    def __init__(
        self,
        coordinator: Coordinator,
        buffers: BufferPool,
        threaded: bool = True,
        clock: Callable[[], float] = time.monotonic,
        about: About | None = None,
    ) -> None:
        self.about = about if about is not None else About(1, 0, 1, "", "")
        self.incarnation = coordinator.incarnation
        self.steps_before = sum(worker.steps for worker in coordinator.totals.values())
        self.buffers = buffers
        self.received_metrics: queue.Queue[tuple[int, str]] = queue.Queue(_MOST_METRICS)
        self.lost_workers: deque[tuple[int, float, str]] = deque(maxlen=_MOST_LOST)
        self._coordinator = coordinator
        coordinator.on_metrics = self._keep_metrics
        self._settled: deque[Settled] = deque(maxlen=_MOST_SETTLED)
        coordinator.on_settled = self._settled.append
        self._happened: deque[Event] = deque([_beginning(coordinator, clock())], maxlen=_MOST_EVENTS)
        coordinator.on_event = self._happened.append
        self._clock = clock
        self._outlets: dict[int, Outlet | LocalOutlet] = {}
        self._spare: BufferLease | None = None
        self._retry = False
        self._view = coordinator.view()
        self._wanted: Mapping[int, int] = {}
        self._failure: BaseException | None = None
        self._closed = False
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="async_localsgd-server", daemon=True)
            self._thread.start()

    # --------------------------------------------------- for the wire and local

    @property
    def layout(self) -> Layout:
        """What is exchanged."""
        return self._coordinator.model.layout

    @property
    def wanted(self) -> Mapping[int, int]:
        """The workers that are to hand in their rounds at once, and the versions these began with.

        Heartbeats carry this to them.
        """
        return self._wanted

    def join(self, hello: Hello, outlet: Outlet | LocalOutlet) -> None:
        """A worker introduces itself; the answer comes through ``outlet``."""
        self._submit(lambda: self._on_join(hello, outlet))

    def push(self, push: Push, lease: BufferLease | None, outlet: Outlet) -> None:
        """A push has arrived completely; the lease is the server's from now on."""

        def event() -> None:
            try:
                self._on_push(push, None if lease is None else lease.tensor, outlet)
            finally:
                if lease is not None:
                    self._keep_or_release(lease)

        if lease is not None:
            lease.settle()
        self._submit(event)

    def push_here(self, push: Push, gradient: Tensor | None, outlet: LocalOutlet, result: Tensor | None = None) -> None:
        """A worker in this process pushes; its tensors stay as they are until it is answered.

        Args:
            push: the header.
            gradient: what it pushes; None where it has taken no steps.
            outlet: for the answer.
            result: see :meth:`.Coordinator.push`.

        """
        self._submit(lambda: self._on_push(push, gradient, outlet, result))

    def lease(self, request: LeaseRequest, answer: Callable[[Lease], None]) -> None:
        """A worker asks for training data; the answer is given from the owner thread."""
        self._submit(lambda: answer(self._on_lease(request)))

    def lost(self, worker: int, session: str, reason: str) -> None:
        """A worker is gone."""
        self._submit(lambda: self._on_lost(worker, session, reason))

    def revive(self, worker: int, session: str) -> None:
        """A worker that was lost shows a sign of life."""
        self._submit(lambda: self._on_revive(worker, session))

    def introduce(self, worker: int, answer: Callable[[Facts], None]) -> None:
        """Somebody asks what is needed to join, as ``worker`` or, with -1, under a number of its own.

        The answer is given from the owner thread; the proof in it is left to the wire.
        """
        self._submit(lambda: answer(self._on_introduce(worker)))

    # ------------------------------------------------------------- for the host

    @property
    def view(self) -> View:
        """The run at a glance, as of the last event."""
        return self._view

    @property
    def quarantined(self) -> frozenset[int]:
        """The workers that are refused for the rest of the run, as of the last event."""
        return self._view.quarantined

    @property
    def inner_states(self) -> dict[int, str]:
        """The names of the files that workers have saved their inner optimizers' states in, as they said last."""
        return self.ask(lambda coordinator: dict(coordinator.attendance.inner_states))

    @property
    def missing(self) -> list[int]:
        """The workers of the first cohort that have not joined yet."""
        return self.ask(lambda coordinator: coordinator.missing)

    @property
    def finished(self) -> bool:
        """Everybody has been handed the final model."""
        return self.ask(lambda coordinator: coordinator.finished)

    @property
    def deadline(self) -> float | None:
        """When there may be something to decide though nothing happens, by the server's clock; None if there is not."""
        return self.ask(lambda coordinator: coordinator.deadline())

    def look(self) -> None:
        """Whoever is due by now is dispatched. A server with a thread of its own does so by itself."""
        self._submit(_nothing)

    def new_number(self) -> int:
        """A number for a worker that has not been there from the beginning."""
        return self.ask(lambda coordinator: coordinator.attendance.new_number())

    def pause(self, worker: int) -> None:
        """Nobody waits for ``worker`` until :meth:`resume`."""
        self._submit(lambda: self._coordinator.pause(worker, self._clock()))

    def resume(self, worker: int) -> None:
        """``worker`` computes again."""
        self._submit(lambda: self._coordinator.resume(worker, self._clock()))

    def ask(self, question: Callable[[Coordinator], _T]) -> _T:
        """Runs ``question`` in the owner thread, between two events, and returns its answer.

        Raises:
            RuntimeError: the server has failed or is closed.

        """
        answer: Future[_T] = Future()

        def event() -> None:
            try:
                answer.set_result(question(self._coordinator))
            except BaseException as error:
                answer.set_exception(error)

        self._submit(event)
        while True:
            try:
                return answer.result(timeout=0.5)
            except FutureTimeoutError:
                self.raise_failure()

    def copy_model(self, out: Tensor) -> int:
        """Copies the global model of one moment to ``out`` (flat fp32) and returns its version.

        Raises:
            RuntimeError: the server has failed or is closed. A step that was broken off leaves a model behind that is
                no model, and nobody is to go on from it.

        """

        def copy(coordinator: Coordinator) -> int:
            self._raise_first_failure()
            coordinator.model.copy_to(out)
            return coordinator.model.version

        return self.ask(copy)

    def state_dict(self) -> dict[str, Any]:
        """The server's whole state of one moment; its tensors are copies.

        Raises:
            RuntimeError: as for :meth:`copy_model`.

        """

        def state(coordinator: Coordinator) -> dict[str, Any]:
            self._raise_first_failure()
            return coordinator.state_dict()

        return self.ask(state)

    def totals(self) -> dict[int, WorkerTotals]:
        """What each worker has done so far."""
        return self.ask(lambda coordinator: {n: WorkerTotals(**vars(t)) for n, t in coordinator.totals.items()})

    def record(self, write: Callable[[Settled], None] | None) -> None:
        """Has every push told to ``write`` from the owner thread, those of the time before included.

        Args:
            write: must return at once. None: nobody wants to know.

        """

        def event() -> None:
            self._coordinator.on_settled = write if write is not None else _forget
            while self._settled:
                self._coordinator.on_settled(self._settled.popleft())

        self._submit(event)

    def record_events(self, write: Callable[[Event], None] | None) -> None:
        """Has everything that happens told to ``write`` from the owner thread, from the beginning on.

        Args:
            write: must return at once. None: nobody wants to know.

        """

        def event() -> None:
            self._coordinator.on_event = write if write is not None else _forget_event
            while self._happened:
                self._coordinator.on_event(self._happened.popleft())

        self._submit(event)

    def share(self, text: str) -> None:
        """Every reply from now on tells ``text``."""

        def event() -> None:
            self._coordinator.shared = text

        self._submit(event)

    def ask_for_inner_states(self) -> None:
        """Has every worker save its inner optimizers' states when it has ended its round."""

        def event() -> None:
            self._coordinator.asked += 1

        self._submit(event)

    def replan(self, total: int | None, at_most: int | None) -> None:
        """The run is expected to come to another number of local steps, see :class:`.Budget`."""
        self._submit(lambda: self._coordinator.replan(total, at_most))

    def stop(self) -> None:
        """Training ends as soon as everybody has handed in what they have."""
        self._submit(self._coordinator.stop)

    def raise_failure(self) -> None:
        """Raises what stopped the owner thread, if anything did.

        Raises:
            RuntimeError: the server has failed or is closed.

        """
        self._raise_first_failure()
        if self._closed:
            raise RuntimeError("the server of the asynchronous run is closed")

    def _raise_first_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"the server of the asynchronous run failed: {self._failure}") from self._failure

    def close(self, reason: str | None = None) -> None:
        """Ends the owner thread. Workers that still wait are refused with ``reason``. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._events.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join()
        for outlet in self._outlets.values():
            outlet.refuse(reason or "training has ended")
        self._outlets.clear()
        if self._spare is not None:
            self._spare.release()
            self._spare = None

    # ------------------------------------------------------------ owner thread

    def _submit(self, event: Callable[[], None]) -> None:
        if self._thread is not None:
            self._events.put(event)
            return
        try:
            self._handle(event)
        except BaseException as error:
            self._fail(error)
            raise

    def _run(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=self._patience())
            except queue.Empty:
                event = _nothing
            if event is None:
                return
            try:
                self._handle(event)
            except BaseException as error:
                _log.exception("the server of the asynchronous run failed")
                self._fail(error)
                for outlet in self._outlets.values():
                    outlet.refuse(f"the server failed: {error}")
                self._outlets.clear()

    def _handle(self, event: Callable[[], None]) -> None:
        event()
        if self._failure is None:
            self._flush()

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:  # What fails after the first does so because of it.
            self._failure = error

    def _patience(self) -> float | None:
        if self._failure is not None:
            return None
        if self._retry:
            return _RETRY_SECONDS
        deadline = self._coordinator.deadline()
        return None if deadline is None else max(0.0, deadline - self._clock())

    def _on_join(self, hello: Hello, outlet: Outlet | LocalOutlet) -> None:
        if self._failure is not None:
            outlet.refuse(f"the server failed: {self._failure}")
            return
        older = self._coordinator.session_of(hello.worker)
        refused = self._coordinator.join(hello, self._clock())
        if refused is not None:
            outlet.refuse(refused)
            return
        outdated = self._outlets.get(hello.worker)
        if outdated is not None and older is not None and older != hello.session:
            outdated.refuse(f"a newer session of worker {hello.worker} has taken this one's place")
        self._outlets[hello.worker] = outlet
        # Should all of them stall at once, there is still a buffer for whoever does not.
        self.buffers.allow(len(self._coordinator.live) + 2)

    def _on_push(
        self, push: Push, gradient: Tensor | None, outlet: Outlet | LocalOutlet, result: Tensor | None = None
    ) -> None:
        if self._failure is not None:
            outlet.refuse(f"the server failed: {self._failure}")
            return
        refused = self._coordinator.push(push, gradient, self._clock(), result)
        if refused is not None:
            outlet.refuse(refused)
            if self._coordinator.session_of(push.worker) is None:
                self._outlets.pop(push.worker, None)
            return
        self._outlets[push.worker] = outlet

    def _on_lease(self, request: LeaseRequest) -> Lease:
        if self._failure is not None:
            return Lease(request.number, request.epoch, 0, 0, f"the server failed: {self._failure}")
        return self._coordinator.lease(request)

    def _on_lost(self, worker: int, session: str, reason: str) -> None:
        # Nothing is said to it: it may come back and go on.
        if self._coordinator.leave(worker, session, self._clock(), reason):
            self._outlets.pop(worker, None)
            if not self._coordinator.finished:
                self.lost_workers.append((worker, self._clock(), reason))

    def _on_revive(self, worker: int, session: str) -> None:
        if self._failure is None:
            self._coordinator.revive(worker, session, self._clock())

    def _on_introduce(self, worker: int) -> Facts:
        attendance, about = self._coordinator.attendance, self.about
        if self._failure is not None:
            refused: str | None = f"the server failed: {self._failure}"
        elif worker == -1:
            refused = "training is over" if attendance.finished else None
            worker = worker if attendance.finished else attendance.new_number()
        else:
            refused = attendance.refuses(worker)
        return Facts(self.incarnation, "", worker, refused=refused, **vars(about))

    def _keep_metrics(self, worker: int, text: str) -> None:
        try:
            self.received_metrics.put_nowait((worker, text))
        except queue.Full:
            _log.warning("rank 0 has not read what workers log for %d pushes; the latest is left out", _MOST_METRICS)

    def _keep_or_release(self, lease: BufferLease) -> None:
        # The buffer of a push that has just been applied is the natural place for the snapshot of a dispatch that is
        # due: with it at hand that never waits for memory that uploads hold.
        if self._spare is None and self._coordinator.ready(self._clock()):
            self._spare = lease
        else:
            lease.release()

    def _flush(self) -> None:
        """Dispatches whoever is due."""
        self._retry = False
        now = self._clock()
        if self._coordinator.ready(now):
            remote = any(not isinstance(outlet, LocalOutlet) for outlet in self._outlets.values())
            if remote and self._spare is None:
                self._spare = self.buffers.try_acquire()
                if self._spare is None:
                    self._retry = True
                    return
            self._dispatch(self._coordinator.dispatch(now))
        if self._spare is not None:
            self._spare.release()
            self._spare = None
        self._view = self._coordinator.view()
        self._wanted = self._coordinator.wanted()

    def _dispatch(self, replies: dict[int, Reply]) -> None:
        model = self._coordinator.model
        distant = []
        for worker, reply in replies.items():
            outlet = self._outlets.get(worker)
            if reply.stop:
                # It waits for nothing more: what ends the server must not end the final model's way to it.
                self._outlets.pop(worker, None)
            if isinstance(outlet, LocalOutlet):
                outlet.answer(reply, model.copy_to)
            elif outlet is not None:
                distant.append((outlet, reply))
            # One that is back from the dead has no connection yet. When it has one, it asks again.
        if not distant:
            return
        lease, self._spare = self._spare, None
        assert lease is not None
        model.copy_to(lease.tensor)
        lease.renew()
        lease.share(len(distant) - 1)
        for outlet, reply in distant:
            outlet.dispatch(reply, lease)


def _nothing() -> None:
    """The event of a deadline that has passed: looking again is all there is to do."""


def _forget(settled: Settled) -> None:
    """What becomes of a push that nobody records."""


def _forget_event(event: Event) -> None:
    """What becomes of an event that nobody records."""


def _beginning(coordinator: Coordinator, now: float) -> Event:
    """The first event of all."""
    content = {
        "format": FORMAT,
        "incarnation": coordinator.incarnation,
        "workers": len(coordinator.missing),
        "version": coordinator.model.version,
        "done": coordinator.budget.done,
        "total": coordinator.budget.total,
        "fingerprint": coordinator.model.layout.fingerprint,
    }
    return Event("begin", now, content)
