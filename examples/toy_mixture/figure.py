"""Plot the validation loss over local steps and over time, as the mean over the seeds of each method."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from compare import Run

# Colors that are distinct with color blindness, too. Synchronous methods have dashed or dotted lines.
STYLES = {
    "sync Nesterov": ("#333333", "--"),
    "async Nesterov": ("#D55E00", "-"),
    "sync SGD": ("#7A7A7A", ":"),
    "async SGD": ("#E69F00", "-"),
    "DN": ("#56B4E9", "-"),
    "DN+DyLU+grace": ("#0072B2", "-"),
}
INK = "#333333"


def draw(runs: Iterable[Run]) -> Figure:
    """Return the figure, with one line for each method and learning rate."""
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.outer_lr), []).append(run)
    figure = Figure(figsize=(9.0, 3.7), dpi=200, layout="constrained", facecolor="white")
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    for (method, lr), group in groups.items():
        color, line = STYLES[method]
        points = [_means(points_at_step) for points_at_step in zip(*(run.curve for run in group), strict=True)]
        steps, seconds, losses = zip(*points, strict=True)
        label = f"{method}, lr {lr:g}"
        by_steps.plot(steps, losses, color=color, linestyle=line, linewidth=2, label=label)
        by_time.plot(seconds, losses, color=color, linestyle=line, linewidth=2, label=label)
    _label(by_steps, "Validation loss", "local steps of all workers")
    _label(by_time, "", "seconds of the simulated cluster")
    by_time.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _means(points: Iterable[tuple[int, float, float]]) -> tuple[float, ...]:
    return tuple(statistics.fmean(values) for values in zip(*points, strict=True))


def _label(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.set_xlabel(below, fontsize=11, color=INK)
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=10, colors=INK)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#AAAAAA")
