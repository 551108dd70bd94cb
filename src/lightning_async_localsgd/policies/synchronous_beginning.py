"""The synchronous beginning of a run: how long it is, and how much each worker contributes to a step."""

from __future__ import annotations

import math
from collections.abc import Mapping

_ROUNDING = 1e-9

LONGEST_PART = 1000
"""``"auto"`` makes the beginning a tenth of a run, but not longer than this number of steps, unless the warm-up is."""


def automatic_length(warmup: int, steps_per_rank: int | None, starts_fresh: bool) -> int:
    """Return the length of a synchronous beginning with ``sync_warmup_steps="auto"``.

    Args:
        warmup: steps in which the learning rate rises at the start.
        steps_per_rank: steps of each worker in the whole run; None if it has no end.
        starts_fresh: whether the run starts from weights that were not trained before.

    Returns:
        Steps per worker: the warm-up, but at least a tenth of the run, up to :data:`LONGEST_PART`; 0 if the weights
        were trained before, because such a run loses nothing if its workers are asynchronous from the start.

    """
    if not starts_fresh:
        return 0
    tenth = 0 if steps_per_rank is None else min(math.ceil(steps_per_rank / 10), LONGEST_PART)
    return max(warmup, tenth)


class SynchronousBeginning:
    """Decides whether the next step is synchronous, and how many local steps of gradients each worker contributes.

    In a synchronous step, each worker accumulates gradients over one or more local steps' worth of batches, the
    gradients of all workers are averaged, and all workers take the same optimizer step. Workers contribute in
    proportion to their speeds, so that all gradients arrive at about the same time.

    Args:
        steps: length of the beginning in steps per worker, as in the trainer's ``max_steps``.
        workers: number of workers that the run is started with.
        unit: units of progress in a step of the script's own batch size, see :class:`.StepSizes`.

    Example::

        >>> beginning = SynchronousBeginning(steps=10, workers=3)
        >>> beginning.shares({0: 4.1, 1: 2.0, 2: 1.0}, room=30)
        {0: 4, 1: 2, 2: 1}
        >>> beginning.shares({0: None, 1: None, 2: None}, room=30)  # as with DDP
        {0: 1, 1: 1, 2: 1}

    """

    def __init__(self, steps: int, workers: int, unit: int = 1) -> None:
        self.steps = steps
        self._end = steps * workers * unit

    def left(self, done: int) -> int:
        """Return the units of all workers together that are left of the beginning, given those done so far."""
        return max(0, self._end - done)

    def shares(
        self, speeds: Mapping[int, float | None], room: float, sizes: Mapping[int, int] | None = None
    ) -> dict[int, int]:
        """Return how many local steps of gradients each worker contributes to the next step, at least one each.

        Args:
            speeds: steps per second of the workers; None while unknown. Then all workers contribute one.
            room: largest sum of the contributions. If it is smaller than the number of workers, each contributes one.
            sizes: units of a step of each worker, in which ``room`` is given; 1 each if not given.

        """
        sizes = dict.fromkeys(speeds, 1) if sizes is None else sizes
        known = [speed for speed in speeds.values() if speed]
        if len(known) < len(speeds):
            return dict.fromkeys(speeds, 1)
        slowest = min(known)
        wanted = {worker: math.floor((speed or slowest) / slowest + _ROUNDING) for worker, speed in speeds.items()}
        total = sum(steps * sizes[worker] for worker, steps in wanted.items())
        if total > room:
            # Rounding down leaves the sum within the room, except for the workers that contribute one at least.
            wanted = {worker: max(1, math.floor(steps * room / total)) for worker, steps in wanted.items()}
            for worker in sorted(wanted, key=lambda worker: (-wanted[worker], worker)):
                excess = sum(steps * sizes[other] for other, steps in wanted.items()) - room
                if excess <= 0:
                    break
                wanted[worker] = max(1, wanted[worker] - math.ceil(excess / sizes[worker]))
        return wanted
