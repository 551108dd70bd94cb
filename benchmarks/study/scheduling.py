"""Which run comes next, and running several at once."""

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
from benchmarks.study.results import TUNING, TUNING_SEED, Results, Untuned
from benchmarks.study.running import Places, run


class Job(NamedTuple):
    """A run that a table wants."""

    table: str
    cell: Cell
    seed: int


class Queue:
    """Hands out runs in the order in which they are wanted, what they need tuned before them, and none twice.

    Args:
        jobs: the wanted runs, the most important first.
        results: what is known already.

    """

    def __init__(self, jobs: Iterable[Job], results: Results) -> None:
        self._jobs = list(jobs)
        self._results = results
        self._begun: set[tuple[Cell, int]] = set()

    def next(self) -> Job | None:
        """The next run, with all its learning rates; None if there is none, or none before another one has ended."""
        return self._next(self._jobs)

    def _next(self, jobs: Iterable[Job]) -> Job | None:
        for table, cell, seed in jobs:
            try:
                resolved = self._results.resolved(cell)
            except Untuned as untuned:
                found = self._next(Job(TUNING, missing, TUNING_SEED) for missing in untuned.missing)
                if found is not None:
                    return found
                continue
            if (resolved, seed) not in self._begun and self._results.find(resolved, seed) is None:
                self._begun.add((resolved, seed))
                return Job(table, resolved, seed)
        return None


def work(
    queue: Queue,
    results: Results,
    places: Places,
    at_once: int,
    play: Callable[[Cell, int, Places], dict[str, Any]] = run,
) -> list[Job]:
    """Runs all that is in a queue, each in one of so many processes.

    Args:
        queue: what to run.
        results: where each run is added as soon as it has ended.
        places: where text and caches are.
        at_once: processes.
        play: what a run is.

    Returns:
        The runs that have failed; the others went on.

    """
    failed: list[Job] = []
    running: dict[Future[dict[str, Any]], Job] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=spawn, initializer=_end_with_the_parent) as pool:
        while True:
            while len(running) < at_once and (job := queue.next()) is not None:
                running[pool.submit(play, job.cell, job.seed, places)] = job
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception()
                if error is not None:
                    failed.append(job)
                    _say(f"FAILED {_name(job)}: {type(error).__name__}: {error}")
                    continue
                record = {"table": job.table, **future.result()}
                results.append(job.table, record)
                _say(f"{_name(job)}: loss {record['final_loss']:.4f} in {record['seconds']:.0f} s of the devices, "
                     f"{record['wall_seconds']:.0f} s here")  # fmt: skip


def _end_with_the_parent() -> None:
    """A process does not outlive the one that has started it, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _name(job: Job) -> str:
    cell = job.cell
    default = Cell(cell.method)
    fields = {name: value for name, value in cell.as_dict().items() if value != getattr(default, name)}
    fields.pop("method", None)
    return f"{job.table} {cell.label} {fields} seed {job.seed}"


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
