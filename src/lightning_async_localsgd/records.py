"""What has happened in a run so far, in numbers: for each worker, for each push, and as a whole."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lightning_async_localsgd.budget import Budget
    from lightning_async_localsgd.global_model import GlobalModel, PushNorm
    from lightning_async_localsgd.messages import Push
    from lightning_async_localsgd.objections import Objection

_log = logging.getLogger(__name__)

FORMER = -1
"""Stands for workers that joined a run that was under way, left it long ago and are not kept apart any more."""


@dataclass
class WorkerTotals:
    """What one worker has done so far, over all its sessions.

    Attributes:
        rounds: pushes applied, or held to be.
        steps: local steps in them.
        samples: samples in them.
        staleness: sum over the pushes.
        wait_seconds: sum of the times between arrival and dispatch, the end of the budget included.
        compute_seconds: sum of the timed computing.
        exchange_seconds: sum of the exchanges, without the waiting.
        refused: pushes refused.
        sessions: times that it joined.
        departures: times that it was gone before training was over, those included from which it came back.

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
        """Takes in what another worker has done."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


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
    """The whole run at a glance. Immutable, so that any thread may read it.

    Attributes:
        refusals: pushes refused, by the kind of their :class:`.Objection`.
        quarantined: workers that are refused for the rest of the run.
        held_back: pushes that the outer optimizer has taken in and not applied yet.
        asked_to_stop: a worker would have training end once the trainer's minimum is reached.

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
    held_back: int = 0
    asked_to_stop: bool = False
    workers: Mapping[int, WorkerView] = field(default_factory=dict)

    @property
    def refused_pushes(self) -> int:
        """All pushes that were refused, for whatever reason."""
        return sum(self.refusals.values())


@dataclass(frozen=True)
class Settled:
    """A push that the server has decided on.

    Args:
        worker: whose it was.
        session: of which session of that worker.
        sequence: its number within that session.
        incarnation: of the server, as the push names it.
        base_version: version of the model that the round started from.
        version: of the global model afterwards.
        steps: local steps in it.
        staleness: versions between base and merge; 0 if it was refused.
        refused: why it was not applied, in one line; None if it was.
        seconds: when, by the server's clock, whose zero means nothing.

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


def settled(push: Push, objection: Objection | None, version: int, staleness: int, now: float) -> Settled:
    """What has become of ``push``, as of ``now``."""
    return Settled(
        worker=push.worker,
        session=push.session,
        sequence=push.sequence,
        incarnation=push.incarnation,
        base_version=push.base_version,
        version=version,
        steps=push.steps,
        staleness=staleness,
        refused=None if objection is None else objection.text,
        seconds=now,
    )


class Records:
    """Counts what happens.

    Attributes:
        totals: what each worker has done.
        refusals: pushes refused, by kind.
        views: the latest values of each live worker.

    """

    def __init__(self) -> None:
        self.totals: dict[int, WorkerTotals] = {}
        self.refusals: Counter[str] = Counter()
        self.views: dict[int, WorkerView] = {}
        self._latest: PushNorm | None = None
        self._recent: list[int] = []

    def of(self, worker: int) -> WorkerTotals:
        """The totals of one worker."""
        return self.totals.setdefault(worker, WorkerTotals())

    def applied(self, push: Push, looked: PushNorm, staleness: int, live: int) -> None:
        """A push was applied when there were ``live`` live workers."""
        self._latest = looked
        totals = self.of(push.worker)
        totals.rounds += 1
        totals.steps += push.steps
        totals.samples += push.samples
        totals.staleness += staleness
        totals.compute_seconds += push.compute_seconds
        totals.exchange_seconds += push.exchange_seconds
        # "Merging" are those whose pushes were among the last 4 k: liveness alone is not participation.
        self._recent = [*self._recent, push.worker][-4 * max(1, live) :]

    def refused(self, push: Push, objection: Objection) -> None:
        """A push was refused."""
        self.refusals[objection.kind] += 1
        if push.worker in self.totals:
            self.totals[push.worker].refused += 1
        _log.warning(
            "refused push %d of worker %d (%d steps on version %d): %s", push.sequence, push.worker, push.steps,
            push.base_version, objection.text,
        )  # fmt: skip

    def forget_view(self, worker: int) -> None:
        """The worker is not live any more."""
        self.views.pop(worker, None)

    def merge(self, workers: Iterable[int]) -> None:
        """From now on only the sum is known of what these workers have done."""
        for worker in workers:
            self.of(FORMER).add(self.totals.pop(worker))

    def view(
        self, model: GlobalModel, budget: Budget, live: int, quarantined: Iterable[int], asked_to_stop: bool
    ) -> View:
        """The run at a glance.

        Args:
            model: the global model.
            budget: of the run.
            live: live workers.
            quarantined: workers in quarantine.
            asked_to_stop: see :class:`View`.

        """
        return View(
            version=model.version,
            progress=budget.done,
            total=budget.total,
            alive_workers=live,
            merging_workers=len(set(self._recent)),
            update_norm=None if self._latest is None else self._latest.norm,
            momentum_cosine=None if self._latest is None else self._latest.momentum_cosine,
            refusals=dict(self.refusals),
            quarantined=frozenset(quarantined),
            held_back=model.rule.held_back,
            asked_to_stop=asked_to_stop,
            workers=dict(self.views),
        )

    def state_dict(self) -> dict[str, Any]:
        """What outlives the server, of JSON's types."""
        return {
            "workers": {str(worker): dict(vars(totals)) for worker, totals in self.totals.items()},
            "refusals": dict(self.refusals),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the numbers in ``state``."""
        self.totals = {int(worker): WorkerTotals(**totals) for worker, totals in state["workers"].items()}
        self.refusals = Counter(state["refusals"])
