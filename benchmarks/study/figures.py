"""Draw the figures of docs/study.md from the results."""

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
from benchmarks.study.results import FIGURES, Results, add_next_start
from benchmarks.study.running import TIMELINE

INK = "#333333"
GRID = "#E5E5E5"
FONT_SIZE = 9
# Colors of Okabe and Ito, which are distinguishable for color-blind readers and in grayscale.
SHOWN: dict[Cell, tuple[str, str]] = {
    cells.SYNC: ("#000000", "-"),
    cells.NESTEROV: ("#D55E00", "-"),
    Cell("sgd"): ("#E69F00", "--"),
    Cell("dn"): ("#56B4E9", "-"),
    Cell("dn", dynamic=True): ("#0072B2", "--"),
    cells.DN_DYLU_GRACE: ("#009E73", "-"),
}
"""The cells in the figures, with color and line style."""

_SMOOTHING_WINDOW = 9
"""Number of logged values in the moving average of cosines."""


def draw_all(results: Results, folder: Path) -> None:
    """Draw all figures with the cells that have results, if :data:`.DN_DYLU_GRACE` has any."""
    runs = {cell: cell_runs for cell in SHOWN if (cell_runs := results.runs_of(cell))}
    if cells.DN_DYLU_GRACE not in runs:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in zip(FIGURES, (plot_losses, plot_staleness, plot_cosines, plot_timelines), strict=True):
        draw(runs).savefig(folder / name)


def plot_losses(runs: dict[Cell, list[dict[str, Any]]]) -> Figure:
    """Plot perplexity over local updates and over the time of the devices."""
    figure = _figure(10.0, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for cell, cell_runs in runs.items():
        color, line = SHOWN[cell]
        points = list(zip(*(run["curve"] for run in cell_runs), strict=False))
        perplexity = [statistics.fmean(math.exp(point[2]) for point in same) for same in points]
        for axes, at in ((left, 0), (right, 1)):
            across = [statistics.fmean(point[at] for point in same) for same in points]
            axes.plot(across, perplexity, color=color, linestyle=line, linewidth=1.6, label=cell.label)
    last = [math.exp(run["curve"][-1][2]) for cell_runs in runs.values() for run in cell_runs]
    left.set_ylim(min(last) * 0.985, max(last) * 1.25)
    _label(left, "Validation perplexity", "local updates of all workers")
    _label(right, "", "seconds of the devices")
    left.legend(frameon=False, fontsize=FONT_SIZE - 1, labelcolor=INK)
    return figure


def plot_staleness(runs: dict[Cell, list[dict[str, Any]]]) -> Figure:
    """Plot histograms of the staleness of merged pushes."""
    shown = {cell: cell_runs for cell, cell_runs in runs.items() if cell != cells.SYNC}
    figure = _figure(10.0, 2.4)
    panels = figure.subplots(1, max(1, len(shown)), sharey=True, squeeze=False)[0]
    for axes, (cell, cell_runs) in zip(panels, shown.items(), strict=False):
        counts: Counter[int] = Counter()
        for run in cell_runs:
            counts.update({int(versions): count for versions, count in run["staleness"]["histogram"].items()})
        share = [counts[versions] / counts.total() for versions in range(max(counts) + 1)]
        axes.bar(range(len(share)), share, color=SHOWN[cell][0], width=0.9)
        _label(axes, cell.label, "staleness")
    return figure


def plot_cosines(runs: dict[Cell, list[dict[str, Any]]]) -> Figure:
    """Plot the cosine between pushes and the outer momentum."""
    figure = _figure(7.0, 3.4)
    axes = figure.subplots()
    for cell, cell_runs in runs.items():
        color, line = SHOWN[cell]
        points = list(zip(*(run["cosine"] for run in cell_runs), strict=False))
        if not points:
            continue
        values = [statistics.fmean(point[1] for point in same) for same in points]
        updates = [same[0][0] for same in points]
        axes.plot(updates, _smooth(values), color=color, linestyle=line, linewidth=1.4, label=cell.label)
    axes.axhline(0.0, color=INK, linewidth=0.6)
    _label(axes, "Cosine of a push with the outer momentum", "local updates of all workers")
    axes.legend(frameon=False, fontsize=FONT_SIZE - 1, labelcolor=INK, ncols=2)
    return figure


def plot_timelines(runs: dict[Cell, list[dict[str, Any]]]) -> Figure:
    """Plot when each worker computes (dark) and waits (pale), and when its pushes are merged (ticks)."""
    shown = {cell: spans for cell, cell_runs in runs.items() if (spans := cell_runs[0].get("timeline"))}
    figure = _figure(10.0, 0.4 + 1.1 * max(1, len(shown)))
    panels = figure.subplots(max(1, len(shown)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (cell, spans) in zip(panels, shown.items(), strict=False):
        for worker, start, end, next_start in add_next_start(spans):
            axes.barh(worker, end - start, left=start, height=0.7, color=SHOWN[cell][0], alpha=0.6, linewidth=0)
            # If the next round is not recorded, it starts after the end of the figure.
            waits_until = max(end, TIMELINE[1]) if next_start is None else next_start
            axes.barh(worker, waits_until - end, left=end, height=0.7, color=SHOWN[cell][0], alpha=0.15, linewidth=0)
            # Exchanges take no time, so pushes that wait for all workers are merged when the next round starts.
            merged = next_start if strategy_quorum(cell) != 1 else end
            if merged is not None:
                axes.plot([merged, merged], [worker - 0.35, worker + 0.35], color=INK, linewidth=1.0)
        axes.set_yticks(range(cell.workers), [f"{seconds:.2f}" for seconds in cell.seconds_per_step])
        axes.invert_yaxis()
        axes.set_xlim(*TIMELINE)
        _label(axes, cell.label, "")
    panels[-1].set_xlabel("seconds of the devices; left, how long a device takes for a step", fontsize=FONT_SIZE)
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    half = _SMOOTHING_WINDOW // 2
    return [statistics.fmean(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _label(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=FONT_SIZE, color=INK)
    axes.set_xlabel(x_label, fontsize=FONT_SIZE, color=INK)
    axes.tick_params(labelsize=FONT_SIZE - 1, colors=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#AAAAAA")
