"""Local steps of each worker in proportion to its speed, so that all rounds take about the same time."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from lightning_async_localsgd.policies.round_length import RoundLength
from lightning_async_localsgd.policies.step_sizes import StepSizes

_log = logging.getLogger(__name__)

_ROUNDING = 1e-9


class SpeedAwareSteps:
    """Dynamic local updates (DyLU), equation 6 of arXiv 2401.09135v2: steps_i = floor(v_i / v_ref * H), at least 1.

    v_i is the median speed of the worker's last rounds, and v_ref that of the fastest live worker. The median is robust
    against single disturbed rounds, and the maximum of medians against a worker that was fast once. The ratio in use
    changes only when it is off by more than ``hysteresis``, so that timer noise does not change rounds.

    If workers have batch sizes of their own, the fastest worker is the one with the most samples per second. Its rounds
    have H of its own steps, and all others as many of theirs as take the same time, which may be more than H.

    Args:
        local_steps: H, local steps of the fastest worker's round, at least 1; ``"auto"`` leaves it to
            :class:`.RoundLength`.
        dynamic: if False, every worker takes H steps. Speeds are measured nevertheless.
        windows: number of measurements that the median is taken over, at least 1.
        hysteresis: relative change of the ratio that is ignored, in [0, 1).

    Attributes:
        sizes: the units of a step of each worker, see :class:`.StepSizes`.

    Raises:
        ValueError: A value is outside its range.

    Example::

        >>> pacing = SpeedAwareSteps(local_steps=50)
        >>> for worker, seconds_per_step in enumerate([0.58, 0.75, 1.51, 3.33]):
        ...     pacing.observe(worker, steps=1, seconds=seconds_per_step)
        >>> [pacing.steps_for(worker, live=range(4)) for worker in range(4)]
        [50, 38, 19, 8]

    """

    def __init__(
        self, local_steps: int | Literal["auto"], dynamic: bool = True, windows: int = 5, hysteresis: float = 0.05
    ) -> None:
        if local_steps != "auto" and (type(local_steps) is not int or local_steps < 1):
            raise ValueError(
                f'local_steps must be an integer >= 1 or "auto", got {local_steps!r}; "auto" is usual, the paper uses '
                "50"
            )
        if type(windows) is not int or windows < 1:
            raise ValueError(f"windows must be an integer >= 1, got {windows!r}")
        if not 0.0 <= hysteresis < 1.0:
            raise ValueError(f"hysteresis must be in [0, 1), got {hysteresis!r}")
        self.dynamic = dynamic
        self.sizes = StepSizes()
        self._length = RoundLength() if local_steps == "auto" else None
        self._local_steps = local_steps
        self._windows = windows
        self._hysteresis = hysteresis
        self._speeds: dict[int, deque[float]] = {}
        self._ratios: dict[int, float] = {}

    @property
    def local_steps(self) -> int:
        """H, local steps of the fastest worker's round."""
        if self._length is not None:
            return self._length.steps
        assert isinstance(self._local_steps, int)
        return self._local_steps

    def observe_exchange(self, worker: int, sequence: int, seconds: float, answer_seconds: float = 0.0) -> None:
        """Record a worker's exchange before a push.

        Args:
            worker: the worker's number.
            sequence: number of the push in the worker's session. Before the first one, there was no exchange.
            seconds: seconds that the worker stood still for the exchange, without the wait for other workers.
            answer_seconds: seconds until the answer arrived while the worker trained on; 0 if it did not.

        """
        if self._length is not None and sequence > 1:
            self._length.observe(worker, seconds, answer_seconds)

    def observe(self, worker: int, steps: int, seconds: float) -> None:
        """Record a measurement of undisturbed computing. A measurement without steps or time is ignored."""
        if steps > 0 and seconds > 0.0 and math.isfinite(seconds):
            self._speeds.setdefault(worker, deque(maxlen=self._windows)).append(steps / seconds)

    def forget(self, worker: int) -> None:
        """Forget the speed of a worker, because another process may take its number."""
        self._speeds.pop(worker, None)
        self._ratios.pop(worker, None)
        if self._length is not None:
            self._length.forget(worker)

    def speed(self, worker: int) -> float | None:
        """Return the worker's steps per second of computing; None while unknown."""
        speeds = self._speeds.get(worker)
        return statistics.median(speeds) if speeds else None

    def rate(self, worker: int) -> float | None:
        """Return the worker's units per second of computing; None while unknown."""
        speed = self.speed(worker)
        return None if speed is None else speed * self.sizes.of(worker)

    def total_rate(self, workers: Iterable[int]) -> float | None:
        """Return the units per second of ``workers`` together; None if no speed is known.

        The mean of the known rates stands for unknown ones.
        """
        rates = [self.rate(worker) for worker in workers]
        known = [rate for rate in rates if rate is not None]
        return statistics.fmean(known) * len(rates) if known else None

    def steps_for(self, worker: int, live: Collection[int], total: int | None = None) -> int:
        """Return the local steps of a worker's next round: H while its speed is unknown.

        Args:
            worker: the worker's number.
            live: all live workers.
            total: units of all workers together in the whole run; None if it has no end.

        """
        fastest = max({worker, *live}, key=lambda other: (self.rate(other) or 0.0, -other))
        reference = self.speed(fastest)
        if self._length is not None:
            before = self._length.steps
            self._length.update(live, reference, total if total is None else total // self.sizes.of(fastest))
            if self._length.steps != before:
                _log.info("rounds have up to %d local steps now, %d before", self._length.steps, before)
        speed = self.speed(worker)
        if not self.dynamic or speed is None or reference is None:
            return self.local_steps
        ratio = speed / reference
        used = self._ratios.get(worker, 1.0)
        if abs(ratio - used) > self._hysteresis * used:
            used = ratio
        self._ratios[worker] = used
        # Tolerate rounding errors, so that 24.999999999999996 counts as 25 steps.
        return max(1, math.floor(used * self.local_steps * (1.0 + _ROUNDING)))

    def state_dict(self) -> dict[str, Any]:
        """Return measured speeds, the ratios in use and the length of rounds, as JSON types."""
        return {
            "speeds": {str(worker): list(speeds) for worker, speeds in self._speeds.items()},
            "ratios": {str(worker): ratio for worker, ratio in self._ratios.items()},
            "length": None if self._length is None else self._length.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``."""
        self._speeds = {
            int(worker): deque(map(float, speeds), maxlen=self._windows) for worker, speeds in state["speeds"].items()
        }
        self._ratios = {int(worker): float(ratio) for worker, ratio in state["ratios"].items()}
        length = state.get("length")
        if self._length is not None and length is not None:
            self._length.load_state_dict(length)
