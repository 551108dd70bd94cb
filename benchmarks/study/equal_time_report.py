"""Render table G of docs/study.md: losses at equal time, and how soon each method reaches a loss."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.study import equal_time
from benchmarks.study.cells import Cell
from benchmarks.study.equal_time import ALONE, BUDGETS, DDP, DEFAULTS, OVERSHOOTING, SECONDS, STARTS, TRIALS, VARIATIONS
from benchmarks.study.markdown import MISSING, markdown_table, mean_and_std
from benchmarks.study.results import Results

COLUMNS = (
    "method",
    "H",
    "learning rate",
    "loss",
    "to the fastest device alone",
    "seeds",
    "time",
    "staleness",
    "waiting",
)


def render(results: Results) -> dict[str, str]:
    """Return the tables by the name of their markers."""
    return {
        "table_g_scratch": _losses(results, 0),
        "table_g_warm": _losses(results, STARTS[1]),
        "table_g_budgets": _budgets(results),
        "table_g_trials": _trials(results),
        "table_g_momentum": _momentum(results),
        "table_g_variations": _variations(results),
    }


def _losses(results: Results, warm_steps: int) -> str:
    cells = [cell for cell in equal_time.core() if cell.warm_steps == warm_steps]
    return markdown_table(COLUMNS, [_row(results, cell) for cell in cells])


def _row(results: Results, cell: Cell) -> list[str]:
    runs = results.runs_of(cell)
    name = [label(cell), _length(cell), _rate(cell)]
    if not runs:
        return [*name, *[MISSING] * 6]
    staleness = f"{statistics.fmean(run['staleness']['mean'] for run in runs):.1f}" if "staleness" in runs[0] else ""
    waiting = f"{statistics.fmean(run['waiting_share'] for run in runs):.0%}" if "waiting_share" in runs[0] else ""
    return [
        *name,
        mean_and_std([run["final_loss"] for run in runs], digits=3),
        _difference(results, cell),
        str(len(runs)),
        f"{statistics.fmean(run['seconds'] for run in runs):,.0f} s",
        staleness,
        waiting,
    ]


def _difference(results: Results, cell: Cell) -> str:
    """Format the difference to the best run of the fastest device alone with the same seed."""
    if cell.method == "alone":
        return ""
    base = replace(ALONE, warm_steps=cell.warm_steps, seconds=cell.seconds, size=cell.size, level=cell.level)
    base = replace(base, workers=cell.workers, exchange_seconds=cell.exchange_seconds)
    differences = [
        run["final_loss"] - best
        for run in results.runs_of(cell)
        if (best := _best(results, equal_time.alone(base), run["seed"])) is not None
    ]
    return mean_and_std(differences, sign="+", digits=3) if differences else MISSING


def _best(results: Results, cells: Sequence[Cell], seed: int) -> float | None:
    """Return the lowest loss of several cells with one seed."""
    losses = [run["final_loss"] for cell in cells if (run := results.find(cell, seed)) is not None]
    return min(losses, default=None)


def label(cell: Cell) -> str:
    """Return the name of a method. DyLU and the grace window are left out where every row has them."""
    name = replace(cell, dynamic=cell.dynamic and cell.method == "sync", grace=0.0).label
    if cell.method != "default":
        return name
    return "**defaults**" if cell == replace(DEFAULTS, warm_steps=cell.warm_steps) else "defaults, H given"


def _length(cell: Cell) -> str:
    return str(cell.local_steps) if cell.workers_apart else ""


def _rate(cell: Cell) -> str:
    if not cell.workers_apart:
        return f"inner {cell.inner_lr:g}"
    return "" if cell.lr is None else f"{cell.lr:g}"


def _budgets(results: Results) -> str:
    """Render the losses of runs with less time, and the time to the losses of others with the full time."""
    rows = []
    for warm_steps in STARTS:
        start = "checkpoint" if warm_steps else "random weights"
        full = [cell for cell in equal_time.budgets() if cell.warm_steps == warm_steps]
        methods = list(dict.fromkeys(replace(cell, seconds=SECONDS) for cell in full))
        for method in methods:
            seeds = [run["seed"] for run in results.runs_of(method)]
            losses = [
                [run["final_loss"] for run in results.runs_of(replace(method, seconds=SECONDS * share))]
                for share in (*BUDGETS, 1.0)
            ]
            cells = [f"{statistics.fmean(values):.3f}" if values else MISSING for values in losses]
            targets = [
                _share_to(results, method, [replace(cell, warm_steps=warm_steps) for cell in others], seeds)
                for others in (equal_time.alone(ALONE), equal_time.data_parallel(DDP))
            ]
            rows.append([label(method), _length(method), start, *cells, *targets])
    names = ["method", "H", "start", *(f"{share:.0%}" for share in (*BUDGETS, 1.0))]
    return markdown_table([*names, "to the fastest device's loss", "to DDP's loss"], rows)


def _share_to(results: Results, method: Cell, others: Sequence[Cell], seeds: Sequence[int]) -> str:
    """Format the share of the time after which a finished run has the loss of the best of ``others``."""
    shares = []
    for seed in seeds:
        target = _best(results, others, seed)
        points = [
            (share, run["final_loss"])
            for share in (*BUDGETS, 1.0)
            if (run := results.find(replace(method, seconds=SECONDS * share), seed)) is not None
        ]
        if target is None or len(points) <= len(BUDGETS):
            return MISSING
        shares.append(share_to_loss(points, target))
    if not shares:
        return MISSING
    if any(math.isinf(share) for share in shares):
        return "never"
    return f"{statistics.fmean(shares):.0%}" if min(shares) > BUDGETS[0] else f"< {BUDGETS[0]:.0%}"


def share_to_loss(points: Sequence[tuple[float, float]], loss: float) -> float:
    """Return the share of the time at which finished runs reach a loss; infinite if none does.

    Args:
        points: (share of the time, final loss) of runs, in order. Values between two of them are interpolated linearly
            in the logarithm of the share.
        loss: the loss to reach.

    """
    if points[0][1] <= loss:
        return points[0][0]
    for (before, above), (share, below) in itertools.pairwise(points):
        if below <= loss:
            part = (above - loss) / (above - below)
            return before * (share / before) ** part
    return math.inf


def _variations(results: Results) -> str:
    rows = [[name, *_row(results, cell)] for name in VARIATIONS for cell in equal_time.variation(name)]
    return markdown_table(["changed", *COLUMNS], rows)


def _trials(results: Results) -> str:
    rows = []
    for name, cell in TRIALS.items():
        runs = results.runs_of(cell)
        differences = [
            run["final_loss"] - default["final_loss"]
            for run in runs
            if (default := results.find(TRIALS["nothing"], run["seed"])) is not None
        ]
        losses = mean_and_std([run["final_loss"] for run in runs], digits=3) if runs else MISSING
        difference = mean_and_std(differences, sign="+", digits=3) if differences and name != "nothing" else ""
        rows.append([name, losses, difference, str(len(runs))])
    return markdown_table(["changed", "loss", "to the defaults", "seeds"], rows)


def _momentum(results: Results) -> str:
    rows = []
    for name, cell in OVERSHOOTING.items():
        losses = [
            [run["final_loss"] for run in results.runs_of(each)] for each in (equal_time.without_momentum(cell), cell)
        ]
        rows.append([name, *(mean_and_std(values, digits=3) if values else MISSING for values in losses)])
    return markdown_table(["workers and rounds", "each push by 1/√k", "defaults"], rows)
