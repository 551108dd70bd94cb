"""Lets workers in and takes them out, and tells the parts of the server that count on them.

Whoever is gone may come back for as long as no newer session has taken its place: its round counts when it is handed
in, unless the data of that round has gone to others meanwhile.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.membership import Member, Membership
from lightning_async_localsgd.objections import not_live

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_async_localsgd.budget import Budget
    from lightning_async_localsgd.global_model import GlobalModel
    from lightning_async_localsgd.guard import Conduct
    from lightning_async_localsgd.messages import Hello
    from lightning_async_localsgd.pacing import SpeedAwareSteps
    from lightning_async_localsgd.records import Records
    from lightning_async_localsgd.sharding import DataLeases

_log = logging.getLogger(__name__)

MOST_STRANGERS = 1024
"""Of those who have joined a run that was under way and are gone, so many are remembered, each with what it has done
and where its session was. Of earlier ones only the sum is kept, and their sessions don't come back."""


class Attendance:
    """Who takes part, from the beginning or later, for good or for a while.

    Args:
        cohort: workers that the run is started with.
        model: counts on the live workers.
        budget: holds steps for them.
        pacing: knows their speeds.
        leases: has given them data.
        conduct: what their pushes were like.
        records: what they have done.

    Attributes:
        live: the live sessions by number.
        started: the whole cohort has been there.
        finished: training is over.
        quarantined: the workers that are refused for the rest of the run, and why.
        inner_states: where each worker has last saved its inner optimizers' states, see :attr:`.Push.inner`.

    """

    def __init__(
        self,
        cohort: int,
        model: GlobalModel,
        budget: Budget,
        pacing: SpeedAwareSteps,
        leases: DataLeases,
        conduct: Conduct,
        records: Records,
    ) -> None:
        self.started = False
        self.finished = False
        self.quarantined: dict[int, str] = {}
        self.inner_states: dict[int, str] = {}
        self._membership = Membership(cohort)
        self.live = self._membership.live
        self._model = model
        self._budget = budget
        self._pacing = pacing
        self._leases = leases
        self._conduct = conduct
        self._records = records

    # ------------------------------------------------------------------ who may

    @property
    def missing(self) -> list[int]:
        """The workers of the cohort that have not joined yet; empty once training has started."""
        return [] if self.started else self._membership.missing

    @property
    def departed(self) -> frozenset[int]:
        """The workers that are gone and whose sessions may come back."""
        return self._membership.departed

    @property
    def bases(self) -> tuple[list[int], list[int]]:
        """The versions that live workers may be computing on, and those that workers which are gone may."""
        return self._membership.bases

    def new_number(self) -> int:
        """A number for somebody who has not been there from the beginning. No number is given twice in a run."""
        return self._membership.new_number()

    def refuses(self, worker: int) -> str | None:
        """Why nobody can join as ``worker`` any more; None if somebody can."""
        if self.finished:
            return f"training is over; worker {worker} came too late to take part"
        if not self._membership.knows(worker):
            return (
                f"there is no worker {worker} in this run; whoever joins it later is given a number if "
                "ASYNC_LOCALSGD_JOIN has the server's address"
            )
        return self.quarantined.get(worker)

    def refuses_lease(self, worker: int, session: str) -> str | None:
        """Why a session is given no data; None if it is live, or has departed and may come back."""
        if self._membership.find(worker, session) or self._membership.find_departed(worker, session):
            return None
        return self.quarantined.get(worker) or not_live(worker, session).text

    # ------------------------------------------------------------------- events

    def join(self, hello: Hello, now: float) -> str | None:
        """See :meth:`.Coordinator.join`."""
        worker, session = hello.worker, hello.session
        reason = self._membership.objection(hello)
        if reason is not None:
            return reason
        member = self.find(worker, session, now)
        if member is None:
            over = hello.rejoining or self._membership.is_over(worker, session)
            reason = self.quarantined.get(worker) or (not_live(worker, session).text if over else self.refuses(worker))
            if reason is None:
                self._enter(worker, session, now)
            return reason
        if hello.rejoining:
            # Only its connection was lost, and the push that follows is answered.
            if member.state == "waiting":
                member.state = "computing"
        elif member.state == "computing" or self.finished:
            member.state = "waiting"  # Its first dispatch was lost on the way: it gets another.
            self._budget.release(worker)
        return None

    def find(self, worker: int, session: str, now: float) -> Member | None:
        """A session that shows a sign of life. If it had departed it goes on where it was.

        Returns:
            None if it cannot: it has never joined, a newer one has taken its place, or it is in quarantine.

        """
        member = self._membership.find(worker, session)
        if member is not None or self._membership.find_departed(worker, session) is None:
            return member
        member = self._membership.bring_back(worker)
        self._leases.unpark(worker)
        if worker == 0:
            self._leases.lead(0)
        if not self.finished:
            _log.warning("worker %d is back and goes on where it was", worker)
            if member.state == "computing":
                self._budget.resume(worker, member.local_steps, now)
        self._count()
        return member

    def leave(self, worker: int, session: str, reason: str) -> bool:
        """See :meth:`.Coordinator.leave`."""
        if self._membership.find(worker, session) is None:
            return False
        self._leases.park(worker)
        self._membership.depart(worker)
        if not self.finished:
            self._records.of(worker).departures += 1
            _log.warning("worker %d left the run (%s); %d go on", worker, reason, len(self.live))
        self._gone(worker)
        self._forget_strangers()
        return True

    def quarantine(self, worker: int, offences: str) -> str:
        """The worker has no part in the rest of the run, under whatever session.

        Args:
            worker: its number.
            offences: what it has done, in words.

        Returns:
            The same for whoever has to know.

        """
        reason = (
            f"worker {worker} is quarantined for the rest of the run: {offences}, though each round began with a fresh "
            "global model; its optimizer's state is probably broken, or its machine is: lower the learning rate, clip "
            "gradients, or look at the data that this worker got"
        )
        _log.error("%s", reason)
        self.quarantined[worker] = reason
        self._membership.end(worker)
        self._leases.forget(worker)
        self._gone(worker)
        return reason

    def wake(self) -> None:
        """Steps may be free again: whoever rested for want of steps may take them."""
        if not self.finished and not self._budget.exhausted:
            for member in self.live.values():
                if member.state == "resting" and not member.final:
                    member.state = "waiting"

    # -------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What outlives the server, of JSON's types.

        A quarantine does not: whoever joins the server's successor is a new process.
        """
        return {
            "next_number": self._membership.next_number,
            "inner_states": {str(worker): name for worker, name in self.inner_states.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the numbers in ``state``, once those of :class:`.Records` are there; workers join anew."""
        known = (
            self._membership.next_number,
            int(state.get("next_number", 0)),
            1 + max(self._records.totals, default=-1),
        )
        self._membership.next_number = max(known)
        self.inner_states = {int(worker): str(name) for worker, name in state.get("inner_states", {}).items()}
        self._forget_strangers()

    # ----------------------------------------------------------------- internal

    def _enter(self, worker: int, session: str, now: float) -> None:
        """A new session takes part, in the place of any older one of this worker."""
        if worker in self.live:
            _log.warning(
                "worker %d is there with a newer session; what the older one has not handed in is lost", worker
            )
            self._budget.release(worker)
            self._records.forget_view(worker)
        if worker in self.live or worker in self._membership.departed:
            # Another process may be of another speed. Of the first one, a resumed run knows it already.
            self._pacing.forget(worker)
        self._membership.enter(worker, session, now)
        self._leases.forget(worker)
        if worker == 0:
            self._leases.lead(0)
        self._records.of(worker).sessions += 1
        if self.started:
            _log.warning("worker %d has joined the run; %d take part", worker, len(self.live))
        self._count()
        self.wake()

    def _gone(self, worker: int) -> None:
        """Somebody is not live any more; what that changes for the others."""
        self._records.forget_view(worker)
        self._budget.release(worker)
        self._count()
        self.wake()

    def _count(self) -> None:
        """The number of live workers may have changed."""
        self.started = self.started or not self._membership.missing
        if self.started and self.live and not self.finished:
            self._model.set_workers(len(self.live))

    def _forget_strangers(self) -> None:
        """Keeps what is remembered of workers that came and went within bounds, in a run of any length."""
        gone = [n for n in self._records.totals if self._membership.is_stranger(n) and n not in self.live]
        oldest = sorted(gone)[: max(0, len(gone) - MOST_STRANGERS)]
        self._records.merge(oldest)
        for worker in oldest:
            self._membership.forget(worker)
            self._leases.forget(worker)
            self._pacing.forget(worker)
            self._conduct.forget(worker)
            self.quarantined.pop(worker, None)
            self.inner_states.pop(worker, None)
