"""Table I: fewer bits and overlap, at equal local updates and at equal time, over links of several speeds.

The exchange takes a share of the fastest device's round with H = 20. Its bytes include the averaged second moments,
which travel as bf16 with every encoding but fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.study.cells import ROUND_SECONDS, Cell
from benchmarks.study.equal_time import INNER_LR, SECONDS
from benchmarks.study.scheduling import PlannedRun

STEPS = 1000
"""Local steps per worker of the runs at equal local updates: about as many as in :data:`.SECONDS` without exchanges."""
LINKS = (0.01, 0.1, 0.5)
"""What an exchange in fp32 takes, relative to a round of the fastest device with H = 20. 0 is a free exchange."""

BLOCKING = Cell("default", dynamic=True, grace="auto", steps=STEPS, inner_lr=INNER_LR, moments=True)
"""The strategy's defaults with H = 20: workers wait for the answers to their pushes, and all travels as fp32."""
BF16 = replace(BLOCKING, upload="bf16", download="bf16")
INT8 = replace(BLOCKING, upload="int8", download="int8")
INT4 = replace(BLOCKING, upload="int4", download="int8")
OVERLAP = replace(BLOCKING, overlap=True)
OVERLAP_INT8 = replace(INT8, overlap=True)
OVERLAP_INT4 = replace(INT4, overlap=True)


def over_link(cell: Cell, share: float) -> Cell:
    """Return a cell whose exchange in fp32 takes a share of a round."""
    return replace(cell, link_seconds=round(share * ROUND_SECONDS, 4))


def at_equal_time(cell: Cell) -> Cell:
    """Return a cell with the time of table G instead of a number of local steps."""
    return replace(cell, steps=0, seconds=SECONDS)


def link_share(cell: Cell) -> float:
    """Return the share of :func:`over_link`."""
    return cell.link_seconds / ROUND_SECONDS


def reference(cell: Cell) -> Cell:
    """Return the run that a cell is compared with: fp32 without overlap over the same link, with the grace window."""
    return replace(cell, upload="fp32", download="fp32", overlap=False, grace="auto")


def _from_scratch(cells: Sequence[Cell]) -> list[Cell]:
    return [replace(cell, warm_steps=0) for cell in cells]


FREE = [BLOCKING, BF16, INT8, INT4]
OVERLAPPED = [over_link(cell, share) for share in (0.1, 0.5, 0.01) for cell in (BLOCKING, OVERLAP)]
WITHOUT_GRACE = replace(over_link(BLOCKING, 0.1), grace=0.0)
"""With overlap, workers do not begin their rounds together, so few pushes meet in a grace window. This run has none."""
BOTH = [over_link(OVERLAP_INT8, 0.1), over_link(OVERLAP_INT4, 0.1)]
EQUAL_TIME = [
    at_equal_time(over_link(cell, share))
    for share in (0.5, 0.1)
    for cell in (BLOCKING, OVERLAP, BF16, INT8, INT4, OVERLAP_INT8)
]
AUTO = [
    at_equal_time(over_link(replace(cell, local_steps="auto"), 0.1))
    for cell in (BLOCKING, OVERLAP, INT8, INT4, OVERLAP_INT8)
]

OVERLAP_AT_EQUAL_TIME = [
    at_equal_time(over_link(replace(cell, local_steps=length), share))
    for length in ("auto", 20)
    for share in (0.0, *LINKS)
    for cell in (BLOCKING, OVERLAP)
]
"""The runs that decide whether overlap is the default."""

GROUPS: list[list[Cell]] = [
    FREE,
    [*OVERLAPPED[:2], WITHOUT_GRACE],
    OVERLAPPED[2:4],
    OVERLAP_AT_EQUAL_TIME,
    EQUAL_TIME[:6],
    _from_scratch([*FREE, *OVERLAPPED[:2]]),
    AUTO,
    BOTH,
    OVERLAPPED[4:],
    _from_scratch(AUTO),
    EQUAL_TIME[6:],
    _from_scratch(EQUAL_TIME[:6]),
]
"""The cells of the table, the most important first."""
FIRST = 4
"""Groups of which all seeds run before the others. Of the others, the first seed runs before the second one."""

TABLE_I: list[Cell] = list(dict.fromkeys(cell for group in GROUPS for cell in group))


def plan(table: str, seeds: Sequence[int]) -> list[PlannedRun]:
    """Return the runs of the table."""
    runs = [PlannedRun(table, cell, seed) for group in GROUPS[:FIRST] for seed in seeds for cell in group]
    runs += [PlannedRun(table, cell, seed) for seed in seeds for group in GROUPS[FIRST:] for cell in group]
    return list(dict.fromkeys(runs))
