"""The budget: the work of all workers together, and how it is granted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Reservation:
    """Units that a worker was granted, and the time from which it takes them."""

    steps: int
    since: float


class Budget:
    """Counts local steps of all workers together, and reserves the steps of each round before it begins.

    If workers have batch sizes of their own, a unit of the budget is a sample, see :class:`.StepSizes`. Then all
    numbers of steps below are numbers of samples, and grants are whole steps of the worker: multiples of its ``size``.

    Near the end, rounds are cut so that all workers finish at about the same time. Otherwise one worker would take the
    last steps while the others wait.

    Args:
        total: steps of the whole run; None for no end.
        done: steps taken before.
        upper_bound: if given, ``total`` is an estimate, and the end of the data ends the run. A worker with data is
            granted a step even if the total is reached, and whole rounds once more than ``upper_bound`` steps are done,
            because then the estimate was wrong.
        unit: units of a step of the script's own batch size.

    Raises:
        ValueError: A number is negative.

    Example::

        >>> budget = Budget(total=60)
        >>> speeds = {0: 2.0, 1: 1.0}
        >>> budget.grant(0, 50, now=0.0, speeds=speeds), budget.grant(1, 50, now=0.0, speeds=speeds)
        (40, 20)
        >>> budget.complete_round(0, 40)
        >>> budget.done, budget.exhausted, budget.finished
        (40, True, False)

    """

    def __init__(self, total: int | None, done: int = 0, upper_bound: int | None = None, unit: int = 1) -> None:
        if total is not None and total < 0:
            raise ValueError(f"a budget's total must be >= 0 local steps, or None for no end, got {total}")
        if done < 0:
            raise ValueError(f"a budget's done steps must be >= 0, got {done}")
        self.total = total
        self._done = done
        self._upper_bound = upper_bound
        self._unit = unit
        self._stopped = False
        self._reservations: dict[int, _Reservation] = {}

    @property
    def done(self) -> int:
        """Steps that were pushed.

        More than ``total`` if a worker took more steps than it was granted, or came back after it was lost.
        """
        return self._done

    @property
    def exhausted(self) -> bool:
        """Whether no steps can be granted now: all are taken or reserved, or the run was stopped.

        If a worker is lost, its reserved steps become free.
        """
        return self._stopped or (self._unreserved() <= 0 and self._upper_bound is None)

    @property
    def left(self) -> float:
        """Steps that are neither taken nor reserved; infinite without an end. Negative if ``total`` was too low."""
        return self._unreserved()

    @property
    def finished(self) -> bool:
        """Whether no steps can be granted, and none are reserved."""
        return self.exhausted and not self._reservations

    def grant(
        self,
        worker: int,
        wanted: int,
        now: float,
        speeds: Mapping[int, float | None],
        begun: int = 0,
        since: float | None = None,
        size: int = 1,
        takes_rest: bool = True,
    ) -> int:
        """Reserve the steps of a worker's next round. An older reservation of that worker is released.

        Args:
            worker: the worker's number.
            wanted: steps of a whole round, at least 1.
            now: seconds.
            speeds: steps per second of every live worker, None while unknown.
            begun: steps that were granted ahead, see :meth:`grant_ahead`. The worker may have taken them already.
            since: time from which the worker takes the steps; now, if not given.
            size: units of a step of the worker. ``wanted`` and ``begun`` are multiples of it.
            takes_rest: whether the worker takes the last step if less than a whole one is left: that with the smallest
                steps.

        Returns:
            The granted steps: at most ``wanted``, less near the end, 0 if none are left. If ``begun`` is more, that
            number stays reserved. A worker that has taken more steps than it is granted ends its round at once.

        """
        if wanted < 1:
            raise ValueError(f"a round has at least one step, got {wanted}")
        self.release(worker)
        if self._stopped or (self.exhausted and begun == 0):
            return 0
        steps = wanted
        if not self._beyond_estimate:
            left, fair = self._unreserved(), self._fair_share(worker, now, speeds)
            if left < size and not (takes_rest or begun or self._upper_bound is not None):
                return 0
            steps = int(max(size, min(wanted, _whole(left, size), -_whole(-fair, size))))
        self._reservations[worker] = _Reservation(max(begun, steps), now if since is None else since)
        return steps

    def grant_ahead(
        self, worker: int, wanted: int, now: float, speeds: Mapping[int, float | None], size: int = 1
    ) -> int:
        """Reserve steps that a worker may take after the round that it was granted, while its push is in flight.

        Args:
            worker: the worker's number.
            wanted: steps of a whole round.
            now: seconds.
            speeds: steps per second of every live worker, None while unknown.
            size: units of a step of the worker.

        Returns:
            The granted steps: at most ``wanted``, and 0 near the end.

        """
        reservation = self._reservations.get(worker)
        if reservation is None or self._stopped:
            return 0
        steps = wanted
        if not self._beyond_estimate:
            fair = self._fair_share(worker, now, speeds) - reservation.steps
            steps = int(max(0, _whole(min(wanted, self._unreserved(), fair), size)))
        self._reservations[worker] = _Reservation(reservation.steps + steps, reservation.since)
        return steps

    def reserve(self, worker: int, steps: int, now: float) -> None:
        """Reserve steps that a worker takes in any case: those granted ahead, or those of a worker that came back.

        If the steps were granted to others meanwhile, the run takes more than ``total`` steps.
        """
        self._reservations[worker] = _Reservation(steps, now)

    def complete_round(self, worker: int, steps: int) -> None:
        """Count the steps that a worker took in its round, whatever it was granted; 0 if the round does not count."""
        if steps < 0:
            raise ValueError(f"a round cannot have {steps} steps")
        self.release(worker)
        self._done += steps

    def release(self, worker: int) -> None:
        """Free the reserved steps of a worker that will not push its round."""
        self._reservations.pop(worker, None)

    def replan(self, total: int | None, upper_bound: int | None) -> None:
        """Change the expected number of steps of the run."""
        self.total, self._upper_bound = total, upper_bound

    def stop(self) -> None:
        """Grant no more steps."""
        self._stopped = True

    def progress(self, now: float, speeds: Mapping[int, float | None]) -> float:
        """Return the steps that should be done by now: pushed steps, and an estimate for each unfinished round.

        At most ``total``, unless ``total`` was an estimate that was too low.
        """
        known = _filled(speeds)
        expected = float(self._done)
        for worker, reservation in self._reservations.items():
            expected += _expected_steps(reservation, now, known.get(worker, 0.0))
        return expected if self.total is None or self._beyond_estimate else min(expected, float(self.total))

    def state_dict(self) -> dict[str, Any]:
        """Return what outlives the process. Reservations do not: unfinished rounds are lost with it."""
        return {"done": self._done} if self._unit == 1 else {"done": self._done, "unit": self._unit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the done steps, but not ``total``, which may be different in this run."""
        self._done = int(state["done"])
        self._reservations.clear()

    @property
    def _beyond_estimate(self) -> bool:
        """Whether more steps are done than the data was expected to allow."""
        return self._upper_bound is not None and self._done > self._upper_bound

    def _unreserved(self) -> float:
        if self.total is None:
            return math.inf
        return self.total - self._done - sum(reservation.steps for reservation in self._reservations.values())

    def _fair_share(self, worker: int, now: float, speeds: Mapping[int, float | None]) -> float:
        """Return the steps that the worker can take until the end, if all live workers share what is left."""
        known = _filled(speeds)
        if self.total is None or worker not in speeds:
            return math.inf
        left = self._unreserved()
        if not known:  # No speed is known: assume equal speeds, and that all rounds are about to begin.
            left += sum(reservation.steps for reservation in self._reservations.values())
            return max(1, math.ceil(left / len(speeds)))
        for other, reservation in self._reservations.items():
            if other == worker:
                left += reservation.steps
            elif other in known:
                left += reservation.steps - _expected_steps(reservation, now, known[other])
        # Rounded first, so that an exact share is not raised by one because of the last bit.
        return max(1, math.ceil(round(known[worker] * left / sum(known.values()), 6)))


def _whole(units: float, size: int) -> float:
    """Return the units of as many whole steps."""
    return units if size == 1 or math.isinf(units) else units // size * size


def _expected_steps(reservation: _Reservation, now: float, speed: float) -> float:
    """Return the steps of an unfinished round that should be taken by now."""
    return min(float(reservation.steps), max(0.0, now - reservation.since) * speed)


def _filled(speeds: Mapping[int, float | None]) -> dict[int, float]:
    """Return ``speeds`` with the mean of the known ones for unknown ones; empty if all are unknown."""
    known = [speed for speed in speeds.values() if speed]
    if not known:
        return {}
    mean = statistics.fmean(known)
    return {worker: speed or mean for worker, speed in speeds.items()}
