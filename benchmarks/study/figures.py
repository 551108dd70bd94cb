"""The figures of docs/study.md, from the results."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study import cells
from benchmarks.study.cells import Cell, strategy_quorum
from benchmarks.study.report import FIGURES, with_next
from benchmarks.study.results import Results
from benchmarks.study.running import TIMELINE

INK = "#333333"
GRID = "#E5E5E5"
FONT_SIZE = 9
# Distinguishable for the colour-blind (Okabe and Ito), and in grey.
SHOWN: dict[Cell, tuple[str, str]] = {
    cells.SYNC: ("#000000", "-"),
    cells.NESTEROV: ("#D55E00", "-"),
    Cell("sgd"): ("#E69F00", "--"),
    Cell("dn"): ("#56B4E9", "-"),
    Cell("dn", dynamic=True): ("#0072B2", "--"),
    cells.BEST: ("#009E73", "-"),
}
"""The cells that are drawn, with colour and line."""

# Of a merged push to the momentum: the mean over so many logged values.
_SMOOTHED = 9


def draw_all(results: Results, folder: Path) -> None:
    """Writes every figure, of the cells that have been run, once :data:`.BEST` has."""
    runs = {cell: found for cell in SHOWN if (found := results.all_of(cell))}
    if cells.BEST not in runs:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in zip(FIGURES, (losses, ages, cosines, timeline), strict=True):
        draw(runs).savefig(folder / name)


def losses(runs: dict[Cell, list[dict[str, Any]]]) -> Figure:
    """Perplexity over local updates, and over the devices' time."""
    figure = _figure(10.0, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for cell, found in runs.items():
        colour, line = SHOWN[cell]
        points = list(zip(*(run["curve"] for run in found), strict=False))
        perplexity = [statistics.fmean(math.exp(point[2]) for point in same) for same in points]
        for axes, at in ((left, 0), (right, 1)):
            across = [statistics.fmean(point[at] for point in same) for same in points]
            axes.plot(across, perplexity, color=colour, linestyle=line, linewidth=1.6, label=cell.label)
    last = [math.exp(run["curve"][-1][2]) for found in runs.values() for run in found]
    left.set_ylim(min(last) * 0.985, max(last) * 1.25)
    _label(left, "Validation perplexity", "local updates of all workers")
    _label(right, "", "seconds of the devices")
    left.legend(frameon=False, fontsize=FONT_SIZE - 1, labelcolor=INK)
    return figure


def ages(runs: dict[Cell, list[dict[str, Any]]]) -> Figure:
    """How old pushes were when they were merged."""
    shown = {cell: found for cell, found in runs.items() if cell != cells.SYNC}
    figure = _figure(10.0, 2.4)
    panels = figure.subplots(1, max(1, len(shown)), sharey=True, squeeze=False)[0]
    for axes, (cell, found) in zip(panels, shown.items(), strict=False):
        counts: Counter[int] = Counter()
        for run in found:
            counts.update({int(age): count for age, count in run["staleness"]["histogram"].items()})
        share = [counts[age] / counts.total() for age in range(max(counts) + 1)]
        axes.bar(range(len(share)), share, color=SHOWN[cell][0], width=0.9)
        _label(axes, cell.label, "staleness")
    return figure


def cosines(runs: dict[Cell, list[dict[str, Any]]]) -> Figure:
    """Whether pushes point where the momentum does."""
    figure = _figure(7.0, 3.4)
    axes = figure.subplots()
    for cell, found in runs.items():
        colour, line = SHOWN[cell]
        points = list(zip(*(run["cosine"] for run in found), strict=False))
        if not points:
            continue
        values = [statistics.fmean(point[1] for point in same) for same in points]
        updates = [same[0][0] for same in points]
        axes.plot(updates, _smooth(values), color=colour, linestyle=line, linewidth=1.4, label=cell.label)
    axes.axhline(0.0, color=INK, linewidth=0.6)
    _label(axes, "Cosine of a push with the outer momentum", "local updates of all workers")
    axes.legend(frameon=False, fontsize=FONT_SIZE - 1, labelcolor=INK, ncols=2)
    return figure


def timeline(runs: dict[Cell, list[dict[str, Any]]]) -> Figure:
    """Who computes (full), who waits (pale), and when pushes are merged (ticks)."""
    shown = {cell: spans for cell, found in runs.items() if (spans := found[0].get("timeline"))}
    figure = _figure(10.0, 0.4 + 1.1 * max(1, len(shown)))
    panels = figure.subplots(max(1, len(shown)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (cell, spans) in zip(panels, shown.items(), strict=False):
        for worker, start, end, goes_on in with_next(spans):
            axes.barh(worker, end - start, left=start, height=0.7, color=SHOWN[cell][0], alpha=0.6, linewidth=0)
            # Where the next round begins after what was kept, so does all that happens until then.
            until = max(end, TIMELINE[1]) if goes_on is None else goes_on
            axes.barh(worker, until - end, left=end, height=0.7, color=SHOWN[cell][0], alpha=0.15, linewidth=0)
            # Exchanges take no time: what waits for all others is merged when the next round begins.
            merged = goes_on if strategy_quorum(cell) != 1 else end
            if merged is not None:
                axes.plot([merged, merged], [worker - 0.35, worker + 0.35], color=INK, linewidth=1.0)
        axes.set_yticks(range(cell.workers), [f"{seconds:.2f}" for seconds in cell.seconds_per_step])
        axes.invert_yaxis()
        axes.set_xlim(*TIMELINE)
        _label(axes, cell.label, "")
    panels[-1].set_xlabel("seconds of the devices; left, how long a device takes for a step", fontsize=FONT_SIZE)
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    half = _SMOOTHED // 2
    return [statistics.fmean(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _label(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=FONT_SIZE, color=INK)
    axes.set_xlabel(below, fontsize=FONT_SIZE, color=INK)
    axes.tick_params(labelsize=FONT_SIZE - 1, colors=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#AAAAAA")
