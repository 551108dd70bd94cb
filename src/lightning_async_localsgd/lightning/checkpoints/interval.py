"""How often a run's state is saved: the strategy's ``checkpoint_every``."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta


class Interval:
    """Time or rounds between two saves.

    Args:
        every: number of rounds of all workers together, or time.
        rounds: rounds merged so far.
        clock: returns monotonic seconds.

    """

    def __init__(self, every: int | timedelta, rounds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self.restart(rounds)

    def restart(self, rounds: int) -> None:
        """Begin a new interval after ``rounds`` merged rounds."""
        self._start_rounds = rounds
        self._start_time = self._clock()

    def is_over(self, rounds: int) -> bool:
        """Return whether the interval is over after ``rounds`` merged rounds."""
        if isinstance(self._every, timedelta):
            return self._clock() - self._start_time >= self._every.total_seconds()
        return rounds - self._start_rounds >= self._every


def check_interval(every: int | timedelta | None) -> None:
    """Check the option ``checkpoint_every``.

    Raises:
        ValueError: The option is outside its range.

    """
    is_rounds = type(every) is int and every > 0
    is_time = isinstance(every, timedelta) and every > timedelta(0)
    if not (every is None or is_rounds or is_time):
        raise ValueError(
            f"checkpoint_every={every!r} must be a positive number of rounds, a positive timedelta, or None for no "
            "checkpoints of the run's own"
        )
