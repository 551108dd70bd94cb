"""Admits workers, removes them, and updates the parts of the server that depend on who takes part.

A worker that left may come back as long as no newer session has replaced its own. Its round counts when it is pushed,
unless the data of that round was leased to other workers meanwhile.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from lightning_async_localsgd.protocol.messages import DOES_NOT_FIT
from lightning_async_localsgd.protocol.rejections import Rejection, inactive_session, quarantined
from lightning_async_localsgd.protocol.traits import WorkerTraits, shuffle_digest
from lightning_async_localsgd.server.sessions import SessionTable, WorkerSession

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_async_localsgd.policies.budget import Budget
    from lightning_async_localsgd.policies.data_leases import DataLeases
    from lightning_async_localsgd.policies.guard import StrikeCounter
    from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
    from lightning_async_localsgd.policies.step_sizes import StepSizes
    from lightning_async_localsgd.protocol.messages import Hello
    from lightning_async_localsgd.server.global_model import GlobalModel
    from lightning_async_localsgd.server.run_stats import RunStats

_log = logging.getLogger(__name__)

MAX_LATE_JOINERS = 1024
"""Number of late joiners that are remembered after they left, with their totals and sessions. Of earlier ones only the
sum of the totals is kept, and their sessions cannot come back."""

_RESERVED_SECONDS = 60.0
"""Seconds in which the number of an expected worker is given to no other process, though none has joined with it yet.
A process gets its number before it sets up its model and its data."""


class Membership:
    """Keeps who takes part in the run: initial workers and late joiners, live, departed or quarantined.

    Args:
        cohort: number of workers that must be there at the start, with the numbers 0, 1, ...
        model: its outer optimizer depends on the number of live workers.
        budget: has reserved steps for the workers.
        pacing: has measured the workers' speeds.
        leases: has leased data to the workers.
        strikes: counts the workers' strikes.
        stats: totals of the workers.
        expected: number of workers that must be live at the start, if that is more than ``cohort``.

    Attributes:
        cohort: see above.
        expected: number of workers with which the run begins.
        live: live sessions by worker.
        started: whether these workers have joined.
        finished: whether all workers have been sent the final model.
        stayed: workers that have left after the end of training.
        quarantined: why each quarantined worker is refused for the rest of the run.
        optimizer_files: the last :attr:`.Push.optimizer_file` of each worker.

    """

    def __init__(
        self,
        cohort: int,
        model: GlobalModel,
        budget: Budget,
        pacing: SpeedAwareSteps,
        leases: DataLeases,
        strikes: StrikeCounter,
        stats: RunStats,
        expected: int = 0,
    ) -> None:
        self.cohort = cohort
        self.expected = max(cohort, expected)
        self.started = False
        self.finished = False
        self.stayed: set[int] = set()
        self.quarantined: dict[int, str] = {}
        self.optimizer_files: dict[int, str] = {}
        self._sessions = SessionTable(cohort)
        # A resumed run gives the workers that it waits for the numbers that they had before.
        self._given_at = dict.fromkeys(range(cohort, self.expected), -math.inf)
        self._sessions.next_number = self.expected
        self.live = self._sessions.live
        self._model = model
        self._budget = budget
        self._pacing = pacing
        self._leases = leases
        self._strikes = strikes
        self._stats = stats

    # ------------------------------------------------------------------- queries

    @property
    def sizes(self) -> StepSizes:
        """What progress is counted in, and the steps of each worker."""
        return self._pacing.sizes

    @property
    def missing(self) -> list[int]:
        """Workers of the cohort that have not joined yet; empty once training has started."""
        return [] if self.started else self._sessions.missing

    @property
    def missing_count(self) -> int:
        """Number of workers that have to join before training starts."""
        return 0 if self.started else max(len(self.missing), self.expected - len(self.live))

    @property
    def departed(self) -> frozenset[int]:
        """Workers that left and whose sessions may come back."""
        return self._sessions.departed

    def is_unfit(self, worker: int, reason: str) -> bool:
        """Return whether a worker of the beginning has left because not even its first batches fit into its memory."""
        never_pushed = worker < self.expected and self._stats.of(worker).rounds == 0
        return self.sizes.counts_samples and never_pushed and DOES_NOT_FIT in reason

    @property
    def bases(self) -> tuple[list[int], list[int]]:
        """Versions that live workers may be computing on, and those that departed workers may."""
        return self._sessions.bases

    def new_number(self, now: float) -> int:
        """Return a number for a worker that joins.

        Before training starts, this is the number of an expected worker, as long as there is one that no live worker
        has and that was not given to another process just now. An attempt to join that fails thus uses up no number.
        All other numbers are new in the run.
        """
        free = [
            (given_at, number)
            for number, given_at in self._given_at.items()
            if number not in self.live and now - given_at >= _RESERVED_SECONDS
        ]
        if self.started or not free:
            return self._sessions.new_number()
        _, number = min(free)
        self._given_at[number] = now
        return number

    def admit(self, worker: int, now: float) -> tuple[int, str | None]:
        """Return the number of a process that asks to join, and why it cannot join; None if it can.

        Args:
            worker: number of the worker whose process is replaced; -1 for a new worker.
            now: seconds.

        """
        if worker != -1:
            return worker, self.check_number(worker)
        return (worker, "training is over") if self.finished else (self.new_number(now), None)

    def check_number(self, worker: int) -> str | None:
        """Return why no process can join as ``worker`` any more; None if one can."""
        if self.finished:
            return f"training is over; worker {worker} came too late to take part"
        if not self._sessions.knows(worker):
            return (
                f"there is no worker {worker} in this run; to join a running run, set ASYNC_LOCALSGD_JOIN to the "
                "server's address, and the server chooses the number"
            )
        return self.quarantined.get(worker)

    def check_lease(self, worker: int, session_id: str) -> str | None:
        """Return why a session gets no data; None if it is live, or departed and may come back."""
        if self._sessions.find(worker, session_id) or self._sessions.find_departed(worker, session_id):
            return None
        return self.session_rejection(worker, session_id).text

    def session_rejection(self, worker: int, session_id: str) -> Rejection:
        """Return the rejection of everything that a session sends that cannot take part."""
        reason = self.quarantined.get(worker)
        return inactive_session(worker, session_id) if reason is None else quarantined(reason)

    # -------------------------------------------------------------------- events

    def join(self, hello: Hello, now: float) -> str | None:
        """See :meth:`.Coordinator.join`."""
        worker, session_id = hello.worker, hello.session
        reason = self._sessions.check_protocol(hello)
        if reason is not None:
            return reason
        session = self.find(worker, session_id, now)
        if session is None:
            ended = hello.reconnecting or self._sessions.is_replaced(worker, session_id)
            reason = self.quarantined.get(worker) or (
                inactive_session(worker, session_id).text if ended else self.check_number(worker)
            )
            reason = reason or self._check_step(hello)
            if reason is None:
                self.sizes.announce(worker, hello.step_samples)
                self._enter(worker, session_id, now)
                self._note_traits(worker, WorkerTraits.of(hello))
            return reason
        if hello.reconnecting:
            session.expect_push_again()
        elif session.computing or self.finished:
            session.dispatch_again()
            self._budget.release(worker)
        return None

    def find(self, worker: int, session_id: str, now: float) -> WorkerSession | None:
        """Return the session of a worker that has sent something, and make it live again if it has departed.

        Returns:
            None if the session cannot take part: it never joined, a newer one has replaced it, or its worker is in
            quarantine.

        """
        session = self._sessions.find(worker, session_id)
        if session is not None or self._sessions.find_departed(worker, session_id) is None:
            return session
        session = self._sessions.bring_back(worker)
        self._leases.unpark(worker)
        if worker == 0:
            self._leases.lead(0)
        if not self.finished:
            _log.warning("worker %d is back and continues its round", worker)
            steps = session.begun_steps
            if session.computing:
                steps = max(steps, session.local_steps) + session.overlap_steps
            if steps > 0:
                self._budget.reserve(worker, steps * self.sizes.of(worker), now)
        self._update_worker_count()
        return session

    def leave(self, worker: int, session_id: str, reason: str) -> bool:
        """See :meth:`.Coordinator.leave`."""
        if self._sessions.find(worker, session_id) is None:
            return False
        self._leases.park(worker)
        self._sessions.depart(worker)
        if self.finished:
            self.stayed.add(worker)
        else:
            self._stats.of(worker).departures += 1
            _log.warning("worker %d left the run (%s); %d go on", worker, reason, len(self.live))
        self._after_removal(worker)
        self._forget_late_joiners()
        return True

    def quarantine(self, worker: int, strikes_text: str, advice: str) -> str:
        """Refuse a worker for the rest of the run, whatever its session.

        Args:
            worker: the worker's number.
            strikes_text: what the worker did.
            advice: the probable cause, and what to do.

        Returns:
            The reason for the log and for the worker.

        """
        reason = f"worker {worker} is quarantined for the rest of the run: {strikes_text}, {advice}"
        _log.error("%s", reason)
        self.quarantined[worker] = reason
        self._sessions.end(worker)
        self._leases.forget(worker)
        self._after_removal(worker)
        return reason

    def wake(self) -> None:
        """Let resting workers wait for a dispatch, because local steps may have become free."""
        if not self.finished and not self._budget.exhausted:
            for session in self.live.values():
                session.wake()

    # --------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return what outlives the server, as JSON types.

        Quarantines do not: a worker that joins the server's successor is a new process.
        """
        return {
            "next_number": self._sessions.next_number,
            "optimizer_files": {str(worker): name for worker, name in self.optimizer_files.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``, after that of :class:`.RunStats`. Workers must join again."""
        known = (
            self._sessions.next_number,
            int(state.get("next_number", 0)),
            1 + max(self._stats.totals, default=-1),
        )
        self._sessions.next_number = max(known)
        self.optimizer_files = {int(worker): str(name) for worker, name in state.get("optimizer_files", {}).items()}
        self._forget_late_joiners()

    # ------------------------------------------------------------------ internal

    def _check_step(self, hello: Hello) -> str | None:
        """Return why a worker cannot take part whose steps are counted in another way; None if it can."""
        if self.sizes.counts_samples == (hello.step_samples > 0):
            return None
        run, worker = ("has", "has not") if self.sizes.counts_samples else ("has not", "has")
        return (
            f"the run {run} the option batch_size and worker {hello.worker} {worker}; use the same option on every host"
        )

    def _enter(self, worker: int, session_id: str, now: float) -> None:
        """Admit a new session, which replaces an older one of the worker."""
        if worker in self.live:
            _log.warning(
                "worker %d has joined with a newer session; the unfinished round of its older one is lost", worker
            )
            self._budget.release(worker)
            self._stats.forget_view(worker)
        if worker in self.live or worker in self._sessions.departed:
            # The new process may have another speed. A resumed run restores the speed of the first one.
            self._pacing.forget(worker)
        self._sessions.enter(worker, session_id, now)
        self._leases.forget(worker)
        if worker == 0:
            self._leases.lead(0)
        self._stats.of(worker).sessions += 1
        if self.started:
            _log.warning("worker %d has joined the run; %d take part", worker, len(self.live))
        self._update_worker_count()
        self.wake()

    def _note_traits(self, worker: int, traits: WorkerTraits) -> None:
        """Note what a worker that has joined computes with."""
        self._stats.record_traits(worker, traits)
        if traits.shuffle not in ("", shuffle_digest()):
            _log.warning(
                "worker %d (%s, %s) shuffles in another order than rank 0 (torch %s): if the training data is "
                "shuffled, some samples are used twice in an epoch and others never. Use the same version of torch on "
                "all hosts", worker, traits.software, traits.system, torch.__version__,
            )  # fmt: skip

    def log_refusal(self, hello: Hello, reason: str) -> None:
        """Log why a process that wants to join is refused, because rank 0 may wait for it on another host."""
        if not hello.reconnecting and not self.finished:
            _log.warning("a process that wants to join as worker %d is refused: %s", hello.worker, reason)

    def _after_removal(self, worker: int) -> None:
        """Update everything that depends on a worker that is not live any more."""
        self._stats.forget_view(worker)
        self._budget.release(worker)
        self._update_worker_count()
        self.wake()

    def _update_worker_count(self) -> None:
        self.started = self.started or self.missing_count == 0
        if self.started and self.live and not self.finished:
            self._model.set_workers(len(self.live))

    def _forget_late_joiners(self) -> None:
        """Bound what is remembered of late joiners that left, so that a run can have any length."""
        departed = [n for n in self._stats.totals if self._sessions.is_late_joiner(n) and n not in self.live]
        oldest = sorted(departed)[: max(0, len(departed) - MAX_LATE_JOINERS)]
        self._stats.merge(oldest)
        for worker in oldest:
            self._sessions.forget(worker)
            self._leases.forget(worker)
            self._pacing.forget(worker)
            self._strikes.forget(worker)
            self.quarantined.pop(worker, None)
            self.optimizer_files.pop(worker, None)
