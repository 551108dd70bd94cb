"""Write the tables and figures of docs/study.md from the results. Each table is between two markers with its name."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.study import cells, equal_time_report, fewer_bits_report
from benchmarks.study.cells import INNER_GRID, LEVELS, METHODS, OUTER_GRID, OUTER_GRID_WITH_INNER, STAGE_GRID, Cell
from benchmarks.study.markdown import MISSING, markdown_table, mean_and_std
from benchmarks.study.results import FIGURES, TUNING_SEED, NotTunedError, Results, stage_candidates

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "study.md"
IMAGES = DOCS / "images"

Column = tuple[str, Callable[[Cell], str]]


def write_report(results: Results, page: Path, images: Path) -> None:
    """Write all tables into the page, and all figures into the folder ``images``.

    Raises:
        ValueError: the page has no markers for a table, or has markers for an unknown table.

    """
    # Imported here because runs do not need matplotlib.
    from benchmarks.study.figures import draw_all

    text = page.read_text()
    tables = render_tables(results)
    markers = set(re.findall(r"<!-- (\w+):begin -->", text))
    if markers != set(tables):
        raise ValueError(f"{page} has markers for {sorted(markers)}, but the tables are {sorted(tables)}")
    for name, lines in tables.items():
        text = replace_section(text, name, lines)
    page.write_text(text)
    draw_all(results, images)


def replace_section(text: str, name: str, lines: str) -> str:
    """Replace the text between the two markers of a table."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"The page must contain {begin} and {end} exactly once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{lines}\n\n{end}{rest.split(end)[1]}"


def render_tables(results: Results) -> dict[str, str]:
    """Render all tables of the page, by the name of their markers."""
    table = ComparisonTable(results)
    workers: Column = ("workers", lambda cell: str(cell.workers))
    size: Column = ("parameters", lambda cell: cell.size.replace("m", " M"))
    return {
        "inner": _inner_rates(results),
        "tuning": _outer_rates(results),
        "stages": _stage_values(results),
        **{f"table_a_{level}": table.render(_cells_at(level)) for level in LEVELS},
        "table_b": table.render(cells.TABLES["table_b"], workers),
        "table_c": table.render(cells.TABLES["table_c"], size),
        "table_d": table.render(
            [cells.SYNC, *cells.TABLES["table_d"]],
            ("c", lambda cell: f"{cell.activation:g}" if cell.method == "dn" else ""),
            ("N", lambda cell: str(cell.period or "k") if cell.method == "dn" else ""),
            ("grace", _grace),
        ),
        "table_h": table.render(cells.TABLES["table_h"]),
        "table_e_iid": table.render([cells.SYNC, *cells.LATER_CELLS]),
        "table_e_domains": table.render(
            [cell for cell in cells.TABLES["table_e"] if cell.corpus == "domains"],
            ("data of a worker", lambda cell: "all domains" if cell.iid else "one domain"),
        ),
        "table_f": _real_processes(results),
        "scratch": table.render(cells.TABLES["scratch"]),
        "wikitext2": table.render(cells.TABLES["wikitext2"]),
        **equal_time_report.render(results),
        **fewer_bits_report.render(results),
        "summary": _summary(results),
        "figures": _figures(results),
    }


def _cells_at(level: str) -> list[Cell]:
    return [*cells.at_level(level), *(cells.CONTROLS if level == "very" else [])]


class ComparisonTable:
    """Renders tables that compare cells with synchronous DiLoCo. They have the same last columns.

    Args:
        results: the results so far.

    """

    def __init__(self, results: Results) -> None:
        self._results = results

    def render(self, rows: Iterable[Cell], *extra: Column) -> str:
        """Render a table with one row per cell. Cells without results have dashes.

        Args:
            rows: the cells.
            extra: name and text of additional columns.

        """
        names = ["method", *(name for name, _ in extra), "outer lr", "perplexity", "difference to sync", "seeds"]
        names += ["time", "time to sync's loss", "staleness", "waiting"]
        body = [[row_label(cell), *(show(cell) for _, show in extra), *self._fields(cell)] for cell in rows]
        return markdown_table(names, body)

    def _fields(self, cell: Cell) -> list[str]:
        runs = self._results.runs_of(cell)
        if not runs:
            return [self._lr(cell)] + [MISSING] * 7
        return [
            self._lr(cell),
            mean_and_std([math.exp(run["final_loss"]) for run in runs]),
            self._difference_to_sync(cell, runs),
            str(len(runs)),
            f"{statistics.fmean(run['seconds'] for run in runs) * cell.slowdown():,.0f} s",
            self._time_to_sync_loss(cell, runs),
            format_staleness(runs),
            format_waiting(cell, runs),
        ]

    def _lr(self, cell: Cell) -> str:
        try:
            lr = self._results.resolved(cell).lr
        except NotTunedError:
            return MISSING
        return "" if lr is None else f"{lr:g}"

    def _difference_to_sync(self, cell: Cell, runs: Sequence[dict[str, Any]]) -> str:
        """Format the difference in perplexity to synchronous DiLoCo with the same seed and the same initial weights."""
        reference = sync_reference(cell)
        if reference.canonical() == replace(cell.canonical(), lr=None):
            return ""
        pairs = [(run, self._results.find(reference, run["seed"])) for run in runs]
        differences = [
            math.exp(run["final_loss"]) - math.exp(sync["final_loss"]) for run, sync in pairs if sync is not None
        ]
        return mean_and_std(differences, sign="+") if differences else MISSING

    def _time_to_sync_loss(self, cell: Cell, runs: Sequence[dict[str, Any]]) -> str:
        """Format when the runs reach the final loss of synchronous DiLoCo with the same seed."""
        reference = sync_reference(cell)
        reached: list[float] = []
        compared = 0
        for run in runs:
            sync = self._results.find(reference, run["seed"])
            if sync is None:
                continue
            compared += 1
            seconds = time_to_loss(run["curve"], sync["curve"][-1][2])
            if seconds is not None:
                reached.append(seconds * cell.slowdown())
        if not compared:
            return MISSING
        if not reached:
            return "never"
        share = "" if len(reached) == compared else f" ({len(reached)} of {compared})"
        return f"{statistics.fmean(reached):,.0f} s{share}"


def row_label(cell: Cell) -> str:
    """Return the name of a cell in the first column, with H if it is not the usual value."""
    usual = 50 if cell.steps == 5000 else 20
    return cell.label + (f", H = {cell.local_steps}" if cell.local_steps != usual else "")


def sync_reference(cell: Cell) -> Cell:
    """Return the synchronous cell with which a cell is compared."""
    steps = 50 if cell.steps == 5000 else 20
    plain = replace(cell, method="sync", dynamic=False, grace=0.0, local_steps=steps)
    return replace(plain, lr=None, stage=None, period=None, activation=0.0)


def time_to_loss(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """Return when a loss curve falls to a loss and stays at or below it, or None if it never does.

    Args:
        curve: points ``[updates, seconds, loss]``. Values between two points are interpolated linearly.
        loss: the loss to reach.

    """
    last_above = next((index for index in reversed(range(len(curve))) if curve[index][2] > loss), None)
    if last_above is None:
        return curve[0][1]
    if last_above + 1 == len(curve):
        return None
    before, point = curve[last_above : last_above + 2]
    share = (before[2] - loss) / (before[2] - point[2])
    return before[1] + share * (point[1] - before[1])


def format_staleness(runs: Sequence[dict[str, Any]]) -> str:
    """Format the mean and the largest staleness of the pushes of all runs."""
    if "staleness" not in runs[0]:
        return ""
    mean = statistics.fmean(run["staleness"]["mean"] for run in runs)
    return f"{mean:.1f} / {max(run['staleness']['max'] for run in runs)}"


def format_waiting(cell: Cell, runs: Sequence[dict[str, Any]]) -> str:
    """Format the share of the workers' total time that they wait."""
    if cell.method == "single":
        return ""
    if cell.independent_of_devices and not cell.processes:
        # The run was made with other devices. With equal steps, each worker waits for the slowest one in each round.
        share = 1.0 - statistics.fmean(cell.seconds_per_step) / max(cell.seconds_per_step)
    else:
        share = statistics.fmean(run["waiting_share"] for run in runs)
    return f"{share:.0%}"


def _grace(cell: Cell) -> str:
    if cell.method != "dn":
        return ""
    if cell.grace == "auto":
        return "auto"
    return f"{cell.grace / cells.ROUND_SECONDS:.0%} ({cell.grace:g} s)"


def _inner_rates(results: Results) -> str:
    """Render the perplexities that determine the inner learning rates."""
    rows = []
    for warm_steps in (cells.SYNC.warm_steps, 0):
        for method, outer_rates in (("sync", OUTER_GRID_WITH_INNER), ("single", (None,))):
            if method == "single" and not warm_steps:
                continue
            tuning = [replace(cell, warm_steps=warm_steps) for cell in cells.inner_tuning() if cell.method == method]
            texts = dict(zip(tuning, _best_in_bold(_tuned_perplexity(results, cell) for cell in tuning), strict=True))
            for outer in outer_rates:
                row = {cell.inner_lr: text for cell, text in texts.items() if cell.lr == outer}
                lr = "" if outer is None else f"{outer:g}"
                rows.append([METHODS[method], _start(warm_steps), lr, *(row[inner] for inner in INNER_GRID)])
    return markdown_table(["method", "start", "outer lr", *(f"inner lr {value:g}" for value in INNER_GRID)], rows)


def _outer_rates(results: Results) -> str:
    """Render the perplexities that determine the outer learning rates."""
    rows = []
    for cell in [*cells.TUNED, *cells.ONE_DOMAIN_CELLS]:
        if cell.method != "single":
            perplexities = [_tuned_perplexity(results, cells.outer_tuning(cell, lr)) for lr in OUTER_GRID]
            start = _start(cell.warm_steps) + ("" if cell.iid else ", one domain each")
            rows.append([row_label(cell), str(cell.workers), start, *_best_in_bold(perplexities)])
    return markdown_table(["method", "workers", "start", *(f"{value:g}" for value in OUTER_GRID)], rows)


def _stage_values(results: Results) -> str:
    """Render the perplexities that determine the parameters of staleness stages, each with its tuned learning rate."""
    rows = []
    for cell in [*cells.TABLE_A, *cells.LATER_CELLS]:
        if cell.method not in STAGE_GRID:
            continue
        grid = ", ".join(f"{value:g}" for value in STAGE_GRID[cell.method])
        perplexities: list[float | None]
        try:
            candidates = stage_candidates(results.resolved(cell))
            perplexities = [_tuned_perplexity(results, candidate) for candidate in candidates]
        except NotTunedError:
            perplexities = [None] * len(STAGE_GRID[cell.method])
        rows.append([row_label(cell), grid, ", ".join(_best_in_bold(perplexities))])
    return markdown_table(["method", "values", "perplexity with each value"], rows)


def _start(warm_steps: int) -> str:
    return "warm" if warm_steps else "scratch"


def _tuned_perplexity(results: Results, cell: Cell) -> float | None:
    run = results.find(cell, TUNING_SEED)
    return None if run is None else math.exp(run["final_loss"])


def _best_in_bold(values: Iterable[float | None]) -> list[str]:
    values = list(values)
    best = min((value for value in values if value is not None), default=None)
    return [MISSING if value is None else f"**{value:.2f}**" if value == best else f"{value:.2f}" for value in values]


def _real_processes(results: Results) -> str:
    """Render the comparison of real processes with the simulation."""
    rows = []
    for cell in cells.TABLES["table_f"]:
        for where, variant in (("simulated", replace(cell, processes=False)), ("real processes", cell)):
            runs = results.runs_of(variant)
            rows.append([row_label(cell), where])
            if not runs:
                rows[-1] += [MISSING] * 5
                continue
            seconds = statistics.fmean(run["seconds"] for run in runs)
            perplexity = mean_and_std([math.exp(run["final_loss"]) for run in runs])
            waiting = f"{statistics.fmean(run['waiting_share'] for run in runs):.0%}"
            rows[-1] += [perplexity, str(len(runs)), f"{seconds:,.0f} s", format_staleness(runs), waiting]
    return markdown_table(["method", "where", "perplexity", "seeds", "time", "staleness", "waiting"], rows)


def _figures(results: Results) -> str:
    if not results.runs_of(cells.DN_DYLU_GRACE):
        return "Not run yet."
    return "\n\n".join(f"![{caption}](images/{name})" for name, caption in FIGURES.items())


def _summary(results: Results) -> str:
    """Render perplexity and time of DN + DyLU + grace and of synchronous DiLoCo, over seeds that both have run."""
    dn_runs, sync_runs = results.runs_of(cells.DN_DYLU_GRACE), results.runs_of(cells.SYNC)
    pairs = [(dn, sync) for dn in dn_runs for sync in sync_runs if dn["seed"] == sync["seed"]]
    if not pairs:
        return "Not run yet."
    dn_values, sync_values = ([math.exp(run["final_loss"]) for run in runs] for runs in zip(*pairs, strict=True))
    differences = [dn - sync for dn, sync in zip(dn_values, sync_values, strict=True)]
    seconds = [statistics.fmean(run["seconds"] for run in runs) for runs in zip(*pairs, strict=True)]
    rows = [
        [
            "perplexity",
            mean_and_std(dn_values),
            mean_and_std(sync_values),
            f"{mean_and_std(differences)} (difference per seed)",
        ],
        ["time", f"{seconds[0]:,.0f} s", f"{seconds[1]:,.0f} s", f"{seconds[0] / seconds[1]:.3f} (ratio)"],
    ]
    names = [f"{len(pairs)} seeds", cells.DN_DYLU_GRACE.label, cells.SYNC.label, "comparison"]
    return markdown_table(names, rows)
