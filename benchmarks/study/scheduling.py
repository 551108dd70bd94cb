"""The order of runs, and running several of them at the same time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, NamedTuple

from benchmarks.study.cells import Cell
from benchmarks.study.results import TUNING, TUNING_SEED, NotTunedError, Results
from benchmarks.study.running import RunContext, run


class PlannedRun(NamedTuple):
    """A run that a table needs."""

    table: str
    cell: Cell
    seed: int


class Queue:
    """Returns planned runs one by one. The runs that tune their learning rates come first, and no run is repeated.

    Args:
        planned: the runs, the most important first.
        results: the results so far.

    """

    def __init__(self, planned: Iterable[PlannedRun], results: Results) -> None:
        self._planned = list(planned)
        self._results = results
        self._started: set[tuple[Cell, int]] = set()

    def next(self) -> PlannedRun | None:
        """Return the next run with all learning rates, or None if no run can start now.

        No run can start if all have started, or if all others need the result of a run that has not ended.
        """
        return self._next(self._planned)

    def _next(self, planned: Iterable[PlannedRun]) -> PlannedRun | None:
        for table, cell, seed in planned:
            try:
                resolved = self._results.resolved(cell)
            except NotTunedError as error:
                tuning_run = self._next(PlannedRun(TUNING, missing, TUNING_SEED) for missing in error.missing)
                if tuning_run is not None:
                    return tuning_run
                continue
            if (resolved, seed) not in self._started and self._results.find(resolved, seed) is None:
                self._started.add((resolved, seed))
                return PlannedRun(table, resolved, seed)
        return None


def run_queue(
    queue: Queue,
    results: Results,
    context: RunContext,
    max_processes: int,
    run_cell: Callable[[Cell, int, RunContext], dict[str, Any]] = run,
) -> list[PlannedRun]:
    """Run everything in a queue, each run in a process of a pool.

    Args:
        queue: the runs.
        results: where each run is added when it ends.
        context: folders and device of the runs.
        max_processes: largest number of runs at the same time.
        run_cell: makes one run.

    Returns:
        The runs that failed. A failed run does not stop the others.

    """
    failed: list[PlannedRun] = []
    running: dict[Future[dict[str, Any]], PlannedRun] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_processes, mp_context=spawn, initializer=_exit_with_parent) as pool:
        while True:
            while len(running) < max_processes and (planned := queue.next()) is not None:
                running[pool.submit(run_cell, planned.cell, planned.seed, context)] = planned
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                planned = running.pop(future)
                error = future.exception()
                if error is not None:
                    failed.append(planned)
                    _log(f"FAILED {_describe(planned)}: {type(error).__name__}: {error}")
                    continue
                record = {"table": planned.table, **future.result()}
                results.append(planned.table, record)
                _log(
                    f"{_describe(planned)}: loss {record['final_loss']:.4f}, {record['seconds']:.0f} s of the devices, "
                    f"{record['wall_seconds']:.0f} s on this machine"
                )


def _exit_with_parent() -> None:
    """Exit this process when its parent process ends, even if the parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _describe(planned: PlannedRun) -> str:
    cell = planned.cell
    default = Cell(cell.method)
    fields = {name: value for name, value in cell.as_dict().items() if value != getattr(default, name)}
    fields.pop("method", None)
    return f"{planned.table} {cell.label} {fields} seed {planned.seed}"


def _log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
