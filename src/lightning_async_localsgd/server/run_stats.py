"""Statistics of a run: totals of each worker, the outcome of each push, and a snapshot of the whole."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.protocol.traits import WorkerTraits

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lightning_async_localsgd.policies.budget import Budget
    from lightning_async_localsgd.policies.worker_minimum import WorkerMinimum
    from lightning_async_localsgd.protocol.messages import Push
    from lightning_async_localsgd.protocol.rejections import Rejection
    from lightning_async_localsgd.server.global_model import GlobalModel, PushNorm
    from lightning_async_localsgd.server.sessions import WorkerSession

_log = logging.getLogger(__name__)

FORMER = -1
"""Number under which the totals of late joiners that left long ago are added up."""


@dataclass
class WorkerTotals:
    """Totals of one worker over all its sessions.

    Attributes:
        rounds: number of pushes that were merged or are held.
        steps: local steps in these pushes.
        samples: samples in these pushes.
        staleness: sum of the stalenesses of these pushes.
        wait_seconds: seconds between arrivals and dispatches, including the wait for the final model. With overlap,
            seconds that the worker stood still because an answer was late.
        compute_seconds: seconds of timed computing.
        exchange_seconds: seconds that the worker stood still for exchanges, without the waits.
        refused: number of refused pushes.
        sessions: number of sessions that joined.
        departures: number of times that the worker left before the end of training, even if it came back.

    """

    rounds: int = 0
    steps: int = 0
    samples: int = 0
    staleness: int = 0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    exchange_seconds: float = 0.0
    refused: int = 0
    sessions: int = 0
    departures: int = 0

    def add(self, other: WorkerTotals) -> None:
        """Add the totals of another worker."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class WorkerView:
    """Latest values of one live worker, for logging."""

    staleness: int
    local_steps: int
    wait_seconds: float
    exchange_seconds: float
    steps_per_second: float | None

    @classmethod
    def of(cls, session: WorkerSession, waited: float, steps_per_second: float | None) -> WorkerView:
        """Return the values of a worker that is dispatched.

        Args:
            session: its session.
            waited: seconds since its last push was decided on.
            steps_per_second: its speed; None while unknown.

        """
        return cls(
            staleness=session.staleness,
            local_steps=session.local_steps,
            wait_seconds=session.wait_seconds if session.overlapped else waited,
            exchange_seconds=session.exchange_seconds,
            steps_per_second=steps_per_second,
        )


@dataclass(frozen=True)
class RunSnapshot:
    """State of the whole run, for logging. Immutable, so that any thread may read it.

    Attributes:
        version: version of the global model.
        progress: local steps of all workers that were pushed.
        total: local steps of all workers in the whole run; None if the run has no end.
        alive_workers: number of live workers.
        merging_workers: number of workers with a recently merged push.
        update_norm: L2 norm of the latest merged pseudo-gradient; None before the first.
        momentum_cosine: cosine between that pseudo-gradient and the outer momentum; None if there is none.
        refusals: number of refused pushes by :attr:`.Rejection.kind`.
        quarantined: workers that are refused for the rest of the run.
        unapplied_pushes: number of pushes that the outer optimizer has accumulated and not applied yet.
        stop_requested: whether a worker requests the end of training at the trainer's minimum of steps or epochs.
        paused: whether training is paused, because too few workers take part.
        pauses: number of such pauses so far.
        paused_seconds: seconds of the pauses that are over.
        workers: latest values of the live workers.
        traits: what each worker that has ever joined computes with, by its latest hello.

    """

    version: int = 0
    progress: int = 0
    total: int | None = None
    alive_workers: int = 0
    merging_workers: int = 0
    update_norm: float | None = None
    momentum_cosine: float | None = None
    refusals: Mapping[str, int] = field(default_factory=dict)
    quarantined: frozenset[int] = frozenset()
    unapplied_pushes: int = 0
    stop_requested: bool = False
    paused: bool = False
    pauses: int = 0
    paused_seconds: float = 0.0
    workers: Mapping[int, WorkerView] = field(default_factory=dict)
    traits: Mapping[int, WorkerTraits] = field(default_factory=dict)

    @property
    def refused_pushes(self) -> int:
        """Number of all refused pushes."""
        return sum(self.refusals.values())


@dataclass(frozen=True)
class PushOutcome:
    """What became of a push.

    Args:
        worker: the worker's number.
        session: the worker's session.
        sequence: number of the push within the session.
        incarnation: incarnation of the server that the push names.
        base_version: version of the model that the round started from.
        version: version of the global model after the push.
        steps: local steps in the push.
        staleness: versions between base and merge; 0 if the push was refused.
        refused: why the push was not merged, in one line; None if it was.
        seconds: time on the server's clock, which has an arbitrary zero.

    """

    worker: int
    session: str
    sequence: int
    incarnation: str
    base_version: int
    version: int
    steps: int
    staleness: int
    refused: str | None
    seconds: float

    @classmethod
    def of(cls, push: Push, rejection: Rejection | None, version: int, staleness: int, now: float) -> PushOutcome:
        """Return the outcome of ``push`` at the time ``now``."""
        return cls(
            worker=push.worker,
            session=push.session,
            sequence=push.sequence,
            incarnation=push.incarnation,
            base_version=push.base_version,
            version=version,
            steps=push.steps,
            staleness=staleness,
            refused=None if rejection is None else rejection.text,
            seconds=now,
        )


class RunStats:
    """Counts pushes, steps, seconds and rejections.

    Attributes:
        totals: totals by worker.
        refusals: number of refused pushes by kind.
        views: latest values of the live workers.
        traits: what each worker computes with. Replaced, never changed, so that snapshots can hold it.

    """

    def __init__(self) -> None:
        self.totals: dict[int, WorkerTotals] = {}
        self.refusals: Counter[str] = Counter()
        self.views: dict[int, WorkerView] = {}
        self.traits: Mapping[int, WorkerTraits] = {}
        self._latest: PushNorm | None = None
        self._recent: list[int] = []

    def of(self, worker: int) -> WorkerTotals:
        """Return the totals of one worker."""
        return self.totals.setdefault(worker, WorkerTotals())

    def record_merge(self, push: Push, norm: PushNorm, staleness: int, live: int) -> None:
        """Count a push that was merged, or is held, while ``live`` workers were live."""
        self._latest = norm
        totals = self.of(push.worker)
        totals.rounds += 1
        totals.steps += push.steps
        totals.samples += push.samples
        totals.staleness += staleness
        totals.compute_seconds += push.compute_seconds
        totals.exchange_seconds += push.exchange_seconds
        totals.wait_seconds += push.wait_seconds
        # A live worker whose pushes are all refused does not take part: of k live workers, those with one of the last
        # 4 k merged pushes do.
        self._recent = [*self._recent, push.worker][-4 * max(1, live) :]

    def record_rejection(self, push: Push, rejection: Rejection) -> None:
        """Count and log a refused push."""
        self.refusals[rejection.kind] += 1
        if push.worker in self.totals:
            self.totals[push.worker].refused += 1
        _log.warning(
            "refused push %d of worker %d (%d steps on version %d): %s", push.sequence, push.worker, push.steps,
            push.base_version, rejection.text,
        )  # fmt: skip

    def record_traits(self, worker: int, traits: WorkerTraits) -> None:
        """Note what a worker that has joined computes with. A restarted worker may be on another machine."""
        self.traits = {**self.traits, worker: traits}

    def forget_view(self, worker: int) -> None:
        """Forget the latest values of a worker that is not live any more."""
        self.views.pop(worker, None)

    def merge(self, workers: Iterable[int]) -> None:
        """Keep only the sum of the totals of these workers."""
        merged = set(workers)
        for worker in merged:
            self.of(FORMER).add(self.totals.pop(worker))
        self.traits = {worker: traits for worker, traits in self.traits.items() if worker not in merged}

    def snapshot(
        self,
        model: GlobalModel,
        budget: Budget,
        live: int,
        quarantined: Iterable[int],
        stop_requested: bool,
        minimum: WorkerMinimum,
    ) -> RunSnapshot:
        """Return the state of the run.

        Args:
            model: the global model.
            budget: budget of the run.
            live: number of live workers.
            quarantined: workers in quarantine.
            stop_requested: see :class:`RunSnapshot`.
            minimum: knows the pauses of the run.

        """
        return RunSnapshot(
            version=model.version,
            progress=budget.done,
            total=budget.total,
            alive_workers=live,
            merging_workers=len(set(self._recent)),
            update_norm=None if self._latest is None else self._latest.norm,
            momentum_cosine=None if self._latest is None else self._latest.momentum_cosine,
            refusals=dict(self.refusals),
            quarantined=frozenset(quarantined),
            unapplied_pushes=model.outer_optimizer.unapplied_pushes,
            stop_requested=stop_requested,
            paused=minimum.paused,
            pauses=minimum.pauses,
            paused_seconds=minimum.seconds,
            workers=dict(self.views),
            traits=self.traits,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what outlives the server, as JSON types."""
        return {
            "workers": {str(worker): dict(vars(totals)) for worker, totals in self.totals.items()},
            "refusals": dict(self.refusals),
            "traits": {str(worker): traits.as_dict() for worker, traits in self.traits.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``."""
        self.totals = {int(worker): WorkerTotals(**totals) for worker, totals in state["workers"].items()}
        self.refusals = Counter(state["refusals"])
        self.traits = {int(worker): WorkerTraits(**traits) for worker, traits in state.get("traits", {}).items()}
