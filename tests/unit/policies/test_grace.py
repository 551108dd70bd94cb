from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.policies.grace import GraceWindow, Pending, Plan

times = st.floats(0.0, 1e4)
pendings = st.lists(st.tuples(times, st.none() | st.floats(0.0, 1e4)), max_size=8).map(
    lambda items: [Pending(worker, at, expected) for worker, (at, expected) in enumerate(items)]
)


def auto(now: float, round_seconds: float, *others: tuple[float, float | None]) -> Plan:
    pending = [Pending(worker, at, expected) for worker, (at, expected) in enumerate(others)]
    return GraceWindow().plan(now, round_seconds, pending)


@given(times, times, pendings, st.floats(0.0, 0.5))
def test_no_worker_is_predicted_to_wait_longer_than_its_share(
    now: float, round_seconds: float, pending: list[Pending], share: float
) -> None:
    plan = GraceWindow("auto", share).plan(now, round_seconds, pending)
    patience = share / (1.0 - share)
    assert now <= plan.deadline <= now + patience * round_seconds
    assert bool(plan.expected) == (plan.deadline > now)
    for other in pending:
        if other.worker in plan.expected:
            seconds = round_seconds if other.expected_seconds is None else other.expected_seconds
            arrival = other.began_at + seconds
            # Not overdue by more than its share, in time for the deadline, and not kept waiting for too long.
            assert arrival + patience * seconds >= now
            assert arrival <= plan.deadline
            assert plan.deadline - max(now, arrival) <= patience * seconds + 1e-9 * plan.deadline


@given(times, times, pendings)
def test_plan_does_not_depend_on_the_order_of_workers(now: float, round_seconds: float, pending: list[Pending]) -> None:
    window = GraceWindow()
    assert window.plan(now, round_seconds, pending) == window.plan(now, round_seconds, pending[::-1])


def test_equal_workers_are_merged_as_one_round() -> None:
    plan = auto(100.0, 30.0, (70.0, 30.0), (70.0, 30.1), (70.0, 29.9))
    assert plan.expected == {0, 1, 2}
    assert 100.1 < plan.deadline < 102.0


def test_late_workers_are_not_waited_for() -> None:
    plan = auto(100.0, 30.0, (70.0, 31.0), (95.0, 30.0))
    assert plan.expected == {0}
    assert plan.deadline < 103.0


def test_overdue_workers_are_not_waited_for() -> None:
    assert auto(100.0, 30.0, (60.0, 30.0)) == Plan(100.0, frozenset())
    # A little overdue: it should come at any moment.
    plan = auto(100.0, 30.0, (69.0, 30.0))
    assert plan.expected == {0}
    assert 100.0 < plan.deadline < 102.0


def test_window_is_closed_without_workers_to_wait_for() -> None:
    assert auto(100.0, 30.0) == Plan(100.0, frozenset())
    assert auto(100.0, 0.0, (100.0, 0.0)) == Plan(100.0, frozenset())
    assert GraceWindow("auto", share=0.0).plan(100.0, 30.0, [Pending(0, 70.0, 31.0)]) == Plan(100.0, frozenset())


def test_unknown_round_is_expected_to_last_as_long_as_the_first() -> None:
    assert auto(30.0, 30.0, (0.0, None)).expected == {0}
    assert auto(30.0, 30.0, (20.0, None)).expected == frozenset()


def test_slow_worker_does_not_keep_fast_workers_waiting() -> None:
    """15 % of a slow worker's time would be most of a fast one's."""
    plan = auto(1000.0, 160.0, (990.0, 11.0), (990.0, 30.0))
    assert plan.expected == {0}
    assert plan.deadline <= 1001.0 + 0.15 / 0.85 * 11.0


def test_devices_of_the_paper_are_merged_as_one_round() -> None:
    """With H=20 and DyLU: 3, 7, 15 and 20 steps, which the slowest device ends first."""
    plan = auto(9.99, 9.99, (0.0, 20 * 0.58), (0.0, 15 * 0.75), (0.0, 7 * 1.51))
    assert plan.expected == {0, 1, 2}
    assert plan.deadline >= 11.6


@given(times, times, pendings, st.floats(0.0, 100.0))
def test_fixed_window_waits_for_all_workers(
    now: float, round_seconds: float, pending: list[Pending], grace: float
) -> None:
    plan = GraceWindow(grace).plan(now, round_seconds, pending)
    if pending and now + grace > now:
        assert plan == Plan(now + grace, frozenset(other.worker for other in pending))
    else:
        assert plan == Plan(now, frozenset())


@pytest.mark.parametrize("grace", [-1, -0.1, float("nan"), float("inf"), "off", None, True])
def test_invalid_grace_is_refused(grace: Any) -> None:
    with pytest.raises(ValueError, match=r"grace must be \"auto\" or seconds >= 0, got .*; 0 turns"):
        GraceWindow(grace)


@pytest.mark.parametrize("share", [-0.1, 0.6, float("nan")])
def test_invalid_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        GraceWindow("auto", share)
