from __future__ import annotations

import heapq
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.policies.budget import Budget
from lightning_async_localsgd.policies.grace import GraceWindow, Pending
from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
from lightning_async_localsgd.policies.plan import EpochSteps, Position, RunBudget, restored_done, step_offset_of

NO_SPEEDS: dict[int, float | None] = {}


def test_full_rounds_are_granted_until_the_budget_is_reserved() -> None:
    budget = Budget(100)
    assert [budget.grant(worker, 40, 0.0, NO_SPEEDS) for worker in range(4)] == [40, 40, 20, 0]
    assert budget.exhausted
    assert not budget.finished
    for worker, steps in enumerate([40, 40, 20]):
        budget.complete_round(worker, steps)
    assert budget.done == 100
    assert budget.finished


def test_budget_without_end_grants_full_rounds() -> None:
    budget = Budget(None, done=5)
    assert budget.grant(0, 50, 0.0, {0: 1.0}) == 50
    budget.complete_round(0, 50)
    assert budget.done == 55
    assert not budget.exhausted
    assert not budget.finished
    budget.stop()
    assert budget.grant(0, 50, 0.0, {0: 1.0}) == 0
    assert budget.finished


def test_steps_that_were_taken_count_not_those_granted() -> None:
    budget = Budget(100)
    budget.grant(0, 50, 0.0, NO_SPEEDS)
    budget.complete_round(0, 20)
    assert budget.done == 20
    assert budget.grant(0, 100, 0.0, NO_SPEEDS) == 80
    budget.complete_round(0, 85)
    assert budget.done == 105
    assert budget.finished
    assert budget.progress(0.0, NO_SPEEDS) == 100.0


def test_steps_of_a_lost_worker_become_free() -> None:
    budget = Budget(50)
    assert budget.grant(0, 50, 0.0, NO_SPEEDS) == 50
    assert budget.grant(1, 50, 0.0, NO_SPEEDS) == 0
    budget.release(0)
    budget.release(7)
    assert not budget.exhausted
    assert budget.grant(1, 50, 0.0, NO_SPEEDS) == 50


def test_new_grant_replaces_the_older_one() -> None:
    budget = Budget(60)
    assert budget.grant(0, 50, 0.0, NO_SPEEDS) == 50
    assert budget.grant(0, 50, 0.0, NO_SPEEDS) == 50


def test_stop_waits_for_rounds_in_flight() -> None:
    budget = Budget(100)
    budget.grant(0, 10, 0.0, NO_SPEEDS)
    budget.stop()
    assert budget.exhausted
    assert not budget.finished
    budget.complete_round(0, 3)
    assert budget.finished
    assert budget.done == 3


def test_last_steps_are_shared_by_speed() -> None:
    speeds: dict[int, float | None] = {0: 4.0, 1: 2.0, 2: 1.0, 3: 1.0}
    budget = Budget(80)
    assert [budget.grant(worker, 50, 0.0, speeds) for worker in range(4)] == [40, 20, 10, 10]
    # With plenty left everybody gets whole rounds.
    assert Budget(10_000).grant(3, 50, 0.0, speeds) == 50


def test_unknown_speeds_count_as_the_mean() -> None:
    assert Budget(40).grant(1, 50, 0.0, {0: 3.0, 1: None, 2: 1.0}) == 14
    assert Budget(40).grant(1, 50, 0.0, {0: None, 1: None}) == 20
    assert Budget(40).grant(9, 50, 0.0, {0: 1.0}) == 40


def test_progress_grows_with_time_up_to_the_granted_steps() -> None:
    budget = Budget(100)
    speeds: dict[int, float | None] = {0: 2.0, 1: None}
    budget.grant(0, 10, 0.0, speeds)
    budget.grant(1, 10, 1.0, speeds)
    assert [budget.progress(now, speeds) for now in (0.0, 1.0, 3.0, 100.0)] == [0.0, 2.0, 10.0, 20.0]
    assert budget.progress(100.0, {0: None, 1: None}) == 0.0
    assert Budget(None, done=7).progress(1.0, speeds) == 7.0


def test_state_is_saved_and_restored() -> None:
    budget = Budget(100)
    budget.grant(0, 30, 0.0, NO_SPEEDS)
    budget.complete_round(0, 30)
    budget.grant(0, 50, 0.0, NO_SPEEDS)
    other = Budget(120)
    other.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    assert other.done == 30
    assert other.grant(0, 200, 0.0, NO_SPEEDS) == 90


def test_invalid_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"total must be >= 0.*got -1"):
        Budget(-1)
    with pytest.raises(ValueError, match="done steps must be >= 0, got -1"):
        Budget(5, done=-1)
    with pytest.raises(ValueError, match="at least one step, got 0"):
        Budget(5).grant(0, 0, 0.0, NO_SPEEDS)
    with pytest.raises(ValueError, match="-1 steps"):
        Budget(5).complete_round(0, -1)
    assert Budget(0).finished


events = st.lists(
    st.tuples(
        st.sampled_from(["grant", "complete", "partial", "release"]),
        st.integers(0, 3),
        st.integers(1, 60),
        st.floats(0, 9),
    ),
    max_size=60,
)


@given(st.integers(0, 300), events, st.dictionaries(st.integers(0, 3), st.none() | st.floats(0.01, 100.0)))
def test_grants_never_exceed_the_total(
    total: int, history: list[tuple[str, int, int, float]], speeds: dict[int, float | None]
) -> None:
    budget = Budget(total)
    granted: dict[int, int] = {}
    now = 0.0
    for event, worker, steps, passed in history:
        now += passed
        if event == "grant":
            given = budget.grant(worker, steps, now, speeds)
            granted.pop(worker, None)
            assert 0 <= given <= steps
            assert (given == 0) == (total - budget.done - sum(granted.values()) <= 0)
            if given:
                granted[worker] = given
        elif event == "release":
            budget.release(worker)
            granted.pop(worker, None)
        elif worker in granted:
            most = granted.pop(worker)
            budget.complete_round(worker, most if event == "complete" else most // 2)
        assert budget.done + sum(granted.values()) <= total
        assert budget.exhausted == (budget.done + sum(granted.values()) == total)
        assert budget.finished == (budget.exhausted and not granted)
        assert budget.done <= budget.progress(now, speeds) <= total


def emulate(seconds_per_step: list[float], local_steps: int, total: int) -> tuple[float, list[float], list[int], int]:
    """A run in virtual time under pacing, grace and budget; end, last hand-in of each worker, steps, rounds."""
    pacing, grace, budget = SpeedAwareSteps(local_steps), GraceWindow(), Budget(total)
    live = range(len(seconds_per_step))
    computing: dict[int, tuple[float, int]] = {}
    arrivals: list[tuple[float, int]] = []
    waiting, last, taken = list(live), [0.0 for _ in live], [0 for _ in live]
    now, rounds = 0.0, 0
    plan = None
    while True:
        speeds = {worker: pacing.speed(worker) for worker in live}
        if waiting and (plan is None or now >= plan.deadline or not plan.expected & computing.keys()):
            for worker in waiting:
                steps = budget.grant(worker, pacing.steps_for(worker, live), now, speeds)
                if steps:
                    computing[worker] = (now, steps)
                    heapq.heappush(arrivals, (now + steps * seconds_per_step[worker], worker))
            waiting, plan = [], None
        if not arrivals:
            assert budget.finished
            return now, last, taken, rounds
        if plan is not None and waiting and plan.deadline < arrivals[0][0]:
            now = plan.deadline
            continue
        now, worker = heapq.heappop(arrivals)
        since, steps = computing.pop(worker)
        budget.complete_round(worker, steps)
        pacing.observe(worker, steps, now - since)
        waiting.append(worker)
        last[worker] = now
        taken[worker] += steps
        rounds += 1
        if plan is None:
            pending = [
                Pending(other, at, None if (speed := pacing.speed(other)) is None else count / speed)
                for other, (at, count) in computing.items()
            ]
            plan = grace.plan(now, now - since, pending)


def test_devices_of_the_paper_end_together() -> None:
    seconds_per_step = [0.58, 0.75, 1.51, 3.33]
    end, last, taken, rounds = emulate(seconds_per_step, 50, 8000)
    ceiling = sum(1 / each for each in seconds_per_step)
    assert sum(taken) == 8000
    assert 8000 / end >= 0.93 * ceiling
    # The last hand-ins lie within two of the slowest worker's steps.
    assert max(last) - min(last) <= 2 * 3.33
    assert rounds <= 8000 / (50 + 38 + 19 + 8) * 4 + 16


@settings(max_examples=40)
@given(st.lists(st.floats(0.1, 3.0), min_size=1, max_size=6), st.integers(1, 30), st.integers(1, 2000))
def test_every_run_ends_with_all_steps_taken(seconds_per_step: list[float], local_steps: int, total: int) -> None:
    _, _, taken, _ = emulate(seconds_per_step, local_steps, total)
    assert sum(taken) == total


def test_resumed_round_reserves_its_steps_again() -> None:
    budget = Budget(total=20)
    budget.grant(0, 10, now=0.0, speeds={0: None, 1: None})
    budget.grant(1, 10, now=0.0, speeds={0: None, 1: None})
    budget.release(1)
    budget.complete_round(0, 10)
    assert budget.grant(0, 10, now=1.0, speeds={0: None}) == 10
    budget.reserve(1, 10, now=2.0)
    assert budget.exhausted
    budget.complete_round(0, 10)
    assert not budget.finished
    assert budget.grant(0, 10, now=3.0, speeds={0: None, 1: None}) == 0
    budget.complete_round(1, 10)
    assert budget.finished
    assert budget.done == 30


def test_too_small_estimate_does_not_shorten_rounds() -> None:
    budget = Budget(total=20, upper_bound=24)
    speeds = {0: 1.0, 1: 1.0}
    budget.complete_round(0, 20)
    assert not budget.exhausted, "the data ends the run"
    assert budget.grant(0, 10, 0.0, speeds) == 1
    assert budget.progress(5.0, speeds) == 20.0
    budget.complete_round(0, 5)
    assert budget.grant(0, 10, 0.0, speeds) == 10
    assert budget.progress(4.0, speeds) == 29.0
    budget.replan(200, 204)
    assert budget.grant(1, 10, 0.0, speeds) == 10
    assert budget.total == 200


EPOCHS = [EpochSteps(total, steps_per_rank) for total, steps_per_rank in ((8, 4), (8, 4), (4, 2))]


@pytest.mark.parametrize(
    ("done", "epochs", "steps_per_rank"),
    [(0, 0.0, 0), (4, 0.5, 2), (16, 2.0, 8), (19, 2.75, 10), (20, 3.0, 10)],
)
def test_position_follows_the_data(done: int, epochs: float, steps_per_rank: int) -> None:
    budget = RunBudget.of_epochs(EPOCHS)
    assert (budget.total, budget.steps_per_rank, budget.ends_with_data) == (20, 10, True)
    assert budget.upper_bound(2) == 26
    assert Position.of(done, budget) == (epochs, done, steps_per_rank)
    state = {"budget": {"done": done}, "initial_workers": 2, "position": list(Position.of(done, budget))}
    assert restored_done(state, budget, 2) == done
    assert step_offset_of(Position.in_state(state), budget, 99) == 0, "nothing has changed"
    # Batches that are twice as large, on four ranks.
    other = RunBudget.of_epochs([EpochSteps(epoch.total // 2, epoch.steps_per_rank // 4 or 1) for epoch in EPOCHS])
    assert restored_done(state, other, 4) == round(done / 2)


def test_more_data_than_expected_has_no_position() -> None:
    budget = RunBudget.of_epochs(EPOCHS)
    assert Position.of(21, budget) is None
    state = {"budget": {"done": 21}, "initial_workers": 2, "position": None}
    assert restored_done(state, budget, 4) == 21
    assert step_offset_of(Position.in_state(state), budget, 99) == 0


def test_resumed_run_of_steps_keeps_its_share_and_continues() -> None:
    state = {"budget": {"done": 30}, "initial_workers": 2}
    assert restored_done(state, RunBudget(200, 50, "max_steps"), 4) == 60
    assert step_offset_of(None, RunBudget(200, 50, "max_steps"), 15) == 0
    assert RunBudget(200, 50, "max_steps").upper_bound(4) is None
    by_epochs = RunBudget.of_epochs(EPOCHS)
    assert restored_done(state, by_epochs, 4) == 30, (
        "of an older version, which has no position: what is used up is used up"
    )
    assert step_offset_of(Position(1.0, 16, 8), by_epochs, 8) == 4


def test_steps_granted_ahead_belong_to_the_next_round() -> None:
    budget = Budget(40)
    speeds = {0: 1.0, 1: 1.0}
    assert (budget.grant(0, 5, 0.0, speeds), budget.grant_ahead(0, 5, 0.0, speeds)) == (5, 5)
    assert budget.grant(1, 40, 0.0, speeds) == 20, "what worker 0 holds counts as its share"
    budget.complete_round(0, 5)
    budget.reserve(0, 5, now=5.0)
    assert budget.grant(1, 40, 5.0, {**speeds, 1: 100.0}) == 30
    budget.complete_round(1, 30)
    assert budget.grant(0, 3, 6.0, speeds, begun=5, since=5.0) == 3
    assert budget.grant_ahead(0, 5, 6.0, speeds) == 0, "it may have taken all five"
    assert budget.progress(8.0, speeds) == 38.0, "the three seconds since its push count"
    budget.complete_round(0, 5)
    assert (budget.done, budget.finished) == (40, True)


def test_no_steps_are_granted_ahead_after_a_stop_or_without_a_round() -> None:
    budget = Budget(None)
    assert budget.grant_ahead(0, 5, 0.0, {0: 1.0}) == 0
    assert (budget.grant(0, 5, 0.0, {0: 1.0}), budget.grant_ahead(0, 5, 0.0, {0: 1.0})) == (5, 5)
    budget.stop()
    assert budget.grant(0, 5, 0.0, {0: 1.0}, begun=5) == 0
    assert budget.grant_ahead(0, 5, 0.0, {0: 1.0}) == 0


@given(
    total=st.integers(1, 300),
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    order=st.lists(st.integers(0, 4), max_size=80),
)
def test_number_of_steps_is_exact_with_steps_granted_ahead(total: int, lengths: list[int], order: list[int]) -> None:
    """Workers take all steps that they may, as early as they may."""
    budget, taken, ahead = Budget(total), {}, {}
    speeds: dict[int, float | None] = {worker: float(length) for worker, length in enumerate(lengths)}
    turns = [worker % len(lengths) for worker in order] + list(range(len(lengths))) * (2 * total)
    for now, worker in enumerate(turns):
        begun = 0
        if taken.get(worker):
            begun = ahead[worker]
            budget.complete_round(worker, taken[worker])
            if begun:
                budget.reserve(worker, begun, now)
        granted = budget.grant(worker, lengths[worker], now, speeds, begun)
        taken[worker] = max(granted, begun)
        ahead[worker] = budget.grant_ahead(worker, lengths[worker], now, speeds)
        assert granted > 0 or begun == 0
        if budget.finished:
            break
    assert budget.done == total


# ----------------------------------------------------------------------------------------- batch sizes of workers' own


def test_grants_are_whole_steps_of_the_worker() -> None:
    budget = Budget(1000, unit=64)
    speeds = {0: 300.0, 1: 100.0}
    assert budget.grant(0, 640, 0.0, speeds, size=64) == 640
    assert budget.grant(1, 320, 0.0, speeds, size=32, takes_rest=True) == 256, "a quarter, rounded up to whole steps"
    assert budget.state_dict() == {"done": 0, "unit": 64}


def test_rest_of_less_than_a_step_is_left_to_the_worker_with_the_smallest_steps() -> None:
    budget = Budget(100)
    assert budget.grant(0, 64, 0.0, NO_SPEEDS, size=64, takes_rest=False) == 64
    budget.complete_round(0, 64)
    assert budget.grant(0, 64, 0.0, NO_SPEEDS, size=64, takes_rest=False) == 0
    assert not budget.exhausted
    assert budget.grant(1, 32, 0.0, NO_SPEEDS, size=16) == 32
    budget.complete_round(1, 32)
    assert budget.grant(0, 64, 0.0, NO_SPEEDS, size=64, takes_rest=False) == 0
    assert budget.grant(1, 32, 0.0, NO_SPEEDS, size=16) == 16, "4 samples are left, less than the smallest step"
    budget.complete_round(1, 16)
    assert (budget.done, budget.finished) == (112, True)


@given(
    total=st.integers(1, 3000),
    workers=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 20)), min_size=1, max_size=5),
    order=st.lists(st.integers(0, 4), max_size=60),
    overlap=st.booleans(),
)
def test_number_of_samples_is_exact_up_to_the_smallest_step(
    total: int, workers: list[tuple[int, int]], order: list[int], overlap: bool
) -> None:
    budget, taken, ahead = Budget(total, unit=8), {}, {}
    speeds: dict[int, float | None] = {worker: float(size * steps) for worker, (size, steps) in enumerate(workers)}
    smallest = min(size for size, _ in workers)
    turns = [worker % len(workers) for worker in order] + list(range(len(workers))) * (2 * total)
    for now, worker in enumerate(turns):
        size, steps = workers[worker]
        begun = 0
        if taken.get(worker):
            begun = ahead[worker]
            budget.complete_round(worker, taken[worker])
            if begun:
                budget.reserve(worker, begun, now)
        granted = budget.grant(worker, size * steps, now, speeds, begun, size=size, takes_rest=size == smallest)
        taken[worker] = max(granted, begun)
        ahead[worker] = budget.grant_ahead(worker, size * steps, now, speeds, size) if overlap else 0
        assert granted % size == ahead[worker] % size == 0
        if budget.finished:
            break
    assert total <= budget.done < total + smallest


def test_resumed_run_counts_in_the_unit_of_its_own_batches() -> None:
    state = {"budget": {"done": 640, "unit": 64}, "initial_workers": 2}
    assert restored_done(state, RunBudget(100 * 2 * 32, 100, "max_steps", unit=32), 2) == 320
    assert restored_done(state, RunBudget(200, 100, "max_steps"), 2) == 10, "a run without own sizes counts steps"
    assert restored_done({**state, "budget": {"done": 10}}, RunBudget(6400, 100, "max_steps", unit=32), 4) == 640
    by_epochs = RunBudget.of_epochs([EpochSteps(600, 20)] * 2, unit=10)
    assert by_epochs.upper_bound(3) == 1200 + 3 * 2 * 10
    assert restored_done({**state, "position": [0.5, 3, 1]}, by_epochs, 2) == 300
    assert RunBudget(None, None, unit=16).total_per_rank_step(3) == 48
