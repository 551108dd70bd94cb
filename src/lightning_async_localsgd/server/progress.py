"""Estimates how much work all workers have done, between two pushes and during a round."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_async_localsgd.policies.budget import Budget
    from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
    from lightning_async_localsgd.server.sessions import WorkerSession


class ProgressEstimate:
    """Progress of the run in local steps of all workers together, or in other units, see :class:`.StepSizes`.

    Args:
        live: live sessions by worker.
        pacing: has measured the workers' speeds.
        budget: counts the steps that were pushed.

    """

    def __init__(self, live: Mapping[int, WorkerSession], pacing: SpeedAwareSteps, budget: Budget) -> None:
        self._live = live
        self._pacing = pacing
        self._budget = budget
        self._latest = float(budget.done)

    def reset(self) -> None:
        """Begin at the steps that the budget has counted, after the budget was restored."""
        self._latest = float(self._budget.done)

    def at(self, now: float, speeds: Mapping[int, float | None]) -> float:
        """Return the units that all workers have done by ``now``. The estimate never decreases.

        Args:
            now: seconds.
            speeds: units per second of the workers that still take steps, None while unknown.

        """
        self._latest = max(self._latest, self._budget.progress(now, speeds))
        return self._latest

    def per_step(self, worker: int, lock_step: bool) -> float:
        """Return how many units all workers together do during one step of ``worker``, at least those of the step.

        Args:
            worker: a worker that is computing.
            lock_step: all workers wait for each other. Then, during this round, the other workers take the steps of
                their own rounds and no more, whatever their speeds.

        """
        sizes, size = self._pacing.sizes, float(self._pacing.sizes.of(worker))
        if lock_step and self._live[worker].local_steps > 0:
            computing = {other: session for other, session in self._live.items() if session.computing}
            units = sum(session.local_steps * sizes.of(other) for other, session in computing.items())
            return max(size, units / self._live[worker].local_steps)
        active = [other for other, session in self._live.items() if not session.final]
        speed, total = self._pacing.speed(worker), self._pacing.total_rate(active)
        return max(size, total / speed if speed and total else float(sum(map(sizes.of, active))))
