"""The grace window: how long the first worker that arrives waits for others, so that they are merged as one round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Pending:
    """A live worker that still computes its round.

    Args:
        worker: its number.
        dispatched_at: when its round began, in seconds.
        expected_seconds: how long the round should take, exchange included; None while unknown.

    """

    worker: int
    dispatched_at: float
    expected_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """A window that has just opened.

    Args:
        deadline: when it closes at the latest, in seconds.
        expected: the workers it is held open for; it closes as soon as none of them computes any more.

    """

    deadline: float
    expected: frozenset[int]


class GraceWindow:
    """Algorithms 2 and 5 of arXiv 2401.09135v2.

    Pushes within a window are applied in turn, at once; the window only decides when their workers are dispatched
    again, all with the same model.

    ``"auto"`` predicts when each computing worker arrives and waits for those who arrive soon, in the order of their
    arrival, as long as nobody in the window, the first nor any later one, is predicted to spend more than ``share`` of
    its time, round and wait together, on waiting. A worker that is overdue by more than it may wait itself has died or
    hangs: nobody waits for it. Where nobody is worth waiting for, the window is closed from the start.

    Args:
        grace: ``"auto"``, or the length of each window in seconds; 0 turns windows off.
        share: largest part of a worker's time that ``"auto"`` lets it wait, in [0, 0.5]. The default has room for all
            four devices of the paper with H=20, whose rounds last from 9.99 to 11.6 s.

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> window = GraceWindow("auto")
        >>> soon = Pending(worker=1, dispatched_at=0.0, expected_seconds=31.0)
        >>> late = Pending(worker=2, dispatched_at=0.0, expected_seconds=60.0)
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
        """The window that opens with an arrival.

        Args:
            now: time of the arrival.
            round_seconds: how long the arriving worker's round took.
            pending: the live workers that still compute.

        """
        if self.grace != "auto":
            deadline = now + self.grace if pending else now
            return Plan(deadline, frozenset(other.worker for other in pending) if deadline > now else frozenset())

        arrivals: list[tuple[float, float, int]] = []
        for other in pending:
            seconds = round_seconds if other.expected_seconds is None else other.expected_seconds
            arrival = other.dispatched_at + seconds
            patience = self._patience(seconds)
            if arrival + patience >= now:
                arrivals.append((max(now, arrival), patience, other.worker))

        # `latest` is when the first of those in the window runs out of patience.
        latest = now + self._patience(round_seconds)
        deadline = now
        expected: set[int] = set()
        for arrival, patience, worker in sorted(arrivals):
            if arrival > latest:
                break
            latest = min(latest, arrival + patience)
            # Predictions are a little off: some of the patience is left for whoever comes later than predicted. It is
            # spent only on those who don't come; as soon as the last one is in, the window closes.
            deadline = max(deadline, arrival + patience / 3.0)
            expected.add(worker)
        deadline = min(deadline, latest)
        return Plan(deadline, frozenset(expected)) if deadline > now else Plan(now, frozenset())

    def _patience(self, round_seconds: float) -> float:
        """For how long somebody waits after a round of so many seconds."""
        return self.share / (1.0 - self.share) * max(0.0, round_seconds)
