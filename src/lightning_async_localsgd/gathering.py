"""For how long those who have handed in wait for others: for the rest of their group, and for the grace window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_async_localsgd.grace import Pending

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_async_localsgd.budget import Budget
    from lightning_async_localsgd.grace import GraceWindow, Plan
    from lightning_async_localsgd.membership import Member
    from lightning_async_localsgd.merging import Merging
    from lightning_async_localsgd.pacing import SpeedAwareSteps

_UNUSUAL = 1.5
"""A round may take half as long again as usual: speeds vary. What is more than that is not the round's own."""


class Gathering:
    """Who is waited for, as things are; it changes no member.

    Without groups the window opens with the first arrival. A group has its window when it has the pushes that it needs.

    Args:
        members: the live members by number.
        grace: plans windows.
        pacing: tells when rounds should end.
        budget: tells who may be given steps.
        merging: has the group.

    """

    def __init__(
        self,
        members: Mapping[int, Member],
        grace: GraceWindow,
        pacing: SpeedAwareSteps,
        budget: Budget,
        merging: Merging,
    ) -> None:
        self._members = members
        self._grace = grace
        self._pacing = pacing
        self._budget = budget
        self._merging = merging
        self._window: Plan | None = None

    @property
    def lock_step(self) -> bool:
        """Whether all live workers wait for each other, however long it takes."""
        live = len(self._members)
        return not self._merging.limited and 1 < live <= self._merging.quorum(live, self._budget.done)

    @property
    def deadline(self) -> float | None:
        """When somebody will have waited long enough."""
        limit = self._merging.deadline if self._members else None
        if self._window is None:
            return limit
        return self._window.deadline if limit is None else min(limit, self._window.deadline)

    def arrive(self, worker: int, member: Member, round_seconds: float, now: float) -> None:
        """A worker waits from now on, which may open a window.

        Args:
            worker: its number.
            member: the worker.
            round_seconds: that its round took.
            now: seconds.

        """
        held = self._merging.held
        self._merging.open(now)
        if self._window is not None or member.answer is not None:
            return
        if held or self._merging.quorum(len(self._members), self._budget.done) > 1:
            if worker not in held or not self._is_complete():
                return
        elif self._budget.exhausted or member.final:
            return
        pending = [
            Pending(number, other.dispatched_at, self._expected_seconds(number, other))
            for number, other in self._members.items()
            if other.state == "computing" and other.paused_at is None and number not in held
        ]
        usual = self._expected_seconds(worker, member)
        if usual is not None:
            # One that was frozen, or whose dispatch was long on its way, is not to wait the longer for it.
            round_seconds = min(round_seconds, _UNUSUAL * usual)
        self._window = self._grace.plan(now, round_seconds, pending)

    def waits(self, worker: int) -> bool:
        """Whether the worker waits for its group."""
        return worker in self._merging.held

    def is_due(self, now: float) -> bool:
        """Whether there is a group, and it is to be merged now."""
        if not self._merging.held or not self._members:
            return False
        limit = self._merging.deadline
        if limit is not None and now >= limit:
            return True
        return (self._window is not None or self._is_complete()) and self._is_closed(now)

    def is_over(self, now: float) -> bool:
        """Whether somebody who waits, and not for a group, is to be dispatched now."""
        free = any(member.state == "waiting" and not self.waits(worker) for worker, member in self._members.items())
        return free and (bool(self._merging.held) or self._is_closed(now))

    def dispatched(self, now: float) -> None:
        """Those who did not wait for a group have been dispatched."""
        if not self._merging.held:
            self._window = None
        self._merging.open(now)  # One that was restored.

    def somebody_left(self) -> None:
        """Somebody is gone, or does not wait any more: the window is closed if nobody does."""
        if not any(member.state == "waiting" for member in self._members.values()):
            self._window = None

    def _is_closed(self, now: float) -> bool:
        window = self._window
        if window is None or now >= window.deadline:
            return True
        return not any(
            member.state == "computing" and member.paused_at is None and worker in window.expected
            for worker, member in self._members.items()
        )

    def _is_complete(self) -> bool:
        """Whether those who are there have handed in the pushes that the group needs.

        Whoever validates or saves is waited for like others; whoever rests, or is gone, is not.
        """
        awaited = sum(
            member.state == "computing" or (member.state == "waiting" and not (member.final or self._budget.exhausted))
            for worker, member in self._members.items()
            if not self.waits(worker)
        )
        return self._merging.complete(self._members, awaited, self._budget.done)

    def _expected_seconds(self, worker: int, member: Member) -> float | None:
        speed = self._pacing.speed(worker)
        return None if speed is None else member.local_steps / speed + member.exchange_seconds
