"""Membership, order, windows and the end of the budget, with time passed in and no thread anywhere."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.budget import Budget
from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.global_model import GlobalModel
from lightning_async_localsgd.grace import GraceWindow
from lightning_async_localsgd.layout import Layout
from lightning_async_localsgd.messages import (
    ALREADY_APPLIED,
    NOT_FINITE,
    PROTOCOL_VERSION,
    Hello,
    Lease,
    LeaseRequest,
    Push,
    Reply,
)
from lightning_async_localsgd.outer import DelayedNesterov, OuterOptimizer, TorchOptimizer
from lightning_async_localsgd.pacing import SpeedAwareSteps

LAYOUT = Layout.of(torch.nn.Linear(3, 2))


def make(
    workers: int = 2,
    total: int | None = 1000,
    grace: float | str = 0.0,
    local_steps: int = 10,
    rule: OuterOptimizer | None = None,
    dynamic: bool = True,
) -> Coordinator:
    model = GlobalModel(LAYOUT, rule or DelayedNesterov(), workers)
    return Coordinator(
        model,
        SpeedAwareSteps(local_steps, dynamic),
        GraceWindow(grace),
        Budget(total),
        cohort=workers,
        incarnation="this",
    )


def hello(worker: int, session: str | None = None, **changes: object) -> Hello:
    return dataclasses.replace(Hello(PROTOCOL_VERSION, worker, session or f"s{worker}", LAYOUT.fingerprint), **changes)


class Player:
    """Plays workers against a coordinator and remembers their last replies."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.replies: dict[int, Reply] = {}
        self.sequences: dict[int, int] = {}

    def join_all(self, workers: int, now: float = 0.0) -> None:
        for worker in range(workers):
            assert self.coordinator.join(hello(worker), now) is None
        self.flush(now)

    def flush(self, now: float) -> dict[int, Reply]:
        given_out: dict[int, Reply] = {}
        while self.coordinator.ready(now):
            given_out.update(self.coordinator.dispatch(now))
        self.replies.update(given_out)
        return given_out

    def push(self, worker: int, now: float, gradient: torch.Tensor | None = None, **changes: object) -> Push:
        reply = self.replies[worker]
        self.sequences[worker] = self.sequences.get(worker, 0) + 1
        push = Push(
            worker=worker,
            session=f"s{worker}",
            sequence=self.sequences[worker],
            incarnation=reply.incarnation,
            base_version=reply.version,
            steps=reply.local_steps,
            samples=reply.local_steps,
            timed_steps=0,
            compute_seconds=0.0,
            exchange_seconds=0.0,
            final=False,
            stop=False,
        )
        push = dataclasses.replace(push, **changes)
        self.refused = self.coordinator.push(push, torch.ones(LAYOUT.numel) if gradient is None else gradient, now)
        return push


def test_nobody_is_dispatched_before_the_cohort_is_complete() -> None:
    coordinator = make(workers=3)
    player = Player(coordinator)
    coordinator.join(hello(0), 0.0)
    coordinator.join(hello(2), 0.0)
    assert coordinator.missing == [1]
    assert player.flush(0.0) == {}
    coordinator.join(hello(1), 1.0)
    assert coordinator.missing == []
    assert {worker: reply.version for worker, reply in player.flush(1.0).items()} == {0: 0, 1: 0, 2: 0}


def test_staleness_is_the_number_of_versions_since_the_dispatch() -> None:
    player = Player(make(workers=2))
    player.join_all(2)
    for expected in (0, 0, 0):
        player.push(0, 1.0)
        assert player.flush(1.0)[0].staleness == expected
    player.push(1, 2.0)
    reply = player.flush(2.0)[1]
    assert (reply.staleness, reply.version) == (3, 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"incarnation": "another"}, "incarnation"),
        ({"base_version": 7}, "version 7"),
        ({"steps": -1}, "-1 steps"),
    ],
)
def test_a_push_that_does_not_fit_is_refused_and_its_worker_goes_on(changes: dict[str, object], reason: str) -> None:
    coordinator = make()
    player = Player(coordinator)
    player.join_all(2)
    before = coordinator.model.theta.clone()
    player.push(0, 1.0, **changes)
    assert player.refused is None
    reply = player.flush(1.0)[0]
    assert reply.refused is not None
    assert reason in reply.refused
    assert reply.local_steps == 10
    assert torch.equal(coordinator.model.theta, before)
    assert coordinator.view().refused_pushes == 1
    assert coordinator.budget.done == 0
    player.push(0, 2.0)
    assert player.flush(2.0)[0].refused is None
    assert coordinator.model.version == 1


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_push_that_is_not_finite_never_reaches_the_model(poison: float) -> None:
    coordinator = make()
    player = Player(coordinator)
    player.join_all(2)
    gradient = torch.zeros(LAYOUT.numel)
    gradient[3] = poison
    player.push(0, 1.0, gradient)
    assert "NaN" in (player.flush(1.0)[0].refused or "")
    assert torch.isfinite(coordinator.model.theta).all()
    assert coordinator.model.version == 0


def test_a_push_of_another_size_is_refused() -> None:
    coordinator = make()
    player = Player(coordinator)
    player.join_all(2)
    player.push(0, 1.0, torch.ones(3))
    assert "3 elements" in (player.flush(1.0)[0].refused or "")
    assert coordinator.model.version == 0


def test_a_push_sent_again_is_applied_once_and_answered_twice() -> None:
    coordinator = make()
    player = Player(coordinator)
    player.join_all(2)
    push = player.push(0, 1.0)
    first = player.flush(1.0)[0]
    theta = coordinator.model.theta.clone()
    assert coordinator.push(push, torch.ones(LAYOUT.numel), 1.5) is None
    again = player.flush(1.5)[0]
    assert torch.equal(coordinator.model.theta, theta)
    assert (again.version, again.sequence, again.refused) == (first.version, 1, ALREADY_APPLIED)
    assert coordinator.totals[0].rounds == 1


def test_a_newer_session_supersedes_and_the_older_is_told() -> None:
    coordinator = make()
    player = Player(coordinator)
    player.join_all(2)
    assert coordinator.join(hello(0, "newer"), 1.0) is None
    assert coordinator.session_of(0) == "newer"
    player.push(0, 2.0)
    assert "newer session" in (player.refused or "")
    assert coordinator.model.version == 0


def test_a_wrong_protocol_and_a_late_comer_are_refused_with_the_way_out() -> None:
    coordinator = make()
    assert "same version" in (coordinator.join(hello(0, protocol=99), 0.0) or "")
    player = Player(make(workers=1, total=1, local_steps=1))
    player.join_all(1)
    player.push(0, 1.0)
    assert player.flush(1.0)[0].stop
    assert "too late" in (player.coordinator.join(hello(5), 2.0) or "")


def test_the_window_dispatches_its_workers_together() -> None:
    player = Player(make(grace=5.0))
    player.join_all(2)
    player.push(0, 10.0)
    assert player.flush(10.0) == {}
    assert player.coordinator.deadline() == 15.0
    player.push(1, 12.0)
    replies = player.flush(12.0)
    assert {worker: reply.version for worker, reply in replies.items()} == {0: 2, 1: 2}
    assert replies[0].wait_seconds == 2.0
    assert replies[1].wait_seconds == 0.0


def test_a_window_closes_at_its_deadline_and_for_the_dead() -> None:
    player = Player(make(workers=3, grace=5.0))
    player.join_all(3)
    player.push(0, 10.0)
    assert player.flush(14.9) == {}
    assert set(player.flush(15.0)) == {0}
    player.push(0, 20.0)
    player.push(1, 20.5)
    assert player.flush(20.5) == {}
    player.coordinator.leave(2, "s2", 21.0, "killed")
    assert set(player.flush(21.0)) == {0, 1}


def test_a_window_is_closed_when_its_only_worker_lost_its_connection() -> None:
    player = Player(make(grace=5.0))
    player.join_all(2)
    player.push(0, 10.0)
    assert player.coordinator.deadline() == 15.0
    # It hands in again what it has had no answer to, which takes as long as it takes.
    assert player.coordinator.join(hello(0, rejoining=True), 11.0) is None
    assert player.coordinator.deadline() is None
    assert player.flush(16.0) == {}
    player.sequences[0] = 0
    player.push(0, 17.0)
    assert player.flush(17.0)[0].refused == ALREADY_APPLIED


def test_nobody_waits_for_a_paused_worker() -> None:
    player = Player(make(grace=5.0))
    player.join_all(2)
    player.coordinator.pause(1, 1.0)
    player.push(0, 2.0)
    assert set(player.flush(2.0)) == {0}
    player.coordinator.resume(1, 3.0)
    player.push(0, 4.0)
    assert player.flush(4.0) == {}


def test_the_budget_ends_for_all_at_once_with_one_final_model() -> None:
    coordinator = make(workers=2, total=25)
    player = Player(coordinator)
    player.join_all(2)
    player.push(0, 1.0)
    assert player.flush(1.0)[0].local_steps == 5  # 25 - 10 - 10 that worker 1 has in hand
    player.push(0, 1.5)
    assert player.flush(1.5) == {}  # Nothing left: worker 0 rests until worker 1 is in.
    player.push(1, 3.0)
    replies = player.flush(3.0)
    assert {worker: (reply.stop, reply.version) for worker, reply in replies.items()} == {0: (True, 3), 1: (True, 3)}
    assert coordinator.finished
    assert coordinator.budget.done == 25


def test_the_steps_of_a_dead_worker_go_to_those_who_rest() -> None:
    coordinator = make(workers=2, total=20)
    player = Player(coordinator)
    player.join_all(2)
    player.push(0, 1.0)
    assert player.flush(1.0) == {}
    coordinator.leave(1, "s1", 2.0, "killed")
    assert player.flush(2.0)[0].local_steps == 10
    player.push(0, 3.0)
    assert player.flush(3.0)[0].stop
    assert coordinator.budget.done == 20


def test_stop_collects_partial_rounds_and_ends() -> None:
    coordinator = make(workers=2, total=None)
    player = Player(coordinator)
    player.join_all(2)
    player.push(0, 1.0, steps=4, final=True, stop=True)
    assert player.flush(1.0) == {}
    assert coordinator.stopping
    player.push(1, 2.0, steps=0)
    replies = player.flush(2.0)
    assert all(reply.stop and reply.version == 1 for reply in replies.values())
    assert coordinator.budget.done == 4


def test_local_steps_follow_the_measured_speeds() -> None:
    player = Player(make(workers=2, local_steps=50))
    player.join_all(2)
    player.push(0, 29.0, timed_steps=49, compute_seconds=49 * 0.58)
    player.flush(29.0)
    player.push(1, 166.5, timed_steps=49, compute_seconds=49 * 3.33)
    reply = player.flush(166.5)[1]
    assert reply.local_steps == 8
    assert reply.pace == pytest.approx((1 / 0.58 + 1 / 3.33) * 3.33)


def test_state_goes_on_in_another_coordinator() -> None:
    first = make(workers=2, total=100)
    player = Player(first)
    player.join_all(2)
    for turn in range(3):
        player.push(turn % 2, float(turn), torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(turn)))
        player.flush(float(turn))
    second = make(workers=2, total=100)
    second.load_state_dict(first.state_dict())
    gradient = torch.randn(LAYOUT.numel)
    first.model.apply(gradient)
    second.model.apply(gradient)
    assert torch.equal(first.model.theta, second.model.theta)
    assert second.model.version == 4
    assert second.budget.done == first.budget.done == 30
    assert second.totals[0] == first.totals[0]


EVENT = st.tuples(
    st.sampled_from(["push", "push", "push", "partial", "again", "poison", "leave", "rejoin", "pause", "resume"]),
    st.integers(0, 3),
    st.floats(0.01, 3.0),
    st.integers(0, 2**31),
)


def play(events: list[tuple[str, int, float, int]], rule: OuterOptimizer, grace: float | str) -> Coordinator:
    """Plays any sequence of events and checks after each what must always hold."""
    coordinator = make(workers=4, total=300, grace=grace, rule=rule, local_steps=8)
    player = Player(coordinator)
    player.join_all(4)
    now, applied, steps = 0.0, 0, 0
    last: dict[int, Push] = {}
    for number, (kind, worker, seconds, seed) in enumerate(events):
        now += seconds
        session = coordinator.session_of(worker)
        computing = session is not None and coordinator._members[worker].state == "computing"
        gradient = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(seed))
        version = coordinator.model.version
        if kind in ("push", "partial", "poison") and computing:
            if kind == "poison":
                gradient[0] = float("nan")
            taken = player.replies[worker].local_steps if kind != "partial" else 1
            last[worker] = player.push(
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
            player.sequences[worker] = 0
            last.pop(worker, None)
        elif kind == "pause":
            coordinator.pause(worker, now)
        elif kind == "resume":
            coordinator.resume(worker, now)
        player.flush(now)
        assert coordinator.model.version == applied
        assert coordinator.budget.done == steps <= 300
        assert torch.isfinite(coordinator.model.theta).all()
        assert coordinator.deadline() is None or coordinator.deadline() >= now
    return coordinator


@settings(max_examples=60, deadline=None)
@given(events=st.lists(EVENT, max_size=60), grace=st.sampled_from([0.0, 1.0, "auto"]))
def test_the_same_events_give_the_same_bits_and_each_push_counts_once(
    events: list[tuple[str, int, float, int]], grace: float | str
) -> None:
    first = play(events, DelayedNesterov(activation=0.1), grace)
    second = play(events, DelayedNesterov(activation=0.1), grace)
    assert torch.equal(first.model.theta, second.model.theta)
    assert first.totals == second.totals


@settings(max_examples=20, deadline=None)
@given(events=st.lists(EVENT, max_size=40))
def test_any_events_with_a_torch_optimizer(events: list[tuple[str, int, float, int]]) -> None:
    rule = TorchOptimizer(torch.optim.SGD, lr=0.3, momentum=0.9, nesterov=True)
    again = TorchOptimizer(torch.optim.SGD, lr=0.3, momentum=0.9, nesterov=True)
    assert torch.equal(play(events, rule, "auto").model.theta, play(events, again, "auto").model.theta)


def test_a_worker_of_unknown_speed_is_called_in_when_others_have_finished() -> None:
    coordinator = make(workers=3, local_steps=50)
    player = Player(coordinator)
    player.join_all(3)
    assert coordinator.wanted() == {}
    player.push(0, 29.0, timed_steps=49, compute_seconds=49 * 0.58)
    player.flush(29.0)
    assert coordinator.wanted() == {1: 0, 2: 0}
    player.push(2, 30.0, steps=8, timed_steps=7, compute_seconds=7 * 3.33)
    assert player.flush(30.0)[2].local_steps == 8
    assert coordinator.wanted() == {1: 0}
    player.push(1, 31.0, steps=40, timed_steps=39, compute_seconds=39 * 0.75)
    player.flush(31.0)
    # Whoever has been measured is never called in again, however late it is.
    player.push(0, 60.0, timed_steps=50, compute_seconds=50 * 0.58)
    player.flush(60.0)
    assert coordinator.wanted() == {}
    coordinator.stop()
    assert set(coordinator.wanted()) == {0, 1, 2}


def test_who_asks_to_stop_leaves_it_to_the_host_which_learns_at_once_who_goes_on() -> None:
    coordinator = make(workers=3)
    player = Player(coordinator)
    player.join_all(3)
    player.push(2, 1.0, timed_steps=10, compute_seconds=0.1)
    player.flush(1.0)
    player.push(1, 2.0, final=True, asks=True)
    assert player.flush(2.0) == {}
    assert coordinator.view().asked_to_stop
    assert not coordinator.stopping
    assert 0 in coordinator.wanted()
    player.push(0, 2.5, timed_steps=10, compute_seconds=1.0)
    reply = player.flush(2.5)[0]
    assert not reply.stop
    assert reply.pace == pytest.approx(1.0 + 10.0), "of itself, and of worker 2, which is ten times as fast"


def test_equal_workers_are_never_called_in() -> None:
    coordinator = make(workers=2, grace="auto")
    player = Player(coordinator)
    player.join_all(2)
    for turn in range(1, 4):
        for worker in (0, 1):
            player.push(worker, 10.0 * turn + 0.1 * worker, timed_steps=9, compute_seconds=9.0)
            player.flush(10.0 * turn + 0.1 * worker)
            assert coordinator.wanted() == {}
        assert player.replies[0].version == player.replies[1].version == 2 * turn
        assert player.replies[0].local_steps == player.replies[1].local_steps == 10


def test_a_worker_that_was_frozen_does_not_wait_the_longer_for_it() -> None:
    coordinator = make(workers=2, grace="auto")
    player = Player(coordinator)
    player.join_all(2)
    for turn in range(1, 4):
        for worker in (0, 1):
            player.push(worker, 10.0 * turn, timed_steps=9, compute_seconds=9.0)
            player.flush(10.0 * turn)
    # Worker 1 is frozen meanwhile.
    for turn in range(4, 14):
        player.push(0, 10.0 * turn + 6.0, timed_steps=9, compute_seconds=9.0)
        player.flush(10.0 * turn + 8.0)
    assert player.replies[0].version == 16
    # Its round took a hundred seconds, of which 15 % would have room for worker 0, that comes at 148 s.
    player.push(1, 140.0)
    assert player.flush(140.0)[1].version == 17


def test_a_worker_that_was_cut_off_goes_on_with_its_round() -> None:
    coordinator = make(workers=2)
    player = Player(coordinator)
    player.join_all(2)
    player.push(0, 1.0)
    player.flush(1.0)
    coordinator.leave(1, "s1", 2.0, "its connection ended")
    assert coordinator.live == [0]
    assert "not a live one" in (coordinator.join(hello(1, "another", rejoining=True), 2.5) or "")
    assert coordinator.join(hello(1, rejoining=True), 3.0) is None
    assert player.flush(3.0) == {}, "it hands in its round before it is dispatched again"
    player.push(1, 4.0)
    assert player.flush(4.0)[1].refused is None
    assert coordinator.totals[1].rounds == 1
    assert coordinator.model.workers == 2


def test_a_loss_after_the_end_leaves_the_final_model_alone() -> None:
    coordinator = make(workers=3, total=50, local_steps=10)
    player = Player(coordinator)
    player.join_all(3)
    now = 0.0
    while not coordinator.finished:
        now += 1.0
        worker = next(n for n in coordinator.live if coordinator._members[n].state == "computing")
        player.push(worker, now)
        player.flush(now)
    final = coordinator.model.theta.clone()
    coordinator.leave(2, "s2", now + 1, "goodbye")
    assert torch.equal(coordinator.model.theta, final)


# ---------------------------------------------------------------- data leases


def ask(coordinator: Coordinator, worker: int, number: int, session: str | None = None) -> Lease:
    return coordinator.lease(LeaseRequest(worker, session or f"s{worker}", number, "0", 40, 1, 0, False))


def free(coordinator: Coordinator) -> list[list[int]]:
    found: list[list[int]] = coordinator.state_dict()["leases"]["0"]["free"]
    return found


def test_items_count_when_their_push_is_settled_and_are_free_again_when_it_is_refused() -> None:
    coordinator = make(workers=1)
    player = Player(coordinator)
    player.join_all(1)
    assert ask(coordinator, 0, 1) == Lease(1, 0, 0, 10, None)
    push = player.push(0, 1.0, used='{"0":3}')
    player.flush(1.0)
    assert free(coordinator) == [[0, 3, 40]]
    assert coordinator.push(push, torch.ones(LAYOUT.numel), 1.5) is None
    assert player.flush(1.5)[0].refused == ALREADY_APPLIED
    assert free(coordinator) == [[0, 3, 40]]
    player.push(0, 2.0, torch.full((LAYOUT.numel,), float("nan")), used='{"0":5}')
    assert player.flush(2.0)[0].refused.startswith(NOT_FINITE)
    assert free(coordinator) == [[0, 5, 40]]
    # A round that is refused is lost with what was learnt from its items: they are for others, and it goes on.
    player.push(0, 3.0, base_version=77, used='{"0":8}')
    player.flush(3.0)
    assert ask(coordinator, 0, 2).start == 5
    player.push(0, 4.0, used='{"0":10}')
    assert player.flush(4.0)[0].refused is None
    assert free(coordinator) == [[0, 5, 8], [0, 10, 40]]


@pytest.mark.parametrize("used", ['{"0":11}', '{"1":1}', "{", "[1]", '{"0":-1}'])
def test_a_push_that_claims_other_items_than_its_worker_was_leased_is_refused(used: str) -> None:
    coordinator = make(workers=1)
    player = Player(coordinator)
    player.join_all(1)
    ask(coordinator, 0, 1)
    player.push(0, 1.0, used=used)
    assert "items" in (player.flush(1.0)[0].refused or "")
    assert coordinator.model.version == 0
    assert free(coordinator) == [[0, 0, 40]]
    player.push(0, 2.0, used='{"0":10}')
    assert player.flush(2.0)[0].refused is None
    assert free(coordinator) == [[0, 10, 40]]


def test_leases_of_a_session_end_with_it() -> None:
    coordinator = make(workers=2)
    player = Player(coordinator)
    player.join_all(2)
    ask(coordinator, 0, 1)
    assert coordinator.join(hello(0, "newer"), 1.0) is None
    player.flush(1.0)
    assert "not a live one" in (ask(coordinator, 0, 2).refused or "")
    assert "not a live one" in (ask(coordinator, 7, 1).refused or "")
    player.push(0, 2.0, used='{"0":2}')
    assert free(coordinator) == [[0, 0, 40]]
    # The newer session counts its requests and its items from the beginning.
    first = ask(coordinator, 0, 1, "newer")
    assert first.refused is None
    player.sequences[0] = 0
    player.push(0, 3.0, session="newer", used=json.dumps({"0": first.stop - first.start}))
    assert player.flush(3.0)[0].refused is None


def test_a_worker_whose_connection_was_lost_asks_on_and_comes_back_with_its_items() -> None:
    coordinator = make(workers=2)
    player = Player(coordinator)
    player.join_all(2)
    first = ask(coordinator, 0, 1)
    coordinator.leave(0, "s0", 1.0, "its connection ended")
    second = ask(coordinator, 0, 2)
    assert second.refused is None
    assert coordinator.join(hello(0, rejoining=True), 2.0) is None
    count = first.stop - first.start + second.stop - second.start
    player.push(0, 3.0, used=json.dumps({"0": count}))
    assert player.flush(3.0)[0].refused is None
    assert sum(stop - start for _, start, stop in free(coordinator)) == 40 - count


def test_a_worker_that_comes_back_too_late_is_refused_one_round_and_goes_on() -> None:
    coordinator = make(workers=2)
    player = Player(coordinator)
    player.join_all(2)
    ask(coordinator, 0, 1)
    coordinator.leave(0, "s0", 1.0, "its connection ended")
    count, number = 0, 0
    while True:
        number += 1
        lease = ask(coordinator, 1, number)
        if lease.start == lease.stop:
            break
        count += lease.stop - lease.start
    assert count == 40
    assert coordinator.join(hello(0, rejoining=True), 2.0) is None
    player.push(0, 3.0, used='{"0":5}')
    assert "went to others" in (player.flush(3.0)[0].refused or "")
    player.push(1, 4.0, used='{"0":40}')
    assert player.flush(4.0)[1].refused is None
    assert free(coordinator) == []
    player.push(0, 5.0)
    assert player.flush(5.0)[0].refused is None


def test_positions_in_the_data_are_saved_and_may_be_missing() -> None:
    coordinator = make(workers=1)
    player = Player(coordinator)
    player.join_all(1)
    ask(coordinator, 0, 1)
    player.push(0, 1.0, used='{"0":4}')
    state = coordinator.state_dict()
    later = make(workers=1)
    later.load_state_dict(state)
    Player(later).join_all(1)
    assert ask(later, 0, 1).start == 4
    del state["leases"]
    without = make(workers=1)
    without.load_state_dict(state)
    Player(without).join_all(1)
    assert ask(without, 0, 1).start == 0
