"""Norms of the pushes of many healthy runs: workers of unequal speed on small convex problems, without a Trainer."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

EIGENVALUES = 3


class Sent(NamedTuple):
    """What the guard sees of a push."""

    worker: int
    norm: float
    steps: int
    base: int
    live: int


Schedule = Callable[[float], float]
"""Learning rate, relative to its largest value, at a part of the run in [0, 1]."""


def constant(_: float) -> float:
    return 1.0


def warm_up(progress: float) -> float:
    return min(1.0, progress / 0.3)


def exponential_warm_up(progress: float) -> float:
    return min(1.0, 1e-6 * 10.0 ** (progress / 0.05))


def cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def warm_restarts(progress: float) -> float:
    return cosine(3.0 * progress % 1.0)


def steps_down(progress: float) -> float:
    return 0.1 ** int(5.0 * progress)


SCHEDULES: tuple[Schedule, ...] = (constant, warm_up, exponential_warm_up, cosine, warm_restarts, steps_down)


class Problem:
    """A quadratic function of some parameters, trained by SGD without noise. Its gradients may fall by any factor.

    All but one parameter of a run that unfreezes are frozen in its first half.
    """

    def __init__(self, draw: random.Random) -> None:
        fastest = draw.choice([10.0 ** draw.uniform(-6.0, 0.0), draw.uniform(0.5, 1.98)])
        # Learning rate times curvature of each parameter. Below 2, training converges.
        self._rates = [fastest, *(fastest * 10.0 ** draw.uniform(-4.0, 0.0) for _ in range(EIGENVALUES - 1))]
        self._unfreezes_at = draw.choice([0.0, 0.0, 0.5])
        self.unfreezes = self._unfreezes_at > 0.0
        size = 10.0 ** draw.uniform(-8.0, 8.0)
        self.theta = [size * draw.gauss(0.0, 1.0) for _ in range(EIGENVALUES)]
        self._outer = draw.choice([1.0, 0.7])

    def train(self, start: list[float], steps: int, learning_rate: float, progress: float, new: bool) -> list[float]:
        """Return the pseudo-gradient of a round."""
        active = EIGENVALUES if progress >= self._unfreezes_at else 1
        return [
            value * (1.0 - (1.0 - learning_rate * rate) ** steps) if index < active else 0.0
            for index, (value, rate) in enumerate(zip(start, self._rates, strict=True))
        ]

    def merge(self, push: list[float], workers: int) -> None:
        share = self._outer / workers
        self.theta = [value - share * moved for value, moved in zip(self.theta, push, strict=True)]


class AdamLike:
    """Steps of about equal length, as of Adam, that point the same way less and less. New optimizers take larger ones.

    Unfreezing multiplies the number of trained parameters.
    """

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._size = 10.0 ** draw.uniform(-6.0, 3.0)
        self._unfreezes_at = draw.uniform(0.2, 0.8)
        self._unfrozen = draw.choice([1.0, 10.0 ** draw.uniform(0.0, 2.6)])
        self.unfreezes = self._unfrozen > 1.0
        self._decay = 10.0 ** draw.uniform(0.0, 3.0)
        self.theta: list[float] = []

    def train(self, start: list[float], steps: int, learning_rate: float, progress: float, new: bool) -> list[float]:
        step = self._size * learning_rate * self._draw.uniform(0.5, 2.0)
        if progress >= self._unfreezes_at:
            step *= self._unfrozen
        noise, signal = math.sqrt(steps), steps * (1.0 if new else 1.0 / (1.0 + self._decay * progress))
        return [step * math.hypot(noise if new else noise / math.sqrt(self._decay), signal)]

    def merge(self, push: list[float], workers: int) -> None:
        pass


@dataclass(frozen=True)
class HealthyRun:
    """A run in which no worker is broken.

    Rounds have 1 to 500 steps. A slow worker's staleness is up to 20 versions for each other worker. Workers restart,
    join late, validate for long, and take short rounds.

    Attributes:
        pushes: the pushes in the order in which they are merged.
        jumps: norms may grow a hundredfold between two pushes: parameters are unfrozen, or the learning rate grows by
            orders of magnitude.

    """

    pushes: list[Sent]
    jumps: bool


def healthy_run(seed: int, pushes: int = 120) -> HealthyRun:
    """Simulate a run."""
    draw = random.Random(seed)
    task: Problem | AdamLike = draw.choice([Problem, AdamLike])(draw)
    schedule = draw.choice(SCHEDULES)
    live = draw.choice([1, 2, 2, 3, 4, 8])
    steps = max(1, round(500 ** draw.random()))
    dynamic = draw.random() < 0.5
    speeds = [1.0, *(draw.uniform(0.05, 1.0) for _ in range(live))]
    joins_at = draw.choice([0, draw.randrange(pushes)])
    new = set(range(live))
    sent: list[Sent] = []
    # The ends of rounds: time, worker, version and model at the start, steps.
    rounds: list[tuple[float, int, int, list[float], int]] = []

    def start(worker: int, now: float) -> None:
        count = max(1, int(steps * speeds[worker])) if dynamic else steps
        if draw.random() < 0.1:
            count = draw.randint(1, count)  # A recalled worker, or the end of an epoch.
        seconds = count / speeds[worker] * draw.uniform(0.9, 1.1)
        if draw.random() < 0.03:
            seconds += 20.0 * steps  # It validates.
        heapq.heappush(rounds, (now + seconds, worker, len(sent), list(task.theta), count))

    for worker in range(live):
        start(worker, 0.0)
    while len(sent) < pushes:
        now, worker, base, model, count = heapq.heappop(rounds)
        # The schedule follows the progress of all workers while the round lasts.
        progress = (base + len(sent)) / (2.0 * pushes)
        push = task.train(model, count, schedule(progress), progress, worker in new)
        new.discard(worker)
        if draw.random() < 0.02:
            push = [0.0 for _ in push]  # A gradient scaler skipped all steps.
        task.merge(push, live)
        sent.append(Sent(worker, math.hypot(*push), count, base, live))
        if draw.random() < 0.02:
            new.add(worker)  # It has restarted.
        start(worker, now)
        if len(sent) == joins_at:
            new.add(live)
            start(live, now)
            live += 1
    return HealthyRun(sent, jumps=task.unfreezes or schedule is exponential_warm_up)
