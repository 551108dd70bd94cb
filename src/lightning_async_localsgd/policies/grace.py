"""The grace window: how long a worker that has pushed waits for others, so that they are dispatched together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Pending:
    """A live worker that computes its round.

    Args:
        worker: the worker's number.
        began_at: time at which the round began, in seconds.
        expected_seconds: expected duration of the round, exchange included; None while unknown.

    """

    worker: int
    began_at: float
    expected_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """A window that has just opened.

    Args:
        deadline: time at which the window closes at the latest, in seconds.
        expected: workers that the window waits for. It closes when none of them computes any more.

    """

    deadline: float
    expected: frozenset[int]


class GraceWindow:
    """Plans windows (Algorithms 2 and 5 of arXiv 2401.09135v2).

    Pushes are merged when they arrive. The window only decides when their workers are dispatched again, all with the
    same model.

    With ``"auto"``, the window predicts when each computing worker arrives, and waits for the next arrivals in order,
    as long as no worker in the window is predicted to spend more than ``share`` of its time (round and wait) waiting. A
    worker that is overdue by more than its own longest wait has died or hangs, and is not waited for. If no arrival is
    near enough, the window closes at once.

    Args:
        grace: ``"auto"``, or the length of each window in seconds; 0 turns windows off.
        share: largest part of a worker's time that ``"auto"`` lets it wait, in [0, 0.5]. The default is enough for all
            four devices of the paper with H=20, whose rounds last from 9.99 to 11.6 s.

    Raises:
        ValueError: A value is outside its range.

    Example::

        >>> window = GraceWindow("auto")
        >>> soon = Pending(worker=1, began_at=0.0, expected_seconds=31.0)
        >>> late = Pending(worker=2, began_at=0.0, expected_seconds=60.0)
        >>> window.plan(now=30.0, round_seconds=30.0, pending=[soon, late])
        Plan(deadline=32.8235294117647, expected=frozenset({1}))

    """

    def __init__(self, grace: Literal["auto"] | float = "auto", share: float = 0.15) -> None:
        number = isinstance(grace, (int, float)) and not isinstance(grace, bool)
        if grace != "auto" and not (number and 0.0 <= float(grace) < math.inf):
            raise ValueError(f'grace must be "auto" or seconds >= 0, got {grace!r}; 0 turns the grace window off')
        if not 0.0 <= share <= 0.5:
            raise ValueError(f"the share of a worker's time spent on waiting must be in [0, 0.5], got {share!r}")
        self.grace = grace
        self.share = share

    def plan(self, now: float, round_seconds: float, pending: Sequence[Pending]) -> Plan:
        """Plan the window that an arrival opens.

        Args:
            now: time of the arrival.
            round_seconds: seconds that the arriving worker's round took.
            pending: live workers that compute.

        """
        if self.grace != "auto":
            deadline = now + self.grace if pending else now
            return Plan(deadline, frozenset(other.worker for other in pending) if deadline > now else frozenset())

        arrivals: list[tuple[float, float, int]] = []
        for other in pending:
            seconds = round_seconds if other.expected_seconds is None else other.expected_seconds
            arrival = other.began_at + seconds
            patience = self._patience(seconds)
            if arrival + patience >= now:
                arrivals.append((max(now, arrival), patience, other.worker))

        # `latest` is the time at which the patience of the first worker in the window ends.
        latest = now + self._patience(round_seconds)
        deadline = now
        expected: set[int] = set()
        for arrival, patience, worker in sorted(arrivals):
            if arrival > latest:
                break
            latest = min(latest, arrival + patience)
            # A third of the patience allows for inexact predictions. The window closes as soon as the last expected
            # worker arrives, so the time is only lost if a worker does not arrive.
            deadline = max(deadline, arrival + patience / 3.0)
            expected.add(worker)
        deadline = min(deadline, latest)
        return Plan(deadline, frozenset(expected)) if deadline > now else Plan(now, frozenset())

    def _patience(self, round_seconds: float) -> float:
        """Return the longest wait after a round, in seconds."""
        return self.share / (1.0 - self.share) * max(0.0, round_seconds)
