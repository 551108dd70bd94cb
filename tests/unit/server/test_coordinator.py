"""SessionTable, order, windows and the end of the budget, with time passed in and no thread anywhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.outer import DelayedNesterov, OuterOptimizer, TorchOptimizer
from lightning_async_localsgd.protocol.messages import ALREADY_APPLIED, Push
from lightning_async_localsgd.server.coordinator import Coordinator
from tests.harness import LAYOUT, Workers, hello, make_coordinator


def test_no_worker_is_dispatched_before_the_cohort_is_complete() -> None:
    coordinator = make_coordinator(workers=3)
    workers = Workers(coordinator)
    coordinator.join(hello(0), 0.0)
    coordinator.join(hello(2), 0.0)
    assert coordinator.membership.missing == [1]
    assert workers.dispatch(0.0) == {}
    coordinator.join(hello(1), 1.0)
    assert coordinator.membership.missing == []
    assert {worker: reply.version for worker, reply in workers.dispatch(1.0).items()} == {0: 0, 1: 0, 2: 0}


def test_staleness_is_the_number_of_versions_since_the_dispatch() -> None:
    workers = Workers(make_coordinator(workers=2))
    workers.join_all(2)
    for expected in (0, 0, 0):
        workers.send(0, 1.0)
        assert workers.dispatch(1.0)[0].staleness == expected
    workers.send(1, 2.0)
    reply = workers.dispatch(2.0)[1]
    assert (reply.staleness, reply.version) == (3, 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"incarnation": "another"}, "incarnation"),
        ({"base_version": 7}, "version 7"),
        ({"steps": -1}, "-1 steps"),
    ],
)
def test_invalid_push_is_refused_and_its_worker_continues(changes: dict[str, object], reason: str) -> None:
    coordinator = make_coordinator()
    workers = Workers(coordinator)
    workers.join_all(2)
    before = coordinator.model.theta.clone()
    workers.send(0, 1.0, **changes)
    assert workers.refused is None
    reply = workers.dispatch(1.0)[0]
    assert reply.refused is not None
    assert reason in reply.refused
    assert reply.local_steps == 10
    assert torch.equal(coordinator.model.theta, before)
    assert coordinator.snapshot().refused_pushes == 1
    assert coordinator.budget.done == 0
    workers.send(0, 2.0)
    assert workers.dispatch(2.0)[0].refused is None
    assert coordinator.model.version == 1


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_push_that_is_not_finite_never_reaches_the_model(poison: float) -> None:
    coordinator = make_coordinator()
    workers = Workers(coordinator)
    workers.join_all(2)
    gradient = torch.zeros(LAYOUT.numel)
    gradient[3] = poison
    workers.send(0, 1.0, gradient)
    assert "NaN" in (workers.dispatch(1.0)[0].refused or "")
    assert torch.isfinite(coordinator.model.theta).all()
    assert coordinator.model.version == 0


def test_push_of_another_size_is_refused() -> None:
    coordinator = make_coordinator()
    workers = Workers(coordinator)
    workers.join_all(2)
    workers.send(0, 1.0, torch.ones(3))
    assert "3 elements" in (workers.dispatch(1.0)[0].refused or "")
    assert coordinator.model.version == 0


def test_repeated_push_is_merged_once_and_answered_twice() -> None:
    coordinator = make_coordinator()
    workers = Workers(coordinator)
    workers.join_all(2)
    push = workers.send(0, 1.0)
    first = workers.dispatch(1.0)[0]
    theta = coordinator.model.theta.clone()
    assert coordinator.push(push, torch.ones(LAYOUT.numel), 1.5) is None
    again = workers.dispatch(1.5)[0]
    assert torch.equal(coordinator.model.theta, theta)
    assert (again.version, again.sequence, again.refused) == (first.version, 1, ALREADY_APPLIED)
    assert coordinator.totals[0].rounds == 1


def test_newer_session_replaces_the_older_one_which_is_refused() -> None:
    coordinator = make_coordinator()
    workers = Workers(coordinator)
    workers.join_all(2)
    assert coordinator.join(hello(0, "newer"), 1.0) is None
    assert coordinator.session_of(0) == "newer"
    workers.send(0, 2.0)
    assert "newer session" in (workers.refused or "")
    assert coordinator.model.version == 0


def test_wrong_protocol_and_late_worker_are_refused_with_the_way_out() -> None:
    coordinator = make_coordinator()
    assert "same version" in (coordinator.join(hello(0, protocol=99), 0.0) or "")
    workers = Workers(make_coordinator(workers=1, total=1, local_steps=1))
    workers.join_all(1)
    workers.send(0, 1.0)
    assert workers.dispatch(1.0)[0].stop
    assert "too late" in (workers.coordinator.join(hello(5), 2.0) or "")


def test_window_dispatches_its_workers_together() -> None:
    workers = Workers(make_coordinator(grace=5.0))
    workers.join_all(2)
    workers.send(0, 10.0)
    assert workers.dispatch(10.0) == {}
    assert workers.coordinator.deadline() == 15.0
    workers.send(1, 12.0)
    replies = workers.dispatch(12.0)
    assert {worker: reply.version for worker, reply in replies.items()} == {0: 2, 1: 2}
    assert replies[0].wait_seconds == 2.0
    assert replies[1].wait_seconds == 0.0


def test_window_closes_at_its_deadline_or_when_the_expected_worker_dies() -> None:
    workers = Workers(make_coordinator(workers=3, grace=5.0))
    workers.join_all(3)
    workers.send(0, 10.0)
    assert workers.dispatch(14.9) == {}
    assert set(workers.dispatch(15.0)) == {0}
    workers.send(0, 20.0)
    workers.send(1, 20.5)
    assert workers.dispatch(20.5) == {}
    workers.coordinator.leave(2, "s2", 21.0, "killed")
    assert set(workers.dispatch(21.0)) == {0, 1}


def test_window_closes_when_its_only_worker_loses_its_connection() -> None:
    workers = Workers(make_coordinator(grace=5.0))
    workers.join_all(2)
    workers.send(0, 10.0)
    assert workers.coordinator.deadline() == 15.0
    # The worker resends the push that was not answered. Its duration is unknown.
    assert workers.coordinator.join(hello(0, reconnecting=True), 11.0) is None
    assert workers.coordinator.deadline() is None
    assert workers.dispatch(16.0) == {}
    workers.sequences[0] = 0
    workers.send(0, 17.0)
    assert workers.dispatch(17.0)[0].refused == ALREADY_APPLIED


def test_no_worker_waits_for_a_paused_one() -> None:
    workers = Workers(make_coordinator(grace=5.0))
    workers.join_all(2)
    workers.coordinator.interrupt(1, 1.0)
    workers.send(0, 2.0)
    assert set(workers.dispatch(2.0)) == {0}
    workers.coordinator.continue_round(1, 3.0)
    workers.send(0, 4.0)
    assert workers.dispatch(4.0) == {}


def test_budget_ends_for_all_workers_with_the_same_final_model() -> None:
    coordinator = make_coordinator(workers=2, total=25)
    workers = Workers(coordinator)
    workers.join_all(2)
    workers.send(0, 1.0)
    assert workers.dispatch(1.0)[0].local_steps == 5  # 25 - 10 - 10 that worker 1 has in hand
    workers.send(0, 1.5)
    assert workers.dispatch(1.5) == {}  # Nothing left: worker 0 rests until worker 1 is in.
    workers.send(1, 3.0)
    replies = workers.dispatch(3.0)
    assert {worker: (reply.stop, reply.version) for worker, reply in replies.items()} == {0: (True, 3), 1: (True, 3)}
    assert coordinator.finished
    assert coordinator.budget.done == 25


def test_steps_of_a_dead_worker_are_granted_to_resting_workers() -> None:
    coordinator = make_coordinator(workers=2, total=20)
    workers = Workers(coordinator)
    workers.join_all(2)
    workers.send(0, 1.0)
    assert workers.dispatch(1.0) == {}
    coordinator.leave(1, "s1", 2.0, "killed")
    assert workers.dispatch(2.0)[0].local_steps == 10
    workers.send(0, 3.0)
    assert workers.dispatch(3.0)[0].stop
    assert coordinator.budget.done == 20


def test_stop_collects_partial_rounds_and_ends_the_run() -> None:
    coordinator = make_coordinator(workers=2, total=None)
    workers = Workers(coordinator)
    workers.join_all(2)
    workers.send(0, 1.0, steps=4, final=True, stop=True)
    assert workers.dispatch(1.0) == {}
    assert coordinator.stopping
    workers.send(1, 2.0, steps=0)
    replies = workers.dispatch(2.0)
    assert all(reply.stop and reply.version == 1 for reply in replies.values())
    assert coordinator.budget.done == 4


def test_local_steps_follow_the_measured_speeds() -> None:
    workers = Workers(make_coordinator(workers=2, local_steps=50))
    workers.join_all(2)
    workers.send(0, 29.0, timed_steps=49, compute_seconds=49 * 0.58)
    workers.dispatch(29.0)
    workers.send(1, 166.5, timed_steps=49, compute_seconds=49 * 3.33)
    reply = workers.dispatch(166.5)[1]
    assert reply.local_steps == 8
    assert reply.progress_per_step == pytest.approx((1 / 0.58 + 1 / 3.33) * 3.33)


def test_saved_state_continues_in_another_coordinator() -> None:
    first = make_coordinator(workers=2, total=100)
    workers = Workers(first)
    workers.join_all(2)
    for turn in range(3):
        workers.send(turn % 2, float(turn), torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(turn)))
        workers.dispatch(float(turn))
    second = make_coordinator(workers=2, total=100)
    second.load_state_dict(first.state_dict())
    gradient = torch.randn(LAYOUT.numel)
    first.model.apply(gradient)
    second.model.apply(gradient)
    assert torch.equal(first.model.theta, second.model.theta)
    assert second.model.version == 4
    assert second.budget.done == first.budget.done == 30
    assert second.totals[0] == first.totals[0]


EVENT = st.tuples(
    st.sampled_from(["push", "push", "push", "partial", "again", "poison", "leave", "rejoin", "interrupt", "continue"]),
    st.integers(0, 3),
    st.floats(0.01, 3.0),
    st.integers(0, 2**31),
)


def play(events: list[tuple[str, int, float, int]], outer_optimizer: OuterOptimizer, grace: float | str) -> Coordinator:
    """Plays any sequence of events and checks after each what must always hold."""
    coordinator = make_coordinator(workers=4, total=300, grace=grace, outer_optimizer=outer_optimizer, local_steps=8)
    workers = Workers(coordinator)
    workers.join_all(4)
    now, applied, steps = 0.0, 0, 0
    last: dict[int, Push] = {}
    for number, (kind, worker, seconds, seed) in enumerate(events):
        now += seconds
        session = coordinator.session_of(worker)
        computing = session is not None and coordinator._live[worker].computing
        gradient = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(seed))
        version = coordinator.model.version
        if kind in ("push", "partial", "poison") and computing:
            if kind == "poison":
                gradient[0] = float("nan")
            taken = workers.replies[worker].local_steps if kind != "partial" else 1
            last[worker] = workers.send(
                worker, now, gradient, session=session, steps=taken, timed_steps=taken, compute_seconds=taken * seconds
            )
            applied += kind != "poison"
            steps += taken  # Of a worker that has diverged, too: the run must come to an end.
        elif kind == "again" and session is not None and worker in last:
            coordinator.push(dataclasses.replace(last[worker], session=session), gradient, now)
            assert coordinator.model.version == version
        elif kind == "leave" and session is not None and len(coordinator.live) > 1:
            coordinator.leave(worker, session, now, "test")
        elif kind == "rejoin" and session is None:
            coordinator.join(hello(worker, f"s{worker}.{number}"), now)
            workers.sequences[worker] = 0
            last.pop(worker, None)
        elif kind == "interrupt":
            coordinator.interrupt(worker, now)
        elif kind == "continue":
            coordinator.continue_round(worker, now)
        workers.dispatch(now)
        assert coordinator.model.version == applied
        assert coordinator.budget.done == steps <= 300
        assert torch.isfinite(coordinator.model.theta).all()
        assert coordinator.deadline() is None or coordinator.deadline() >= now
    return coordinator


@settings(max_examples=60)
@given(events=st.lists(EVENT, max_size=60), grace=st.sampled_from([0.0, 1.0, "auto"]))
def test_same_events_give_the_same_bits_and_each_push_counts_once(
    events: list[tuple[str, int, float, int]], grace: float | str
) -> None:
    first = play(events, DelayedNesterov(activation=0.1), grace)
    second = play(events, DelayedNesterov(activation=0.1), grace)
    assert torch.equal(first.model.theta, second.model.theta)
    assert first.totals == second.totals


@settings(max_examples=20)
@given(events=st.lists(EVENT, max_size=40))
def test_any_events_with_a_torch_optimizer(events: list[tuple[str, int, float, int]]) -> None:
    outer_optimizer = TorchOptimizer(torch.optim.SGD, lr=0.3, momentum=0.9, nesterov=True)
    again = TorchOptimizer(torch.optim.SGD, lr=0.3, momentum=0.9, nesterov=True)
    assert torch.equal(play(events, outer_optimizer, "auto").model.theta, play(events, again, "auto").model.theta)


def test_worker_with_unknown_speed_is_recalled_when_others_have_finished() -> None:
    coordinator = make_coordinator(workers=3, local_steps=50)
    workers = Workers(coordinator)
    workers.join_all(3)
    assert coordinator.recalled() == {}
    workers.send(0, 29.0, timed_steps=49, compute_seconds=49 * 0.58)
    workers.dispatch(29.0)
    assert coordinator.recalled() == {1: 0, 2: 0}
    workers.send(2, 30.0, steps=8, timed_steps=7, compute_seconds=7 * 3.33)
    assert workers.dispatch(30.0)[2].local_steps == 8
    assert coordinator.recalled() == {1: 0}
    workers.send(1, 31.0, steps=40, timed_steps=39, compute_seconds=39 * 0.75)
    workers.dispatch(31.0)
    # A worker with a known speed is never recalled, however late it is.
    workers.send(0, 60.0, timed_steps=50, compute_seconds=50 * 0.58)
    workers.dispatch(60.0)
    assert coordinator.recalled() == {}
    coordinator.stop(60.0)
    assert set(coordinator.recalled()) == {0, 1, 2}


def test_request_to_stop_recalls_the_host_which_decides() -> None:
    coordinator = make_coordinator(workers=3)
    workers = Workers(coordinator)
    workers.join_all(3)
    workers.send(2, 1.0, timed_steps=10, compute_seconds=0.1)
    workers.dispatch(1.0)
    workers.send(1, 2.0, final=True, request_stop=True)
    assert workers.dispatch(2.0) == {}
    assert coordinator.snapshot().stop_requested
    assert not coordinator.stopping
    assert 0 in coordinator.recalled()
    workers.send(0, 2.5, timed_steps=10, compute_seconds=1.0)
    reply = workers.dispatch(2.5)[0]
    assert not reply.stop
    assert reply.progress_per_step == pytest.approx(1.0 + 10.0), (
        "of itself, and of worker 2, which is ten times as fast"
    )


def test_equal_workers_are_never_recalled() -> None:
    coordinator = make_coordinator(workers=2, grace="auto")
    workers = Workers(coordinator)
    workers.join_all(2)
    for turn in range(1, 4):
        for worker in (0, 1):
            workers.send(worker, 10.0 * turn + 0.1 * worker, timed_steps=9, compute_seconds=9.0)
            workers.dispatch(10.0 * turn + 0.1 * worker)
            assert coordinator.recalled() == {}
        assert workers.replies[0].version == workers.replies[1].version == 2 * turn
        assert workers.replies[0].local_steps == workers.replies[1].local_steps == 10


def test_frozen_worker_does_not_wait_longer_because_of_its_long_round() -> None:
    coordinator = make_coordinator(workers=2, grace="auto")
    workers = Workers(coordinator)
    workers.join_all(2)
    for turn in range(1, 4):
        for worker in (0, 1):
            workers.send(worker, 10.0 * turn, timed_steps=9, compute_seconds=9.0)
            workers.dispatch(10.0 * turn)
    # Worker 1 is frozen meanwhile.
    for turn in range(4, 14):
        workers.send(0, 10.0 * turn + 6.0, timed_steps=9, compute_seconds=9.0)
        workers.dispatch(10.0 * turn + 8.0)
    assert workers.replies[0].version == 16
    # Its round took a hundred seconds, of which 15 % would have room for worker 0, that comes at 148 s.
    workers.send(1, 140.0)
    assert workers.dispatch(140.0)[1].version == 17


def test_worker_that_was_cut_off_continues_its_round() -> None:
    coordinator = make_coordinator(workers=2)
    workers = Workers(coordinator)
    workers.join_all(2)
    workers.send(0, 1.0)
    workers.dispatch(1.0)
    coordinator.leave(1, "s1", 2.0, "its connection ended")
    assert coordinator.live == [0]
    assert "is not active" in (coordinator.join(hello(1, "another", reconnecting=True), 2.5) or "")
    assert coordinator.join(hello(1, reconnecting=True), 3.0) is None
    assert workers.dispatch(3.0) == {}, "the worker pushes its round before it is dispatched again"
    workers.send(1, 4.0)
    assert workers.dispatch(4.0)[1].refused is None
    assert coordinator.totals[1].rounds == 1
    assert coordinator.model.workers == 2


def test_loss_of_a_worker_after_the_end_does_not_change_the_final_model() -> None:
    coordinator = make_coordinator(workers=3, total=50, local_steps=10)
    workers = Workers(coordinator)
    workers.join_all(3)
    now = 0.0
    while not coordinator.finished:
        now += 1.0
        worker = next(n for n in coordinator.live if coordinator._live[n].computing)
        workers.send(worker, now)
        workers.dispatch(now)
    final = coordinator.model.theta.clone()
    coordinator.leave(2, "s2", now + 1, "goodbye")
    assert torch.equal(coordinator.model.theta, final)


def test_outer_optimizer_knows_the_length_of_rounds() -> None:
    automatic = DelayedNesterov(lr="auto", momentum="auto")
    coordinator = make_coordinator(workers=4, outer_optimizer=automatic, local_steps=50)
    workers = Workers(coordinator)
    assert automatic.momentum == 0.0
    workers.join_all(4)
    assert automatic.momentum == 0.5
    assert automatic.lr == 1.0
