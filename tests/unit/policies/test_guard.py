"""Which pushes are too large, and who is put in quarantine."""

from __future__ import annotations

import logging
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.policies.guard import (
    MAX_STRIKES,
    MAX_WORKERS,
    PUSHES,
    REFUSE_ABOVE,
    SCALE_ABOVE,
    WARM_UP,
    StrikeCounter,
    UpdateGuard,
    Verdict,
)
from tests.unit.policies.healthy_runs import HealthyRun, healthy_run

NORM = st.floats(1e-6, 1e6)
SEEDS = range(3000)


def warm(norm: float = 1.0, steps: int = 50) -> UpdateGuard:
    guard = UpdateGuard()
    for push in range(WARM_UP):
        assert guard.judge(push % 4, norm, steps, push, 4) == Verdict()
    return guard


@pytest.fixture(scope="module")
def healthy() -> list[HealthyRun]:
    return [healthy_run(seed) for seed in SEEDS]


@pytest.mark.parametrize("limit", [0, -1.0, math.inf, math.nan, True, "automatic", "1.0", [1.0]])
def test_invalid_limit_is_refused_with_the_way_out(limit: object) -> None:
    with pytest.raises(ValueError, match=r"merge.max_update_norm=.* must be .* None for no limit"):
        UpdateGuard(limit)  # type: ignore[arg-type]


def test_without_a_limit_all_pushes_pass() -> None:
    guard = UpdateGuard(None)
    assert all(guard.judge(0, 10.0**power, 1, power, 4) == Verdict() for power in range(200))


@given(limit=NORM, norm=NORM)
def test_fixed_limit_applies_from_the_first_push(limit: float, norm: float) -> None:
    assert (UpdateGuard(limit).judge(0, norm, 1, 0, 1).refusal is None) == (norm <= limit)


# ------------------------------------------------------------------- healthy runs


def test_healthy_runs_have_every_push_merged(healthy: list[HealthyRun], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    for seed, run in zip(SEEDS, healthy, strict=True):
        guard = UpdateGuard()
        for push in run.pushes:
            verdict = guard.judge(*push)
            assert verdict.refusal is None, f"seed {seed}: {push}"
            assert verdict.factor == 1.0 or run.jumps, f"seed {seed}: {push}"


def test_healthy_runs_try_what_norms_can_do(healthy: list[HealthyRun]) -> None:
    """The simulation is worth something only if norms fall and rise by large factors, and workers are stale."""
    norms = [[push.norm for push in run.pushes if push.norm > 0.0] for run in healthy]
    assert sum(max(run) / run[-1] > 1e6 for run in norms) > len(norms) / 20
    assert sum(max(run) / run[0] > 1e3 for run in norms) > len(norms) / 20
    steps = [push.steps for run in healthy for push in run.pushes]
    assert (min(steps), max(steps) > 450) == (1, True)
    staleness = [at - push.base for run in healthy for at, push in enumerate(run.pushes) if push.live == 2]
    assert max(staleness) > 20


def test_blow_ups_are_refused_in_every_run(healthy: list[HealthyRun]) -> None:
    tried = 0
    for seed, run in zip(SEEDS, healthy, strict=True):
        guard = UpdateGuard()
        at = random.Random(seed).randrange(2 * WARM_UP, len(run.pushes))
        for push in run.pushes[:at]:
            guard.judge(*push)
        if sum(push.norm > 0.0 for push in run.pushes[:at]) < WARM_UP:
            continue  # It had converged to the last bit.
        tried += 1
        # An expected norm is at most proportional to the steps.
        largest = max(push.norm * max(1.0, run.pushes[at].steps / push.steps) for push in run.pushes[:at])
        for norm in (1e6 * largest, 3e38):  # The second one is next to overflow.
            assert guard.judge(*run.pushes[at]._replace(norm=norm)).refusal is not None, f"seed {seed}: {norm}"
    assert tried > 0.9 * len(healthy)


def test_push_of_a_slow_worker_from_an_old_model_is_compared_with_the_pushes_of_its_time() -> None:
    guard = UpdateGuard()
    for push in range(60):
        assert guard.judge(0, 0.5**push, 50, push, 2) == Verdict()
    assert guard.judge(1, 1.0, 50, 0, 2) == Verdict()


def test_norms_that_grew_while_the_others_validated_are_no_reason_to_refuse() -> None:
    guard = UpdateGuard()
    guard.judge(1, 1.0, 50, 0, 2)
    for push in range(1, 60):
        assert guard.judge(0, 1.5**push, 50, push, 2) == Verdict()
    assert guard.judge(1, 1.5, 50, 1, 2) == Verdict()
    assert guard.judge(0, 1.5**60, 50, 60, 2) == Verdict()
    assert guard.judge(1, 1.5**60, 50, 61, 2) == Verdict()


def test_workers_that_joined_late_say_nothing_about_earlier_norms() -> None:
    guard = UpdateGuard()
    for push in range(40):
        guard.judge(0, 0.5**push, 50, push, 1)
    for push in range(40, 60, 2):
        guard.judge(1, 0.5**push, 50, push, 2)
        guard.judge(0, 0.5**push, 50, push, 2)
    assert guard.judge(0, 1.0, 50, 60, 2) == Verdict()


# ------------------------------------------------------------------ broken workers


def test_no_push_is_refused_before_enough_are_known() -> None:
    guard = UpdateGuard()
    for push in range(WARM_UP):
        assert guard.judge(push % 4, 1000.0**push, 50, push, 4) == Verdict()
    assert guard.judge(0, 1000.0**100, 50, WARM_UP, 4).refusal is not None


@given(norms=st.lists(NORM, min_size=WARM_UP, max_size=80), scale=st.floats(1e-3, 1e3), last=NORM)
def test_limit_depends_on_ratios_of_norms_only(norms: list[float], scale: float, last: float) -> None:
    one, other = UpdateGuard(), UpdateGuard()
    for push, norm in enumerate(norms):
        one.judge(0, norm, 7, push, 4)
        other.judge(0, norm * scale, 7, push, 4)
    first, second = one.judge(1, last, 7, 0, 4), other.judge(1, last * scale, 7, 0, 4)
    assert first.factor == pytest.approx(second.factor, rel=1e-6)
    assert (first.refusal is None) == (second.refusal is None)


@pytest.mark.parametrize(("steps", "expected"), [(10, 1.0), (50, 1.0), (500, 10.0)])
def test_limit_grows_with_the_number_of_steps_and_does_not_shrink(steps: int, expected: float) -> None:
    limit = SCALE_ABOVE * expected
    assert warm().judge(0, limit * 0.999, steps, WARM_UP, 4) == Verdict()
    assert warm().judge(0, limit * 2.0, steps, WARM_UP, 4).factor == pytest.approx(expected / (2.0 * limit))


def test_refusal_has_norm_limit_and_way_out() -> None:
    refused = warm().judge(2, 25_000.0, 50, WARM_UP, 4).refusal
    assert refused is not None
    assert "its norm of 2.5e+04 exceeds 10000 times the largest norm expected for 50 steps (1)" in refused
    assert "max_update_norm" in refused


def test_push_between_both_limits_is_scaled_down_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    guard = warm()
    assert guard.judge(2, 500.0, 50, WARM_UP, 4) == Verdict(factor=pytest.approx(1 / 500))
    assert "worker 2: a push of 50 steps has a norm of 500" in caplog.text
    assert "scaled down" in caplog.text
    # The other workers' pushes may now be as large: parameters were unfrozen.
    assert guard.judge(1, 500.0, 50, WARM_UP, 4) == Verdict()
    assert guard.judge(2, 500.0, 50, WARM_UP + 2, 4) == Verdict()


def test_broken_worker_stays_refused() -> None:
    guard = warm()
    for push in range(100):
        assert guard.judge(0, 1e6, 50, WARM_UP + 2 * push, 4).refusal is not None
        assert guard.judge(1, 1.0, 50, WARM_UP + 2 * push, 4) == Verdict()


@pytest.mark.parametrize("broken_from", [0, 60])
@pytest.mark.parametrize("growth", [1.5, 3.0, 30.0, 1e6])
def test_worker_whose_norms_grow_cannot_raise_its_own_limit(growth: float, broken_from: int) -> None:
    guard, norm = UpdateGuard(), 1.0
    refused = 0
    for push in range(400):
        worker = push % 4
        if worker < 3:
            assert guard.judge(worker, 1.0, 50, max(0, push - 4), 4) == Verdict()
            continue
        norm = min(norm * growth, 1e30) if push >= broken_from else norm
        verdict = guard.judge(worker, norm, 50, max(0, push - 4), 4)
        refused += verdict.refusal is not None
        if push > WARM_UP:
            assert verdict.refusal is not None or norm * verdict.factor <= SCALE_ABOVE
    assert refused > 30


@pytest.mark.parametrize("norm", [1e6, 1e30])
def test_single_worker_that_blows_up_is_refused(norm: float) -> None:
    guard = UpdateGuard()
    for push in range(2 * WARM_UP):
        assert guard.judge(0, 1.0, 50, push, 1) == Verdict()
    assert guard.judge(0, norm, 50, 2 * WARM_UP, 1).refusal is not None
    assert guard.judge(0, 1.0, 50, 2 * WARM_UP, 1) == Verdict()


@pytest.mark.parametrize(("workers", "live"), [([0, 1, 2], 4), ([0, 0, 1], 4), ([0, 1, 1], 2), ([0, 0, 0], 1)])
def test_third_refusal_in_a_row_is_none_when_all_workers_changed(
    workers: list[int], live: int, caplog: pytest.LogCaptureFixture
) -> None:
    guard, norm = warm(), 10.0 * REFUSE_ABOVE
    answers = [guard.judge(worker, norm, 50, WARM_UP, live) for worker in workers]
    assert [answer.refusal is None for answer in answers] == [False, False, True]
    assert "the run has changed" in caplog.text
    # From here on these are the norms that are usual.
    for push in range(WARM_UP):
        assert guard.judge(push % live, norm, 50, WARM_UP + push, live) == Verdict()
    assert guard.judge(0, norm * 1e6, 50, 2 * WARM_UP, live).refusal is not None


def test_sound_push_restarts_the_count_of_large_pushes() -> None:
    guard = warm()
    for worker in (0, 1, 2, 3):
        assert guard.judge(worker, 10.0 * REFUSE_ABOVE, 50, WARM_UP, 4).refusal is not None
        assert guard.judge(worker, 1.0, 50, WARM_UP, 4) == Verdict()


def test_norms_of_zero_are_ignored() -> None:
    guard = UpdateGuard()
    for push in range(100):
        assert guard.judge(0, 0.0, 50, push, 4) == Verdict()
    assert guard.judge(0, 5.0, 50, 100, 4) == Verdict()


def test_number_of_remembered_workers_is_bounded() -> None:
    guard = warm()
    for worker in range(3 * MAX_WORKERS):
        guard.judge(worker, 0.5, 50, worker, 4)
    assert len(guard.state_dict()["largest"]) == MAX_WORKERS
    assert guard.judge(3 * MAX_WORKERS, 10.0 * REFUSE_ABOVE, 50, 0, 4).refusal is not None


def test_restored_guard_continues() -> None:
    guard = UpdateGuard()
    guard.load_state_dict(warm().state_dict())
    assert guard.judge(0, 5.0, 50, WARM_UP, 4) == Verdict()
    assert guard.judge(0, 5.0 * REFUSE_ABOVE, 50, WARM_UP, 4).refusal is not None


@given(pushes=st.lists(st.booleans(), max_size=60))
def test_quarantine_depends_on_strikes_among_the_latest_pushes(pushes: list[bool]) -> None:
    strikes = StrikeCounter()
    for count in range(1, len(pushes) + 1):
        latest = pushes[max(0, count - PUSHES) : count]
        told = strikes.note(3, pushes[count - 1])
        assert (told is not None) == (sum(latest) >= MAX_STRIKES)
        assert strikes.note(4, False) is None
    strikes.forget(3)
    assert strikes.note(3, True) is None
