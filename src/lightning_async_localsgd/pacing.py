"""How many local steps each worker takes: in proportion to its speed, so that all rounds take about the same time."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_ROUNDING = 1e-9


class SpeedAwareSteps:
    """Dynamic local updates (DyLU), equation 6 of arXiv 2401.09135v2: steps_i = floor(v_i / v_ref * H), at least 1.

    v_i is the median speed over the worker's last windows, v_ref the fastest live worker's. A median is robust against
    single disturbed windows, and the maximum of medians against a worker that was fast once. The proportion in use
    changes only when it is off by more than ``hysteresis``, so that noise in the clock does not change rounds.

    Args:
        local_steps: H, steps of the fastest worker's round, >= 1.
        dynamic: False gives every worker ``local_steps``; speeds are measured all the same.
        windows: windows that the median covers, >= 1.
        hysteresis: relative change of the proportion that is ignored, in [0, 1).

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> pacing = SpeedAwareSteps(local_steps=50)
        >>> for worker, seconds_per_step in enumerate([0.58, 0.75, 1.51, 3.33]):
        ...     pacing.observe(worker, steps=1, seconds=seconds_per_step)
        >>> [pacing.steps_for(worker, live=range(4)) for worker in range(4)]
        [50, 38, 19, 8]

    """

    def __init__(self, local_steps: int, dynamic: bool = True, windows: int = 5, hysteresis: float = 0.05) -> None:
        if type(local_steps) is not int or local_steps < 1:
            raise ValueError(f"local_steps must be an integer >= 1, got {local_steps!r}; the paper uses 50")
        if type(windows) is not int or windows < 1:
            raise ValueError(f"windows must be an integer >= 1, got {windows!r}")
        if not 0.0 <= hysteresis < 1.0:
            raise ValueError(f"hysteresis must be in [0, 1), got {hysteresis!r}")
        self.local_steps = local_steps
        self.dynamic = dynamic
        self._windows = windows
        self._hysteresis = hysteresis
        self._speeds: dict[int, deque[float]] = {}
        self._ratios: dict[int, float] = {}

    def observe(self, worker: int, steps: int, seconds: float) -> None:
        """Takes note of one window of undisturbed computing; one without steps or time says nothing and is ignored."""
        if steps > 0 and seconds > 0.0 and math.isfinite(seconds):
            self._speeds.setdefault(worker, deque(maxlen=self._windows)).append(steps / seconds)

    def forget(self, worker: int) -> None:
        """The worker is gone; another one under its number starts unknown."""
        self._speeds.pop(worker, None)
        self._ratios.pop(worker, None)

    def speed(self, worker: int) -> float | None:
        """Steps per second of compute; None while unknown."""
        speeds = self._speeds.get(worker)
        return statistics.median(speeds) if speeds else None

    def total_speed(self, workers: Iterable[int]) -> float | None:
        """Steps per second of ``workers`` together; None if all are unknown.

        Unknown ones count as the mean of the known.
        """
        speeds = [self.speed(worker) for worker in workers]
        known = [speed for speed in speeds if speed is not None]
        return statistics.fmean(known) * len(speeds) if known else None

    def steps_for(self, worker: int, live: Collection[int]) -> int:
        """Local steps for the worker's next round.

        Args:
            worker: who is dispatched; while its speed is unknown it gets ``local_steps``.
            live: all live workers.

        """
        speed = self.speed(worker)
        if not self.dynamic or speed is None:
            return self.local_steps
        reference = max(known for known in (speed, *map(self.speed, live)) if known is not None)
        ratio = speed / reference
        used = self._ratios.get(worker, 1.0)
        if abs(ratio - used) > self._hysteresis * used:
            used = ratio
        self._ratios[worker] = used
        # A step must not be lost because 0.5 * 50 came out as 24.999999999999996.
        return max(1, math.floor(used * self.local_steps * (1.0 + _ROUNDING)))

    def state_dict(self) -> dict[str, Any]:
        """Measured speeds and proportions in use, of JSON's types."""
        return {
            "speeds": {str(worker): list(speeds) for worker, speeds in self._speeds.items()},
            "ratios": {str(worker): ratio for worker, ratio in self._ratios.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with the speeds in ``state``."""
        self._speeds = {
            int(worker): deque(map(float, speeds), maxlen=self._windows) for worker, speeds in state["speeds"].items()
        }
        self._ratios = {int(worker): float(ratio) for worker, ratio in state["ratios"].items()}
