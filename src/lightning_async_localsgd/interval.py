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


def check_interval(every: int | timedelta | None) -> None:
    """Whether ``every`` is one that ``checkpoint_every`` can be.

    Raises:
        ValueError: it is not.

    """
    rounds = type(every) is int and every > 0
    time_ = isinstance(every, timedelta) and every > timedelta(0)
    if not (every is None or rounds or time_):
        raise ValueError(
            f"checkpoint_every={every!r} must be a positive number of rounds, a positive timedelta, or None for no "
            "checkpoints of the run's own"
        )
