"""Runs the study, table by table, and writes its page.

    python -m benchmarks.study table_a              # all runs of a table, and those that tune its learning rates
    python -m benchmarks.study table_a --levels very --seeds 0
    python -m benchmarks.study all --jobs 2         # everything, the most important first; hours
    python -m benchmarks.study report               # the tables and figures of docs/study.md, from the results

Each run is a line of JSON in ``docs/results/``. Runs that are there are not repeated, so that a command that was
interrupted can be given again. ``--small`` makes every run tiny, to see that all works; give it ``--results`` of its
own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.study import cells
from benchmarks.study.cells import LEVELS, SEEDS, TABLES
from benchmarks.study.report import IMAGES, PAGE, report
from benchmarks.study.results import DEFAULT_FOLDER, TUNING, TUNING_SEED, Results
from benchmarks.study.running import Places
from benchmarks.study.scheduling import Job, Queue, work
from benchmarks.study.text import DEFAULT_CACHE, DEFAULT_DATA

ORDER = ("table_d", "none", "moderate", "slight", "table_e", "table_h", "wikitext2", "table_b", "scratch", "table_c")
"""What follows the question itself, the first seed of everything before the others."""


def jobs_of(table: str, levels: list[str], seeds: list[int]) -> list[Job]:
    """The runs of a table, or of the whole study in order of importance."""
    if table == TUNING:
        return [Job(TUNING, cell, TUNING_SEED) for cell in [*cells.inner_tuning(), *cells.TUNED, *cells.CHECKED]]
    if table in LEVELS:
        return jobs_of("table_a", [table] if table in levels else [], seeds)
    if table != "all":
        return [
            Job(table, cell, seed)
            for seed in seeds
            for cell in TABLES[table]
            if table != "table_a" or cell.level in levels
        ]
    jobs = [Job("table_a", cell, seed) for seed in seeds for cell in (cells.SYNC, cells.BEST) if cell.level in levels]
    jobs += [*jobs_of("very", levels, seeds), *jobs_of("table_f", levels, seeds)]
    jobs += [job for seed in seeds for part in ORDER for job in jobs_of(part, levels, [seed])]
    return jobs + [Job(TUNING, cell, TUNING_SEED) for cell in cells.CHECKED]


def main(arguments: list[str] | None = None) -> int:
    """Does what the command line says; returns 1 if a run has failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[TUNING, *TABLES, "all", "report"])
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), default=list(LEVELS), help="of table_a")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one thread (default: 1)")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu", help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="the text (default: %(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="tokens and warm starts (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=DEFAULT_FOLDER, help="default: %(default)s")
    parser.add_argument("--page", type=Path, default=PAGE, help="of the report (default: %(default)s)")
    parser.add_argument("--images", type=Path, default=IMAGES, help="of the report (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny runs")
    given = parser.parse_args(arguments)
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs} must be at least 1")
    if given.small and given.results.resolve() == DEFAULT_FOLDER.resolve():
        parser.error("--small gives no results worth keeping: give them a folder of their own with --results")
    try:
        results = Results(given.results)
    except ValueError as error:
        parser.error(str(error))
    if given.what == "report":
        report(results, given.page, given.images)
        return 0
    if given.accelerator == "gpu" and not torch.cuda.is_available():
        parser.error("--accelerator gpu: torch finds no CUDA device here")
    if not given.data.is_dir():
        parser.error(f"--data {given.data} is no folder: give the one that has c4_en, wikitext2 and domains")
    jobs = jobs_of(given.what, given.levels, given.seeds)
    if given.small:
        jobs = [job._replace(cell=cell) for job, cell in zip(jobs, cells.small(job.cell for job in jobs), strict=True)]
    places = Places(given.data, given.cache, given.accelerator)
    return 1 if work(Queue(jobs, results), results, places, given.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
