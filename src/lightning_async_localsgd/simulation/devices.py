"""Description of a virtual cluster: speeds of its machines, their links, and what happens to them.

Plain values, which are checked when they are created. All times are virtual seconds since the start of training.
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
"""Significant digits of random times. The last bits of exponential and logarithm depend on the platform, and must not
decide which push arrives first."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(name: str, value: float, minimum: float = 0.0, exclusive: bool = False) -> None:
    """Check that ``value`` is a finite number of at least ``minimum``, or above ``minimum`` if ``exclusive``.

    Raises:
        ValueError: It is not.

    """
    good = _is_number(value) and math.isfinite(value) and (value > minimum if exclusive else value >= minimum)
    if not good:
        raise ValueError(f"{name}={value!r} must be a finite number {'>' if exclusive else '>='} {minimum:g}")


def _check_worker(name: str, worker: int) -> None:
    if type(worker) is not int or worker < 0:
        raise ValueError(f"{name}={worker!r} must be a worker's number, an integer >= 0")


@dataclass(frozen=True)
class StepSeconds:
    """Duration of a local step on a machine.

    Args:
        seconds: mean duration, > 0.
        jitter: standard deviation divided by the mean, >= 0. With jitter, durations follow a log-normal distribution.

    Raises:
        ValueError: A value is outside its range.

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
        _check("StepSeconds.seconds", self.seconds, exclusive=True)
        _check("StepSeconds.jitter", self.jitter)

    def draw(self, generator: random.Random) -> float:
        """Draw the duration of one step, in seconds."""
        if self.jitter == 0.0:
            return self.seconds
        variance = math.log1p(self.jitter**2)
        drawn = generator.lognormvariate(math.log(self.seconds) - variance / 2, math.sqrt(variance))
        return float(f"{drawn:.{_DIGITS}g}")


@dataclass(frozen=True)
class Link:
    """A worker's link to the server, equal in both directions.

    Args:
        latency: seconds that a message needs in one direction, >= 0.
        bytes_per_second: bandwidth in one direction, > 0. The default is infinite.

    Raises:
        ValueError: A value is outside its range.

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
        """Return how many seconds ``size`` bytes need in one direction."""
        return self.latency + size / self.bytes_per_second


@dataclass(frozen=True)
class Slowdown:
    """A period in which a machine is slower or faster. It applies to the steps that begin in the period.

    Args:
        worker: the worker's number.
        start: beginning of the period, >= 0.
        end: end of the period, > ``start``; may be infinite.
        factor: factor by which steps take longer, > 0. Below 1, the machine is faster.

    Raises:
        ValueError: A value is outside its range.

    """

    worker: int
    start: float
    end: float
    factor: float

    def __post_init__(self) -> None:
        _check_worker("Slowdown.worker", self.worker)
        _check("Slowdown.start", self.start)
        _check("Slowdown.factor", self.factor, exclusive=True)
        if not _is_number(self.end) or not self.end > self.start:
            raise ValueError(f"Slowdown.end={self.end!r} must be a number > start={self.start!r}")


@dataclass(frozen=True)
class Death:
    """The death of a worker. Its unfinished round is lost.

    Args:
        worker: the worker's number.
        at: time of the death, >= 0.
        back_at: time at which the worker joins again, > ``at``. It keeps its inner optimizer's state, like a live
            worker that is restarted. ``None`` if the worker does not come back.

    Raises:
        ValueError: A value is outside its range.

    """

    worker: int
    at: float
    back_at: float | None = None

    def __post_init__(self) -> None:
        _check_worker("Death.worker", self.worker)
        _check("Death.at", self.at)
        if self.back_at is not None:
            _check("Death.back_at", self.back_at, minimum=self.at, exclusive=True)


@dataclass(frozen=True)
class Arrival:
    """A machine that joins while training runs.

    Its worker gets the next free number. With k initial workers, the first arrival is worker k.

    Args:
        at: time of the arrival, >= 0.
        seconds_per_step: seconds of a local step on this machine, like an entry of the strategy's option.
        exchange_seconds: this machine's link, like an entry of the strategy's option. ``None`` takes the strategy's
            value, if that is one value for all workers.

    Raises:
        ValueError: A value is outside its range.

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
    """Return ``value`` as a :class:`StepSeconds`. A number becomes one without jitter.

    Args:
        name: name of the option, for the error text.
        value: a number or a :class:`StepSeconds`.

    Raises:
        ValueError: ``value`` is neither.

    """
    if isinstance(value, StepSeconds):
        return value
    if not _is_number(value) or not 0 < value < math.inf:  # type: ignore[operator] # it is a number by then
        raise ValueError(f"{name}={value!r} must be a finite number of seconds > 0, or a StepSeconds")
    return StepSeconds(float(value))  # type: ignore[arg-type]


def as_link(name: str, value: object) -> Link:
    """Return ``value`` as a :class:`Link`. A number becomes a link with that latency and infinite bandwidth.

    Args:
        name: name of the option, for the error text.
        value: a number or a :class:`Link`.

    Raises:
        ValueError: ``value`` is neither.

    """
    if isinstance(value, Link):
        return value
    if not _is_number(value) or not 0 <= value < math.inf:  # type: ignore[operator] # it is a number by then
        raise ValueError(f"{name}={value!r} must be a finite number of seconds >= 0, or a Link")
    return Link(float(value))  # type: ignore[arg-type]


class Cluster:
    """The machines of a virtual cluster and what happens to them.

    Args:
        seconds_per_step: seconds of a local step on each initial worker's machine.
        exchange_seconds: link of each initial worker, or one for all workers: a :class:`Link`, or the seconds that a
            message needs in one direction.
        schedule: what happens to machines.

    Attributes:
        devices: step seconds of each worker. Workers that arrive later come last.
        links: link of each worker.
        arrivals: arrivals in the order of their times.
        deaths: deaths in the order of their times.
        initial_workers: number of workers at the start.
        worker_numbers: numbers of all workers, including those that arrive later.
        incarnation: name of the server.
        start_time: the server's time at the start.

    Raises:
        ValueError: A value is outside its range, or an entry of the schedule cannot happen.

    Example::

        >>> cluster = Cluster([1.0, 2.0], Link(latency=0.1), [Arrival(60.0, 0.5), Death(1, at=30.0)])
        >>> cluster.initial_workers, len(cluster.devices), cluster.devices[2].seconds
        (2, 3, 0.5)

    """

    def __init__(
        self,
        seconds_per_step: Sequence[float | StepSeconds],
        exchange_seconds: float | Link | Sequence[float | Link] = 0.0,
        schedule: Sequence[Slowdown | Death | Arrival] = (),
    ) -> None:
        if isinstance(seconds_per_step, (str, bytes)) or not hasattr(seconds_per_step, "__len__"):
            raise ValueError(f"seconds_per_step={seconds_per_step!r} must be a list with one entry for each worker")
        if len(seconds_per_step) == 0:
            raise ValueError("seconds_per_step is empty; give the seconds of a local step for each worker")
        self.initial_workers = len(seconds_per_step)
        self.incarnation = "simulated"
        self.start_time = 0.0
        self.devices = [as_step_seconds(f"seconds_per_step[{n}]", value) for n, value in enumerate(seconds_per_step)]
        self.links = _links(exchange_seconds, self.initial_workers)
        if not hasattr(schedule, "__len__"):  # A generator would be empty the second time.
            raise ValueError(f"schedule={schedule!r} must be a list of Slowdown, Death and Arrival objects")
        for entry in schedule:
            if not isinstance(entry, (Slowdown, Death, Arrival)):
                raise ValueError(f"schedule contains {entry!r}; entries must be Slowdown, Death or Arrival objects")
        self.arrivals = sorted((entry for entry in schedule if isinstance(entry, Arrival)), key=lambda entry: entry.at)
        self.deaths = sorted(
            (entry for entry in schedule if isinstance(entry, Death)), key=lambda entry: (entry.at, entry.worker)
        )
        for arrival in self.arrivals:
            self.devices.append(as_step_seconds("Arrival.seconds_per_step", arrival.seconds_per_step))
            self.links.append(_link_of(arrival, exchange_seconds))
        self.worker_numbers = range(len(self.devices))
        self._slowdowns: list[list[Slowdown]] = [[] for _ in self.devices]
        for entry in schedule:
            if not isinstance(entry, Arrival) and entry.worker >= len(self.devices):
                raise ValueError(
                    f"schedule contains {entry}, but worker {entry.worker} does not exist: seconds_per_step and the "
                    f"arrivals define {len(self.devices)} worker(s), numbered from 0"
                )
            if isinstance(entry, Slowdown):
                self._slowdowns[entry.worker].append(entry)
        self._check_slowdowns()
        self._check_deaths()

    def slowdown_factor(self, worker: int, now: float) -> float:
        """Return the factor by which a step of a worker that begins at ``now`` takes longer."""
        return next((slow.factor for slow in self._slowdowns[worker] if slow.start <= now < slow.end), 1.0)

    def events_after(self, now: float) -> list[Slowdown | Death | Arrival]:
        """Return the entries of the schedule that begin after ``now``, in order."""
        times: list[tuple[float, Slowdown | Death | Arrival]] = []
        times += [(slow.start, slow) for slowdowns in self._slowdowns for slow in slowdowns]
        times += [(death.at, death) for death in self.deaths]
        times += [(arrival.at, arrival) for arrival in self.arrivals]
        return [entry for time, entry in sorted(times, key=lambda pair: pair[0]) if time > now]

    def _check_slowdowns(self) -> None:
        """Check that slowdowns do not overlap and that the worker is alive in them."""
        for slowdowns in self._slowdowns:
            slowdowns.sort(key=lambda slow: slow.start)
            for first, second in itertools.pairwise(slowdowns):
                if second.start < first.end:
                    raise ValueError(f"schedule contains {first} and {second}, which overlap; join them into one")
        begin = {self.initial_workers + n: arrival.at for n, arrival in enumerate(self.arrivals)}
        end = {death.worker: death.at for death in self.deaths if death.back_at is None}
        for worker, slowdowns in enumerate(self._slowdowns):
            for slow in slowdowns:
                if slow.end <= begin.get(worker, 0.0):
                    raise ValueError(f"schedule contains {slow}, but worker {worker} arrives only at {begin[worker]:g}")
                if slow.start >= end.get(worker, math.inf):
                    raise ValueError(f"schedule contains {slow}, but worker {worker} dies for good at {end[worker]:g}")

    def _check_deaths(self) -> None:
        """Check that workers that die are alive."""
        last: dict[int, Death] = {}
        for death in self.deaths:
            before = last.get(death.worker)
            if before is not None and (before.back_at is None or before.back_at >= death.at):
                raise ValueError(
                    f"schedule contains {death}, but worker {death.worker} is already dead then because of {before}"
                )
            late = death.worker - self.initial_workers
            if late >= 0 and self.arrivals[late].at > death.at:
                raise ValueError(f"schedule contains {death}, but worker {death.worker} arrives later than that")
            last[death.worker] = death


def _link_of(arrival: Arrival, given: float | Link | Sequence[float | Link]) -> Link:
    """Return the link of a machine that arrives later, in a cluster whose ``exchange_seconds`` is ``given``."""
    if arrival.exchange_seconds is not None:
        return as_link("Arrival.exchange_seconds", arrival.exchange_seconds)
    if isinstance(given, Sequence):
        raise ValueError(
            f"schedule contains {arrival} without a link, and exchange_seconds has entries for the initial workers "
            "only; set Arrival(exchange_seconds=...), or give one exchange_seconds for all workers"
        )
    return as_link("exchange_seconds", given)


def _links(given: float | Link | Sequence[float | Link], workers: int) -> list[Link]:
    if isinstance(given, Link) or _is_number(given):
        return [as_link("exchange_seconds", given)] * workers
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise ValueError(f"exchange_seconds={given!r} must be a number of seconds, a Link, or a list of these")
    if len(given) != workers:
        raise ValueError(
            f"exchange_seconds has {len(given)} entries and seconds_per_step has {workers}; give one entry for each "
            "worker, or one value for all workers"
        )
    return [as_link(f"exchange_seconds[{n}]", value) for n, value in enumerate(given)]
