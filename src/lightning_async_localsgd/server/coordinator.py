"""Decides who takes part, in which order pushes are merged, and when each worker is dispatched with which steps.

The coordinator is a state machine over the global model and the policies. It uses no thread, no socket and no clock:
every event comes with its time, so that the live server and the simulated cluster run the same object, and the same
events in the same order lead to the same global model to the last bit.

Workers wait, compute or rest, see :class:`.WorkerSession`. When all live workers rest, training is over, and all of
them are sent the same final model. A departed worker gets that model when it comes back; a round that it had not pushed
by then is refused.

In the synchronous beginning of a run, workers push gradients instead of rounds, see :class:`.Beginning`.

Each push counts once. As long as a session may come back, the coordinator remembers the session's last sequence number
and the outcome of that push. A push that is sent again is answered again, and changes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.policies.data_leases import DataLeases
from lightning_async_localsgd.policies.guard import StrikeCounter, UpdateGuard
from lightning_async_localsgd.policies.synchronous_beginning import SynchronousBeginning
from lightning_async_localsgd.policies.worker_minimum import WorkerMinimum
from lightning_async_localsgd.protocol import rejections
from lightning_async_localsgd.protocol.messages import Lease
from lightning_async_localsgd.server.beginning import Beginning
from lightning_async_localsgd.server.discipline import Discipline
from lightning_async_localsgd.server.events import Event
from lightning_async_localsgd.server.membership import Membership
from lightning_async_localsgd.server.merging import Merging
from lightning_async_localsgd.server.observers import ObserverList
from lightning_async_localsgd.server.progress import ProgressEstimate
from lightning_async_localsgd.server.recalls import HOST, Recalls
from lightning_async_localsgd.server.replies import ReplyMaker
from lightning_async_localsgd.server.run_stats import RunSnapshot, RunStats, WorkerTotals
from lightning_async_localsgd.server.step_grants import StepGrants
from lightning_async_localsgd.server.waiting import DispatchWindow

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from lightning_async_localsgd.policies.budget import Budget
    from lightning_async_localsgd.policies.grace import GraceWindow
    from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
    from lightning_async_localsgd.protocol.messages import Hello, LeaseRequest, Push, Reply
    from lightning_async_localsgd.protocol.rejections import Rejection
    from lightning_async_localsgd.server.global_model import GlobalModel
    from lightning_async_localsgd.server.sessions import WorkerSession


class Coordinator:
    """Membership, order of pushes, dispatch windows and dispatches over one global model.

    Call the event methods (:meth:`join`, :meth:`push`, :meth:`leave`, ...) when things happen. After each of them, call
    :meth:`dispatch` while :meth:`ready` is true. If nothing happens, check again at :meth:`deadline`.

    Args:
        model: the global model, already loaded.
        pacing: local steps of each worker (DyLU, equation 6 of arXiv 2401.09135).
        grace: dispatches arrivals together (Algorithms 2 and 5 of arXiv 2401.09135).
        budget: local steps of all workers together.
        cohort: number of workers that must join before the first dispatch. Their numbers are 0, 1, ...
        incarnation: random name of this start of the server.
        guard: detects pushes that are too large; with its defaults if not given.
        merging: merges pushes; by default each one when it arrives.
        leases: leases of training data.
        overlap: whether workers go on training while their pushes are in flight.
        beginning: length and shares of the synchronous beginning; by default there is none.
        minimum: pauses training while too few workers take part; by default never.
        expected: number of workers that must be live before the first dispatch, if that is more than ``cohort``.

    Attributes:
        observers: observers of all events and pushes.
        broadcast: see :attr:`.Reply.broadcast`.
        save_request: see :attr:`.Reply.save_request`.
        membership: who takes part.
        beginning: the synchronous beginning.
        minimum: knows whether training is paused, because too few workers take part.

    """

    def __init__(
        self,
        model: GlobalModel,
        pacing: SpeedAwareSteps,
        grace: GraceWindow,
        budget: Budget,
        cohort: int,
        incarnation: str,
        guard: UpdateGuard | None = None,
        merging: Merging | None = None,
        leases: DataLeases | None = None,
        overlap: bool = False,
        beginning: SynchronousBeginning | None = None,
        minimum: WorkerMinimum | None = None,
        expected: int = 0,
    ) -> None:
        self.model = model
        self.budget = budget
        self.incarnation = incarnation
        self.observers = ObserverList()
        self.broadcast = ""
        self.save_request = 0
        self.stopping = False
        self._stop_requested = False
        self._pacing = pacing
        self._guard = guard if guard is not None else UpdateGuard()
        self._merging = merging if merging is not None else Merging(model)
        self.minimum = minimum if minimum is not None else WorkerMinimum()
        self._leases = leases if leases is not None else DataLeases(cohort)
        self._stats = RunStats()
        strikes = StrikeCounter()
        self.membership = Membership(cohort, model, budget, pacing, self._leases, strikes, self._stats, expected)
        self._discipline = Discipline(strikes, self.membership)
        self._live = self.membership.live
        self._grants = StepGrants(budget, pacing, self._live, overlap)
        self._recalls = Recalls(self._live, pacing)
        self._window = DispatchWindow(self._live, grace, pacing, budget, self._merging, self._recalls, self.minimum)
        self._progress = ProgressEstimate(self._live, pacing, budget)
        self._replies = ReplyMaker(
            incarnation, model, budget, pacing, self.membership, self._progress, self._window, self._stats
        )
        policy = beginning if beginning is not None else SynchronousBeginning(0, cohort)
        self.beginning = Beginning(policy, model, budget, pacing, self._live, self.minimum)
        self._parts: dict[str, Any] = {"model": model, "budget": budget, "pacing": pacing, "leases": self._leases}
        self._parts |= {"guard": self._guard, "merging": self._merging, "beginning": self.beginning}

    # -------------------------------------------------------------------- events

    def join(self, hello: Hello, now: float) -> str | None:
        """Handle a worker's hello. A new session replaces an older one of the worker.

        Returns:
            Why the session is refused for good; None if the worker waits for its dispatch, or will push again.

        """
        self.observers.on_event(Event("join", now, {"hello": hello}))
        # If the worker was lost before its first dispatch arrived, its session is live again from now on.
        session = None if hello.reconnecting else self.membership.find(hello.worker, hello.session, now)
        if self.beginning.join_again(hello.worker, session):
            return None
        reason = self.membership.join(hello, now)
        # A worker that was waiting will resend its lost push, so it counts as computing.
        self._window.close_if_unused()
        self._update_minimum(now)
        return reason

    def revive(self, worker: int, session: str, now: float) -> bool:
        """Handle a sign of life of a worker that was lost. It continues its round, or resends its push.

        Returns:
            Whether the session is live. It is not if a newer one has replaced it, or its worker is in quarantine.

        """
        self.observers.on_event(Event("revive", now, {"worker": worker, "session": session}))
        is_live = self.membership.find(worker, session, now) is not None
        self._update_minimum(now)
        return is_live

    def push(self, push: Push, gradient: Tensor | None, now: float, result: Tensor | None = None) -> str | None:
        """Merge a complete push, hold it for its group, or refuse it. Then the worker waits for its dispatch.

        Args:
            push: the header.
            gradient: the pseudo-gradient, or what else the header names, flat fp32, of the global model's length; None
                without :attr:`.Push.has_data`.
            now: seconds.
            result: exact value of theta - g, if the outer step is just that (see
                :attr:`~lightning_async_localsgd.outer.OuterOptimizer.replaces_model`).

        Returns:
            Why the *session* is refused for good: a newer one has replaced it, or its worker is in quarantine. None
            otherwise, even if the push was refused. Worker 0 is quarantined only if it is the only worker; otherwise
            its optimizer is reset (:attr:`.Reply.reset_optimizer`).

        """
        self.observers.on_event(Event("push", now, {"push": push}))
        session = self.membership.find(push.worker, push.session, now)
        if session is None:
            rejection = self.membership.session_rejection(push.worker, push.session)
            self._report(push, rejection, now)
            return rejection.text
        if push.sequence <= session.sequence:
            self._answer_again(push, session, now)
            self._update_minimum(now)
            return None
        session.staleness = 0
        refused = self._check(push, gradient, session) or self._merge(push, gradient, result, session)
        self._record(push, refused, session, now)
        reason = self._discipline.note(push.worker, refused, session, self.beginning.on)
        if reason is None:
            self._await_dispatch(push, session, now)
            self.membership.wake()
        else:
            self._window.close_if_unused()
        self._update_minimum(now)
        return reason

    def leave(self, worker: int, session: str, now: float, reason: str) -> bool:
        """Handle the loss of a worker: it died, closed its connection, or was silent. See also :meth:`revive`.

        Returns:
            Whether the session was live.

        """
        self.observers.on_event(Event("leave", now, {"worker": worker, "session": session, "reason": reason}))
        was_live = self.membership.leave(worker, session, reason)
        if was_live:
            self.beginning.leave(worker, session, now)
            self._window.close_if_unused()
            self._update_minimum(now)
        return was_live

    def lease(self, request: LeaseRequest) -> Lease:
        """Lease training data to a worker, also to a departed one, which needs the data to finish its round."""
        reason = self.membership.check_lease(request.worker, request.session)
        if reason is not None:
            lease = Lease(request.number, request.epoch, 0, 0, reason)
        else:
            lease = self._leases.grant(request, len(self._live))
        self.observers.on_event(Event("lease", content={"request": request, "lease": lease}))
        return lease

    def recall(self, now: float) -> frozenset[int]:
        """Recall workers because rank 0 is about to validate, see :meth:`.Recalls.recall_for_validation`."""
        self.observers.on_event(Event("recall", now))
        return self._recalls.recall_for_validation(now)

    def interrupt(self, worker: int, now: float) -> None:
        """Note that a worker begins to validate or save: no worker waits for it until :meth:`continue_round`."""
        self.observers.on_event(Event("interrupt", now, {"worker": worker}))
        if worker in self._live:
            self._live[worker].interrupt(now)

    def continue_round(self, worker: int, now: float) -> None:
        """Note that an interrupted worker computes again."""
        self.observers.on_event(Event("continue", now, {"worker": worker}))
        if worker in self._live:
            self._live[worker].continue_round(now)

    def replan(self, total: int | None, upper_bound: int | None) -> None:
        """Change the expected number of local steps of the run, see :class:`.Budget`."""
        self.observers.on_event(Event("replan", content={"total": total, "upper_bound": upper_bound}))
        self.budget.replan(total, upper_bound)
        self.membership.wake()

    def stop(self, now: float) -> None:
        """End training: grant no more steps, and send the final model once every worker has pushed its round."""
        self.observers.on_event(Event("stop", now))
        self._stop(now)

    # ------------------------------------------------------------------- queries

    @property
    def live(self) -> list[int]:
        """Live workers, in order of their numbers."""
        return sorted(self._live)

    @property
    def finished(self) -> bool:
        """Whether all workers have been sent the final model."""
        return self.membership.finished

    def session_of(self, worker: int) -> str | None:
        """Return the session of a live worker; None if the worker is not live."""
        session = self._live.get(worker)
        return None if session is None else session.id

    def recalled(self) -> dict[int, int]:
        """Return the workers that must push at their next step, and the versions that their rounds started from.

        When training ends, these are all workers. Before, see :class:`.Recalls`.
        """
        return self._recalls.recalled(everyone=self.stopping or self.finished)

    def snapshot(self) -> RunSnapshot:
        """Return the state of the run, for logging."""
        quarantined = self.membership.quarantined
        return self._stats.snapshot(
            self.model, self.budget, len(self._live), quarantined, self._stop_requested, self.minimum
        )

    @property
    def totals(self) -> dict[int, WorkerTotals]:
        """What each worker has done so far, see :data:`.MAX_LATE_JOINERS`."""
        return self._stats.totals

    # ---------------------------------------------------------------- dispatches

    def deadline(self) -> float | None:
        """Return when :meth:`ready` may become true without an event, in seconds; None if never."""
        waiting = self.beginning.deadline if self.beginning.on else self._window.deadline
        return min((at for at in (waiting, self.minimum.deadline) if at is not None), default=None)

    def ready(self, now: float) -> bool:
        """Return whether :meth:`dispatch` has something to do."""
        if not self.membership.started:
            return False
        if self.beginning.on:
            return self.beginning.is_due(now)
        return self._window.group_is_due(now) or self._window.is_over(now) or (not self.finished and self._all_rest())

    def dispatch(self, now: float) -> dict[int, Reply]:
        """Merge the group if it is due, and dispatch all workers that wait for no group with the same global model.

        In the synchronous beginning, dispatch the workers of the step with the mean of their gradients instead.

        Returns:
            The replies by worker. A worker for which no steps are left rests without a reply, until there are steps
            again (another worker died) or training is over.

        """
        self._update_minimum(now)
        members = self.beginning.dispatch(now, self.stopping, self.broadcast) if self.beginning.on else {}
        if members:
            return self._answer(members, now, 0.0, members)
        if self._window.group_is_due(now):
            for held in self._merging.merge():
                self._report(held.push, None, now, held.staleness)
        speeds = {worker: self._pacing.rate(worker) for worker, session in self._live.items() if not session.final}
        progress = self._progress.at(now, speeds)
        # If all workers have equal rounds and wait for each other, their last rounds are equal, too.
        equal_rounds = self._window.lock_step and not self._pacing.dynamic
        shares = self._pacing.sizes.equal_steps(speeds) if equal_rounds else speeds
        due = self._window.due(now)
        for worker in due:
            if self.stopping or self.finished:
                self._grants.refuse(worker)
            else:
                self._grants.dispatch(worker, self.model.version, now, shares)
        self.model.set_local_steps(self._pacing.local_steps)
        dispatched = [worker for worker in due if self._live[worker].computing]
        if dispatched:
            self._recalls.begin(now)
            self._merging.keep_base(*self.membership.bases)
        self._window.close_after_dispatch(now)
        self._recalls.recall_unknown_speeds()
        if self.finished:
            answered = due  # Workers that were away, or whose final model was lost.
        elif self._all_rest():
            self.membership.finished = True
            answered = self.live
        else:
            answered = dispatched
        return self._answer(answered, now, progress)

    # --------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a new server needs to continue, as plain values and tensors.

        Quarantines are not part of the state: a worker that joins a new server is a new process.
        """
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return {**parts, **self._stats.state_dict(), **self.membership.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state``. All workers must join again."""
        for name, part in self._parts.items():
            part.load_state_dict(state.get(name, {}))
        self._stats.load_state_dict(state)
        self.membership.load_state_dict(state)
        self._progress.reset()

    # ----------------------------------------------------------- steps of a push

    def _check(self, push: Push, gradient: Tensor | None, session: WorkerSession) -> Rejection | None:
        """Return why a push must not be merged, as far as its header says."""
        if push.incarnation != self.incarnation:
            return rejections.WRONG_INCARNATION
        if self.finished:
            return rejections.TOO_LATE
        # Any of the bases, in any state: the worker may have sent this push before it received a repeated answer.
        if push.base_version not in session.bases:
            return rejections.wrong_base(push.base_version)
        if (rejection := self.beginning.rejection(push, session)) is not None:
            return rejection
        return rejections.check_header(push, gradient, self.model.layout.numel) or self._leases.rejection(
            push.worker, push.items_used
        )

    def _merge(
        self, push: Push, gradient: Tensor | None, result: Tensor | None, session: WorkerSession
    ) -> Rejection | None:
        """Merge or hold what a push hands in, and return None, or why it is refused."""
        if not push.has_data:
            return None
        assert gradient is not None
        norm = self.model.inspect(gradient)
        if norm.diverged is not None:
            return rejections.diverged(norm.diverged)
        is_round, factor = push.contents == "round", 1.0
        if is_round:
            verdict = self._guard.judge(push.worker, norm.norm, push.steps, push.base_version, len(self._live))
            if verdict.refusal is not None:
                return rejections.norm_too_large(verdict.refusal)
            factor = verdict.factor
        self._pacing.observe(push.worker, push.timed_steps, push.compute_seconds)
        self._pacing.observe_exchange(push.worker, push.sequence, push.exchange_seconds, push.answer_seconds)
        session.exchange_seconds, session.wait_seconds = push.exchange_seconds, push.wait_seconds
        staleness = self.model.version - push.base_version
        if is_round:
            rejection = self._merging.hold_or_apply(push, gradient, norm, self._live, result, factor)
        else:
            rejection = self.beginning.merge(push, gradient)
        if rejection is None and push.steps > 0:
            session.staleness = staleness
            self._stats.record_merge(push, norm, staleness, len(self._live))
        return rejection

    def _record(self, push: Push, rejection: Rejection | None, session: WorkerSession, now: float) -> None:
        """Record a decided push: its outcome, steps, items and metrics, and the worker's wish to stop."""
        worker = push.worker
        session.sequence = push.sequence
        session.rejection = rejection
        session.reset_optimizer = False
        session.bases.clear()
        counts_steps = rejection is None or rejection.counts_steps
        if push.metrics and counts_steps:
            self.observers.on_metrics(worker, push.metrics)
        if push.optimizer_file and (rejection is None or not rejection.untrusted):
            self.membership.optimizer_files[worker] = push.optimizer_file
        self._grants.complete(push, session, counts_steps, now)
        self._leases.complete_round(worker, push.items_used, consumed=counts_steps)
        held = self._merging.held.get(worker)
        if held is None or held.push is not push:
            self._report(push, rejection, now, session.staleness)
        if push.request_stop:
            self._stop_requested = True
            host = self._live.get(HOST)
            if host is not None and host.computing:
                host.recalled = True  # It decides at the end of its round, on the latest progress.
        if push.stop:
            self._stop(now)

    def _answer_again(self, push: Push, session: WorkerSession, now: float) -> None:
        """Handle a push that was decided on before. Only the latest one is answered again."""
        if push.sequence < session.sequence:
            self._report(push, rejections.REPEATED, now)
            return
        if session.rejection is None:
            session.rejection = rejections.REPEATED
        self._report(push, session.rejection, now, again=True)
        if session.computing and self.beginning.repeat(push.worker, push.sequence):
            return
        if session.computing or self.finished:
            self._await_dispatch(push, session, now)

    def _await_dispatch(self, push: Push, session: WorkerSession, now: float) -> None:
        """Let the worker wait for its group, or for the dispatch window that its arrival may open."""
        round_seconds = session.arrive(now)
        session.final = session.final or push.final
        if self.beginning.on:
            self.beginning.arrive(push, session.rejection)
            return
        self._recalls.arrive(session, push.steps > 0 and session.rejection is None, now)
        self._window.arrive(push.worker, session, round_seconds, now)

    def _report(
        self, push: Push, rejection: Rejection | None, now: float, staleness: int = 0, again: bool = False
    ) -> None:
        """Count a decided push, and notify the observers of its outcome."""
        if rejection is not None and (not again or rejection is rejections.REPEATED):
            self._stats.record_rejection(push, rejection)
        self.observers.on_push(self._stats.outcome(push, rejection, self.model.version, staleness, now))

    # ------------------------------------------------------- parts of a dispatch

    def _answer(
        self, workers: Iterable[int], now: float, progress: float, fields: Mapping[int, dict[str, Any]] | None = None
    ) -> dict[int, Reply]:
        """Return the replies of workers, with further fields of each, and notify the observers."""
        replies = {
            worker: dataclasses.replace(
                self._replies.make(worker, now, progress, self.broadcast, self.save_request),
                **(fields or {}).get(worker, {}),
            )
            for worker in workers
        }
        self.observers.on_event(Event("dispatch", now, {"replies": replies}))
        return replies

    def _all_rest(self) -> bool:
        return bool(self._live) and all(session.resting for session in self._live.values())

    def _update_minimum(self, now: float) -> None:
        """Begin or end a pause, after something has happened to a worker or to the budget."""
        done = self.finished or self.budget.exhausted
        done = done or (bool(self._live) and all(session.final for session in self._live.values()))
        if self.membership.started:
            self.minimum.update(len(self._live), now, steps_left=not done)

    def _stop(self, now: float) -> None:
        self.stopping = True
        self.budget.stop()
        self.minimum.end(now)
