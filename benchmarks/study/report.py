"""The tables of docs/study.md, from the results: each stands between two markers of its name."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.study import cells
from benchmarks.study.cells import INNER_GRID, LEVELS, METHODS, OUTER_GRID, OUTER_WITH_INNER, STAGE_GRID, Cell
from benchmarks.study.results import TUNING_SEED, Results, Untuned, stage_candidates

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "study.md"
IMAGES = DOCS / "images"
MISSING = "-"

FIGURES = {
    "study_loss.png": "Perplexity over local updates, and over time",
    "study_staleness.png": "How old pushes are when they are merged",
    "study_cosine.png": "Cosine of pushes with the momentum",
    "study_timeline.png": "Who computes and who waits",
}

Column = tuple[str, Callable[[Cell], str]]


def report(results: Results, page: Path, images: Path) -> None:
    """Writes all tables into the page, and all figures beside it.

    Raises:
        ValueError: the page lacks a table's markers, or has markers of an unknown one.

    """
    # Only here: runs need no matplotlib.
    from benchmarks.study.figures import draw_all

    text = page.read_text()
    made = tables(results)
    there = set(re.findall(r"<!-- (\w+):begin -->", text))
    if there != set(made):
        raise ValueError(f"{page} has markers of {sorted(there)}, and the tables are {sorted(made)}")
    for name, lines in made.items():
        text = fill(text, name, lines)
    page.write_text(text)
    draw_all(results, images)


def fill(text: str, name: str, lines: str) -> str:
    """Puts lines between a name's markers, in the place of what is there."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must have {begin} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{lines}\n\n{end}{rest.split(end)[1]}"


def tables(results: Results) -> dict[str, str]:
    """Every table of the page, by the name of its markers."""
    table = Table(results)
    workers: Column = ("workers", lambda cell: str(cell.workers))
    size: Column = ("parameters", lambda cell: cell.size.replace("m", " M"))
    return {
        "inner": _inner(results),
        "tuning": _tuning(results),
        "stages": _stages(results),
        **{f"table_a_{level}": table.of(_level(level)) for level in LEVELS},
        "table_b": table.of(cells.TABLES["table_b"], workers),
        "table_c": table.of(cells.TABLES["table_c"], size),
        "table_d": table.of(
            [cells.SYNC, *cells.TABLES["table_d"]],
            ("c", lambda cell: f"{cell.activation:g}" if cell.method == "dn" else ""),
            ("N", lambda cell: str(cell.period or "k") if cell.method == "dn" else ""),
            ("grace", _grace),
        ),
        "table_h": table.of(cells.TABLES["table_h"]),
        "table_e_iid": table.of([cells.SYNC, *cells.RULES]),
        "table_e_domains": table.of(
            [cell for cell in cells.TABLES["table_e"] if cell.corpus == "domains"],
            ("each worker has", lambda cell: "a share of all" if cell.iid else "one domain"),
        ),
        "table_f": _processes(results),
        "scratch": table.of(cells.TABLES["scratch"]),
        "wikitext2": table.of(cells.TABLES["wikitext2"]),
        "bar": _bar(results),
        "figures": _figures(results),
    }


def _level(level: str) -> list[Cell]:
    return [*cells.at(level), *(cells.CONTROLS if level == "very" else [])]


class Table:
    """Tables that have the same columns behind their own ones."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def of(self, rows: Iterable[Cell], *own: Column) -> str:
        """A row for each cell; cells without a run have empty fields."""
        names = ["method", *(name for name, _ in own), "outer lr", "perplexity", "against sync", "seeds", "time"]
        names += ["to sync's loss", "staleness", "waiting"]
        body = [[label(cell), *(show(cell) for _, show in own), *self._fields(cell)] for cell in rows]
        return markdown(names, body)

    def _fields(self, cell: Cell) -> list[str]:
        runs = self._results.all_of(cell)
        if not runs:
            return [self._lr(cell)] + [MISSING] * 7
        return [
            self._lr(cell),
            spread([math.exp(run["final_loss"]) for run in runs]),
            self._against_sync(cell, runs),
            str(len(runs)),
            f"{statistics.fmean(run['seconds'] for run in runs) * cell.slowdown():,.0f} s",
            self._to_sync(cell, runs),
            staleness(runs),
            waiting(cell, runs),
        ]

    def _lr(self, cell: Cell) -> str:
        try:
            lr = self._results.resolved(cell).lr
        except Untuned:
            return MISSING
        return "" if lr is None else f"{lr:g}"

    def _against_sync(self, cell: Cell, runs: Sequence[dict[str, Any]]) -> str:
        """The difference of each seed's perplexity to that of synchronous DiLoCo, from the same weights."""
        if sync_of(cell).canonical() == replace(cell.canonical(), lr=None):
            return ""
        others = [(run, self._results.find(sync_of(cell), run["seed"])) for run in runs]
        found = [math.exp(run["final_loss"]) - math.exp(one["final_loss"]) for run, one in others if one is not None]
        return spread(found, sign="+") if found else MISSING

    def _to_sync(self, cell: Cell, runs: Sequence[dict[str, Any]]) -> str:
        sync = sync_of(cell)
        reached: list[float] = []
        compared = 0
        for run in runs:
            other = self._results.find(sync, run["seed"])
            if other is None:
                continue
            compared += 1
            seconds = time_to(run["curve"], other["curve"][-1][2])
            if seconds is not None:
                reached.append(seconds * cell.slowdown())
        if not compared:
            return MISSING
        if not reached:
            return "never"
        share = "" if len(reached) == compared else f" ({len(reached)} of {compared})"
        return f"{statistics.fmean(reached):,.0f} s{share}"


def label(cell: Cell) -> str:
    """What a table calls a cell."""
    usual = 50 if cell.steps == 5000 else 20
    return cell.label + (f", H = {cell.local_steps}" if cell.local_steps != usual else "")


def sync_of(cell: Cell) -> Cell:
    """The synchronous run that a cell is compared with."""
    steps = 50 if cell.steps == 5000 else 20
    plain = replace(cell, method="sync", dynamic=False, grace=0.0, local_steps=steps)
    return replace(plain, lr=None, stage=None, period=None, activation=0.0)


def time_to(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """From when a curve of ``[updates, seconds, loss]`` on stays at or below a loss, on a line between two points."""
    above = next((at for at in reversed(range(len(curve))) if curve[at][2] > loss), None)
    if above is None:
        return curve[0][1]
    if above + 1 == len(curve):
        return None
    before, point = curve[above : above + 2]
    share = (before[2] - loss) / (before[2] - point[2])
    return before[1] + share * (point[1] - before[1])


def with_next(spans: Sequence[Sequence[float]]) -> list[tuple[int, float, float, float | None]]:
    """Worker, begin and end of each round, and when that worker begins the next one; None where that is not known."""
    found: list[tuple[int, float, float, float | None]] = []
    following: dict[int, float] = {}
    for worker, start, end in sorted(spans, key=lambda span: span[1], reverse=True):
        found.append((int(worker), start, end, following.get(int(worker))))
        following[int(worker)] = start
    return found[::-1]


def spread(values: Sequence[float], sign: str = "-") -> str:
    """Mean and standard deviation; with ``sign="+"`` the mean has its sign in any case."""
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def staleness(runs: Sequence[dict[str, Any]]) -> str:
    """Mean and largest age of the pushes of all runs."""
    if "staleness" not in runs[0]:
        return ""
    mean = statistics.fmean(run["staleness"]["mean"] for run in runs)
    return f"{mean:.1f} / {max(run['staleness']['max'] for run in runs)}"


def waiting(cell: Cell, runs: Sequence[dict[str, Any]]) -> str:
    """Share of all workers' time that they wait."""
    if cell.method == "single":
        return ""
    if cell.independent_of_devices and not cell.processes:
        # The run is one of other devices; who takes equal steps waits as long as the slowest takes longer.
        share = 1.0 - statistics.fmean(cell.seconds_per_step) / max(cell.seconds_per_step)
    else:
        share = statistics.fmean(run["waiting_share"] for run in runs)
    return f"{share:.0%}"


def markdown(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _grace(cell: Cell) -> str:
    if cell.method != "dn":
        return ""
    if cell.grace == "auto":
        return "auto"
    return f"{cell.grace / cells.ROUND_SECONDS:.0%} ({cell.grace:g} s)"


def _inner(results: Results) -> str:
    rows = []
    for warm in (cells.SYNC.warm_steps, 0):
        for method, outers in (("sync", OUTER_WITH_INNER), ("single", (None,))):
            if method == "single" and not warm:
                continue
            mine = [replace(cell, warm_steps=warm) for cell in cells.inner_tuning() if cell.method == method]
            shown = dict(zip(mine, _best_in_bold(_tuned(results, cell) for cell in mine), strict=True))
            for outer in outers:
                row = {cell.inner_lr: text for cell, text in shown.items() if cell.lr == outer}
                lr = "" if outer is None else f"{outer:g}"
                rows.append([METHODS[method], _start(warm), lr, *(row[inner] for inner in INNER_GRID)])
    return markdown(["method", "start", "outer lr", *(f"inner lr {value:g}" for value in INNER_GRID)], rows)


def _tuning(results: Results) -> str:
    rows = []
    for cell in [*cells.TUNED, *cells.APART]:
        if cell.method != "single":
            losses = [_tuned(results, cells.outer_tuning(cell, lr)) for lr in OUTER_GRID]
            start = _start(cell.warm_steps) + ("" if cell.iid else ", one domain each")
            rows.append([label(cell), str(cell.workers), start, *_best_in_bold(losses)])
    return markdown(["method", "workers", "start", *(f"{value:g}" for value in OUTER_GRID)], rows)


def _stages(results: Results) -> str:
    """What was tuned of staleness stages, each row with the learning rate of its method."""
    rows = []
    for cell in [*cells.TABLE_A, *cells.RULES]:
        if cell.method not in STAGE_GRID:
            continue
        grid = ", ".join(f"{value:g}" for value in STAGE_GRID[cell.method])
        try:
            found = [_tuned(results, one) for one in stage_candidates(results.resolved(cell))]
        except Untuned:
            found = [None] * len(STAGE_GRID[cell.method])
        rows.append([label(cell), grid, ", ".join(_best_in_bold(found))])
    return markdown(["method", "values", "perplexity with each"], rows)


def _start(warm_steps: int) -> str:
    return "warm" if warm_steps else "scratch"


def _tuned(results: Results, cell: Cell) -> float | None:
    run = results.find(cell, TUNING_SEED)
    return None if run is None else math.exp(run["final_loss"])


def _best_in_bold(values: Iterable[float | None]) -> list[str]:
    values = list(values)
    best = min((value for value in values if value is not None), default=None)
    return [MISSING if value is None else f"**{value:.2f}**" if value == best else f"{value:.2f}" for value in values]


def _processes(results: Results) -> str:
    rows = []
    for cell in cells.TABLES["table_f"]:
        for where, one in (("simulated", replace(cell, processes=False)), ("real processes", cell)):
            runs = results.all_of(one)
            rows.append([label(cell), where])
            if not runs:
                rows[-1] += [MISSING] * 5
                continue
            seconds = statistics.fmean(run["seconds"] for run in runs)
            ppl = spread([math.exp(run["final_loss"]) for run in runs])
            rows[-1] += [ppl, str(len(runs)), f"{seconds:,.0f} s", staleness(runs), f"{_waited(runs):.0%}"]
    return markdown(["method", "where", "perplexity", "seeds", "time", "staleness", "waiting"], rows)


def _waited(runs: Sequence[dict[str, Any]]) -> float:
    return statistics.fmean(run["waiting_share"] for run in runs)


def _figures(results: Results) -> str:
    if not results.all_of(cells.BEST):
        return "Not run yet."
    return "\n\n".join(f"![{what}](images/{name})" for name, what in FIGURES.items())


def _bar(results: Results) -> str:
    """The study's question in three numbers."""
    best, sync = results.all_of(cells.BEST), results.all_of(cells.SYNC)
    pairs = [(one, other) for one in best for other in sync if one["seed"] == other["seed"]]
    if not pairs:
        return "Not run yet."
    ours, theirs = ([math.exp(run["final_loss"]) for run in runs] for runs in zip(*pairs, strict=True))
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    seconds = [statistics.fmean(run["seconds"] for run in runs) for runs in zip(*pairs, strict=True)]
    rows = [
        ["perplexity", spread(ours), spread(theirs), f"{spread(differences)} (of each seed, the difference)"],
        ["finishing time", f"{seconds[0]:,.0f} s", f"{seconds[1]:,.0f} s", f"{seconds[0] / seconds[1]:.3f} of it"],
    ]
    return markdown([f"{len(pairs)} seeds", cells.BEST.label, cells.SYNC.label, ""], rows)
