"""Conversion of local steps of all workers to global steps."""

from __future__ import annotations

import pytest

from lightning_async_localsgd.policies.plan import EpochSteps, RunBudget
from lightning_async_localsgd.runtime.global_steps import EpochSpan, below_end, to_global_steps, to_local_steps

STEPS = RunBudget(60, 20, "max_steps")
EPOCHS = RunBudget.of_epochs([EpochSteps(10, 4), EpochSteps(10, 4)])


def test_without_an_end_a_global_step_is_a_local_step_of_each_worker() -> None:
    assert to_global_steps(30.0, 30.0, RunBudget(None, None), workers=4) == 7.5


def test_budget_and_steps_per_rank_end_together() -> None:
    assert to_global_steps(30.0, 30.0, STEPS, workers=3) == 10.0
    # Ten batches for three ranks are 3.33 batches for each, which are four steps per rank under DDP.
    assert to_global_steps(20.0, 20.0, EPOCHS, workers=3) == 8.0


def test_estimate_does_not_exceed_the_budget() -> None:
    assert to_global_steps(65.0, 58.0, STEPS, workers=3) == 20.0


@pytest.mark.parametrize(("confirmed", "expected"), [(26.0, 8.0), (27.0, 12.0)])
def test_global_steps_exceed_the_budget_if_there_is_more_data_than_expected(confirmed: float, expected: float) -> None:
    # Each of the three workers may end each of the two epochs with a part of a window.
    assert EPOCHS.upper_bound(3) == 26
    assert to_global_steps(30.0, confirmed, EPOCHS, workers=3) == expected


def test_step_offset_is_added_in_runs_with_an_end() -> None:
    assert to_global_steps(30.0, 30.0, STEPS, workers=3, step_offset=7) == 17.0
    assert to_global_steps(30.0, 30.0, RunBudget(None, None), workers=3, step_offset=7) == 10.0


def test_below_end_changes_only_the_exact_end() -> None:
    assert below_end(20.0, STEPS) == pytest.approx(20.0 - 1e-3)
    assert below_end(27.0, STEPS, step_offset=7) == pytest.approx(27.0 - 1e-3)
    assert below_end(19.5, STEPS) == 19.5
    assert below_end(20.0, RunBudget(None, None)) == 20.0


@pytest.mark.parametrize(("budget", "offset"), [(STEPS, 0), (STEPS, 7), (EPOCHS, 0), (RunBudget(None, None), 0)])
def test_local_steps_are_the_inverse_of_global_steps(budget: RunBudget, offset: int) -> None:
    for local in (0.0, 7.0, 20.0):
        assert to_local_steps(to_global_steps(local, local, budget, 3, offset), budget, 3, offset) == pytest.approx(
            local
        )


def test_epoch_ends_at_the_step_at_which_its_data_is_used_up() -> None:
    span = EpochSpan(16, 32)
    # The other workers may have trained on anything between nothing and later epochs.
    for estimate in (3.0, 17.0, 31.2, 32.0, 63.5):
        assert span.step_of(estimate, is_last=True) == 32
    assert [span.step_of(estimate, is_last=False) for estimate in (3.0, 17.0, 31.2, 32.0, 63.5)] == [16, 17, 31, 31, 31]


def test_epoch_with_unequal_shares_ends_with_the_step_that_uses_its_last_items() -> None:
    assert EpochSpan(0.0, 16.5).step_of(3.0, is_last=True) == 17
    assert EpochSpan(16.5, 33.0).step_of(3.0, is_last=False) == 16


def test_epoch_that_the_run_does_not_finish_has_no_end() -> None:
    assert EpochSpan(16, float("inf")).step_of(18.4, is_last=True) == 18
