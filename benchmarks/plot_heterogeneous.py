"""Draws what ``benchmarks/heterogeneous.py`` has measured: loss over time, and who took how many steps.

It reads the benchmark's output as it is; what is no JSON line in it (the table) is skipped::

    python benchmarks/heterogeneous.py | tee measurements.txt
    python benchmarks/plot_heterogeneous.py measurements.txt    # draws docs/images/run.png

Left: validation loss against seconds of wall clock since the first rank began to train. Right: local steps of each rank
in the runs with several ranks, and how near they came to the ceiling ``sum(1 / seconds_per_step)`` in the steady state.
Needs matplotlib: ``pip install -e '.[docs]'``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "run.png"
# Colours that those who see red and green alike can tell apart, too, and a mark in case there is no colour at all.
STYLES = {
    "async": ("async_localsgd", "#0072B2", "o"),
    "ddp": ("ddp", "#D55E00", "s"),
    "single": ("fastest device alone", "#7A7A7A", "^"),
}
FONT_SIZE = 11
INK = "#333333"


def read(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns the measurement of each run, by its name; of runs that were measured repeatedly the last.

    Raises:
        ValueError: there is no measurement.

    """
    found = {}
    for line in lines:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict) and values.get("run") in STYLES:
            found[values["run"]] = values
    if not found:
        raise ValueError("there is no JSON line of a run in it; give the output of benchmarks/heterogeneous.py")
    return {run: found[run] for run in STYLES if run in found}


def draw(measurements: dict[str, dict[str, Any]]) -> Figure:
    """Returns the figure."""
    shared = {run: found for run, found in measurements.items() if found["ranks"] > 1}
    figure = Figure(figsize=(9.0, 3.7), dpi=200, layout="constrained", facecolor="white")
    if shared:
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1.0))
        _draw_steps(right, shared)
    else:
        left = figure.subplots()
    _draw_losses(left, measurements)
    return figure


def _draw_losses(axes: Axes, measurements: dict[str, dict[str, Any]]) -> None:
    if "ddp" in measurements:
        # Where the others reach the loss that DDP ends with.
        axes.axhline(measurements["ddp"]["final_loss"], color=STYLES["ddp"][1], linewidth=0.8, linestyle=":")
    for run, found in measurements.items():
        name, colour, mark = STYLES[run]
        seconds, losses = zip(*found["losses"], strict=True)
        label = f"{name}: {found['train_seconds']:.0f} s"
        # A mark over a line where two runs meet: the first of STYLES lies on top.
        depth = 10 - list(STYLES).index(run)
        axes.plot(seconds, losses, color=colour, marker=mark, markersize=5, linewidth=2, label=label, zorder=depth)
    axes.set_xlim(left=0)
    _label(axes, "Validation loss", "seconds of wall clock")
    axes.grid(axis="both", color="#E5E5E5", linewidth=0.8)
    axes.legend(frameon=False, fontsize=FONT_SIZE - 1, labelcolor=INK, loc="best")


def _draw_steps(axes: Axes, measurements: dict[str, dict[str, Any]]) -> None:
    ranks = max(found["ranks"] for found in measurements.values())
    width = 0.8 / len(measurements)
    for at, (run, found) in enumerate(measurements.items()):
        name, colour, _ = STYLES[run]
        places = [rank + (at - (len(measurements) - 1) / 2) * width for rank in range(found["ranks"])]
        label = f"{name}: {found['share_of_ceiling']:.0%} of all ranks' speed"
        bars = axes.bar(places, found["local_steps_by_rank"], width * 0.92, color=colour, label=label, zorder=2)
        axes.bar_label(bars, fmt="{:.0f}", fontsize=FONT_SIZE - 3, color=INK, padding=1)
    axes.set_xticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    # Room for the legend above the bars.
    axes.set_ylim(top=1.35 * max(max(found["local_steps_by_rank"]) for found in measurements.values()))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _label(axes, "Local steps of each rank", "")
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8, zorder=0)
    axes.legend(frameon=False, fontsize=FONT_SIZE - 1, labelcolor=INK, loc="upper right")


def _label(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=FONT_SIZE + 1, color=INK)
    axes.set_xlabel(below, fontsize=FONT_SIZE, color=INK)
    axes.tick_params(labelsize=FONT_SIZE - 1, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#AAAAAA")


def main(arguments: list[str] | None = None) -> None:
    """Reads the measurements and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=Path, help="what benchmarks/heterogeneous.py has printed")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the image (default: docs/images/run.png)")
    given = parser.parse_args(arguments)
    try:
        with given.measurements.open() as lines:
            measurements = read(lines)
    except (OSError, ValueError) as error:
        parser.error(f"{given.measurements}: {error}")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    draw(measurements).savefig(given.output)
    print(given.output)


if __name__ == "__main__":
    main()
