"""Sets of integers as ranges."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Ranges:
    """A set of integers as ranges ``[start, stop)``, in order, with none adjacent to another.

    Args:
        spans: the ranges.

    Raises:
        ValueError: a range overlaps another one.

    Attributes:
        size: how many integers there are.

    """

    def __init__(self, spans: Iterable[Sequence[int]] = ()) -> None:
        self.size = 0
        self._spans: list[tuple[int, int]] = []
        for start, stop in spans:
            self.add(start, stop)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The ranges."""
        return list(self._spans)

    def add(self, start: int, stop: int) -> None:
        """Puts a range in.

        Raises:
            ValueError: a part of it is there already.

        """
        if start >= stop:
            return
        at = bisect_left(self._spans, (start, stop))
        before = self._spans[at - 1] if at > 0 else None
        after = self._spans[at] if at < len(self._spans) else None
        if (before is not None and before[1] > start) or (after is not None and after[0] < stop):
            raise ValueError(f"[{start}, {stop}) overlaps what is there")
        self.size += stop - start
        first = last = at
        if before is not None and before[1] == start:
            first, start = at - 1, before[0]
        if after is not None and after[0] == stop:
            last, stop = at + 1, after[1]
        self._spans[first:last] = [(start, stop)]

    def within(self, start: int, stop: int) -> int:
        """How many integers lie in ``[start, stop)``."""
        count = 0
        for first, last in itertools.islice(self._spans, self._first_in(start), None):
            if first >= stop:
                break
            count += min(last, stop) - max(first, start)
        return count

    def take(self, most: int, start: int, stop: int) -> tuple[int, int]:
        """Takes out the first range of at most ``most`` integers within ``[start, stop)``, which are not all gone."""
        at = self._first_in(start)
        first, last = self._spans[at]
        begin = max(first, start)
        end = min(last, stop, begin + most)
        self._spans[at : at + 1] = [part for part in ((first, begin), (end, last)) if part[0] < part[1]]
        self.size -= end - begin
        return begin, end

    def _first_in(self, start: int) -> int:
        """Index of the first range that ends behind ``start``."""
        at = bisect_left(self._spans, (start,))
        return at - 1 if at > 0 and self._spans[at - 1][1] > start else at
