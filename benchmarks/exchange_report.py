"""Measurements and ratios of ``benchmarks/exchange.py``, and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

SIZE_WITH_BARS = 100_000_000
"""The number of parameters for which the bars apply."""


@dataclass(frozen=True)
class Measurement:
    """Repeated measurements of one quantity, in seconds, bytes or buffers."""

    parameters: int
    name: str
    unit: str
    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class Ratio:
    """The ratio of two quantities: the median over repeats in which both were measured in turn."""

    parameters: int
    name: str
    ratio: float
    low: float
    high: float
    bar: float | None
    passed: bool | None


class Report:
    """The measurements and ratios of one model size.

    Args:
        numel: number of parameters of the model.

    """

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.rows: list[Measurement | Ratio] = []

    def add_measurement(self, name: str, values: list[float], unit: str = "s") -> None:
        low, median, high = quartiles(values)
        self.rows.append(Measurement(self.numel, name, unit, median, low, high, len(values)))

    def add_ratio(self, name: str, ratios: list[float], bar: float | None = None) -> None:
        low, median, high = quartiles(ratios)
        passed = None if bar is None or self.numel != SIZE_WITH_BARS else median <= bar
        self.rows.append(Ratio(self.numel, name, median, low, high, bar, passed))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def divide(numerators: list[float], denominators: list[float]) -> list[float]:
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]


def measure_in_turn(repeats: int, *actions: Callable[[], float]) -> list[list[float]]:
    """Run all actions once without measuring, then ``repeats`` times in turn, and return one list for each action."""
    for action in actions:
        action()
    columns: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats):
        for column, action in zip(columns, actions, strict=True):
            column.append(action())
    return columns


def format_value(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e6:.0f} MB"
    return f"{value:.0f}" if unit == "buffers" else f"{value:.4f} {unit}"


def format_table(rows: list[Measurement | Ratio]) -> str:
    lines = [f"{'':46} {'median':>10} {'quartiles':>22} {'bar':>6}"]
    size = None
    for row in rows:
        if row.parameters != size:
            size = row.parameters
            lines += ["", f"{size / 1e6:g} M parameters, {4 * size / 1e6:g} MB"]
        if isinstance(row, Measurement):
            spread = f"{format_value(row.low, row.unit)} .. {format_value(row.high, row.unit)}"
            lines.append(f"  {row.name:46} {format_value(row.median, row.unit):>10} {spread:>22}")
        else:
            bar = "" if row.bar is None else f"{row.bar:>5}x"
            verdict = "" if row.passed is None else "  passed" if row.passed else "  MISSED"
            spread = f"{row.low:.2f} .. {row.high:.2f}"
            lines.append(f"  = {row.name:44} {row.ratio:>9.2f}x {spread:>22} {bar}{verdict}")
    return "\n".join(lines)
