"""Which pushes are too large, and who is put in quarantine."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.guard import FACTOR, OFFENCES, PUSHES, WARM_UP, WINDOW, Conduct, UpdateGuard

NORM = st.floats(1e-6, 1e6)


def warm(norm: float = 1.0, steps: int = 50) -> UpdateGuard:
    guard = UpdateGuard()
    for push in range(WARM_UP):
        assert guard.judge(push % 4, norm, steps, 4) is None
    return guard


@pytest.mark.parametrize("limit", [0, -1.0, math.inf, math.nan, True, "automatic", "1.0", [1.0]])
def test_a_limit_that_is_none_is_refused_with_the_way_out(limit: object) -> None:
    with pytest.raises(ValueError, match=r"max_update_norm must be .* got .*None for no limit|None for no limit, got"):
        UpdateGuard(limit)  # type: ignore[arg-type]


def test_without_a_limit_everything_passes() -> None:
    guard = UpdateGuard(None)
    assert all(guard.judge(0, 10.0**power, 1, 4) is None for power in range(200))


@given(limit=NORM, norm=NORM)
def test_a_fixed_limit_holds_from_the_first_push_on(limit: float, norm: float) -> None:
    assert (UpdateGuard(limit).judge(0, norm, 1, 1) is None) == (norm <= limit)


def test_nothing_is_refused_before_the_median_is_warm() -> None:
    guard = UpdateGuard()
    for push in range(WARM_UP):
        assert guard.judge(push % 4, 1000.0**push, 50, 4) is None
    assert guard.judge(0, 1000.0**100, 50, 4) is not None


@given(norms=st.lists(NORM, min_size=WARM_UP, max_size=2 * WINDOW), scale=st.floats(1e-3, 1e3), last=NORM)
def test_only_proportions_matter(norms: list[float], scale: float, last: float) -> None:
    one, other = UpdateGuard(), UpdateGuard()
    for norm in norms:
        one.judge(0, norm, 7, 4)
        other.judge(0, norm * scale, 7, 4)
    if not math.isclose(last, FACTOR * one._expected(7), rel_tol=1e-6):
        assert (one.judge(1, last, 7, 4) is None) == (other.judge(1, last * scale, 7, 4) is None)


@given(norms=st.lists(st.floats(1.0, FACTOR), max_size=300), workers=st.integers(1, 5))
def test_what_stays_within_the_factor_is_never_refused(norms: list[float], workers: int) -> None:
    guard = UpdateGuard()
    assert all(guard.judge(push % workers, norm, 50, workers) is None for push, norm in enumerate(norms))


@settings(max_examples=20, deadline=None)
@given(
    speeds=st.lists(st.integers(1, 100), min_size=2, max_size=6),
    growth=st.floats(0.5, 1.0),
    rounds=st.integers(5, 20),
)
def test_whoever_takes_more_steps_may_push_more(speeds: list[int], growth: float, rounds: int) -> None:
    guard = UpdateGuard()
    for _ in range(rounds):
        for worker, steps in enumerate(speeds):
            assert guard.judge(worker, steps**growth, steps, len(speeds)) is None
            # Near the end of the budget a round may have any length.
            assert guard.judge(worker, 1.0, 1, len(speeds)) is None
    assert guard.judge(0, 1.1 * FACTOR * max(speeds), speeds[0], len(speeds)) is not None


def test_a_refusal_says_how_large_it_was_and_what_to_do() -> None:
    refused = warm().judge(2, 250.0, 50, 4)
    assert refused is not None
    assert "250" in refused
    assert "max_update_norm" in refused


def test_one_worker_that_has_gone_wrong_stays_refused() -> None:
    guard = warm()
    for _ in range(WARM_UP - 1):
        assert guard.judge(0, 10_000.0, 50, 4) is not None
    assert guard.judge(1, 1.0, 50, 4) is None


@pytest.mark.parametrize(("workers", "live"), [([0, 1, 2], 4), ([0, 0, 1], 4), ([0, 1, 1], 2), ([0, 0, 0], 1)])
def test_when_the_run_has_changed_the_third_push_is_let_through(
    workers: list[int], live: int, caplog: pytest.LogCaptureFixture
) -> None:
    guard = warm()
    answers = [guard.judge(worker, 10.0 * FACTOR, 50, live) for worker in workers]
    assert [answer is None for answer in answers] == [False, False, True]
    assert "the run has changed" in caplog.text
    # From here on these are the norms that are usual.
    for push in range(WARM_UP):
        assert guard.judge(push % live, 10.0 * FACTOR, 50, live) is None
    assert guard.judge(0, 1e6, 50, live) is not None


def test_good_pushes_in_between_are_no_row() -> None:
    guard = warm()
    for worker in (0, 1, 2, 3):
        assert guard.judge(worker, 10.0 * FACTOR, 50, 4) is not None
        assert guard.judge(worker, 1.0, 50, 4) is None


def test_norms_of_zero_say_nothing() -> None:
    guard = UpdateGuard()
    for _ in range(WINDOW):
        assert guard.judge(0, 0.0, 50, 4) is None
    assert guard.judge(0, 5.0, 50, 4) is None


def test_a_guard_goes_on_where_another_one_was() -> None:
    guard = UpdateGuard()
    guard.load_state_dict(warm().state_dict())
    assert guard.judge(0, 5.0, 50, 4) is None
    assert guard.judge(0, 5.0 * FACTOR, 50, 4) is not None


@given(pushes=st.lists(st.booleans(), max_size=60))
def test_quarantine_is_for_offences_among_the_latest_pushes(pushes: list[bool]) -> None:
    conduct = Conduct()
    for count in range(1, len(pushes) + 1):
        latest = pushes[max(0, count - PUSHES) : count]
        told = conduct.note(3, pushes[count - 1])
        assert (told is not None) == (sum(latest) >= OFFENCES)
        assert conduct.note(4, False) is None
    conduct.forget(3)
    assert conduct.note(3, True) is None
