"""Run the study, table by table, and write its page.

    python -m benchmarks.study table_a              # the runs of a table, and those that tune its learning rates
    python -m benchmarks.study table_a --levels very --seeds 0
    python -m benchmarks.study all --jobs 2         # all tables, the most important first; takes hours
    python -m benchmarks.study report               # write tables and figures of docs/study.md from the results

Each run is a line of JSON in ``docs/results/``. Runs that are already there are not repeated, so an interrupted command
can be repeated. ``--small`` makes all runs tiny, as a smoke test. It needs a ``--results`` folder of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.study import cells
from benchmarks.study.cells import LEVELS, SEEDS
from benchmarks.study.equal_time import TABLE_G, with_best_rates
from benchmarks.study.fewer_bits import TABLE_I, plan
from benchmarks.study.report import IMAGES, PAGE, write_report
from benchmarks.study.results import DEFAULT_FOLDER, TUNING, TUNING_SEED, Results
from benchmarks.study.running import RunContext
from benchmarks.study.scheduling import PlannedRun, Queue, run_queue
from benchmarks.study.text import DEFAULT_CACHE, DEFAULT_DATA

TABLES = {**cells.TABLES, "table_g": TABLE_G, "table_i": TABLE_I}
"""The cells of all tables."""

ORDER = ("table_d", "none", "moderate", "slight", "table_e", "table_h", "wikitext2", "table_b", "scratch", "table_c")
"""The order of the remaining tables and levels of ``all``. The first seed of all of them runs before the others."""


def plan_runs(table: str, levels: list[str], seeds: list[int], results: Results) -> list[PlannedRun]:
    """Return the runs of a table, or of the whole study in order of importance."""
    if table == TUNING:
        return [
            PlannedRun(TUNING, cell, TUNING_SEED) for cell in [*cells.inner_tuning(), *cells.TUNED, *cells.RATE_CHECKS]
        ]
    if table in LEVELS:
        return plan_runs("table_a", [table] if table in levels else [], seeds, results)
    if table == "table_g":
        return [PlannedRun(table, cell, seed) for seed in seeds for cell in with_best_rates(results, seed)]
    if table == "table_i":
        return plan(table, seeds)
    if table != "all":
        return [
            PlannedRun(table, cell, seed)
            for seed in seeds
            for cell in TABLES[table]
            if table != "table_a" or cell.level in levels
        ]
    first = [cell for cell in (cells.SYNC, cells.DN_DYLU_GRACE) if cell.level in levels]
    runs = [PlannedRun("table_a", cell, seed) for seed in seeds for cell in first]
    runs += [*plan_runs("very", levels, seeds, results), *plan_runs("table_f", levels, seeds, results)]
    runs += [run for seed in seeds for part in ORDER for run in plan_runs(part, levels, [seed], results)]
    return runs + [PlannedRun(TUNING, cell, TUNING_SEED) for cell in cells.RATE_CHECKS]


def main(arguments: list[str] | None = None) -> int:
    """Carry out a command line, and return 1 if a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[TUNING, *TABLES, "all", "report"])
    parser.add_argument(
        "--levels", nargs="+", choices=list(LEVELS), default=list(LEVELS), help="levels of heterogeneity in table_a"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each on one thread (default: 1)")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu", help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with the text (default: %(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="folder for tokens and warm starts (default: %(default)s)"
    )
    parser.add_argument(
        "--results", type=Path, default=DEFAULT_FOLDER, help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="page that the report updates (default: %(default)s)")
    parser.add_argument(
        "--images", type=Path, default=IMAGES, help="folder for the figures of the report (default: %(default)s)"
    )
    parser.add_argument("--small", action="store_true", help="make all runs tiny, as a smoke test")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} must be at least 1")
    if options.small and options.results.resolve() == DEFAULT_FOLDER.resolve():
        parser.error("--small makes runs that must not be mixed with real results: set --results to another folder")
    try:
        results = Results(options.results)
    except ValueError as error:
        parser.error(str(error))
    if options.what == "report":
        write_report(results, options.page, options.images)
        return 0
    if options.accelerator == "gpu" and not torch.cuda.is_available():
        parser.error("--accelerator gpu needs a CUDA device, but torch finds none")
    if not options.data.is_dir():
        parser.error(f"--data {options.data} is not a folder: set it to the folder with c4_en, wikitext2 and domains")
    runs = plan_runs(options.what, options.levels, options.seeds, results)
    if options.small:
        small = cells.shrink(run.cell for run in runs)
        runs = [run._replace(cell=cell) for run, cell in zip(runs, small, strict=True)]
    context = RunContext(options.data, options.cache, options.accelerator)
    return 1 if run_queue(Queue(runs, results), results, context, options.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
