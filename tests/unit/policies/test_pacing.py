from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
from lightning_async_localsgd.policies.step_sizes import StepSizes

seconds = st.floats(1e-4, 1e4)


def measured(pacing: SpeedAwareSteps, seconds_per_step: list[float], windows: int = 1) -> SpeedAwareSteps:
    for worker, each in enumerate(seconds_per_step):
        for _ in range(windows):
            pacing.observe(worker, 10, 10 * each)
    return pacing


def steps(pacing: SpeedAwareSteps, count: int) -> list[int]:
    return [pacing.steps_for(worker, range(count)) for worker in range(count)]


def test_local_steps_of_the_devices_of_the_paper() -> None:
    pacing = measured(SpeedAwareSteps(50), [0.58, 0.75, 1.51, 3.33])
    assert steps(pacing, 4) == [50, 38, 19, 8]


@example(55, 11, 0.06)  # The proportion times 55 is 4.999999999999999.
@given(st.integers(1, 500), st.integers(1, 500), seconds)
def test_floor_loses_no_step_to_rounding(local_steps: int, factor: int, fastest: float) -> None:
    pacing = measured(SpeedAwareSteps(local_steps, hysteresis=0.0), [fastest, fastest * factor])
    assert steps(pacing, 2) == [local_steps, max(1, local_steps // factor)]


@given(st.integers(1, 200), st.lists(seconds, min_size=1, max_size=8))
def test_rounds_last_as_long_as_those_of_the_fastest_worker(local_steps: int, seconds_per_step: list[float]) -> None:
    pacing = measured(SpeedAwareSteps(local_steps, hysteresis=0.0), seconds_per_step)
    window = local_steps * min(seconds_per_step)
    for each, taken in zip(seconds_per_step, steps(pacing, len(seconds_per_step)), strict=True):
        assert 1 <= taken <= local_steps
        assert taken == 1 or taken * each <= window * (1 + 1e-6)
        assert taken == local_steps or (taken + 1) * each >= window * (1 - 1e-6)


def test_unknown_workers_take_whole_rounds() -> None:
    pacing = SpeedAwareSteps(50)
    assert steps(pacing, 2) == [50, 50]
    pacing.observe(0, 10, 1.0)
    assert steps(pacing, 2) == [50, 50]
    assert pacing.speed(1) is None


def test_static_pacing_gives_equal_rounds_and_still_measures() -> None:
    pacing = measured(SpeedAwareSteps(50, dynamic=False), [1.0, 4.0])
    assert steps(pacing, 2) == [50, 50]
    assert pacing.speed(1) == pytest.approx(0.25)


def test_single_disturbed_window_changes_nothing() -> None:
    pacing = measured(SpeedAwareSteps(50), [1.0, 2.0], windows=3)
    pacing.observe(0, 10, 1000.0)
    pacing.observe(1, 10, 0.001)
    assert steps(pacing, 2) == [50, 25]


def test_only_the_last_windows_count() -> None:
    pacing = measured(SpeedAwareSteps(50, windows=3), [1.0, 1.0], windows=10)
    for _ in range(2):
        pacing.observe(1, 1, 2.0)
    assert pacing.speed(1) == pytest.approx(0.5)


def test_noise_within_the_hysteresis_changes_nothing() -> None:
    pacing = SpeedAwareSteps(100, windows=1, hysteresis=0.05)
    measured(pacing, [1.0, 1.04])
    assert steps(pacing, 2) == [100, 100]
    measured(pacing, [1.0, 2.0])
    assert steps(pacing, 2) == [100, 50]
    measured(pacing, [1.0, 1.94])
    assert steps(pacing, 2) == [100, 50]
    measured(pacing, [1.0, 1.8])
    assert steps(pacing, 2) == [100, 55]


def test_reference_is_the_fastest_live_worker() -> None:
    pacing = measured(SpeedAwareSteps(50), [1.0, 2.0, 4.0])
    assert pacing.steps_for(2, live=[1, 2]) == 25
    assert pacing.steps_for(2, live=[]) == 50


def test_forgotten_worker_has_no_speed() -> None:
    pacing = measured(SpeedAwareSteps(50), [1.0, 4.0])
    assert steps(pacing, 2) == [50, 12]
    pacing.forget(1)
    pacing.forget(7)
    assert pacing.speed(1) is None
    assert steps(pacing, 2) == [50, 50]


@pytest.mark.parametrize(
    ("count", "each"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0), (1, float("inf")), (1, float("nan"))]
)
def test_windows_without_steps_or_time_are_ignored(count: int, each: float) -> None:
    pacing = SpeedAwareSteps(50)
    pacing.observe(0, count, each)
    assert pacing.speed(0) is None


def test_total_rate_counts_unknown_workers_as_the_mean() -> None:
    pacing = measured(SpeedAwareSteps(50), [1.0, 0.5])
    assert pacing.total_rate([0, 1]) == pytest.approx(3.0)
    assert pacing.total_rate([0, 1, 2, 3]) == pytest.approx(6.0)
    assert pacing.total_rate([2]) is None
    assert pacing.total_rate([]) is None


def test_state_is_saved_and_restored() -> None:
    pacing = measured(SpeedAwareSteps(50), [1.0, 2.0], windows=3)
    steps(pacing, 2)
    other = SpeedAwareSteps(50)
    other.load_state_dict(json.loads(json.dumps(pacing.state_dict())))
    for each in (pacing, other):
        measured(each, [1.0, 1.93], windows=4)
    assert steps(other, 2) == steps(pacing, 2) == [50, 25]
    assert other.state_dict() == pacing.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_steps": 0}, 'local_steps must be an integer >= 1 or "auto", got 0'),
        ({"local_steps": 2.5}, "local_steps"),
        ({"local_steps": True}, "local_steps"),
        ({"local_steps": 1, "windows": 0}, "windows must be an integer >= 1, got 0"),
        ({"local_steps": 1, "hysteresis": 1.0}, r"hysteresis must be in \[0, 1\)"),
        ({"local_steps": 1, "hysteresis": -0.1}, "hysteresis"),
    ],
)
def test_invalid_values_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeedAwareSteps(**arguments)


def with_sizes(sizes: list[int], seconds_per_step: list[float], **options: Any) -> SpeedAwareSteps:
    pacing = SpeedAwareSteps(20, **options)
    pacing.sizes = StepSizes(reference=64)
    for worker, (size, seconds) in enumerate(zip(sizes, seconds_per_step, strict=True)):
        pacing.sizes.announce(worker, size)
        pacing.observe(worker, 1, seconds)
    return pacing


def test_fastest_worker_is_the_one_with_the_most_samples_a_second() -> None:
    # 128, 64 and 32 samples a second. All rounds take 10 seconds, those of worker 0 have H of its own steps.
    pacing = with_sizes([64, 16, 64], [0.5, 0.25, 2.0])
    assert [pacing.rate(worker) for worker in range(3)] == [128.0, 64.0, 32.0]
    assert steps(pacing, 3) == [20, 40, 5]
    assert pacing.total_rate(range(3)) == pytest.approx(224.0)


def test_equal_sizes_change_no_round() -> None:
    seconds = [0.58, 0.75, 1.51, 3.33]
    plain = measured(SpeedAwareSteps(20), seconds)
    assert steps(with_sizes([64] * 4, seconds), 4) == steps(plain, 4)


def test_length_of_rounds_in_a_short_run_follows_from_the_steps_of_the_fastest_worker() -> None:
    pacing = SpeedAwareSteps("auto")
    pacing.sizes = StepSizes(reference=10)
    for worker in range(2):
        pacing.sizes.announce(worker, 40)
        pacing.observe(worker, 1, 1.0)
    for _ in range(20):
        for worker in range(2):
            pacing.observe_exchange(worker, 2, seconds=1.0)
        pacing.steps_for(0, [0, 1], total=64_000)
    # 64,000 samples are 800 steps for each worker, of which 1/200 are 4.
    assert pacing.local_steps == 4
