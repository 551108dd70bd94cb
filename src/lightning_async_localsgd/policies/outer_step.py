"""The outer step that fits any number of workers and any rounds, so that the settings of one device stay right.

The numbers follow from measurements, see ``docs/study.md``.
"""

from __future__ import annotations

import math

_STEPS_AT_ONCE = 50.0
"""Largest movement of the model by k pushes before momentum makes up the rest, in local steps of the fastest worker.

Pushes of all workers are in flight at the same time. If there are many of them, or if their rounds are long, and each
of them moved the model by 1/sqrt(k), the model would overshoot. Below this limit, no momentum above 0 was better."""

_LARGEST_MOMENTUM = 0.9


def automatic_momentum(workers: int, local_steps: int) -> float:
    """Return the momentum of ``DelayedNesterov(momentum="auto")``: 1 - 50 / (sqrt(k) * H), from 0 to 0.9.

    Args:
        workers: number of live workers k, >= 1. A single worker has no momentum.
        local_steps: H, local steps of the fastest worker's round, >= 1.

    Example::

        >>> automatic_momentum(4, 20), automatic_momentum(4, 50), automatic_momentum(16, 25)
        (0.0, 0.5, 0.5)

    """
    if workers == 1:
        return 0.0
    return min(_LARGEST_MOMENTUM, max(0.0, 1.0 - _STEPS_AT_ONCE / (math.sqrt(workers) * local_steps)))


def automatic_lr(workers: int, momentum: float) -> float:
    """Return the learning rate of ``DelayedNesterov(lr="auto")``: sqrt(k) * (1 - momentum).

    k equal pushes then move the model by sqrt(k) of one of them in the long run, whatever the momentum is. That lies
    between the plain mean 1, which is right if all pushes agree, and all whole pushes k, which is right if they have
    nothing in common.

    Args:
        workers: number of live workers k, >= 1.
        momentum: the outer momentum, in [0, 1).

    Example::

        >>> automatic_lr(4, 0.0), automatic_lr(16, 0.5)
        (2.0, 2.0)

    """
    return math.sqrt(workers) * (1.0 - momentum)
