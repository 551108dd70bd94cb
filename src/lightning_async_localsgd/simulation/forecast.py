"""Forecasts the speed of a run by the simulator's own policies, without training.

The workers of a virtual cluster take the steps of a model with one parameter that nothing changes. How long things take
does not depend on the model, so the times are those of a run with the same machines.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_async_localsgd.outer import SGD, Nesterov
from lightning_async_localsgd.policies.grace import GraceWindow
from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
from lightning_async_localsgd.policies.plan import RunBudget
from lightning_async_localsgd.protocol.options import ExchangeOptions
from lightning_async_localsgd.runtime.settings import RuntimeSettings
from lightning_async_localsgd.server.merge_policy import MergePolicy
from lightning_async_localsgd.server.run_stats import WorkerTotals
from lightning_async_localsgd.simulation.devices import Cluster
from lightning_async_localsgd.simulation.runtime import SimulatedRuntime

_SETTLED_ROUNDS = 6
"""Rounds of each worker for which H must not have changed before anything is measured."""

_MOST_SETTLING_ROUNDS = 80
"""Rounds of each worker after which the measurement begins at the latest."""

_MEASURED_ROUNDS = 25
"""Rounds of each worker that are measured."""

_MOST_ROUNDS = 200
"""Rounds of a worker during one round of the slowest worker, on average. More would take too long to simulate."""


@dataclass(frozen=True)
class WorkerForecast:
    """What a worker does in a long run.

    Args:
        steps_per_second: local steps in a second of the run.
        local_steps: mean local steps in its rounds.
        share: its share of all local steps.
        staleness: mean staleness of its pushes, in versions.
        waiting: share of its time that it waits for its dispatches.
        exchanging: share of its time that it stands still for exchanges, without waiting.

    """

    steps_per_second: float
    local_steps: float
    share: float
    staleness: float
    waiting: float
    exchanging: float


@dataclass(frozen=True)
class Forecast:
    """What a long run does.

    Args:
        local_steps: H, local steps in a round of the fastest worker.
        steps_per_second: local steps of all workers in a second.
        rounds_per_second: pushes of all workers in a second.
        staleness: mean staleness of the pushes, in versions.
        workers: the workers, in the order of their numbers.

    """

    local_steps: int
    steps_per_second: float
    rounds_per_second: float
    staleness: float
    workers: tuple[WorkerForecast, ...]


def forecast(
    seconds_per_step: Sequence[float],
    exchange_seconds: Sequence[float],
    *,
    local_steps: int | Literal["auto"] = "auto",
    dynamic_local_steps: bool = True,
    grace: float | Literal["auto"] = "auto",
    quorum: int | Literal["all"] = 1,
    overlap: bool = False,
    total: int | None = None,
) -> Forecast:
    """Return what a long run of some machines does.

    Args:
        seconds_per_step: seconds of a local step on each machine.
        exchange_seconds: seconds of an exchange of each worker, which is a push and a model.
        local_steps: as in the strategy, like all following options.
        dynamic_local_steps: whether slower workers take fewer local steps.
        grace: length of the grace window.
        quorum: number of workers whose pushes are merged as one step.
        overlap: whether workers train while their pushes are in flight.
        total: local steps of all workers in the whole run, which limit the rounds of short runs; None if it is long. A
            run that is over before it can be measured is measured from its beginning.

    Raises:
        ValueError: A value is outside its range, or a worker takes part so seldom that a forecast would take too long.

    Example::

        >>> result = forecast([0.1, 0.2], [0.0, 0.0], local_steps=10)
        >>> round(result.steps_per_second, 1)
        15.0

    """
    # The server only needs the sum: it sees neither the begin of an upload nor the end of a download.
    cluster = Cluster(seconds_per_step, [seconds / 2 for seconds in exchange_seconds])
    workers = len(seconds_per_step)
    settings = RuntimeSettings(
        pacing=SpeedAwareSteps(local_steps, dynamic_local_steps),
        outer_optimizer=SGD(1.0) if quorum == 1 else Nesterov(lr=0.7),
        grace=GraceWindow(grace),
        budget=RunBudget(total, None if total is None else max(1, total // workers)),
        merge=MergePolicy(quorum),
        exchange=ExchangeOptions(overlap=overlap),
    )
    runtime = SimulatedRuntime(settings, cluster, nn.Linear(1, 1, bias=False), seed=0)
    try:
        begin, before = runtime.seconds, runtime.totals()
        _settle(runtime, workers)
        if not runtime.stopped:
            settled, then = runtime.seconds, runtime.totals()
            _take_rounds(runtime, workers, _MEASURED_ROUNDS)
            if not runtime.stopped:
                begin, before = settled, then
        after, seconds = runtime.totals(), runtime.seconds - begin
        steps = settings.pacing.local_steps
    finally:
        runtime.close()
    return _result(workers, before, after, seconds, steps)


def _settle(runtime: SimulatedRuntime, workers: int) -> None:
    """Go on until H stays the same."""
    pacing, last, since = runtime._settings.pacing, 0, 0
    for _ in range(_MOST_SETTLING_ROUNDS):
        _take_rounds(runtime, workers, 1)
        since = since + 1 if pacing.local_steps == last else 0
        last = pacing.local_steps
        if since >= _SETTLED_ROUNDS:
            return


def _take_rounds(runtime: SimulatedRuntime, workers: int, count: int) -> None:
    """Go on until each worker has pushed some rounds more, or the run has ended."""
    left = dict.fromkeys(range(workers), count)
    rounds = 0
    while left and not runtime.stopped:
        worker, over = runtime.worker.number, False
        while not over and not runtime.stopped:
            runtime.count_batch(1, 1)
            runtime.worker.count_step()
            over = runtime.end_step()
        if not runtime.stopped:
            runtime.next_round()
        rounds += 1
        if rounds > _MOST_ROUNDS * workers * count:
            raise ValueError(
                f"worker {next(iter(left))} takes part only once in more than {_MOST_ROUNDS} rounds of the others, "
                "because of its speed or its link; leave it out"
            )
        if worker in left:
            left[worker] -= 1
            if left[worker] <= 0:
                del left[worker]


def _result(
    workers: int, before: dict[int, WorkerTotals], after: dict[int, WorkerTotals], seconds: float, local_steps: int
) -> Forecast:
    none = WorkerTotals()
    grown = {
        number: {
            name: value - vars(before.get(number, none))[name] for name, value in vars(after.get(number, none)).items()
        }
        for number in range(workers)
    }
    steps = sum(worker["steps"] for worker in grown.values())
    rounds = sum(worker["rounds"] for worker in grown.values())
    return Forecast(
        local_steps=local_steps,
        steps_per_second=steps / seconds,
        rounds_per_second=rounds / seconds,
        staleness=sum(worker["staleness"] for worker in grown.values()) / rounds,
        workers=tuple(
            WorkerForecast(
                steps_per_second=worker["steps"] / seconds,
                local_steps=worker["steps"] / max(1, worker["rounds"]),
                share=worker["steps"] / steps,
                staleness=worker["staleness"] / max(1, worker["rounds"]),
                waiting=worker["wait_seconds"] / seconds,
                exchanging=worker["exchange_seconds"] / seconds,
            )
            for worker in grown.values()
        ),
    )


def mean_waiting(result: Forecast) -> float:
    """Return the share of the workers' time that they wait for dispatches."""
    return statistics.fmean(worker.waiting for worker in result.workers)
