"""Sets of integers as ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.policies.ranges import Ranges


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 12), st.integers(1, 9)), max_size=40))
def test_ranges_are_a_set_of_integers(history: list[tuple[bool, int, int, int]]) -> None:
    ranges, expected = Ranges(), set[int]()
    for adding, start, length, most in history:
        window = set(range(start, start + length))
        if adding and window & expected:
            with pytest.raises(ValueError, match="overlaps"):
                ranges.add(start, start + length)
        elif adding:
            ranges.add(start, start + length)
            expected |= window
        elif window & expected:
            first, last = ranges.pop(most, start, start + length)
            taken = set(range(first, last))
            assert taken <= window & expected
            assert first == min(window & expected)
            assert 1 <= len(taken) <= most
            expected -= taken
        assert ranges.within(start, start + length) == len(window & expected)
        assert ranges.size == len(expected)
        assert {item for first, last in ranges.spans for item in range(first, last)} == expected
        assert all(before[1] < after[0] for before, after in zip(ranges.spans, ranges.spans[1:], strict=False))
