"""Before a validation, workers are recalled whose steps the global model lacks."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_async_localsgd.server.merge_policy import MergePolicy
from tests.harness import Workers, make_coordinator


def start(workers: int = 2, **options: Any) -> Workers:
    run = Workers(make_coordinator(workers, local_steps=50, **options))
    run.join_all(workers)
    return run


def measured(seconds: float = 1.0, steps: int = 50, **changes: Any) -> dict[str, Any]:
    """Return the header of a push of which each step took ``seconds``."""
    return {"timed_steps": steps, "compute_seconds": steps * seconds, "steps": steps, **changes}


def run_rounds(run: Workers, workers: int, rounds: int, now: float = 0.0) -> float:
    """Let all workers push whole rounds at the same times, and return the last time."""
    for _ in range(rounds):
        now += 50.0
        for worker in range(workers):
            run.push(worker, now, **measured())
    return now


def test_rank_zero_is_dispatched_when_the_recalled_workers_have_pushed() -> None:
    run = start(3)
    assert run.coordinator.recall(10.0) == {0, 1, 2}
    assert set(run.coordinator.recalled()) == {0, 1, 2}
    assert run.push(0, 10.0, **measured(steps=10)) == {}
    # The other workers wait for nobody.
    assert set(run.push(1, 11.0, **measured(steps=11))) == {1}
    version = run.model.version
    replies = run.push(2, 12.0, **measured(steps=12))
    assert set(replies) == {0, 2}
    assert replies[0].version == version + 1
    assert run.coordinator.recalled() == {}


def test_workers_with_two_rounds_since_the_last_validation_are_not_recalled() -> None:
    run = start()
    now = run_rounds(run, 2, rounds=2)
    assert run.coordinator.recall(now + 10.0) == frozenset()
    now = run_rounds(run, 2, rounds=2, now=now)
    # The first of these rounds began before that validation.
    assert run.coordinator.recall(now + 10.0) == {0, 1}


def test_refused_pushes_do_not_bring_the_model_up_to_date() -> None:
    run = start()
    for now in (50.0, 100.0):
        run.push(1, now, float("nan"), **measured())
        run.push(0, now, **measured())
    assert run.coordinator.recall(110.0) == {1}


def test_wait_is_limited_by_the_steps_of_the_recalled_worker() -> None:
    run = start()
    now = run_rounds(run, 2, rounds=1)
    assert run.coordinator.recall(now + 30.0) == {0, 1}
    assert run.push(0, now + 30.0, **measured(steps=30)) == {}
    deadline = run.coordinator.deadline()
    assert deadline == pytest.approx(now + 30.0 + 3.1)
    assert set(run.dispatch(deadline)) == {0}
    # The late worker is still recalled.
    assert set(run.coordinator.recalled()) == {1}


def test_wait_for_a_worker_of_unknown_speed_is_limited_by_the_time_since_the_last_validation() -> None:
    run = start()
    run.coordinator.recall(10.0)
    assert run.push(0, 10.0, **measured(steps=10)) == {}
    assert run.coordinator.deadline() == 20.0
    assert set(run.dispatch(20.0)) == {0}


@pytest.mark.parametrize("event", ["leave", "join"])
def test_worker_that_leaves_or_joins_again_is_not_waited_for(event: str) -> None:
    run = start()
    run.join(0, 0.0)
    run.join(1, 0.0)
    run.coordinator.recall(10.0)
    assert run.push(0, 10.0, **measured(steps=10)) == {}
    assert 0 in (run.leave(1, 11.0) if event == "leave" else run.join(1, 11.0))


@pytest.mark.parametrize("grace", ["auto", 0.5, 5.0, 100.0])
def test_grace_window_and_wait_end_together(grace: Any) -> None:
    run = start(3, grace=grace)
    for worker in range(3):
        run.push(worker, 50.0, **measured())
    run.dispatch(50.0)
    assert run.coordinator.recall(60.0) == {0, 1, 2}
    run.push(0, 60.0, **measured(steps=10))
    run.push(1, 60.5, **measured(steps=10))
    dispatched: set[int] = set()
    while (deadline := run.coordinator.deadline()) is not None:
        dispatched |= set(run.dispatch(deadline))  # The harness checks that no deadline is in the past.
    assert dispatched <= {0, 1}
    assert {worker for worker in (0, 1) if run.replies[worker].sequence == 2} == {0, 1}


def test_group_is_merged_with_the_recalled_pushes() -> None:
    run = start(2, policy=MergePolicy(quorum="all"))
    run.coordinator.recall(10.0)
    assert run.push(0, 10.0, **measured(steps=10)) == {}
    assert set(run.push(1, 40.0, **measured(steps=10))) == {0, 1}
    assert run.model.version == 2


def test_paused_and_waiting_workers_are_not_recalled() -> None:
    run = start(3)
    run.coordinator.interrupt(2, 5.0)
    run.send(1, 9.0, **measured(steps=9))
    assert run.coordinator.recall(10.0) == {0}


def test_recall_is_an_event_of_the_log() -> None:
    run = start()
    seen: list[Any] = []
    run.coordinator.observers.on_event = seen.append  # type: ignore[method-assign]
    run.coordinator.recall(10.0)
    assert [(event.kind, event.seconds) for event in seen] == [("recall", 10.0)]
