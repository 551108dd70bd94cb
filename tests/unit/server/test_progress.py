"""The estimate of the local steps that all workers have taken."""

from __future__ import annotations

from lightning_async_localsgd.policies.budget import Budget
from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
from lightning_async_localsgd.server.progress import ProgressEstimate
from lightning_async_localsgd.server.sessions import WorkerSession


def sessions(**local_steps: int) -> dict[int, WorkerSession]:
    live = {}
    for number, steps in enumerate(local_steps.values()):
        live[number] = WorkerSession(f"s{number}")
        live[number].dispatch(0, steps, 0.0)
    return live


def test_estimate_never_decreases() -> None:
    budget = Budget(100)
    progress = ProgressEstimate({}, SpeedAwareSteps(10), budget)
    budget.grant(0, 10, 0.0, {0: 1.0})
    assert progress.at(8.0, {0: 1.0}) == 8.0
    budget.release(0)
    assert progress.at(9.0, {0: 1.0}) == 8.0, "the worker is lost, and its steps with it"
    budget.load_state_dict({"done": 2})
    progress.reset()
    assert progress.at(9.0, {}) == 2.0


def test_steps_of_all_workers_during_a_step_follow_from_the_speeds() -> None:
    pacing, live = SpeedAwareSteps(10), sessions(a=10, b=10)
    progress = ProgressEstimate(live, pacing, Budget(100))
    assert progress.per_step(0, lock_step=False) == 2.0, "no speed is known"
    pacing.observe(0, 10, 10.0)
    pacing.observe(1, 30, 10.0)
    assert progress.per_step(0, lock_step=False) == 4.0
    assert progress.per_step(1, lock_step=False) == 4.0 / 3.0
    live[0].final = True
    assert progress.per_step(1, lock_step=False) == 1.0


def test_in_lock_step_they_follow_from_the_rounds() -> None:
    pacing = SpeedAwareSteps(10)
    pacing.observe(0, 10, 10.0)
    pacing.observe(1, 30, 10.0)
    progress = ProgressEstimate(sessions(a=10, b=5), pacing, Budget(100))
    assert progress.per_step(0, lock_step=True) == 1.5
    assert progress.per_step(1, lock_step=True) == 3.0
