from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
from lightning_async_localsgd.policies.round_length import LONGEST, RoundLength

exchanges = st.floats(0.0, 100.0)


def settled(length: RoundLength, seconds: list[float], fastest: float = 10.0, total: int | None = None) -> int:
    """Return H after many exchanges of the same duration for each worker."""
    live = range(len(seconds))
    for _ in range(30):
        for worker, each in enumerate(seconds):
            length.observe(worker, each)
            length.update(live, fastest, total)
    return length.steps


@given(exchanges, st.floats(0.1, 1000.0))
def test_shortest_round_that_spends_two_percent_on_its_exchange(seconds: float, fastest: float) -> None:
    steps = settled(RoundLength(hysteresis=0.0), [seconds], fastest)
    assert 1 <= steps <= LONGEST
    share = seconds / (seconds + steps / fastest)
    assert share <= 0.02 + 1e-9 or steps == LONGEST
    if steps > 1:
        assert seconds / (seconds + (steps - 1) / fastest) > 0.02 - 1e-9, "a shorter round would do"


@given(st.lists(exchanges, min_size=1, max_size=6))
def test_slowest_link_decides(seconds: list[float]) -> None:
    assert settled(RoundLength(), seconds) == settled(RoundLength(), [max(seconds)])


def test_begins_with_one_step_and_at_most_doubles_once_everybody_has_exchanged() -> None:
    length = RoundLength()
    seen = [length.steps]
    for number in range(12):
        length.observe(number % 2, 1.0)
        length.update([0, 1], 10.0, None)
        seen.append(length.steps)
    assert seen == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 32, 32, 64]


def test_one_slow_exchange_changes_nothing() -> None:
    length = RoundLength()
    before = settled(length, [0.1, 0.1])
    for seconds in (30.0, 0.1, 0.1, 0.1, 0.1):
        for worker in (0, 1):
            length.observe(worker, seconds)
            length.update([0, 1], 10.0, None)
            assert length.steps == before


def test_noise_does_not_change_rounds() -> None:
    length = RoundLength()
    before = settled(length, [0.1])
    assert settled(length, [0.115]) == before
    assert settled(length, [0.2]) > 1.5 * before
    assert settled(length, [0.1]) == before


def test_follows_links_and_speeds_in_mid_run() -> None:
    length = RoundLength()
    fast = settled(length, [0.01])
    assert fast == 5
    assert settled(length, [0.1]) == 49
    assert settled(length, [0.01]) == fast
    assert settled(length, [0.01], fastest=100.0) == 49


def test_worker_that_left_does_not_decide() -> None:
    length = RoundLength()
    settled(length, [0.01, 1.0])
    assert length.steps == 490
    length.forget(1)
    assert settled(length, [0.01]) == 5


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (None, 49),
        (10**6, 49),
        (8000, 20),  # 200 rounds of 20 steps for each of two workers
        (384, 1),
    ],
)
def test_short_run_has_short_rounds(total: int | None, expected: int) -> None:
    assert settled(RoundLength(), [0.1, 0.1], total=total) == expected


def test_short_run_spends_most_of_its_time_on_exchanges_at_most() -> None:
    # An exchange lasts 300 steps: rounds of 100 steps spend three quarters of the time on it.
    assert settled(RoundLength(hysteresis=0.0), [30.0, 30.0], total=384) == 100


def test_single_worker_has_no_short_runs() -> None:
    assert settled(RoundLength(), [0.1], total=10) == 49


def test_unknown_speeds_and_exchanges_change_nothing() -> None:
    length = RoundLength()
    length.update([0], 10.0, None)
    length.observe(0, 1.0)
    length.update([0], None, None)
    length.observe(0, float("nan"))
    length.observe(0, -1.0)
    length.update([1], 10.0, None)
    assert length.steps == 1


def test_state_is_restored() -> None:
    length, restored = RoundLength(), RoundLength()
    settled(length, [0.1, 0.3])
    restored.load_state_dict(json.loads(json.dumps(length.state_dict())))
    for each in (length, restored):
        each.observe(0, 9.0)
        each.update([0, 1], 10.0, None)
    assert restored.state_dict() == length.state_dict()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"share": 0.0}, r"must be in \(0, 1\), got 0.0"),
        ({"share": 1.0}, "share"),
        ({"windows": 0}, "windows must be an integer >= 1, got 0"),
        ({"hysteresis": 1.0}, r"hysteresis must be in \[0, 1\), got 1.0"),
    ],
)
def test_invalid_values_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RoundLength(**options)


# ------------------------------------------------------------------ with the speeds


def exchanged(pacing: SpeedAwareSteps, seconds: float, rounds: int = 20) -> list[int]:
    """Let workers of 0.1 and 0.4 s a step exchange often, and return the steps of their next rounds."""
    for sequence in range(2, 2 + rounds):
        for worker, each in enumerate([0.1, 0.4]):
            pacing.observe(worker, 1, each)
            pacing.observe_exchange(worker, sequence, seconds)
            pacing.steps_for(worker, [0, 1])
    return [pacing.steps_for(worker, [0, 1]) for worker in (0, 1)]


def test_automatic_rounds_are_those_of_the_fastest_worker() -> None:
    assert exchanged(SpeedAwareSteps("auto"), 0.1) == [49, 12]
    assert exchanged(SpeedAwareSteps("auto", dynamic=False), 0.1) == [49, 49]
    assert exchanged(SpeedAwareSteps("auto"), 0.0) == [1, 1]


def test_a_number_means_what_it_says() -> None:
    assert exchanged(SpeedAwareSteps(20), 100.0) == [20, 5]


def test_change_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lightning_async_localsgd")
    pacing = SpeedAwareSteps("auto")
    exchanged(pacing, 0.004)
    exchanged(pacing, 0.004)
    assert [record.getMessage() for record in caplog.records] == ["rounds have up to 2 local steps now, 1 before"]


def test_state_of_the_pacing_holds_the_length() -> None:
    pacing, restored, fixed = SpeedAwareSteps("auto"), SpeedAwareSteps("auto"), SpeedAwareSteps(7)
    exchanged(pacing, 0.1)
    state = json.loads(json.dumps(pacing.state_dict()))
    restored.load_state_dict(state)
    fixed.load_state_dict(state)
    assert (restored.local_steps, fixed.local_steps) == (49, 7)
    restored.load_state_dict(json.loads(json.dumps(fixed.state_dict())))
    assert restored.local_steps == 49, "a run that had fixed rounds has measured no exchanges"


def test_first_push_follows_no_exchange() -> None:
    pacing = SpeedAwareSteps("auto")
    for _ in range(20):
        pacing.observe(0, 1, 0.1)
        pacing.observe_exchange(0, 1, 100.0)
        assert pacing.steps_for(0, [0]) == 1


def test_rounds_are_not_shorter_than_the_time_until_an_answer_arrives() -> None:
    """Copies take 1 ms. The answer takes five steps, in which the worker trains on."""
    length = RoundLength()
    for _ in range(10):
        length.observe(0, 0.001, answer_seconds=0.5)
        length.update([0], fastest=10.0, total=None)
    assert length.steps == 6
    saved = RoundLength()
    saved.load_state_dict(json.loads(json.dumps(length.state_dict())))
    assert saved.state_dict() == length.state_dict()
    for _ in range(10):
        length.observe(0, 0.001, answer_seconds=0.05)
        length.update([0], fastest=10.0, total=None)
    assert length.steps == 1
