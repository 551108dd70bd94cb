"""The fewest workers with which training goes on."""

from __future__ import annotations

import logging
import math

from lightning_async_localsgd.protocol.checks import check_count

_log = logging.getLogger(__name__)


def check_min_workers(min_workers: object) -> int:
    """Return ``min_workers`` if it is a number of workers.

    Raises:
        ValueError: It is anything else.

    """
    return check_count("AsyncLocalSGD", "min_workers", min_workers, "1 never pauses training")


class WorkerMinimum:
    """Pauses training while fewer than ``workers`` take part.

    In a pause no worker is dispatched, so nothing is lost: workers that compute push their rounds, and then wait like
    the others. Callers pass the number of live workers and the time. The log has a line when a pause begins, and one
    when enough workers take part again.

    Args:
        workers: fewest live workers with which training goes on; 1 never pauses training.
        timeout: seconds after which a pause ends the run with an error.

    Attributes:
        workers: fewest live workers with which training goes on.
        pauses: number of pauses that have begun.
        seconds: seconds of the pauses that are over.

    Example::

        >>> minimum = WorkerMinimum(2, timeout=60.0)
        >>> minimum.update(1, now=10.0)
        >>> minimum.paused, minimum.deadline
        (True, 70.0)
        >>> minimum.update(2, now=15.0)
        >>> minimum.paused, minimum.seconds
        (False, 5.0)

    """

    def __init__(self, workers: int = 1, timeout: float = math.inf) -> None:
        self.workers = workers
        self.pauses = 0
        self.seconds = 0.0
        self._timeout = timeout
        self._live = 0
        self._paused_at: float | None = None
        self._ended = False

    @property
    def paused(self) -> bool:
        """Whether training is paused."""
        return self._paused_at is not None

    @property
    def deadline(self) -> float | None:
        """When the present pause ends the run, in seconds; None without a pause or a limit."""
        if self._paused_at is None or self._timeout == math.inf:
            return None
        return self._paused_at + self._timeout

    def update(self, live: int, now: float, steps_left: bool = True) -> None:
        """Begin or end a pause.

        Args:
            live: number of live workers.
            now: seconds.
            steps_left: whether a worker may need steps. Without steps, there is nothing to pause.

        """
        self._live = live
        missing = self.workers - live
        if self._ended:
            return
        if self.workers > 1 and missing > 0 and steps_left:
            if self._paused_at is None:
                self._paused_at = now
                self.pauses += 1
                limit = "" if self._timeout == math.inf else f"; if not, it ends with an error in {self._timeout:g} s"
                _log.warning(
                    "training is paused: %d worker(s) take part, and min_workers=%d; training goes on when %d more "
                    "worker(s) have joined or come back%s", live, self.workers, missing, limit,
                )  # fmt: skip
        elif self._paused_at is not None:
            if missing <= 0:
                _log.warning("training goes on with %d workers, after a pause of %.1f s", live, now - self._paused_at)
            self._end_pause(now)

    def end(self, now: float) -> None:
        """End a pause, and begin no other, because training ends."""
        self._ended = True
        self._end_pause(now)

    def failure(self, now: float) -> str | None:
        """Return why the run must end because of its present pause; None if it need not."""
        deadline = self.deadline
        if deadline is None or now < deadline:
            return None
        return (
            f"training was paused for exchange.pause_timeout={self._timeout:g} s, because {self._live} worker(s) take "
            f"part and min_workers={self.workers}; see why the others have ended, start them again or lower "
            "min_workers, and resume from the run's newest checkpoint"
        )

    def _end_pause(self, now: float) -> None:
        if self._paused_at is not None:
            self.seconds += now - self._paused_at
            self._paused_at = None
