"""How often a run's state is written to the disk: the strategy's ``checkpoint_every``."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta


class Interval:
    """Says when it is time again.

    Args:
        every: rounds of all workers together, or time.
        rounds: merged so far.
        clock: seconds, monotonic.

    """

    def __init__(self, every: int | timedelta, rounds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self.begin(rounds)

    def begin(self, rounds: int) -> None:
        """A new interval begins, ``rounds`` are merged."""
        self._rounds = rounds
        self._began = self._clock()

    def over(self, rounds: int) -> bool:
        """Whether the interval is over, now that ``rounds`` are merged."""
        if isinstance(self._every, timedelta):
            return self._clock() - self._began >= self._every.total_seconds()
        return rounds - self._rounds >= self._every
