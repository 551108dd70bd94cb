"""The length of rounds that follows from the cost of an exchange."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

LONGEST = 500
"""Longest round, in local steps of the fastest worker. It is the longest that DiLoCo (arXiv 2311.08105) reports."""

_MIN_ROUNDS = 200
"""Rounds that each worker of a short run should have at least."""

_MAX_SHARE_OF_SHORT_RUNS = 0.75
"""Largest share of its time that a worker of a short run spends on exchanges, to have so many rounds."""

_ANSWER_MARGIN = 1.2
"""Shortest round, relative to the time until an answer arrives. Answers that take a little longer then arrive in time.
"""

_ROUNDING = 1e-9


class RoundLength:
    """Chooses H: the shortest round in which a worker stands still for at most ``share`` of its time.

    A worker stands still while it waits for an exchange. If it trains on while its push is in flight, it stands still
    for copies only. Then rounds are also not shorter than the time until the answer arrives.

    Short rounds learn more from the same steps, and long rounds exchange less. All live workers have rounds of about
    the same duration, so the worker with the slowest exchange decides.

    A short run would have only few rounds then. So the rounds of several workers are never longer than 1/200 of each
    worker's part of the run, unless the exchange would take more than 75 % of the time.

    H begins at 1. It at most doubles between two exchanges of each worker, and changes only if it is off by more than
    ``hysteresis``, so that a few slow exchanges change little.

    Args:
        share: largest part of a worker's time that it waits for exchanges, in (0, 1).
        windows: number of exchanges that the median is taken over, at least 1.
        hysteresis: relative change of H that is ignored, in [0, 1).

    Attributes:
        steps: H, local steps of the fastest worker's round.

    Raises:
        ValueError: A value is outside its range.

    Example::

        >>> length = RoundLength()
        >>> for _ in range(10):
        ...     length.observe(worker=0, seconds=0.03)
        ...     length.update([0], fastest=10.0, total=None)
        >>> length.steps  # 15 steps of 0.1 s for each exchange of 0.03 s
        15

    """

    def __init__(self, share: float = 0.02, windows: int = 5, hysteresis: float = 0.2) -> None:
        if not 0.0 < share < 1.0:
            raise ValueError(f"the share of a worker's time spent on exchanges must be in (0, 1), got {share!r}")
        if type(windows) is not int or windows < 1:
            raise ValueError(f"windows must be an integer >= 1, got {windows!r}")
        if not 0.0 <= hysteresis < 1.0:
            raise ValueError(f"hysteresis must be in [0, 1), got {hysteresis!r}")
        self.steps = 1
        self._share = share
        self._windows = windows
        self._hysteresis = hysteresis
        self._exchanges: dict[int, deque[float]] = {}
        self._answers: dict[int, deque[float]] = {}
        # Exchanges since the last change of H.
        self._observed = 0

    def observe(self, worker: int, seconds: float, answer_seconds: float = 0.0) -> None:
        """Record an exchange of a worker.

        Args:
            worker: the worker's number.
            seconds: seconds that the worker stood still, without the wait for other workers.
            answer_seconds: seconds until the answer arrived while the worker trained on; 0 if it did not.

        """
        if min(seconds, answer_seconds) >= 0.0 and math.isfinite(seconds + answer_seconds):
            self._exchanges.setdefault(worker, deque(maxlen=self._windows)).append(seconds)
            self._answers.setdefault(worker, deque(maxlen=self._windows)).append(answer_seconds)
            self._observed += 1

    def forget(self, worker: int) -> None:
        """Forget the exchanges of a worker, because another process may take its number."""
        self._exchanges.pop(worker, None)
        self._answers.pop(worker, None)

    def update(self, live: Collection[int], fastest: float | None, total: int | None) -> None:
        """Adapt :attr:`steps` to the exchanges that were observed.

        Args:
            live: live workers.
            fastest: steps per second of the fastest of them; None while unknown.
            total: local steps of all workers together in the whole run; None if it has no end.

        """
        if fastest is None or self._observed < len(live):
            return  # Checked first, because this runs at every dispatch.
        known = [worker for worker in live if worker in self._exchanges]
        if not known:
            return
        exchange, answer = (
            max(statistics.median(seconds[worker]) for worker in known) * fastest
            for seconds in (self._exchanges, self._answers)
        )
        wanted = self._wanted(exchange, answer, len(live), total)
        if abs(wanted - self.steps) > self._hysteresis * self.steps:
            self.steps = min(wanted, 2 * self.steps)
            self._observed = 0

    def state_dict(self) -> dict[str, Any]:
        """Return H and the exchanges that it follows from, as JSON types."""
        return {
            "steps": self.steps,
            "observed": self._observed,
            "exchanges": {str(worker): list(seconds) for worker, seconds in self._exchanges.items()},
            "answers": {str(worker): list(seconds) for worker, seconds in self._answers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``."""
        self.steps = int(state["steps"])
        self._observed = int(state["observed"])
        self._exchanges = self._restored(state["exchanges"])
        self._answers = self._restored(state.get("answers") or {worker: [0.0] for worker in state["exchanges"]})

    def _restored(self, state: Mapping[str, Sequence[float]]) -> dict[int, deque[float]]:
        return {int(worker): deque(map(float, seconds), maxlen=self._windows) for worker, seconds in state.items()}

    def _wanted(self, exchange: float, answer: float, workers: int, total: int | None) -> int:
        """Return H for exchanges that take as long as ``exchange`` steps of the fastest worker, and their answers."""
        steps = _for_share(exchange, self._share)
        if total is not None and workers > 1:
            steps = min(steps, max(total / workers / _MIN_ROUNDS, _for_share(exchange, _MAX_SHARE_OF_SHORT_RUNS)))
        steps = max(steps, _ANSWER_MARGIN * answer)
        # Tolerate rounding errors, so that 15.000000000000002 counts as 15 steps.
        return max(1, min(LONGEST, math.ceil(steps * (1.0 - _ROUNDING))))


def _for_share(exchange: float, share: float) -> float:
    """Return the length of rounds that spend ``share`` of their time on exchanges."""
    return exchange * (1.0 - share) / share
