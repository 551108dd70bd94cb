"""Plot the result of ``benchmarks/heterogeneous.py``: loss over time, and the local steps of each rank.

Reads the output of the benchmark. Lines that are not JSON, such as the table, are ignored::

    python benchmarks/heterogeneous.py | tee measurements.txt
    python benchmarks/plot_heterogeneous.py measurements.txt    # writes docs/images/run.png

Left: validation loss over seconds of wall clock since the first rank began to train, one line for each seed, with the
mean of the final losses. Right: local steps of each rank in runs with several ranks, and the share of the ceiling
``sum(1 / seconds_per_step)`` that they reach in the steady state.
Needs matplotlib: ``pip install -e '.[docs]'``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "run.png"
# Colors that are distinguishable for color-blind readers, and markers for prints without color.
STYLES = {
    "async": ("async_localsgd", "#0072B2", "o"),
    "ddp": ("ddp", "#D55E00", "s"),
    "ddp2": ("ddp, twice the learning rate", "#E69F00", "D"),
    "diloco": ("synchronous DiLoCo", "#009E73", "v"),
    "single": ("fastest device alone", "#7A7A7A", "^"),
}
FONT_SIZE = 11
INK = "#333333"


def read(lines: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the measurements of each run by its name, one for each seed. The last one of a seed counts.

    Raises:
        ValueError: the lines contain no measurement.

    """
    measurements: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict) and values.get("run") in STYLES:
            measurements.setdefault(values["run"], {})[values["seed"]] = values
    if not measurements:
        raise ValueError("the file contains no JSON line of a run; pass the output of benchmarks/heterogeneous.py")
    return {run: list(measurements[run].values()) for run in STYLES if run in measurements}


def draw(measurements: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw the figure. The steps are those of the first seed, without the second run of DDP."""
    with_several_ranks = {
        run: seeds[0] for run, seeds in measurements.items() if seeds[0]["ranks"] > 1 and run != "ddp2"
    }
    figure = Figure(figsize=(9.0, 3.7), dpi=200, layout="constrained", facecolor="white")
    if with_several_ranks:
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1.0))
        _draw_steps(right, with_several_ranks)
    else:
        left = figure.subplots()
    _draw_losses(left, measurements)
    return figure


def _draw_losses(axes: Axes, measurements: dict[str, list[dict[str, Any]]]) -> None:
    for run, seeds in measurements.items():
        name, color, mark = STYLES[run]
        label: str | None = f"{name}: {statistics.fmean(values['final_loss'] for values in seeds):.2f}"
        for values in seeds:
            seconds, losses = zip(*values["losses"], strict=True)
            # Where two runs overlap, the first of STYLES is on top.
            zorder = 10 - list(STYLES).index(run)
            style = {"color": color, "marker": mark, "markersize": 4, "linewidth": 1.5}
            axes.plot(seconds, losses, label=label, zorder=zorder, **style)
            label = None
    axes.set_xlim(left=0)
    # Leave room for the legend above the curves.
    low, high = axes.get_ylim()
    axes.set_ylim(top=high + 0.16 * len(measurements) * (high - low))
    _label(axes, "Validation loss", "seconds of wall clock")
    axes.grid(axis="both", color="#E5E5E5", linewidth=0.8)
    axes.legend(frameon=False, fontsize=FONT_SIZE - 1, labelcolor=INK, loc="upper right")


def _draw_steps(axes: Axes, measurements: dict[str, dict[str, Any]]) -> None:
    ranks = max(values["ranks"] for values in measurements.values())
    width = 0.8 / len(measurements)
    for index, (run, values) in enumerate(measurements.items()):
        name, color, _ = STYLES[run]
        positions = [rank + (index - (len(measurements) - 1) / 2) * width for rank in range(values["ranks"])]
        label = f"{name}: {values['share_of_ceiling']:.0%}"
        bars = axes.bar(positions, values["local_steps_by_rank"], width * 0.92, color=color, label=label, zorder=2)
        axes.bar_label(bars, fmt="{:.0f}", fontsize=FONT_SIZE - 3, color=INK, padding=1)
    axes.set_xticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    # Leave room for the legend above the bars.
    axes.set_ylim(
        top=(1.15 + 0.12 * len(measurements))
        * max(max(values["local_steps_by_rank"]) for values in measurements.values())
    )
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _label(axes, "Local steps, share of all ranks' speed", "")
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8, zorder=0)
    axes.legend(frameon=False, fontsize=FONT_SIZE - 1, labelcolor=INK, loc="upper right")


def _label(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=FONT_SIZE + 1, color=INK)
    axes.set_xlabel(x_label, fontsize=FONT_SIZE, color=INK)
    axes.tick_params(labelsize=FONT_SIZE - 1, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#AAAAAA")


def main(arguments: list[str] | None = None) -> None:
    """Read the measurements and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=Path, help="the output of benchmarks/heterogeneous.py")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="image file (default: docs/images/run.png)")
    options = parser.parse_args(arguments)
    try:
        with options.measurements.open() as lines:
            measurements = read(lines)
    except (OSError, ValueError) as error:
        parser.error(f"{options.measurements}: {error}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(measurements).savefig(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
