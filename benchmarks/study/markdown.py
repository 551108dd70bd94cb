"""Tables and numbers in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

MISSING = "-"
"""What a table shows for a run that is missing."""


def markdown_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def mean_and_std(values: Sequence[float], sign: str = "-", digits: int = 2) -> str:
    """Format mean and standard deviation. With ``sign="+"`` positive means have a plus sign."""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
