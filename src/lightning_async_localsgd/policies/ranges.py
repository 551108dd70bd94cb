"""Sets of integers as ranges."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Ranges:
    """A set of integers, stored as ordered ranges ``[start, stop)`` of which no two are adjacent.

    Args:
        spans: the ranges.

    Raises:
        ValueError: Two ranges overlap.

    Attributes:
        size: number of integers in the set.

    """

    def __init__(self, spans: Iterable[Sequence[int]] = ()) -> None:
        self.size = 0
        self._spans: list[tuple[int, int]] = []
        for start, stop in spans:
            self.add(start, stop)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The ranges, in order."""
        return list(self._spans)

    def add(self, start: int, stop: int) -> None:
        """Add a range.

        Raises:
            ValueError: A part of the range is in the set.

        """
        if start >= stop:
            return
        at = bisect_left(self._spans, (start, stop))
        before = self._spans[at - 1] if at > 0 else None
        after = self._spans[at] if at < len(self._spans) else None
        if (before is not None and before[1] > start) or (after is not None and after[0] < stop):
            raise ValueError(f"[{start}, {stop}) overlaps a range of the set")
        self.size += stop - start
        first = last = at
        if before is not None and before[1] == start:
            first, start = at - 1, before[0]
        if after is not None and after[0] == stop:
            last, stop = at + 1, after[1]
        self._spans[first:last] = [(start, stop)]

    def within(self, start: int, stop: int) -> int:
        """Return how many integers of the set are in ``[start, stop)``."""
        count = 0
        for first, last in itertools.islice(self._spans, self._first_in(start), None):
            if first >= stop:
                break
            count += min(last, stop) - max(first, start)
        return count

    def pop(self, count: int, start: int, stop: int) -> tuple[int, int]:
        """Remove and return the first range within ``[start, stop)``, cut to at most ``count`` integers.

        The set must have an integer there.
        """
        at = self._first_in(start)
        first, last = self._spans[at]
        begin = max(first, start)
        end = min(last, stop, begin + count)
        self._spans[at : at + 1] = [part for part in ((first, begin), (end, last)) if part[0] < part[1]]
        self.size -= end - begin
        return begin, end

    def _first_in(self, start: int) -> int:
        """Return the index of the first range that ends after ``start``."""
        at = bisect_left(self._spans, (start,))
        return at - 1 if at > 0 and self._spans[at - 1][1] > start else at
