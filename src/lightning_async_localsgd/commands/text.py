"""How the commands write numbers, times and the state of a run, as plain text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_BARS = "▁▂▃▄▅▆▇█"

WORKER_COLUMNS = ("worker", "state", "steps/s", "H", "staleness", "share", "waiting", "exchange", "traffic", "refused")
"""Columns of :func:`worker_rows`."""

FORMER = -1
"""Number that stands for all workers that left long ago."""


def duration(seconds: float | None) -> str:
    """Return a duration for people.

    Example::

        >>> duration(0.0312), duration(42.0), duration(3725.0), duration(None)
        ('31.2 ms', '42.0 s', '1 h 02 min', '-')

    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 1.0:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120.0:
        return f"{seconds:.1f} s"
    if seconds < 3600.0:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    days, hours = divmod(int(seconds // 3600), 24)
    minutes = int(seconds // 60) % 60
    return f"{days} d {hours} h" if days else f"{hours} h {minutes:02d} min"


def size(count: float) -> str:
    """Return a number of bytes for people.

    Example::

        >>> size(512), size(2_500_000), size(4.4e9)
        ('512 B', '2.5 MB', '4.4 GB')

    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with some significant digits; ``-`` for None."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return a curve of one line.

    Example::

        >>> sparkline([3.0, 2.0, 1.0])
        '█▄▁'

    """
    shown = [value for value in values if math.isfinite(value)]
    if len(shown) > width:
        shown = [shown[round(n * (len(shown) - 1) / (width - 1))] for n in range(width)]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[int((value - low) * scale)] for value in shown)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of plain text; the columns are as wide as their contents."""
    lines = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def worker_rows(state: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each worker of a run's state, see :meth:`.RunState.as_dict`."""
    return [
        (
            "former" if worker["worker"] == FORMER else str(worker["worker"]),
            _activity(worker),
            number(worker["steps_per_second"]),
            str(worker["local_steps"]),
            f"{worker['staleness']} ({worker['mean_staleness']:.1f})",
            f"{worker['share']:.1%}",
            duration(worker["wait_seconds"]),
            duration(worker["exchange_seconds"]),
            size(worker["bytes"]),
            str(worker["refused"]),
        )
        for worker in state["workers"]
    ]


def headlines(state: Mapping[str, Any]) -> list[str]:
    """Return some lines about the run as a whole."""
    total, progress = state["total"], state["progress"]
    share = f" of {total} ({progress / total:.1%})" if total else ""
    clock = "virtual " if state["virtual"] else ""
    lines = [
        f"run {state['run_name'] or '-'}: {_condition(state)} after {duration(state['seconds'])} {clock}".rstrip(),
        f"{progress} {state['unit']} of all workers{share}, {number(state['progress_per_second'])} "
        f"{state['unit'].removeprefix('local ')}/s, "
        + (_condition(state) if state["ended"] else f"{duration(state['seconds_left'])} left"),
        f"{state['version']} pushes merged, {sum(state['refusals'].values())} refused, "
        f"{size(state['bytes_sent'])} sent, {size(state['bytes_received'])} received",
    ]
    if state["refusals"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(state["refusals"].items()))
        lines.append(f"refused pushes: {kinds}")
    values = {**state["values"], **state["validation"]}
    if values:
        lines.append("  ".join(f"{name} {number(value, 4)}" for name, value in values.items()))
    if len(state["losses"]) > 1:
        lines.append(f"loss {sparkline([loss for _, loss in state['losses']])}")
    if state.get("silent_seconds", 0.0) > 60.0 and not state["ended"]:
        lines.append(f"no event for {duration(state['silent_seconds'])}: rank 0 may have ended without a word")
    if state["more_workers"]:
        lines.append(f"and {state['more_workers']} more workers")
    return [_printable(line) for line in lines]


def fault_lines(state: Mapping[str, Any], count: int = 5) -> list[str]:
    """Return a line for each of the latest faults."""
    return [
        f"{duration(fault['seconds'])}: "
        + ("" if fault["worker"] is None else f"worker {fault['worker']} ")
        + _printable(str(fault["text"]))
        for fault in state["faults"][-count:]
    ]


def _printable(line: str) -> str:
    """Return a line without control characters, which a worker's reason may have, and a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in line)


def _activity(worker: Mapping[str, Any]) -> str:
    """Return what a worker does, and for how long it has done so."""
    if worker["state"] == "finished":
        return "finished"
    return f"{worker['state']} {duration(worker['state_seconds'])}"


def _condition(state: Mapping[str, Any]) -> str:
    if state["error"] is not None:
        return "ended with an error"
    if state["ended"]:
        return "finished"
    return "paused for lack of workers" if state["paused"] else "running"
