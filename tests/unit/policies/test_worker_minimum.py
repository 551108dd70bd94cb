"""When training is paused because too few workers take part, and when a pause ends the run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd import AsyncLocalSGDStrategy, ExchangeOptions, SimulatedAsyncLocalSGDStrategy
from lightning_async_localsgd.policies.worker_minimum import WorkerMinimum


def test_a_pause_begins_and_ends_with_one_line_each(caplog: pytest.LogCaptureFixture) -> None:
    minimum = WorkerMinimum(3, timeout=60.0)
    for live, now in ((3, 0.0), (2, 10.0), (1, 11.0), (2, 12.0)):
        minimum.update(live, now)
    assert minimum.paused
    assert [record.message for record in caplog.records] == [
        "training is paused: 2 worker(s) take part, and min_workers=3; training goes on when 1 more worker(s) have "
        "joined or come back; if not, it ends with an error in 60 s"
    ]
    caplog.clear()
    minimum.update(3, 14.5)
    minimum.update(4, 20.0)
    assert [record.message for record in caplog.records] == ["training goes on with 3 workers, after a pause of 4.5 s"]
    assert (minimum.paused, minimum.pauses, minimum.seconds, minimum.deadline) == (False, 1, 4.5, None)


def test_only_a_pause_beyond_the_limit_fails_and_its_text_names_the_options() -> None:
    minimum = WorkerMinimum(2, timeout=60.0)
    minimum.update(1, 10.0)
    assert minimum.deadline == 70.0
    assert minimum.failure(69.9) is None
    failure = minimum.failure(70.0)
    assert failure is not None
    for part in ("exchange.pause_timeout=60 s", "min_workers=2", "1 worker(s)", "checkpoint"):
        assert part in failure
    minimum.update(2, 75.0)
    assert minimum.failure(1000.0) is None, "the workers are back"


def test_without_steps_there_is_nothing_to_pause(caplog: pytest.LogCaptureFixture) -> None:
    minimum = WorkerMinimum(2, timeout=60.0)
    minimum.update(1, 0.0, steps_left=False)
    assert not minimum.paused
    minimum.update(1, 1.0)
    minimum.update(1, 2.0, steps_left=False)
    assert not minimum.paused
    assert "training goes on with" not in caplog.text
    minimum.update(1, 3.0)
    minimum.end(10.0)
    minimum.update(1, 11.0)
    assert (minimum.paused, minimum.deadline) == (False, None), "no pause begins when training ends"
    assert minimum.seconds == 1.0 + 7.0


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0.0, 100.0), st.booleans())), st.integers(1, 4))
def test_training_is_paused_exactly_while_workers_are_missing(
    events: list[tuple[int, float, bool]], least: int
) -> None:
    minimum = WorkerMinimum(least, timeout=1000.0)
    now = paused_seconds = 0.0
    for live, seconds, steps_left in events:
        paused_seconds += seconds if minimum.paused else 0.0
        now += seconds
        minimum.update(live, now, steps_left)
        assert minimum.paused == (least > 1 and live < least and steps_left)
        assert (minimum.deadline is not None) == minimum.paused
        if not minimum.paused:
            assert minimum.seconds == pytest.approx(paused_seconds)


@pytest.mark.parametrize("strategy", [AsyncLocalSGDStrategy, SimulatedAsyncLocalSGDStrategy])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_minimum_that_is_no_number_of_workers_is_refused(strategy: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=f"min_workers must be an integer >= 1, got {value!r}"):
        strategy(min_workers=value)


def test_limit_that_is_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exchange.pause_timeout=0"):
        ExchangeOptions(pause_timeout=0)
