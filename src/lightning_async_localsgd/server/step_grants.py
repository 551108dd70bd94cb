"""Grants workers the local steps of their rounds, and with overlap those that they take while a push is in flight."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_async_localsgd.policies.budget import Budget
    from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
    from lightning_async_localsgd.protocol.messages import Push
    from lightning_async_localsgd.server.sessions import WorkerSession


class StepGrants:
    """Reserves steps of the budget for each round.

    With overlap, a worker goes on training while its push is in flight. Each dispatch then grants it, beside the steps
    of the round, those that it may take after the round: at most those of another round, and none near the end of the
    budget. They belong to the next round, so the number of steps of a run stays exact.

    Args:
        budget: work of all workers together, in the units of ``pacing.sizes``.
        pacing: local steps of each worker's round.
        live: live sessions by worker.
        overlap: whether workers go on training while their pushes are in flight.

    """

    def __init__(
        self, budget: Budget, pacing: SpeedAwareSteps, live: Mapping[int, WorkerSession], overlap: bool = False
    ) -> None:
        self._budget = budget
        self._pacing = pacing
        self._live = live
        self._overlap = overlap

    def dispatch(self, worker: int, version: int, now: float, speeds: Mapping[int, float | None]) -> None:
        """Dispatch a waiting worker with the steps of its next round. If there are none for it, it rests.

        Args:
            worker: the worker's number.
            version: version of the global model that it is sent.
            now: seconds.
            speeds: units per second of the workers that share what is left of the budget, None while unknown.

        """
        session = self._live[worker]
        if session.final:
            self.refuse(worker)
            return
        size = self._pacing.sizes.of(worker)
        wanted = self._pacing.steps_for(worker, sorted(self._live), self._budget.total) * size
        begun = session.begun_steps * size
        since = session.arrived_at if begun else None
        # The run ends as exactly as whole steps allow if the worker with the smallest ones takes the last.
        takes_rest = size == self._pacing.sizes.smallest(other for other in self._live if not self._live[other].final)
        units = self._budget.grant(worker, wanted, now, speeds, begun, since, size, takes_rest)
        if units == 0:
            self.refuse(worker)
            return
        # A single worker waits for no other worker, and exchanges within its process.
        overlaps = self._overlap and len(self._live) > 1
        ahead = self._budget.grant_ahead(worker, wanted, now, speeds, size) if overlaps else 0
        session.dispatch(version, units // size, now, ahead // size)

    def refuse(self, worker: int) -> None:
        """Let a waiting worker rest, because there are no steps for it."""
        self._live[worker].rest()
        self._budget.release(worker)  # It holds steps if its dispatch did not reach it.

    def complete(self, push: Push, session: WorkerSession, counts: bool, now: float) -> None:
        """Count the steps of a decided push, and keep those reserved that its worker may be taking by now.

        Args:
            push: the push.
            session: its session, with the outcome of the push.
            counts: whether its steps count.
            now: seconds.

        """
        sizes = self._pacing.sizes
        self._budget.complete_round(push.worker, sizes.units(push) if counts else 0)
        goes_on = session.rejection is None and not push.final
        session.begun_steps = session.overlap_steps if goes_on else 0
        if session.begun_steps > 0:
            self._budget.reserve(push.worker, session.begun_steps * sizes.of(push.worker), now)
