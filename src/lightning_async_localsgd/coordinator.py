"""What the server decides: who takes part, in which order pushes are applied, who is dispatched when and with what.

The coordinator is a state machine over the global model and the policies. It knows no thread, no socket and no clock:
every event comes with the time at which it happened, so that the live server and a simulated cluster run the very same
object, and the same events in the same order give the same global model to the last bit.

A worker is *computing* between a dispatch and its push, *waiting* from its push to its dispatch (for the grace window
to close, or for the others of its group), and *resting* when there are no local steps left to give it. When everybody
rests, training is over and all are handed the same final model. Whoever was away then is handed it, too, when it comes
back; what it had not handed in by then is refused.

Each push counts once: the last sequence number of each session is remembered, with what became of it, for as long as
the session may come back. A push that is sent again is answered again, and changes nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.attendance import Attendance
from lightning_async_localsgd.events import Event
from lightning_async_localsgd.gathering import Gathering
from lightning_async_localsgd.guard import Conduct, UpdateGuard
from lightning_async_localsgd.merging import Merging
from lightning_async_localsgd.messages import Lease, Reply
from lightning_async_localsgd.objections import (
    OTHER_INCARNATION,
    REPEATED,
    TOO_LATE,
    Objection,
    diverged,
    form_objection,
    not_live,
    other_base,
    quarantined,
    too_large,
)
from lightning_async_localsgd.records import Records, View, WorkerTotals, WorkerView, settled
from lightning_async_localsgd.sharding import DataLeases

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lightning_async_localsgd.budget import Budget
    from lightning_async_localsgd.global_model import GlobalModel
    from lightning_async_localsgd.grace import GraceWindow
    from lightning_async_localsgd.membership import Member
    from lightning_async_localsgd.messages import Hello, LeaseRequest, Push
    from lightning_async_localsgd.pacing import SpeedAwareSteps
    from lightning_async_localsgd.records import Settled

_log = logging.getLogger(__name__)

_HOST = 0
"""The worker in the server's own process, which also validates and saves: without it the run cannot go on."""


class Coordinator:
    """Membership, order of pushes, grace windows and dispatches over one global model.

    Call the event methods (:meth:`join`, :meth:`push`, :meth:`leave`, ...) as things happen, then, as long as
    :meth:`ready` says so, :meth:`dispatch`. With nothing happening, look again at :meth:`deadline`.

    Args:
        model: the global model, already loaded.
        pacing: local steps per worker (DyLU, the paper's equation 6).
        grace: the window in which arrivals are dispatched together (Algorithms 2 and 5).
        budget: local steps of all workers together.
        cohort: how many workers must have joined before the first dispatch; their numbers are 0, 1, ...
        incarnation: random name of this start of the server.
        guard: tells which pushes are too large; one with its own default if there is none.
        merging: makes outer steps of pushes; by default of each at once.

    Attributes:
        on_metrics: called with a worker's number and what its module has logged in a round, as the push has it.
        on_settled: called with each push that has been decided on.
        on_event: called with everything that happens, in order.
        shared: what every reply tells, see :class:`~lightning_async_localsgd.messages.Reply`.
        asked: likewise.
        attendance: who takes part.

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
    ) -> None:
        self.model = model
        self.budget = budget
        self.incarnation = incarnation
        self.on_metrics: Callable[[int, str], None] = lambda worker, text: None
        self.on_settled: Callable[[Settled], None] = lambda settled: None
        self.on_event: Callable[[Event], None] = lambda event: None
        self.shared = ""
        self.asked = 0
        self.stopping = False
        self._asked_to_stop = False
        self._pacing = pacing
        self._guard = guard if guard is not None else UpdateGuard()
        self._merging = merging if merging is not None else Merging(model, cohort)
        self._conduct = Conduct()
        self._leases = DataLeases(cohort)
        self._records = Records()
        self.attendance = Attendance(cohort, model, budget, pacing, self._leases, self._conduct, self._records)
        self._members = self.attendance.live
        self._gathering = Gathering(self._members, grace, pacing, budget, self._merging)
        self._progress = float(budget.done)
        self._latest_arrival = float("-inf")

    # ------------------------------------------------------------------ events

    def join(self, hello: Hello, now: float) -> str | None:
        """A worker introduces itself, for the first time or with a new session, which supersedes its older one.

        Returns:
            Why it is refused for good, or None: it waits for its dispatch.

        """
        self.on_event(Event("join", now, {"hello": hello}))
        refused = self.attendance.join(hello, now)
        # One that waited hands in again what was lost with its connection: it computes, as it were.
        self._gathering.somebody_left()
        return refused

    def revive(self, worker: int, session: str, now: float) -> bool:
        """A worker that was given up shows a sign of life: it goes on where it was.

        It may hand in the round that it was dispatched, or again what it has had no answer to.

        Returns:
            Whether the session is live. It cannot be once a newer one has taken its place, or if it is in quarantine.

        """
        self.on_event(Event("revive", now, {"worker": worker, "session": session}))
        return self.attendance.find(worker, session, now) is not None

    def session_of(self, worker: int) -> str | None:
        """The present session of a live worker; None if there is none."""
        member = self._members.get(worker)
        return None if member is None else member.session

    def push(self, push: Push, gradient: Tensor | None, now: float, result: Tensor | None = None) -> str | None:
        """A pseudo-gradient has arrived completely. It is applied at once, or held, or refused, counted and logged.

        Args:
            push: its header.
            gradient: flat fp32, as long as the global model; None with ``push.steps`` of 0.
            now: seconds.
            result: what theta - g is known to be exactly, where the outer step is just that (see
                :attr:`~lightning_async_localsgd.outer.OuterOptimizer.replaces_model`).

        Returns:
            Why this *session* is refused for good (another one has taken its place, or it is in quarantine), else None:
            the worker waits for its dispatch, whether its push was taken or not. Worker 0 is in quarantine only where
            it is the only one; otherwise its optimizer begins anew (:attr:`.Reply.renew`).

        """
        self.on_event(Event("push", now, {"push": push}))
        worker = push.worker
        member = self.attendance.find(worker, push.session, now)
        if member is None:
            return self._refuse_session(push, now)
        if push.sequence <= member.sequence:
            self._repeated(push, member, now)
            return None
        objection = self._objection(push, gradient, member)
        member.staleness = 0
        if objection is None and push.steps > 0:
            assert gradient is not None
            objection = self._apply(push, gradient, result, member)
        member.sequence = push.sequence
        member.answer = objection
        member.renew = False
        member.bases.clear()
        counts = objection is None or objection.counts
        if push.metrics and counts:
            self.on_metrics(worker, push.metrics)
        if push.inner and (objection is None or not objection.nonsense):
            self.attendance.inner_states[worker] = push.inner
        self.budget.settle(worker, push.steps if counts else 0)
        self._leases.settle(worker, push.used, consumed=counts)
        held = self._merging.held.get(worker)
        if held is None or held.push is not push:
            self._settle(push, objection, now, member.staleness)
        if push.asks:
            self._asked_to_stop = True
            host = self._members.get(_HOST)
            if host is not None and host.state == "computing":
                host.called_in = True  # To decide it has to know what has been taken, and who goes on.
        if push.stop:
            self._stop()
        offences = self._conduct.note(worker, objection is not None and objection.offence)
        if offences is not None:
            assert objection is not None
            offences = f"{offences} were refused (the last one: {objection.text})"
            if worker != _HOST or len(self._members) == 1:
                reason = self.attendance.quarantine(worker, offences)
                self._gathering.somebody_left()
                return reason
            self._conduct.forget(worker)
            member.renew = True
            _log.error(
                "worker %d: %s, though each round began with a fresh global model. The server is in its process, so it "
                "is not quarantined: its optimizer begins anew, and what it hands in goes on being looked at. Lower "
                "the learning rate, clip gradients, or look at the data that this worker got",
                worker, offences,
            )  # fmt: skip
        self._wait(push, member, now)
        self.attendance.wake()
        return None

    def leave(self, worker: int, session: str, now: float, reason: str) -> bool:
        """A worker is gone (it died, hung up, or was given up). Its session may come back, see :meth:`revive`.

        Returns:
            Whether it was a live worker's present session.

        """
        self.on_event(Event("leave", now, {"worker": worker, "session": session, "reason": reason}))
        live = self.attendance.leave(worker, session, reason)
        if live:
            self._gathering.somebody_left()
        return live

    def lease(self, request: LeaseRequest) -> Lease:
        """A worker asks for training data.

        So may one whose connection was lost: before it has some it cannot finish the round to come back with.
        """
        refused = self.attendance.refuses_lease(request.worker, request.session)
        if refused is not None:
            lease = Lease(request.number, request.epoch, 0, 0, refused)
        else:
            lease = self._leases.grant(request, len(self._members))
        self.on_event(Event("lease", content={"request": request, "lease": lease}))
        return lease

    def pause(self, worker: int, now: float) -> None:
        """A worker does something else (validates, saves): nobody waits for it until :meth:`resume`."""
        self.on_event(Event("pause", now, {"worker": worker}))
        member = self._members.get(worker)
        if member is not None and member.paused_at is None:
            member.paused_at = now

    def resume(self, worker: int, now: float) -> None:
        """A paused worker computes again."""
        self.on_event(Event("resume", now, {"worker": worker}))
        member = self._members.get(worker)
        if member is not None and member.paused_at is not None:
            member.dispatched_at += now - member.paused_at
            member.paused_at = None

    def replan(self, total: int | None, at_most: int | None) -> None:
        """The run is expected to come to another number of local steps, see :class:`.Budget`."""
        self.on_event(Event("replan", content={"total": total, "at_most": at_most}))
        self.budget.replan(total, at_most)
        self.attendance.wake()

    def stop(self) -> None:
        """Training ends: nothing more is granted, every worker hands in what it has and gets the final model."""
        self.on_event(Event("stop"))
        self._stop()

    # --------------------------------------------------------------- decisions

    @property
    def live(self) -> list[int]:
        """The live workers, in order."""
        return sorted(self._members)

    @property
    def missing(self) -> list[int]:
        """The workers of the first cohort (0, 1, ...) that have not joined yet; empty once training has started."""
        return self.attendance.missing

    @property
    def finished(self) -> bool:
        """Everybody has been handed the final model."""
        return self.attendance.finished

    def deadline(self) -> float | None:
        """When to look again though nothing happened (seconds, same clock), or None."""
        return self._gathering.deadline

    def ready(self, now: float) -> bool:
        """Whether somebody is to be dispatched now."""
        if not self.attendance.started:
            return False
        if self._gathering.is_due(now) or self._gathering.is_over(now):
            return True
        return not self.finished and self._everybody_rests()

    def dispatch(self, now: float) -> dict[int, Reply]:
        """Dispatches everybody who waits for no group: all of them the present global model.

        A group that is due is merged before that.

        Returns:
            The replies by worker; workers for whom no steps are left rest without a reply until there are some
            again (another worker died) or training is over.

        """
        if self._gathering.is_due(now):
            for one in self._merging.merge():
                self._settle(one.push, None, now, one.staleness)
        members = self._members
        speeds = {worker: self._pacing.speed(worker) for worker, member in members.items() if not member.final}
        progress = self._expected_progress(now, speeds)
        # Those who wait for each other all take the same steps, the last ones too, if their rounds are equally long.
        rates = dict.fromkeys(speeds) if self._gathering.lock_step and not self._pacing.dynamic else speeds
        replies, dispatched = {}, []
        for worker in self.live:
            member = members[worker]
            if member.state != "waiting" or self._gathering.waits(worker):
                continue
            steps = 0
            if not (self.stopping or self.finished or member.final):
                wanted = self._pacing.steps_for(worker, self.live)
                steps = self.budget.grant(worker, wanted, now, rates)
            if steps == 0:
                member.state = "resting"
                self.budget.release(worker)  # Of a dispatch that did not reach it.
                if self.finished:  # It was away, or its connection was, when the others got this.
                    replies[worker] = self._reply(worker, member, now, progress, stop=True)
                continue
            member.state = "computing"
            member.local_steps = steps
            member.version = self.model.version
            member.bases.append(self.model.version)
            member.dispatched_at = now
            member.paused_at = None
            member.called_in = False
            dispatched.append(worker)
        for worker in dispatched:
            replies[worker] = self._reply(worker, members[worker], now, progress, stop=False)
        if dispatched:
            self._merging.keep_base(*self.attendance.bases)
        self._gathering.dispatched(now)
        self._call_in_the_unknown()
        if not self.finished and self._everybody_rests():
            self.attendance.finished = True
            for worker, member in members.items():
                replies[worker] = self._reply(worker, member, now, progress, stop=True)
        self.on_event(Event("dispatch", now, {"replies": replies}))
        return replies

    def wanted(self) -> dict[int, int]:
        """The workers that are to hand in their rounds at once, and the versions these began with.

        When training ends these are all; otherwise workers whose speed is still unknown when others have finished a
        round: a slow one would spend a whole round of the fastest worker's steps before it is known to be slow.
        """
        return {
            worker: member.version
            for worker, member in self._members.items()
            if member.state == "computing" and (self.stopping or self.finished or member.called_in)
        }

    def view(self) -> View:
        """The run at a glance."""
        return self._records.view(
            self.model, self.budget, len(self._members), self.attendance.quarantined, self._asked_to_stop
        )

    @property
    def totals(self) -> dict[int, WorkerTotals]:
        """What each worker has done so far, see :data:`.MOST_STRANGERS`."""
        return self._records.totals

    # ------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything a server needs to go on, in plain values and tensors.

        That is the model with its outer optimizer, the budget, the speeds and the workers' totals. A quarantine does
        not outlive the server: whoever joins its successor is a new process.
        """
        return {
            "model": self.model.state_dict(),
            "budget": self.budget.state_dict(),
            "pacing": self._pacing.state_dict(),
            "leases": self._leases.state_dict(),
            "guard": self._guard.state_dict(),
            "merging": self._merging.state_dict(),
            **self._records.state_dict(),
            **self.attendance.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken; workers join anew."""
        self.model.load_state_dict(state["model"])
        self.budget.load_state_dict(state["budget"])
        self._pacing.load_state_dict(state["pacing"])
        self._leases.load_state_dict(state.get("leases", {}))
        if "guard" in state:
            self._guard.load_state_dict(state["guard"])
        self._merging.load_state_dict(state.get("merging", {}))
        self._records.load_state_dict(state)
        self.attendance.load_state_dict(state)
        self._progress = float(self.budget.done)

    # ---------------------------------------------------------------- internal

    def _stop(self) -> None:
        self.stopping = True
        self.budget.stop()

    def _objection(self, push: Push, gradient: Tensor | None, member: Member) -> Objection | None:
        """Why ``push`` must not be applied, as far as can be told without reading all of it."""
        if push.incarnation != self.incarnation:
            return OTHER_INCARNATION
        if self.finished:
            return TOO_LATE
        # It may have got an answer that was asked for again since: what it waits for is no matter.
        if push.base_version not in member.bases:
            return other_base(push.base_version)
        return form_objection(push, gradient, self.model.layout.numel) or self._leases.objection(push.worker, push.used)

    def _apply(self, push: Push, gradient: Tensor, result: Tensor | None, member: Member) -> Objection | None:
        looked = self.model.inspect(gradient)
        if looked.diverged is not None:
            return diverged(looked.diverged)
        refused = self._guard.judge(push.worker, looked.norm, push.steps, len(self._members))
        if refused is not None:
            return too_large(refused)
        self._pacing.observe(push.worker, push.timed_steps, push.compute_seconds)
        member.exchange_seconds = push.exchange_seconds
        staleness = self.model.version - push.base_version
        objection = self._merging.take(push, gradient, looked, self._members, self.budget.done, result)
        if objection is None:
            member.staleness = staleness
            self._records.applied(push, looked, staleness, len(self._members))
        return objection

    def _repeated(self, push: Push, member: Member, now: float) -> None:
        """A push that has been settled comes again. Nothing changes; if it is the latest one it is answered again."""
        if push.sequence < member.sequence:
            self._settle(push, REPEATED, now)
            return
        if member.answer is None:
            member.answer = REPEATED
        self._settle(push, member.answer, now, again=True)
        if member.state == "computing" or self.finished:
            self._wait(push, member, now)

    def _wait(self, push: Push, member: Member, now: float) -> None:
        """The worker waits for its dispatch: for its group, or the grace window that its arrival may open."""
        round_seconds = now - member.dispatched_at
        member.state = "waiting"
        member.arrived_at = self._latest_arrival = now
        member.paused_at = None
        member.final = member.final or push.final
        self._gathering.arrive(push.worker, member, round_seconds, now)

    def _call_in_the_unknown(self) -> None:
        members = self._members
        if self._pacing.dynamic and self._pacing.total_speed(members) is not None:
            for worker, member in members.items():
                if self._pacing.speed(worker) is None and member.dispatched_at < self._latest_arrival:
                    member.called_in = True

    def _everybody_rests(self) -> bool:
        members = self._members
        return bool(members) and all(member.state == "resting" for member in members.values())

    def _expected_progress(self, now: float, speeds: Mapping[int, float | None]) -> float:
        """Local steps of all workers that are done by now, those of unfinished rounds estimated; never decreasing."""
        self._progress = max(self._progress, self.budget.progress(now, speeds))
        return self._progress

    def _reply(self, worker: int, member: Member, now: float, progress: float, stop: bool) -> Reply:
        waited = now - member.arrived_at
        if member.sequence > 0:
            self._records.totals[worker].wait_seconds += waited
        going = [other for other, one in self._members.items() if not one.final]
        speed, total = self._pacing.speed(worker), self._pacing.total_speed(going)
        pace = total / speed if speed and total else float(len(going))
        if self._gathering.lock_step and not stop:
            # In the time of this round, whatever the speeds, the others take those of theirs and no more.
            computing = [other.local_steps for other in self._members.values() if other.state == "computing"]
            pace = sum(computing) / member.local_steps
        self._records.views[worker] = WorkerView(
            staleness=member.staleness,
            local_steps=member.local_steps,
            wait_seconds=waited,
            exchange_seconds=member.exchange_seconds,
            steps_per_second=speed,
        )
        return Reply(
            incarnation=self.incarnation,
            sequence=member.sequence,
            version=self.model.version,
            staleness=member.staleness,
            local_steps=0 if stop else member.local_steps,
            progress=float(self.budget.done) if stop else progress,
            pace=max(1.0, pace),
            wait_seconds=waited,
            stop=stop,
            refused=None if member.answer is None else member.answer.text,
            shared=self.shared,
            asked=self.asked,
            renew=member.renew,
        )

    def _refuse_session(self, push: Push, now: float) -> str:
        reason = self.attendance.quarantined.get(push.worker)
        objection = not_live(push.worker, push.session) if reason is None else quarantined(reason)
        self._settle(push, objection, now)
        return objection.text

    def _settle(
        self, push: Push, objection: Objection | None, now: float, staleness: int = 0, again: bool = False
    ) -> None:
        """A push has been decided on: it is counted and told of."""
        if objection is not None and (not again or objection is REPEATED):
            self._records.refused(push, objection)
        self.on_settled(settled(push, objection, self.model.version, staleness, now))
