"""Makes the headers of dispatches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_async_localsgd.protocol.messages import Reply
from lightning_async_localsgd.server.run_stats import WorkerView

if TYPE_CHECKING:
    from lightning_async_localsgd.policies.budget import Budget
    from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
    from lightning_async_localsgd.server.global_model import GlobalModel
    from lightning_async_localsgd.server.membership import Membership
    from lightning_async_localsgd.server.progress import ProgressEstimate
    from lightning_async_localsgd.server.run_stats import RunStats
    from lightning_async_localsgd.server.waiting import DispatchWindow


class ReplyMaker:
    """Makes replies from the state of the server, and notes the latest values of the workers for logging.

    Args:
        incarnation: random name of this start of the server.
        model: the global model.
        budget: local steps of all workers together.
        pacing: has measured the workers' speeds.
        membership: who takes part.
        progress: estimates the progress of the run.
        window: knows whether all workers wait for each other.
        stats: totals and latest values of the workers.

    """

    def __init__(
        self,
        incarnation: str,
        model: GlobalModel,
        budget: Budget,
        pacing: SpeedAwareSteps,
        membership: Membership,
        progress: ProgressEstimate,
        window: DispatchWindow,
        stats: RunStats,
    ) -> None:
        self._incarnation = incarnation
        self._model = model
        self._budget = budget
        self._pacing = pacing
        self._membership = membership
        self._progress = progress
        self._window = window
        self._stats = stats

    def make(self, worker: int, now: float, progress: float, broadcast: str, save_request: int) -> Reply:
        """Return the header of a dispatch.

        Args:
            worker: a live worker.
            now: seconds.
            progress: local steps of all workers together that are expected to be done by now.
            broadcast: see :attr:`.Reply.broadcast`.
            save_request: see :attr:`.Reply.save_request`.

        """
        session, finished = self._membership.live[worker], self._membership.finished
        waited = now - session.arrived_at
        if session.sequence > 0 and not session.overlapped:
            self._stats.of(worker).wait_seconds += waited
        self._stats.views[worker] = WorkerView.of(session, waited, self._pacing.speed(worker))
        return Reply(
            incarnation=self._incarnation,
            sequence=session.sequence,
            version=self._model.version,
            staleness=session.staleness,
            local_steps=0 if finished else session.local_steps,
            progress=float(self._budget.done) if finished else progress,
            progress_per_step=self._progress.per_step(worker, self._window.lock_step and not finished),
            wait_seconds=waited,
            stop=finished,
            refused=None if session.rejection is None else session.rejection.text,
            broadcast=broadcast,
            save_request=save_request,
            reset_optimizer=session.reset_optimizer,
            overlap_steps=0 if finished else session.overlap_steps,
        )
