"""What the server decides: who takes part, in which order pushes are applied, who is dispatched when and with what.

The coordinator is a state machine over the global model and the policies. It knows no thread, no socket and no clock:
every event comes with the time at which it happened, so that the live server and a simulated cluster run the very same
object, and the same events in the same order give the same global model to the last bit.

A worker is *computing* between a dispatch and its push, *waiting* from its push to its dispatch (for the grace window
to close), and *resting* when there are no local steps left to give it. When everybody rests, training is over and all
are handed the same final model.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lightning_async_localsgd.grace import Pending
from lightning_async_localsgd.messages import (
    ALREADY_APPLIED,
    NOT_FINITE,
    PROTOCOL_VERSION,
    Hello,
    Lease,
    LeaseRequest,
    Push,
    Reply,
)
from lightning_async_localsgd.sharding import DataLeases

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lightning_async_localsgd.budget import Budget
    from lightning_async_localsgd.global_model import GlobalModel
    from lightning_async_localsgd.grace import GraceWindow, Plan
    from lightning_async_localsgd.pacing import SpeedAwareSteps

_log = logging.getLogger(__name__)


def _not_live(worker: int, session: str) -> str:
    return (
        f"session {session} of worker {worker} is not a live one: a newer session has taken its place, or the server "
        "had given it up; start the worker again to rejoin"
    )


@dataclass
class WorkerTotals:
    """What one worker has done so far, over all its sessions.

    Attributes:
        rounds: pushes applied.
        steps: local steps in them.
        samples: samples in them.
        staleness: sum over the pushes.
        wait_seconds: sum of the times between application and dispatch, the end of the budget included.
        compute_seconds: sum of the timed computing.
        exchange_seconds: sum of the exchanges, without the waiting.
        refused: pushes refused.

    """

    rounds: int = 0
    steps: int = 0
    samples: int = 0
    staleness: int = 0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    exchange_seconds: float = 0.0
    refused: int = 0


@dataclass
class _Member:
    session: str
    state: Literal["computing", "waiting", "resting"] = "waiting"
    sequence: int = 0
    version: int = 0
    """Of the model it was dispatched last."""
    dispatched_at: float = 0.0
    local_steps: int = 0
    arrived_at: float = 0.0
    staleness: int = 0
    exchange_seconds: float = 0.0
    paused_at: float | None = None
    final: bool = False
    called_in: bool = False
    refused: str | None = None


@dataclass(frozen=True)
class WorkerView:
    """One live worker at a glance: its latest values, for logging."""

    staleness: int
    local_steps: int
    wait_seconds: float
    exchange_seconds: float
    steps_per_second: float | None


@dataclass(frozen=True)
class View:
    """The whole run at a glance. Immutable, so that any thread may read it."""

    version: int = 0
    progress: int = 0
    total: int | None = None
    alive_workers: int = 0
    merging_workers: int = 0
    update_norm: float | None = None
    momentum_cosine: float | None = None
    refused_pushes: int = 0
    workers: Mapping[int, WorkerView] = field(default_factory=dict)


class Coordinator:
    """Membership, order of pushes, grace windows and dispatches over one global model.

    Call the event methods (:meth:`join`, :meth:`push`, :meth:`leave`, ...) as things happen, then, as long as
    :meth:`ready` says so, :meth:`dispatch`. With nothing happening, look again at :meth:`deadline`.

    Args:
        model: the global model, already loaded.
        pacing: local steps per worker (DyLU, the paper's equation 6).
        grace: the window in which arrivals are dispatched together (Algorithms 2 and 5).
        budget: local steps of all workers together.
        cohort: how many workers must have joined before the first dispatch.
        incarnation: random name of this start of the server.

    Attributes:
        on_metrics: called with a worker's number and what its module has logged in a round, as the push has it.
        shared: what every reply tells, see :class:`~lightning_async_localsgd.messages.Reply`.

    """

    def __init__(
        self,
        model: GlobalModel,
        pacing: SpeedAwareSteps,
        grace: GraceWindow,
        budget: Budget,
        cohort: int,
        incarnation: str,
    ) -> None:
        self.model = model
        self.budget = budget
        self.incarnation = incarnation
        self.on_metrics: Callable[[int, str], None] = lambda worker, text: None
        self.shared = ""
        self.stopping = False
        self.finished = False
        self.totals: dict[int, WorkerTotals] = {}
        self.refusals: Counter[str] = Counter()
        self._pacing = pacing
        self._grace = grace
        self._leases = DataLeases(cohort)
        self._cohort = cohort
        self._started = False
        self._members: dict[int, _Member] = {}
        self._departed: dict[int, tuple[str, _Member]] = {}
        self._window: Plan | None = None
        self._progress = float(budget.done)
        self._latest_arrival = float("-inf")
        self._update_norm: float | None = None
        self._momentum_cosine: float | None = None
        self._last_views: dict[int, WorkerView] = {}
        self._recent: list[int] = []

    # ------------------------------------------------------------------ events

    def join(self, hello: Hello, now: float) -> str | None:
        """A worker introduces itself, for the first time or with a new session, which supersedes its older one.

        Returns:
            Why it is refused for good, or None: it waits for its dispatch.

        """
        if hello.protocol != PROTOCOL_VERSION:
            return (
                f"worker {hello.worker} speaks protocol {hello.protocol}, the server speaks {PROTOCOL_VERSION}: "
                "install the same version of lightning-async-localsgd on every machine"
            )
        if self.finished:
            return f"training is over; worker {hello.worker} came too late to take part"
        known = self._members.get(hello.worker)
        if known is not None and known.session == hello.session:
            if not hello.rejoining and known.state == "computing":
                known.state = "waiting"  # Its first dispatch was lost on the way: it gets another.
                self.budget.release(hello.worker)
            return None
        if hello.rejoining:
            session, departed = self._departed.get(hello.worker, ("", None))
            if known is not None or departed is None or session != hello.session:
                return _not_live(hello.worker, hello.session)
            # Only its connection was lost: the push that follows is based on what it was dispatched.
            departed.state = "computing"
            self._members[hello.worker] = departed
            del self._departed[hello.worker]
            self._leases.unpark(hello.worker)
            if hello.worker == 0:
                self._leases.lead(0)
            self.model.set_workers(len(self._members))
            return None
        if known is not None:
            self._remove(hello.worker, now, "superseded by a newer session")
        self._departed.pop(hello.worker, None)
        self._leases.forget(hello.worker)
        if hello.worker == 0:
            self._leases.lead(0)
        self._members[hello.worker] = _Member(hello.session, arrived_at=now)
        self.totals.setdefault(hello.worker, WorkerTotals())
        self._started = self._started or len(self._members) >= self._cohort
        if self._started:
            self.model.set_workers(len(self._members))
        return None

    def session_of(self, worker: int) -> str | None:
        """The present session of a live worker; None if there is none."""
        member = self._members.get(worker)
        return None if member is None else member.session

    def push(self, push: Push, gradient: Tensor | None, now: float, result: Tensor | None = None) -> str | None:
        """A pseudo-gradient has arrived completely. It is applied at once, or refused, counted and logged.

        Args:
            push: its header.
            gradient: flat fp32, as long as the global model; None with ``push.steps`` of 0.
            now: seconds.
            result: what theta - g is known to be exactly, where the outer step is just that (see
                :attr:`~lightning_async_localsgd.outer.OuterOptimizer.replaces_model`).

        Returns:
            Why this *session* is refused for good (it is not a live worker's present one), else None: the worker
            waits for its dispatch, whether its push was applied or not.

        """
        member = self._members.get(push.worker)
        if member is None or member.session != push.session:
            return self._refuse_session(push)
        if push.sequence == member.sequence:
            # Sent again because the answer was lost. The first copy counts; the worker waits for the same answer.
            self._count_refusal(push, ALREADY_APPLIED)
            if member.state == "computing":
                self._wait(push, member, now)
            member.refused = ALREADY_APPLIED
            return None
        reason = self._objection(push, gradient, member)
        member.staleness = 0
        if reason is None and push.steps > 0:
            assert gradient is not None
            reason = self._apply(push, gradient, result, member)
        member.sequence = max(member.sequence, push.sequence)
        member.refused = reason
        if reason is not None:
            self._count_refusal(push, reason)
        # The steps of a worker that has diverged were taken, though they taught nothing: the run must come to an end.
        counts = reason in (None, NOT_FINITE)
        if push.metrics and counts:
            self.on_metrics(push.worker, push.metrics)
        self.budget.settle(push.worker, push.steps if counts else 0)
        self._leases.settle(push.worker, push.used, consumed=counts)
        if push.stop and not self.stopping:
            self.stop()
        self._wait(push, member, now)
        return None

    def leave(self, worker: int, session: str, now: float, reason: str) -> bool:
        """A worker is gone (it died, hung up, or was given up).

        Returns:
            Whether it was a live worker's present session.

        """
        if self.session_of(worker) != session:
            return False
        self._departed[worker] = (session, self._members[worker])
        self._leases.park(worker)
        self._remove(worker, now, reason)
        return True

    def lease(self, request: LeaseRequest) -> Lease:
        """A worker asks for training data.

        So may one whose connection was lost: before it has some it cannot finish the round to come back with.
        """
        session, _ = self._departed.get(request.worker, (self.session_of(request.worker), None))
        if session != request.session:
            refused = _not_live(request.worker, request.session)
            return Lease(request.number, request.epoch, 0, 0, refused)
        return self._leases.grant(request, len(self._members))

    def pause(self, worker: int, now: float) -> None:
        """A worker does something else (validates, saves): nobody waits for it until :meth:`resume`."""
        member = self._members.get(worker)
        if member is not None and member.paused_at is None:
            member.paused_at = now

    def resume(self, worker: int, now: float) -> None:
        """A paused worker computes again."""
        member = self._members.get(worker)
        if member is not None and member.paused_at is not None:
            member.dispatched_at += now - member.paused_at
            member.paused_at = None

    def stop(self) -> None:
        """Training ends: nothing more is granted, every worker hands in what it has and gets the final model."""
        self.stopping = True
        self.budget.stop()

    # --------------------------------------------------------------- decisions

    @property
    def live(self) -> list[int]:
        """The live workers, in order."""
        return sorted(self._members)

    @property
    def missing(self) -> list[int]:
        """The workers of the first cohort (0, 1, ...) that have not joined yet; empty once training has started."""
        return [] if self._started else [n for n in range(self._cohort) if n not in self._members]

    def deadline(self) -> float | None:
        """When to look again though nothing happened (seconds, same clock), or None."""
        return self._window.deadline if self._window is not None else None

    def ready(self, now: float) -> bool:
        """Whether somebody is to be dispatched now."""
        if not self._started or self.finished:
            return False
        if not any(member.state == "waiting" for member in self._members.values()):
            return self._everybody_rests()
        if self._window is None or now >= self._window.deadline:
            return True
        return not any(
            member.state == "computing" and member.paused_at is None and worker in self._window.expected
            for worker, member in self._members.items()
        )

    def dispatch(self, now: float) -> dict[int, Reply]:
        """Dispatches everybody who waits: all of them the present global model.

        Returns:
            The replies by worker; workers for whom no steps are left rest without a reply until there are some
            again (another worker died) or training is over.

        """
        self._window = None
        waiting = [worker for worker in self.live if self._members[worker].state == "waiting"]
        speeds = {worker: self._pacing.speed(worker) for worker in self._members}
        progress = self._expected_progress(now, speeds)
        replies = {}
        for worker in waiting:
            member = self._members[worker]
            steps = 0
            if not (self.stopping or member.final):
                wanted = self._pacing.steps_for(worker, self.live)
                steps = self.budget.grant(worker, wanted, now, speeds)
            if steps == 0:
                member.state = "resting"
                continue
            member.state = "computing"
            member.local_steps = steps
            member.version = self.model.version
            member.dispatched_at = now
            member.paused_at = None
            member.called_in = False
            replies[worker] = self._reply(worker, member, now, progress, stop=False)
        self._call_in_the_unknown()
        if self._everybody_rests():
            self.finished = True
            for worker, member in self._members.items():
                replies[worker] = self._reply(worker, member, now, progress, stop=True)
        return replies

    def wanted(self) -> dict[int, int]:
        """The workers that are to hand in their rounds at once, and the versions these began with.

        When training ends these are all; otherwise workers whose speed is still unknown when others have finished a
        round: a slow one would spend a whole round of the fastest worker's steps before it is known to be slow.
        """
        return {
            worker: member.version
            for worker, member in self._members.items()
            if member.state == "computing" and (self.stopping or member.called_in)
        }

    def view(self) -> View:
        """The run at a glance."""
        return View(
            version=self.model.version,
            progress=self.budget.done,
            total=self.budget.total,
            alive_workers=len(self._members),
            merging_workers=len(set(self._recent)),
            update_norm=self._update_norm,
            momentum_cosine=self._momentum_cosine,
            refused_pushes=sum(self.refusals.values()),
            workers=dict(self._last_views),
        )

    # ------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything a server needs to go on, in plain values and tensors.

        That is the model with its outer optimizer, the budget, the speeds and the workers' totals.
        """
        return {
            "model": self.model.state_dict(),
            "budget": self.budget.state_dict(),
            "pacing": self._pacing.state_dict(),
            "leases": self._leases.state_dict(),
            "workers": {str(worker): dict(vars(totals)) for worker, totals in self.totals.items()},
            "refusals": dict(self.refusals),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken; workers join anew."""
        self.model.load_state_dict(state["model"])
        self.budget.load_state_dict(state["budget"])
        self._pacing.load_state_dict(state["pacing"])
        self._leases.load_state_dict(state.get("leases", {}))
        self.totals = {int(worker): WorkerTotals(**totals) for worker, totals in state["workers"].items()}
        self.refusals = Counter(state["refusals"])
        self._progress = float(self.budget.done)

    # ---------------------------------------------------------------- internal

    def _objection(self, push: Push, gradient: Tensor | None, member: _Member) -> str | None:
        """Why ``push`` must not be applied, as far as can be told without reading all of it."""
        if push.incarnation != self.incarnation:
            return "made for another incarnation of the server"
        if push.sequence < member.sequence:
            return ALREADY_APPLIED
        if member.state != "computing" or push.base_version != member.version:
            return f"based on version {push.base_version}, which was not this worker's last dispatch"
        if push.steps < 0 or push.samples < 0:
            return f"claims {push.steps} steps and {push.samples} samples"
        if push.steps > 0 and (gradient is None or gradient.numel() != self.model.layout.numel):
            size = 0 if gradient is None else gradient.numel()
            return f"has {size} elements, the model has {self.model.layout.numel}"
        return self._leases.objection(push.worker, push.used)

    def _apply(self, push: Push, gradient: Tensor, result: Tensor | None, member: _Member) -> str | None:
        looked = self.model.inspect(gradient)
        if not looked.finite:
            return NOT_FINITE
        member.staleness = self.model.version - push.base_version
        self._update_norm, self._momentum_cosine = looked.norm, looked.momentum_cosine
        self.model.apply(gradient, result)
        self._pacing.observe(push.worker, push.timed_steps, push.compute_seconds)
        member.exchange_seconds = push.exchange_seconds
        totals = self.totals[push.worker]
        totals.rounds += 1
        totals.steps += push.steps
        totals.samples += push.samples
        totals.staleness += member.staleness
        totals.compute_seconds += push.compute_seconds
        totals.exchange_seconds += push.exchange_seconds
        # "Merging" are those whose pushes were among the last 4 k: liveness alone is not participation.
        self._recent = [*self._recent, push.worker][-4 * max(1, len(self._members)) :]
        return None

    def _wait(self, push: Push, member: _Member, now: float) -> None:
        """The worker hands over to the grace window, which its arrival may open."""
        round_seconds = now - member.dispatched_at
        member.state = "waiting"
        member.arrived_at = self._latest_arrival = now
        member.paused_at = None
        member.final = member.final or push.final
        if self._window is None and member.refused is None and not (self.budget.exhausted or member.final):
            pending = [
                Pending(worker, other.dispatched_at, self._expected_seconds(worker, other))
                for worker, other in self._members.items()
                if other.state == "computing" and other.paused_at is None
            ]
            self._window = self._grace.plan(now, round_seconds, pending)

    def _expected_seconds(self, worker: int, member: _Member) -> float | None:
        speed = self._pacing.speed(worker)
        return None if speed is None else member.local_steps / speed + member.exchange_seconds

    def _remove(self, worker: int, now: float, reason: str) -> None:
        del self._members[worker]
        self._last_views.pop(worker, None)
        self._pacing.forget(worker)
        self.budget.release(worker)
        if not self.finished:
            left = len(self._members)
            _log.warning("worker %d left the run (%s); its unfinished round is lost, %d go on", worker, reason, left)
        if self._started and self._members and not self.finished:
            self.model.set_workers(len(self._members))
        if not any(member.state == "waiting" for member in self._members.values()):
            self._window = None  # It was open for the one that left.
        if not self.budget.exhausted:
            # The steps it had been given are free again: whoever rested for want of steps may take them.
            for member in self._members.values():
                if member.state == "resting" and not member.final:
                    member.state = "waiting"

    def _call_in_the_unknown(self) -> None:
        if self._pacing.dynamic and self._pacing.total_speed(self._members) is not None:
            for worker, member in self._members.items():
                if self._pacing.speed(worker) is None and member.dispatched_at < self._latest_arrival:
                    member.called_in = True

    def _everybody_rests(self) -> bool:
        return bool(self._members) and all(member.state == "resting" for member in self._members.values())

    def _expected_progress(self, now: float, speeds: Mapping[int, float | None]) -> float:
        """Local steps of all workers that are done by now, those of unfinished rounds estimated; never decreasing."""
        self._progress = max(self._progress, self.budget.progress(now, speeds))
        return self._progress

    def _reply(self, worker: int, member: _Member, now: float, progress: float, stop: bool) -> Reply:
        waited = now - member.arrived_at
        if member.sequence > 0:
            self.totals[worker].wait_seconds += waited
        speed, total = self._pacing.speed(worker), self._pacing.total_speed(self._members)
        pace = total / speed if speed and total else float(len(self._members))
        self._last_views[worker] = WorkerView(
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
            refused=member.refused,
            shared=self.shared,
        )

    def _refuse_session(self, push: Push) -> str:
        self._count_refusal(push, "of a session that is no longer live")
        return _not_live(push.worker, push.session)

    def _count_refusal(self, push: Push, reason: str) -> None:
        self.refusals[reason] += 1
        if push.worker in self.totals:
            self.totals[push.worker].refused += 1
        _log.warning(
            "refused push %d of worker %d (%d steps on version %d): %s", push.sequence, push.worker, push.steps,
            push.base_version, reason,
        )  # fmt: skip
