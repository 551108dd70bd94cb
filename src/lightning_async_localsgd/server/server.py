"""The server in rank 0: one thread owns the global model, and everything else sends it events through a queue.

Receiving, sending and saving happen in other threads, with buffers of a bounded pool. The owner thread merges a push
once its buffer is complete, and copies the model once for all workers that it dispatches together. Rank 0's own worker
uses :class:`.LocalExchange`, which takes the same path without the wire.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import override

from lightning_async_localsgd.protocol.exchange import ExchangeError, TooFewWorkersError
from lightning_async_localsgd.protocol.messages import EVALUATOR, JoinInfo, Lease
from lightning_async_localsgd.protocol.ports import LocalReplyChannel
from lightning_async_localsgd.server.begin_event import begin_event
from lightning_async_localsgd.server.coordinator import Coordinator
from lightning_async_localsgd.server.evaluations import Evaluations, ValidationRequest
from lightning_async_localsgd.server.event_loop import EventLoop, nothing
from lightning_async_localsgd.server.journal import Journal, run_facts
from lightning_async_localsgd.server.observers import MetricsQueue
from lightning_async_localsgd.server.queries import ServerQueries
from lightning_async_localsgd.server.shared_values import SharedValues
from lightning_async_localsgd.server.traffic import Traffic

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.protocol.buffers import BufferPool, PooledBuffer
    from lightning_async_localsgd.protocol.layout import Layout
    from lightning_async_localsgd.protocol.messages import Hello, LeaseRequest, Push, Reply, Share
    from lightning_async_localsgd.protocol.ports import ReplyChannel
    from lightning_async_localsgd.server.observers import RunObserver

_T = TypeVar("_T")

_RETRY_SECONDS = 0.005
"""Seconds between attempts to get a buffer for a dispatch when the pool is exhausted."""

_MAX_LOST_WORKERS = 1000
"""Number of lost workers of which time and reason are kept."""


class Server(ServerQueries):
    """Runs a :class:`~lightning_async_localsgd.server.coordinator.Coordinator` in a thread of its own.

    Any thread may call any method. Methods that report events return at once. Methods that return values wait for the
    owner thread, at most until the push that it works on is merged.

    Args:
        coordinator: makes the decisions. From now on only the owner thread uses it.
        buffers: pool for uploads and for copies of the model.
        threaded: if False, events run at once in the caller's thread, for a run with a single worker.
        clock: monotonic time, in seconds.
        join_info: what joining processes are told of the run. Not needed if none can join.
        observers: observers of the run from its beginning on.
        shared: values of frozen parameters that modules move themselves.
        traffic: how pushes and models travel; by default without rounding.

    Attributes:
        join_info: what joining processes are told. May be replaced during the run.
        steps_before: local steps of all workers before this start of the server, if it resumed from a checkpoint.
        received_metrics: workers and the values that their modules logged, in order of arrival.
        lost_workers: the last workers that were lost before the end of training, each with time and reason.
        gave_up: why the run ends because a pause for lack of workers was too long; None if it does not.
        misfit: why the run ends at its beginning, because its evaluator cannot validate, or a worker's first batches do
            not fit into its memory; None if it does not.
        evaluations: validations by the evaluator.

    """

    def __init__(
        self,
        coordinator: Coordinator,
        buffers: BufferPool,
        threaded: bool = True,
        clock: Callable[[], float] = time.monotonic,
        join_info: JoinInfo | None = None,
        observers: Sequence[RunObserver] = (),
        shared: SharedValues | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.join_info = join_info if join_info is not None else JoinInfo(1, 0, 1, "", "")
        self.incarnation = coordinator.incarnation
        self.steps_before = sum(worker.steps for worker in coordinator.totals.values())
        self._traffic = traffic if traffic is not None else Traffic(coordinator.model.layout, buffers)
        self._shared = shared if shared is not None else SharedValues()
        metrics = MetricsQueue()
        self.received_metrics = metrics.received
        self.lost_workers: deque[tuple[int, float, str]] = deque(maxlen=_MAX_LOST_WORKERS)
        self._coordinator = coordinator
        facts = run_facts(self.join_info.run_name, self.layout, self._traffic, virtual=clock is not time.monotonic)
        self._journal = Journal(coordinator.observers.on_line, facts)
        coordinator.observers.add([self._journal, metrics, *observers])
        coordinator.observers.on_event(begin_event(coordinator, clock()))
        self.gave_up: str | None = None
        self.misfit: str | None = None
        self.evaluations = Evaluations(self.incarnation, coordinator.model.layout.numel)
        self._clock = clock
        self._channels: dict[int, ReplyChannel | LocalReplyChannel] = {}
        self._retry = False
        self._snapshot = coordinator.snapshot()
        self._recalled: Mapping[int, int] = {}
        self._loop = EventLoop(self._dispatch_due, self._seconds_to_deadline, self._on_failure, threaded)

    # -------------------------------------- events of workers (ServerPort and LocalExchange)

    @property
    def layout(self) -> Layout:
        """See :class:`.ServerPort`."""
        return self._coordinator.model.layout

    def push_buffers(self, push: Push) -> BufferPool:
        """See :class:`.ServerPort`."""
        return self._traffic.pool_of(push)

    @property
    def recalled(self) -> Mapping[int, int]:
        """See :class:`.ServerPort`."""
        return self._recalled

    def join(self, hello: Hello, channel: ReplyChannel | LocalReplyChannel) -> None:
        """See :class:`.ServerPort`."""
        self._loop.submit(lambda: self._on_join(hello, channel))

    def push(self, push: Push, buffer: PooledBuffer | None, channel: ReplyChannel) -> None:
        """See :class:`.ServerPort`."""

        def event() -> None:
            try:
                self._on_push(push, None if buffer is None else self._traffic.unpack(push, buffer), channel)
            finally:
                if buffer is not None:
                    self._keep_or_release(buffer)

        if buffer is not None:
            buffer.mark_complete()
        self._loop.submit(event)

    def push_here(
        self, push: Push, gradient: Tensor | None, channel: LocalReplyChannel, result: Tensor | None = None
    ) -> None:
        """Handle a push of the worker in this process. Its tensors must not change before the reply.

        Args:
            push: the header.
            gradient: what the header names, flat fp32; None without :attr:`.Push.has_data`.
            channel: gets the reply.
            result: see :meth:`.Coordinator.push`.

        """
        self._loop.submit(lambda: self._on_push(push, gradient, channel, result))

    def share_buffers(self, share: Share) -> BufferPool:
        """See :class:`.ServerPort`."""
        return self._shared.buffers(share)

    def share(self, share: Share, buffer: PooledBuffer, channel: ReplyChannel) -> None:
        """See :class:`.ServerPort`."""

        def event() -> None:
            if self._ended is not None:
                buffer.release()
                channel.refuse(self._ended)
                return
            reply = self._on_share(share, buffer.tensor)
            buffer.restart()
            channel.dispatch(reply, buffer)

        buffer.mark_complete()
        self._loop.submit(event)

    def share_here(self, share: Share, values: Tensor, channel: LocalReplyChannel) -> None:
        """Handle values of the worker in this process. The answer replaces them in ``values``."""

        def event() -> None:
            if self._ended is not None:
                channel.refuse(self._ended)
                return
            channel.answer(self._on_share(share, values), lambda _: None)

        self._loop.submit(event)

    def request_lease(self, request: LeaseRequest, answer: Callable[[Lease], None]) -> None:
        """See :class:`.ServerPort`. The owner thread calls ``answer``."""
        self._loop.submit(lambda: answer(self._on_lease(request)))

    def lost(self, worker: int, session: str, reason: str) -> None:
        """See :class:`.ServerPort`."""
        self._loop.submit(lambda: self._on_lost(worker, session, reason))

    def revive(self, worker: int, session: str) -> None:
        """See :class:`.ServerPort`."""
        self._loop.submit(lambda: self._on_revive(worker, session))

    def request_join_info(self, worker: int, answer: Callable[[JoinInfo], None]) -> None:
        """See :class:`.ServerPort`. The owner thread calls ``answer``."""
        self._loop.submit(lambda: answer(self._on_join_request(worker)))

    def request_status(self, answer: Callable[[str], None]) -> None:
        """See :class:`.ServerPort`. The owner thread calls ``answer``."""
        self._loop.submit(lambda: answer(self._journal.status(self._clock())))

    # ------------------------------------------------------------ state of the run

    @property
    def deadline(self) -> float | None:
        """When :meth:`dispatch_due` may have an effect without an event, in seconds; None if never."""
        return self._ask(lambda coordinator: None if self._ended is not None else coordinator.deadline())

    def copy_model(self, out: Tensor) -> int:
        """Copy the global model to ``out`` (flat fp32), and return its version.

        Raises:
            RuntimeError: The server has failed or is closed. After a failure during an outer step the model is not
                usable.

        """

        def copy(coordinator: Coordinator) -> int:
            self._loop.raise_failure(closed=False)
            coordinator.model.copy_to(out)
            return coordinator.model.version

        return self._ask(copy)

    def shared_values(self) -> dict[int, Tensor]:
        """Return copies of the run's values of frozen parameters that modules move themselves, by number."""
        return self._ask(lambda _: self._shared.copies())

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state of the server. The tensors are copies.

        Raises:
            RuntimeError: see :meth:`copy_model`.

        """

        def state(coordinator: Coordinator) -> dict[str, Any]:
            self._loop.raise_failure(closed=False)
            return coordinator.state_dict()

        return self._ask(state)

    # ----------------------------------------------------- control of the run by rank 0

    def new_number(self) -> int:
        """Return a number for a late joiner."""
        return self._ask(lambda coordinator: coordinator.membership.new_number(self._clock()))

    def dispatch_due(self) -> None:
        """Dispatch the workers that are due by now. A server with its own thread does so itself."""
        self._loop.submit(nothing)

    def recall(self) -> frozenset[int]:
        """Recall workers because rank 0 is about to validate, and return them, see :meth:`.Coordinator.recall`."""
        return self._ask(lambda coordinator: coordinator.recall(self._clock()))

    def request_validation(self, position: Mapping[str, int]) -> ValidationRequest | None:
        """Let the evaluator validate the global model as it is now, see :meth:`.Evaluations.begin`."""
        return self._ask(lambda run: self.evaluations.begin(run.model, position, self._shared.listed))

    def end_evaluations(self) -> None:
        """End the evaluator, because training is over."""
        self._loop.submit(lambda: self.evaluations.end(self._coordinator.model))

    def interrupt(self, worker: int) -> None:
        """Note that a worker begins to validate or save: no worker waits for it until :meth:`continue_round`."""
        self._loop.submit(lambda: self._coordinator.interrupt(worker, self._clock()))

    def continue_round(self, worker: int) -> None:
        """Note that an interrupted worker computes again."""
        self._loop.submit(lambda: self._coordinator.continue_round(worker, self._clock()))

    def add_observer(self, observer: RunObserver) -> None:
        """Add an observer of everything that happens from now on."""
        self._loop.submit(lambda: self._coordinator.observers.add([observer]))

    def write_line(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Add a line of rank 0's own to the event file, with the present time."""
        self._loop.submit(lambda: self._journal.write({"kind": kind, "seconds": self._clock(), **fields}))

    def broadcast(self, text: str) -> None:
        """Send a text to all workers, in every reply from now on, see :attr:`.Reply.broadcast`."""

        def event() -> None:
            self._coordinator.broadcast = text

        self._loop.submit(event)

    def request_saves(self) -> None:
        """Request that every worker saves the states of its inner optimizers at the end of its round."""

        def event() -> None:
            self._coordinator.save_request += 1

        self._loop.submit(event)

    def add_optimizer_files(self, names: Mapping[int, str]) -> None:
        """Add files that workers have saved outside of their rounds, see :attr:`optimizer_files`."""
        self._ask(lambda coordinator: coordinator.membership.optimizer_files.update(names))

    def replan(self, total: int | None, upper_bound: int | None) -> None:
        """Change the expected number of local steps of the run, see :class:`.Budget`."""
        self._loop.submit(lambda: self._coordinator.replan(total, upper_bound))

    def load_weights(self, worker: int, weights: Tensor) -> None:
        """See :meth:`.Beginning.load_weights`."""
        self._ask(lambda coordinator: coordinator.beginning.load_weights(worker, weights))

    def stop(self) -> None:
        """End training once every worker has pushed its round."""
        self._loop.submit(lambda: self._coordinator.stop(self._clock()))

    def raise_failure(self) -> None:
        """Raise the error that ended the server, if there is one.

        Raises:
            RuntimeError: The server has failed or is closed.
            TooFewWorkersError: A pause for lack of workers was too long.
            ExchangeError: The evaluator cannot validate, or the first batches of a worker do not fit into its memory.

        """
        self._loop.raise_failure()
        if self.gave_up is not None:
            raise TooFewWorkersError(self.gave_up)
        if self.misfit is not None:
            raise ExchangeError(self.misfit)

    def close(self, reason: str | None = None) -> None:
        """End the owner thread. Workers that still wait are refused with ``reason``. Can be called twice."""
        if self._loop.close():
            self._refuse_all(reason or "training has ended")
            self._traffic.release_spares()

    # ---------------------------------------------------------------- owner thread

    @override
    def _ask(self, question: Callable[[Coordinator], _T]) -> _T:
        return self._loop.ask(lambda: question(self._coordinator))

    @property
    def _ended(self) -> str | None:
        """Why the server refuses whatever comes; None while it does not."""
        return self.gave_up or self.misfit if self._loop.failure is None else f"the server failed: {self._loop.failure}"

    def _on_failure(self, error: BaseException) -> None:
        self._refuse_all(f"the server failed: {error}")

    def _refuse_all(self, reason: str) -> None:
        for channel in self._channels.values():
            channel.refuse(reason)
        self._channels.clear()
        self.evaluations.refuse(reason)

    def _seconds_to_deadline(self) -> float | None:
        if self._retry:
            return _RETRY_SECONDS
        # The loop's thread may be here before the constructor has the loop.
        deadline = None if self.gave_up or self.misfit else self._coordinator.deadline()
        return None if deadline is None else max(0.0, deadline - self._clock())

    def _on_join(self, hello: Hello, channel: ReplyChannel | LocalReplyChannel) -> None:
        if self._ended is not None:
            channel.refuse(self._ended)
            return
        if hello.worker == EVALUATOR and not isinstance(channel, LocalReplyChannel):
            if (reason := self.evaluations.join(hello, channel, self._coordinator.model)) is not None:
                channel.refuse(reason)
            return
        older = self._coordinator.session_of(hello.worker)
        reason = self._traffic.check(hello, len(set(self._coordinator.live) - {hello.worker}))
        reason = reason or self._coordinator.beginning.check_dtypes(hello)
        reason = reason or self._coordinator.join(hello, self._clock())
        if reason is not None:
            self._coordinator.membership.log_refusal(hello, reason)
            channel.refuse(reason)
            return
        outdated = self._channels.get(hello.worker)
        if outdated is not None and older is not None and older != hello.session:
            outdated.refuse(f"a newer session of worker {hello.worker} has replaced this one")
        self._channels[hello.worker] = channel
        # One buffer for each worker, even if all of their uploads stall, and one more for a dispatch.
        self._traffic.raise_max_total(len(self._coordinator.live) + 2)

    def _on_push(
        self,
        push: Push,
        gradient: Tensor | None,
        channel: ReplyChannel | LocalReplyChannel,
        result: Tensor | None = None,
    ) -> None:
        if self._ended is not None:
            channel.refuse(self._ended)
            return
        if push.worker == EVALUATOR and not isinstance(channel, LocalReplyChannel):
            misfit = self.evaluations.push(push, channel)
            if misfit is not None and self._coordinator.membership.started:
                self.evaluations.dismiss(misfit)
            elif misfit is not None:
                self.misfit = misfit
                self._refuse_all(misfit)
            return
        self._traffic.confirm(push)
        reason = self._coordinator.push(push, gradient, self._clock(), result)
        if reason is not None:
            channel.refuse(reason)
            if self._coordinator.session_of(push.worker) is None:
                self._channels.pop(push.worker, None)
                self._traffic.forget(push.worker)
            return
        self._channels[push.worker] = channel

    def _on_share(self, share: Share, values: Tensor) -> Reply:
        coordinator = self._coordinator
        # After the end, the values are final. Those of a replaced or quarantined session do not count.
        counts = share.merge and not coordinator.finished and coordinator.session_of(share.worker) == share.session
        return self._shared.answer(share, values, len(coordinator.live) if counts else 0)

    def _on_lease(self, request: LeaseRequest) -> Lease:
        if self._ended is not None:
            return Lease(request.number, request.epoch, 0, 0, self._ended)
        return self._coordinator.lease(request)

    def _on_lost(self, worker: int, session: str, reason: str) -> None:
        if worker == EVALUATOR:
            self.evaluations.lose(session, reason)
            return
        # The worker is sent nothing, because it may come back and continue.
        if self._coordinator.leave(worker, session, self._clock(), reason):
            self._channels.pop(worker, None)
            self._traffic.forget(worker)
            if not self._coordinator.finished:
                self.lost_workers.append((worker, self._clock(), reason))
                if self._coordinator.membership.is_unfit(worker, reason):
                    self.misfit = reason.removeprefix("it ended with ")
                    self._refuse_all(self.misfit)

    def _on_revive(self, worker: int, session: str) -> None:
        if worker == EVALUATOR:
            self.evaluations.revive(session)
        elif self._ended is None:
            self._coordinator.revive(worker, session, self._clock())

    def _on_join_request(self, worker: int) -> JoinInfo:
        refused = self._ended
        if refused is None and worker == EVALUATOR:
            refused = self.evaluations.check_join()
        elif refused is None:
            worker, refused = self._coordinator.membership.admit(worker, self._clock())
        return dataclasses.replace(self.join_info, incarnation=self.incarnation, worker=worker, refused=refused)

    # ------------------------------------------------------------------ dispatches

    def _keep_or_release(self, buffer: PooledBuffer) -> None:
        if not (self._coordinator.ready(self._clock()) and self._traffic.keep(buffer)):
            buffer.release()

    def _dispatch_due(self) -> None:
        """Dispatch the workers that are due, and update what other threads read."""
        self._retry = False
        now = self._clock()
        if self.gave_up is None and (failure := self._coordinator.minimum.failure(now)) is not None:
            self.gave_up = failure
            self._coordinator.minimum.end(now)
            self._refuse_all(failure)
        if self._ended is not None:
            self._publish()
            return
        if self._coordinator.ready(now):
            remote = any(not isinstance(channel, LocalReplyChannel) for channel in self._channels.values())
            if remote and not self._traffic.reserve():
                self._retry = True
                return
            self._send_replies(self._coordinator.dispatch(now))
        self._traffic.release_spares()
        self._publish()

    def _publish(self) -> None:
        self._snapshot = self._coordinator.snapshot()
        self._journal.note(self._snapshot.paused, self._clock())
        self._recalled = self._coordinator.recalled()

    def _send_replies(self, replies: Mapping[int, Reply]) -> None:
        batch = self._traffic.batch(self._coordinator.model, self._coordinator.beginning.averages.mean)
        for worker, header in replies.items():
            channel = self._channels.get(worker)
            reply = dataclasses.replace(header, shared=self._shared.listed)
            if reply.stop:
                # The worker waits for nothing else, and must get the final model even if the server is closed now.
                self._channels.pop(worker, None)
            if channel is not None:
                batch.send(worker, self._coordinator.session_of(worker), reply, channel)
            # Without a channel, the worker has no connection yet. Once connected, it sends its push again.
        batch.close()
