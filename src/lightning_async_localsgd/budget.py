"""The budget: local optimizer steps of all workers together, and who may still take how many of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Reservation:
    """Steps that a worker was granted, and when."""

    steps: int
    since: float


class Budget:
    """Counts local steps of all workers together and reserves those of each round before it begins.

    Near the end a round is cut so that all workers finish at about the same time, instead of one taking the last steps
    while the others look on.

    Args:
        total: steps of the whole run, or None for no end.
        done: steps taken before.
        at_most: ``total`` is what the data is expected to come to, and the data itself ends the run: a worker that
            still has some is granted a step even when the total is reached, and whole rounds when so many steps are
            done that the estimate must have been wrong. None: ``total`` is no estimate.

    Raises:
        ValueError: a negative number.

    Example::

        >>> budget = Budget(total=60)
        >>> speeds = {0: 2.0, 1: 1.0}
        >>> budget.grant(0, 50, now=0.0, speeds=speeds), budget.grant(1, 50, now=0.0, speeds=speeds)
        (40, 20)
        >>> budget.settle(0, 40)
        >>> budget.done, budget.exhausted, budget.finished
        (40, True, False)

    """

    def __init__(self, total: int | None, done: int = 0, at_most: int | None = None) -> None:
        if total is not None and total < 0:
            raise ValueError(f"a budget's total must be >= 0 local steps, or None for no end, got {total}")
        if done < 0:
            raise ValueError(f"a budget's done steps must be >= 0, got {done}")
        self.total = total
        self._done = done
        self._at_most = at_most
        self._stopped = False
        self._reservations: dict[int, _Reservation] = {}

    @property
    def done(self) -> int:
        """Steps that were handed in.

        May exceed ``total`` where a worker took more than it was granted, or came back when it had been given up.
        """
        return self._done

    @property
    def exhausted(self) -> bool:
        """Nothing can be granted now: all steps are taken or reserved, or the run was stopped.

        The death of a worker may free steps again.
        """
        return self._stopped or (self._unreserved() <= 0 and self._at_most is None)

    @property
    def finished(self) -> bool:
        """Nothing more is granted, and everything that was granted is handed in or given up."""
        return self.exhausted and not self._reservations

    def grant(self, worker: int, wanted: int, now: float, speeds: Mapping[int, float | None]) -> int:
        """Reserves the steps of a worker's next round; an older reservation of that worker is given up.

        Args:
            worker: who is about to be dispatched.
            wanted: steps of a whole round, >= 1.
            now: seconds.
            speeds: steps per second of every live worker, None while unknown.

        Returns:
            Steps to take: at most ``wanted``, less near the end, 0 if none are left.

        """
        if wanted < 1:
            raise ValueError(f"a round has at least one step, got {wanted}")
        self.release(worker)
        if self.exhausted:
            return 0
        if self._beyond_estimate:
            self._reservations[worker] = _Reservation(wanted, now)
            return wanted
        steps = int(max(1, min(wanted, self._unreserved(), self._fair_share(worker, now, speeds))))
        self._reservations[worker] = _Reservation(steps, now)
        return steps

    def resume(self, worker: int, steps: int, now: float) -> None:
        """A round of ``steps`` steps that had been given up goes on after all.

        They are the worker's again, even if others have been granted them meanwhile: then there are more than ``total``
        in the end.
        """
        self._reservations[worker] = _Reservation(steps, now)

    def settle(self, worker: int, steps: int) -> None:
        """A round was handed in with its true number of steps, whatever was granted; 0 for one that does not count."""
        if steps < 0:
            raise ValueError(f"a round cannot have {steps} steps")
        self.release(worker)
        self._done += steps

    def release(self, worker: int) -> None:
        """The worker won't hand in its round: its steps are free again."""
        self._reservations.pop(worker, None)

    def replan(self, total: int | None, at_most: int | None) -> None:
        """The run is expected to come to another number of steps."""
        self.total, self._at_most = total, at_most

    def stop(self) -> None:
        """Nothing more is granted."""
        self._stopped = True

    def progress(self, now: float, speeds: Mapping[int, float | None]) -> float:
        """Steps that should be done by now, never more than ``total`` unless that has turned out to be too few.

        These are the steps handed in, and of each unfinished round what its worker's speed lets expect.
        """
        known = _filled(speeds)
        expected = float(self._done)
        for worker, reservation in self._reservations.items():
            expected += _taken(reservation, now, known.get(worker, 0.0))
        return expected if self.total is None or self._beyond_estimate else min(expected, float(self.total))

    def state_dict(self) -> dict[str, Any]:
        """What outlives the process. Reservations don't: rounds that were not handed in are lost with it."""
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the steps in ``state``; ``total`` stays this run's own."""
        self._done = int(state["done"])
        self._reservations.clear()

    @property
    def _beyond_estimate(self) -> bool:
        """More has been handed in than the data was expected to come to, and it has not ended."""
        return self._at_most is not None and self._done > self._at_most

    def _unreserved(self) -> float:
        if self.total is None:
            return math.inf
        return self.total - self._done - sum(reservation.steps for reservation in self._reservations.values())

    def _fair_share(self, worker: int, now: float, speeds: Mapping[int, float | None]) -> float:
        """Steps that the worker can take until everything is done, if all live workers share what is left."""
        known = _filled(speeds)
        if self.total is None or worker not in speeds:
            return math.inf
        left = self._unreserved()
        if not known:  # Nobody has been measured yet: as if all were equally fast and about to begin.
            left += sum(reservation.steps for reservation in self._reservations.values())
            return max(1, math.ceil(left / len(speeds)))
        for other, reservation in self._reservations.items():
            if other in known:
                left += reservation.steps - _taken(reservation, now, known[other])
        # Rounded first, so that an exact share is not raised by one because of the last bit.
        return max(1, math.ceil(round(known[worker] * left / sum(known.values()), 6)))


def _taken(reservation: _Reservation, now: float, speed: float) -> float:
    """Steps of an unfinished round that should be taken by now."""
    return min(float(reservation.steps), max(0.0, now - reservation.since) * speed)


def _filled(speeds: Mapping[int, float | None]) -> dict[int, float]:
    """``speeds`` with unknown ones as the mean of the known; empty if all are unknown."""
    known = [speed for speed in speeds.values() if speed]
    if not known:
        return {}
    mean = statistics.fmean(known)
    return {worker: speed or mean for worker, speed in speeds.items()}
