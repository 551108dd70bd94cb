"""Render table I of docs/study.md: fewer bits and overlap."""

from __future__ import annotations

import math
import statistics

from benchmarks.study.cells import Cell
from benchmarks.study.fewer_bits import TABLE_I, link_share, reference
from benchmarks.study.markdown import MISSING, markdown_table, mean_and_std
from benchmarks.study.results import Results

_COLUMNS = ("start", "H", "link", "exchange", "perplexity", "to fp32 without overlap", "seeds", "MB a round", "time")


def render(results: Results) -> dict[str, str]:
    """Return the tables by the name of their markers."""
    at_equal_updates = [cell for cell in TABLE_I if cell.seconds is None]
    at_equal_time = [cell for cell in TABLE_I if cell.seconds is not None]
    return {
        "table_i_updates": markdown_table(
            (*_COLUMNS, "blocked"), [_row(results, cell) for cell in _sort(at_equal_updates)]
        ),
        "table_i_time": markdown_table(
            (*_COLUMNS, "blocked", "local steps"),
            [[*_row(results, cell), _steps(results, cell)] for cell in _sort(at_equal_time)],
        ),
    }


def _sort(cells: list[Cell]) -> list[Cell]:
    """Order cells by start, H and link, and leave each group in its order."""
    return sorted(cells, key=lambda cell: (-cell.warm_steps, cell.local_steps == "auto", cell.link_seconds))


def _row(results: Results, cell: Cell) -> list[str]:
    name = [
        "checkpoint" if cell.warm_steps else "random weights",
        str(cell.local_steps),
        f"{link_share(cell):.0%}" if cell.link_seconds else "free",
        label(cell),
    ]
    runs = results.runs_of(cell)
    if not runs:
        return [*name, *[MISSING] * 6]
    # The first runs of the defaults did not count bytes. Their exchanges took no time.
    blocked = statistics.fmean(run.get("exchange_share", 0.0) + run["waiting_share"] for run in runs)
    megabytes = [run["bytes"] / run["pushes"] / 1e6 for run in runs if "bytes" in run]
    return [
        *name,
        mean_and_std([math.exp(run["final_loss"]) for run in runs]),
        _difference(results, cell),
        str(len(runs)),
        f"{statistics.fmean(megabytes):.2f}" if megabytes else MISSING,
        f"{statistics.fmean(run['seconds'] for run in runs):,.0f} s",
        f"{blocked:.0%}",
    ]


def label(cell: Cell) -> str:
    """Return how the pushes and the models of a cell travel."""
    name = cell.upload if cell.upload == cell.download else f"{cell.upload}, models {cell.download}"
    extras = [*(["overlap"] if cell.overlap else []), *([] if cell.grace else ["no grace window"])]
    return ", ".join([name, *extras])


def _difference(results: Results, cell: Cell) -> str:
    """Format the relative difference in perplexity to fp32 without overlap, with the same seed over the same link."""
    base = reference(cell)
    if base == cell:
        return ""
    differences = [
        100.0 * math.expm1(run["final_loss"] - exact["final_loss"])
        for run in results.runs_of(cell)
        if (exact := results.find(base, run["seed"])) is not None
    ]
    return f"{mean_and_std(differences, sign='+')} %" if differences else MISSING


def _steps(results: Results, cell: Cell) -> str:
    runs = results.runs_of(cell)
    return f"{statistics.fmean(sum(run['steps_by_worker']) for run in runs):,.0f}" if runs else MISSING
