"""How long workers that have pushed wait for others: for the rest of their group, and for the grace window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_async_localsgd.policies.grace import Pending
from lightning_async_localsgd.server.recalls import HOST

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_async_localsgd.policies.budget import Budget
    from lightning_async_localsgd.policies.grace import GraceWindow, Plan
    from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
    from lightning_async_localsgd.policies.worker_minimum import WorkerMinimum
    from lightning_async_localsgd.server.merging import Merging
    from lightning_async_localsgd.server.recalls import Recalls
    from lightning_async_localsgd.server.sessions import WorkerSession

_MAX_ROUND_RATIO = 1.5
"""Longest round that a grace window is planned with, relative to the expected one. Speeds vary; what is longer was
caused by something else than the round."""


class DispatchWindow:
    """The wait between pushes and their dispatch. Reads sessions, and changes none.

    Without groups, the window opens with the first arrival. With groups, it opens when a group has all the pushes that
    it needs.

    Args:
        live: live sessions by worker.
        grace: plans grace windows.
        pacing: predicts when rounds end.
        budget: knows whether there are steps left.
        merging: holds the group.
        recalls: knows whether rank 0's worker waits for recalled workers.
        minimum: knows whether training is paused. Then no worker is due that needs steps. Groups are merged as usual.

    """

    def __init__(
        self,
        live: Mapping[int, WorkerSession],
        grace: GraceWindow,
        pacing: SpeedAwareSteps,
        budget: Budget,
        merging: Merging,
        recalls: Recalls,
        minimum: WorkerMinimum,
    ) -> None:
        self._live = live
        self._grace = grace
        self._pacing = pacing
        self._budget = budget
        self._merging = merging
        self._recalls = recalls
        self._minimum = minimum
        self._plan: Plan | None = None

    @property
    def lock_step(self) -> bool:
        """Whether all live workers wait for each other without a time limit."""
        live = len(self._live)
        return not self._merging.limited and 1 < live <= self._merging.quorum(live)

    @property
    def deadline(self) -> float | None:
        """When the group, the window or the wait for recalled workers ends at the latest; None without time limits."""
        limits = [] if self._merging.deadline is None or not self._live else [self._merging.deadline]
        waiting = self._waiting
        # In a pause, the window may be over and have no worker to dispatch.
        window = [self._plan.deadline] if self._plan is not None and (waiting or self._merging.held) else []
        wait_ends = self._recalls.deadline if HOST in waiting else None
        if wait_ends is not None:
            limits.append(max([wait_ends, *window]))
        if wait_ends is None or waiting != [HOST] or self._merging.held:
            limits += window
        return min(limits, default=None)

    def arrive(self, worker: int, session: WorkerSession, round_seconds: float, now: float) -> None:
        """Handle the arrival of a worker, which may open a window.

        Args:
            worker: the worker's number.
            session: the worker's session.
            round_seconds: seconds that its round took.
            now: seconds.

        """
        held = self._merging.held
        self._merging.start_timer(now)
        if self._plan is not None or session.rejection is not None:
            return
        if held or self._merging.quorum(len(self._live)) > 1:
            if worker not in held or not self._group_is_complete():
                return
        elif self._budget.exhausted or session.final:
            return
        pending = [
            Pending(number, other.began_at, self._expected_seconds(number, other))
            for number, other in self._live.items()
            if other.computing and not other.interrupted and number not in held
        ]
        expected = self._expected_seconds(worker, session)
        if expected is not None:
            # If the worker was frozen, or its dispatch was slow, it must not wait longer because of that.
            round_seconds = min(round_seconds, _MAX_ROUND_RATIO * expected)
        self._plan = self._grace.plan(now, round_seconds, pending)

    def awaits_group(self, worker: int) -> bool:
        """Return whether the worker's push is held for its group."""
        return worker in self._merging.held

    def group_is_due(self, now: float) -> bool:
        """Return whether a group must be merged now."""
        if not self._merging.held or not self._live:
            return False
        limit = self._merging.deadline
        if limit is not None and now >= limit:
            return True
        return (self._plan is not None or self._group_is_complete()) and self._is_closed(now)

    def is_over(self, now: float) -> bool:
        """Return whether a worker that waits for no group must be dispatched now."""
        return bool(self.due(now)) and (bool(self._merging.held) or self._is_closed(now))

    def due(self, now: float) -> list[int]:
        """Return the workers that wait for neither their group, the end of a pause, nor recalled workers."""
        return [worker for worker in self._waiting if not (worker == HOST and self._recalls.host_waits(now))]

    def close_after_dispatch(self, now: float) -> None:
        """Close the window, unless a group is held, because all workers that wait for no group were dispatched."""
        if not self._merging.held:
            self._plan = None
        self._merging.start_timer(now)  # A group from a checkpoint has no time limit before.

    def close_if_unused(self) -> None:
        """Close the window if no worker waits any more."""
        if not any(session.waiting for session in self._live.values()):
            self._plan = None

    @property
    def _waiting(self) -> list[int]:
        """Workers that wait neither for their group nor for the end of a pause, in order of their numbers."""
        return [
            worker
            for worker, session in sorted(self._live.items())
            if session.waiting and not self.awaits_group(worker) and (session.final or not self._minimum.paused)
        ]

    def _is_closed(self, now: float) -> bool:
        plan = self._plan
        if plan is None or now >= plan.deadline:
            return True
        return not any(
            session.computing and not session.interrupted and worker in plan.expected
            for worker, session in self._live.items()
        )

    def _group_is_complete(self) -> bool:
        """Return whether the group has all the pushes that it needs.

        Interrupted workers are waited for, too. Workers that rest or have left are not.
        """
        awaited = sum(
            session.computing or (session.waiting and not (session.final or self._budget.exhausted))
            for worker, session in self._live.items()
            if not self.awaits_group(worker)
        )
        return self._merging.is_complete(self._live, awaited)

    def _expected_seconds(self, worker: int, session: WorkerSession) -> float | None:
        speed = self._pacing.speed(worker)
        return None if speed is None else session.local_steps / speed + session.exchange_seconds
