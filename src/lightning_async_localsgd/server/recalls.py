"""Which workers must push at their next step, before their rounds are over."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
    from lightning_async_localsgd.server.sessions import WorkerSession

HOST = 0
"""The worker in the server's process. It also validates and saves, so the run cannot continue without it."""

_ENOUGH_ROUNDS = 2
"""If a worker has pushed this many whole rounds since the last validation, its present round is not recalled: the model
has most of the worker's steps. Validations that are rare leave all rounds as long as they are."""

_PATIENCE = 3.0
"""Rank 0 waits for this many times the step and exchange of a recalled worker. Then it validates without the worker."""

_MESSAGE_SECONDS = 0.1
"""Added to that wait, because a recall is a message of its own."""


class Recalls:
    """Recalls workers of unknown speed, and before rank 0 validates, workers whose steps the model lacks.

    If rounds are longer than the interval between validations, the model would be the same in several validations, and
    early stopping or a plateau scheduler would take that for the end of progress.

    Args:
        live: live sessions by worker.
        pacing: has measured the workers' speeds.

    """

    def __init__(self, live: Mapping[int, WorkerSession], pacing: SpeedAwareSteps) -> None:
        self._live = live
        self._pacing = pacing
        self._last_arrival = float("-inf")
        self._validated_at: float | None = None
        # Sessions that rank 0 waits for.
        self._awaited: dict[int, str] = {}
        self._deadline = float("-inf")

    def begin(self, now: float) -> None:
        """Note a dispatch. The first one begins the first interval between validations."""
        if self._validated_at is None:
            self._validated_at = now

    def arrive(self, session: WorkerSession, merged: bool, now: float) -> None:
        """Note an arrival.

        Args:
            session: the session that has pushed.
            merged: whether its push has steps and was not refused.
            now: seconds.

        """
        self._last_arrival = now
        if merged and self._validated_at is not None and session.dispatched_at >= self._validated_at:
            session.rounds_since_validation += 1

    def recalled(self, everyone: bool) -> dict[int, int]:
        """Return the workers that must push at their next step, and the versions that their rounds started from.

        Args:
            everyone: whether all workers must, because training ends.

        """
        return {
            worker: session.version
            for worker, session in self._live.items()
            if session.computing and (everyone or session.recalled)
        }

    def recall_unknown_speeds(self) -> None:
        """Recall workers of unknown speed, after another worker has finished a round."""
        if self._pacing.dynamic and self._pacing.total_rate(self._live) is not None:
            for worker, session in self._live.items():
                if self._pacing.speed(worker) is None and session.dispatched_at < self._last_arrival:
                    session.recalled = True

    def recall_for_validation(self, now: float) -> frozenset[int]:
        """Recall the workers whose steps since the last validation are for the most part not in the model.

        Returns:
            The recalled workers. If rank 0's worker pushes its round, its dispatch waits for the others, see
            :meth:`host_waits`.

        """
        interval = 0.0 if self._validated_at is None else now - self._validated_at
        recalled = [
            worker
            for worker, session in self._live.items()
            if session.computing and not session.interrupted and session.rounds_since_validation < _ENOUGH_ROUNDS
        ]
        for session in self._live.values():
            session.rounds_since_validation = 0
        for worker in recalled:
            self._live[worker].recalled = True
        others = [worker for worker in recalled if worker != HOST]
        self._awaited = {worker: self._live[worker].id for worker in others}
        self._deadline = now + max((min(interval, self._patience(worker)) for worker in others), default=0.0)
        self._validated_at = now
        return frozenset(recalled)

    def host_waits(self, now: float) -> bool:
        """Return whether rank 0's dispatch waits for recalled workers."""
        return self.deadline is not None and now < self.deadline

    @property
    def deadline(self) -> float | None:
        """When rank 0 waits no longer for recalled workers, in seconds; None if all have pushed or left."""
        sessions = ((self._live.get(worker), session_id) for worker, session_id in self._awaited.items())
        awaited = any(
            session is not None and session.id == session_id and session.computing and session.recalled
            for session, session_id in sessions
        )
        return self._deadline if awaited else None

    def _patience(self, worker: int) -> float:
        """Return how long a worker is waited for: without limit if its speed is unknown."""
        speed = self._pacing.speed(worker)
        if speed is None:
            return float("inf")
        return _PATIENCE * (1.0 / speed + self._live[worker].exchange_seconds) + _MESSAGE_SECONDS
