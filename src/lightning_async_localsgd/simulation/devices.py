"""What a virtual cluster is made of: how fast its machines compute, how they are linked, and what happens to them.

Plain values, checked where they are made. All times are virtual seconds since the start of training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

_DIGITS = 12
"""Drawn times keep so many digits. The last bits of exponential and logarithm differ from machine to machine, and must
not decide who arrives first."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(what: str, value: float, least: float = 0.0, above: bool = False) -> None:
    """Refuses what is no number, not finite or too small.

    Raises:
        ValueError: it is.

    """
    good = _is_number(value) and math.isfinite(value) and (value > least if above else value >= least)
    if not good:
        raise ValueError(f"{what}={value!r} must be a finite number {'>' if above else '>='} {least:g}")


def _check_worker(what: str, worker: int) -> None:
    if type(worker) is not int or worker < 0:
        raise ValueError(f"{what}={worker!r} must be a worker's number, 0 or more")


@dataclass(frozen=True)
class StepSeconds:
    """How long a machine takes for a local step.

    Args:
        seconds: the mean, > 0.
        jitter: standard deviation divided by the mean, >= 0. Times are then drawn from a log-normal distribution.

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> import random
        >>> StepSeconds(0.5).draw(random.Random(0))
        0.5
        >>> drawn = [StepSeconds(0.5, jitter=0.2).draw(random.Random(seed)) for seed in range(1000)]
        >>> 0.48 < sum(drawn) / 1000 < 0.52
        True

    """

    seconds: float
    jitter: float = 0.0

    def __post_init__(self) -> None:
        _check("StepSeconds.seconds", self.seconds, above=True)
        _check("StepSeconds.jitter", self.jitter)

    def draw(self, generator: random.Random) -> float:
        """The duration of one step."""
        if self.jitter == 0.0:
            return self.seconds
        variance = math.log1p(self.jitter**2)
        drawn = generator.lognormvariate(math.log(self.seconds) - variance / 2, math.sqrt(variance))
        return float(f"{drawn:.{_DIGITS}g}")


@dataclass(frozen=True)
class Link:
    """A worker's link to the server, the same in both directions.

    Args:
        latency: seconds that a message needs each way, >= 0.
        bytes_per_second: bandwidth, > 0; infinite by default.

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> Link(latency=0.05, bytes_per_second=1e6).seconds(4_000_000)
        4.05

    """

    latency: float = 0.0
    bytes_per_second: float = math.inf

    def __post_init__(self) -> None:
        _check("Link.latency", self.latency)
        rate = self.bytes_per_second
        if not _is_number(rate) or not rate > 0:
            raise ValueError(f"Link.bytes_per_second={rate!r} must be a number > 0")

    def seconds(self, size: int) -> float:
        """How long ``size`` bytes take, one way."""
        return self.latency + size / self.bytes_per_second


@dataclass(frozen=True)
class Slowdown:
    """A machine is slower, or faster, for a while: the steps that begin in that time.

    Args:
        worker: the worker's number.
        start: from then on.
        end: until then; may be infinite.
        factor: its steps take so many times as long, > 0.

    Raises:
        ValueError: a value is outside its range.

    """

    worker: int
    start: float
    end: float
    factor: float

    def __post_init__(self) -> None:
        _check_worker("Slowdown.worker", self.worker)
        _check("Slowdown.start", self.start)
        _check("Slowdown.factor", self.factor, above=True)
        if not _is_number(self.end) or not self.end > self.start:
            raise ValueError(f"Slowdown.end={self.end!r} must be a number > start={self.start!r}")


@dataclass(frozen=True)
class Death:
    """A worker dies; its unfinished round is lost.

    Args:
        worker: the worker's number.
        at: when.
        back_at: when it joins again with its inner optimizer's state, as a worker does that is started again; None if
            it does not.

    Raises:
        ValueError: a value is outside its range.

    """

    worker: int
    at: float
    back_at: float | None = None

    def __post_init__(self) -> None:
        _check_worker("Death.worker", self.worker)
        _check("Death.at", self.at)
        if self.back_at is not None:
            _check("Death.back_at", self.back_at, least=self.at, above=True)


@dataclass(frozen=True)
class Arrival:
    """A machine joins the running training. It gets the next number: k for the first of k initial workers, and so on.

    Args:
        at: when.
        seconds_per_step: as the strategy's, for this machine.
        exchange_seconds: likewise; None is the strategy's, where that is one for all.

    Raises:
        ValueError: a value is outside its range.

    """

    at: float
    seconds_per_step: float | StepSeconds
    exchange_seconds: float | Link | None = None

    def __post_init__(self) -> None:
        _check("Arrival.at", self.at)
        as_step_seconds("Arrival.seconds_per_step", self.seconds_per_step)
        if self.exchange_seconds is not None:
            as_link("Arrival.exchange_seconds", self.exchange_seconds)


def as_step_seconds(name: str, value: object) -> StepSeconds:
    """``value``, or a machine without jitter where it is a number.

    Raises:
        ValueError: it is neither; the text names it ``name``.

    """
    if isinstance(value, StepSeconds):
        return value
    if not _is_number(value) or not 0 < value < math.inf:  # type: ignore[operator] # it is a number by then
        raise ValueError(f"{name}={value!r} must be a finite number of seconds > 0, or a StepSeconds")
    return StepSeconds(float(value))  # type: ignore[arg-type]


def as_link(name: str, value: object) -> Link:
    """``value``, or a link of that latency where it is a number.

    Raises:
        ValueError: it is neither; the text names it ``name``.

    """
    if isinstance(value, Link):
        return value
    if not _is_number(value) or not 0 <= value < math.inf:  # type: ignore[operator] # it is a number by then
        raise ValueError(f"{name}={value!r} must be a finite number of seconds >= 0, or a Link")
    return Link(float(value))  # type: ignore[arg-type]


class Cluster:
    """The machines of a virtual cluster, and what happens to them.

    Args:
        seconds_per_step: of each worker.
        exchange_seconds: of each worker, or one for all: a link, or the seconds that a message needs each way.
        schedule: what happens.

    Attributes:
        devices: how fast each worker computes, those that arrive later at the end.
        links: how each is linked.
        arrivals: who arrives later, in order.
        deaths: who dies, in order.
        initial: workers at the beginning.
        numbers: of all workers, those that arrive later included.
        incarnation: name of the server.
        start: the server's time at the beginning.

    Raises:
        ValueError: a speed is none, there are none, or an entry of the schedule cannot happen.

    Example::

        >>> cluster = Cluster([1.0, 2.0], Link(latency=0.1), [Arrival(60.0, 0.5), Death(1, at=30.0)])
        >>> cluster.initial, len(cluster.devices), cluster.devices[2].seconds
        (2, 3, 0.5)

    """

    def __init__(
        self,
        seconds_per_step: Sequence[float | StepSeconds],
        exchange_seconds: float | Link | Sequence[float | Link] = 0.0,
        schedule: Sequence[Slowdown | Death | Arrival] = (),
    ) -> None:
        if isinstance(seconds_per_step, (str, bytes)) or not hasattr(seconds_per_step, "__len__"):
            raise ValueError(f"seconds_per_step={seconds_per_step!r} must be a list with the seconds of each worker")
        if len(seconds_per_step) == 0:
            raise ValueError("seconds_per_step is empty; give the seconds that each worker takes for a local step")
        self.initial = len(seconds_per_step)
        self.incarnation = "simulated"
        self.start = 0.0
        self.devices = [as_step_seconds(f"seconds_per_step[{n}]", one) for n, one in enumerate(seconds_per_step)]
        self.links = _links(exchange_seconds, self.initial)
        if not hasattr(schedule, "__len__"):  # A generator would be empty the second time.
            raise ValueError(f"schedule={schedule!r} must be a list of Slowdown, Death and Arrival objects")
        for entry in schedule:
            if not isinstance(entry, (Slowdown, Death, Arrival)):
                raise ValueError(f"schedule has {entry!r}; its entries are Slowdown, Death and Arrival objects")
        self.arrivals = sorted((one for one in schedule if isinstance(one, Arrival)), key=lambda one: one.at)
        self.deaths = sorted((one for one in schedule if isinstance(one, Death)), key=lambda one: (one.at, one.worker))
        self._slowdowns: list[list[Slowdown]] = [[] for _ in range(self.initial + len(self.arrivals))]
        for one in self.arrivals:
            self.devices.append(as_step_seconds("Arrival.seconds_per_step", one.seconds_per_step))
            self.links.append(_link_of(one, exchange_seconds))
        self.numbers = range(len(self.devices))
        for entry in schedule:
            if not isinstance(entry, Arrival) and entry.worker >= len(self.devices):
                raise ValueError(
                    f"schedule has {entry}, but there is no worker {entry.worker}: seconds_per_step and the arrivals "
                    f"make {len(self.devices)}, numbered from 0"
                )
            if isinstance(entry, Slowdown):
                self._slowdowns[entry.worker].append(entry)
        self._check_times()

    def factor(self, worker: int, now: float) -> float:
        """How many times as long a step of the worker takes that begins now."""
        return next((one.factor for one in self._slowdowns[worker] if one.start <= now < one.end), 1.0)

    def after(self, now: float) -> list[Slowdown | Death | Arrival]:
        """The entries of the schedule that begin later than that, in order."""
        times: list[tuple[float, Slowdown | Death | Arrival]] = []
        times += [(one.start, one) for entries in self._slowdowns for one in entries]
        times += [(one.at, one) for one in self.deaths]
        times += [(one.at, one) for one in self.arrivals]
        return [one for at, one in sorted(times, key=lambda entry: entry[0]) if at > now]

    def _check_lives(self) -> None:
        """Looks for slowdowns that would slow nobody down."""
        begin = {self.initial + n: arrival.at for n, arrival in enumerate(self.arrivals)}
        end = {death.worker: death.at for death in self.deaths if death.back_at is None}
        for worker, entries in enumerate(self._slowdowns):
            for one in entries:
                if one.end <= begin.get(worker, 0.0):
                    raise ValueError(f"schedule has {one}, but worker {worker} arrives at {begin[worker]:g} only")
                if one.start >= end.get(worker, math.inf):
                    raise ValueError(f"schedule has {one}, but worker {worker} dies for good at {end[worker]:g}")

    def _check_times(self) -> None:
        for entries in self._slowdowns:
            entries.sort(key=lambda one: one.start)
            for first, second in itertools.pairwise(entries):
                if second.start < first.end:
                    raise ValueError(f"schedule has {first} and {second}, which overlap; join them into one")
        self._check_lives()
        gone: dict[int, Death] = {}
        for death in self.deaths:
            before = gone.get(death.worker)
            if before is not None and (before.back_at is None or before.back_at >= death.at):
                raise ValueError(f"schedule has {death}, but after {before} there is no worker {death.worker} then")
            if death.worker >= self.initial and self.arrivals[death.worker - self.initial].at > death.at:
                raise ValueError(f"schedule has {death}, but worker {death.worker} arrives later than that")
            gone[death.worker] = death


def _link_of(arrival: Arrival, given: float | Link | Sequence[float | Link]) -> Link:
    """The link of a machine that arrives, in a cluster that was given ``exchange_seconds``."""
    if arrival.exchange_seconds is not None:
        return as_link("Arrival.exchange_seconds", arrival.exchange_seconds)
    if isinstance(given, Sequence):
        raise ValueError(
            f"schedule has {arrival}, and exchange_seconds has an entry for each worker of the beginning only; give "
            "Arrival(exchange_seconds=...) too, or one exchange_seconds for all"
        )
    return as_link("exchange_seconds", given)


def _links(given: float | Link | Sequence[float | Link], workers: int) -> list[Link]:
    if isinstance(given, Link) or _is_number(given):
        return [as_link("exchange_seconds", given)] * workers
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise ValueError(f"exchange_seconds={given!r} must be a number of seconds, a Link, or a list of these")
    if len(given) != workers:
        raise ValueError(
            f"exchange_seconds has {len(given)} entries and seconds_per_step {workers}; give one for each worker, or "
            "one alone for all"
        )
    return [as_link(f"exchange_seconds[{n}]", one) for n, one in enumerate(given)]
