"""Workers that come, go, come back, stay away or are sent away, by a coordinator with no clock and no thread."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightning_async_localsgd import attendance
from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.guard import FACTOR, UpdateGuard
from lightning_async_localsgd.messages import ALREADY_APPLIED, NOT_FINITE, Push
from lightning_async_localsgd.objections import TOO_LATE
from lightning_async_localsgd.records import FORMER, Settled, WorkerTotals
from tests.unit.test_coordinator import LAYOUT, Player, ask, free, hello, make

NAN = torch.full((LAYOUT.numel,), float("nan"))


def started(workers: int = 2, **options: object) -> tuple[Coordinator, Player]:
    coordinator = make(workers, **options)  # type: ignore[arg-type]
    player = Player(coordinator)
    player.join_all(workers)
    return coordinator, player


def finished() -> tuple[Coordinator, Player, Push]:
    """Worker 1 is gone with a round of its own, the others have come to the end."""
    coordinator, player = started(workers=2, total=20)
    coordinator.leave(1, "s1", 1.0, "silent")
    player.push(0, 2.0)
    assert player.flush(2.0)[0].local_steps == 10
    last = player.push(0, 3.0)
    assert player.flush(3.0)[0].stop
    assert coordinator.finished
    return coordinator, player, last


# ---------------------------------------------------------------- coming and going


def test_strangers_get_numbers_of_their_own_which_outlive_the_server() -> None:
    coordinator, _ = started(workers=3)
    assert [coordinator.attendance.new_number() for _ in range(3)] == [3, 4, 5]
    later = make(workers=2)
    later.load_state_dict(coordinator.state_dict())
    assert later.attendance.new_number() == 6
    # Of a state that says nothing of numbers, those that have done something are taken.
    state = coordinator.state_dict()
    del state["next_number"]
    later = make(workers=2)
    later.load_state_dict(state)
    assert later.attendance.new_number() == 3


@pytest.mark.parametrize("worker", [-1, 2, 1000])
def test_a_number_that_nobody_was_given_is_refused_with_the_way_in(worker: int) -> None:
    coordinator, _ = started(workers=2)
    assert "ASYNC_LOCALSGD_JOIN" in (coordinator.join(hello(worker), 1.0) or "")
    assert "no worker" in (coordinator.attendance.refuses(worker) or "")
    assert coordinator.live == [0, 1]


def test_a_stranger_takes_part_like_everybody_else() -> None:
    coordinator, player = started(workers=2, grace=5.0, total=100)
    worker = coordinator.attendance.new_number()
    assert coordinator.join(hello(worker), 1.0) is None
    assert player.flush(1.0)[worker].local_steps == 10
    assert coordinator.model.workers == 3
    first = ask(coordinator, worker, 1)
    assert first.start < first.stop
    player.push(0, 10.0)
    assert player.flush(10.0) == {}, "the window is open for the stranger, too"
    player.push(1, 11.0)
    assert player.flush(11.0) == {}
    player.push(worker, 12.0, used=f'{{"0":{first.stop - first.start}}}', timed_steps=10, compute_seconds=1.0)
    assert set(player.flush(12.0)) == {0, 1, 2}
    assert coordinator.totals[worker].rounds == 1
    coordinator.leave(worker, f"s{worker}", 13.0, "it said goodbye")
    assert coordinator.model.workers == 2
    state = coordinator.state_dict()
    later = make(workers=2, total=100)
    later.load_state_dict(state)
    assert later.totals[worker].rounds == 1
    assert later.budget.done == 30


def test_strangers_who_come_before_the_start_do_not_start_it() -> None:
    coordinator = make(workers=2)
    player = Player(coordinator)
    coordinator.join(hello(0), 0.0)
    worker = coordinator.attendance.new_number()
    assert coordinator.join(hello(worker), 0.0) is None
    assert coordinator.missing == [1]
    assert player.flush(0.0) == {}
    coordinator.join(hello(1), 1.0)
    assert set(player.flush(1.0)) == {0, 1, 2}


def test_of_strangers_who_left_long_ago_only_the_sum_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "MOST_STRANGERS", 3)
    coordinator, player = started(workers=1, total=None)
    for _ in range(10):
        worker = coordinator.attendance.new_number()
        coordinator.join(hello(worker), 1.0)
        player.flush(1.0)
        lease = ask(coordinator, worker, 1)
        used = f'{{"0":{lease.stop - lease.start}}}' if lease.stop > lease.start else ""
        player.push(worker, 2.0, used=used, inner="worker-1.pt", timed_steps=1, compute_seconds=1.0)
        player.flush(2.0)
        coordinator.leave(worker, f"s{worker}", 3.0, "goodbye")
    state = coordinator.state_dict()
    assert sorted(state["workers"], key=int) == [str(FORMER), "0", "8", "9", "10"]
    assert coordinator.totals[FORMER].rounds == coordinator.totals[FORMER].sessions == 7
    assert coordinator.totals[FORMER].steps == 70
    assert sorted(state["inner_states"]) == ["10", "8", "9"]
    assert sorted(state["pacing"]["speeds"]) == ["10", "8", "9"]
    assert coordinator.attendance.departed == {8, 9, 10}
    assert "not a live one" in (coordinator.join(hello(1, rejoining=True), 4.0) or "")
    later = make(workers=1)
    later.load_state_dict(state)
    assert later.totals[FORMER] == coordinator.totals[FORMER]
    assert later.attendance.new_number() == 11


def test_totals_add_up() -> None:
    total = WorkerTotals(1, 2, 3, 4, 5.0, 6.0, 7.0, 8, 9, 10)
    total.add(total)
    assert total == WorkerTotals(2, 4, 6, 8, 10.0, 12.0, 14.0, 16, 18, 20)


def test_whoever_comes_back_goes_on_with_its_round_and_its_steps() -> None:
    coordinator, player = started(workers=2, total=25)
    coordinator.leave(1, "s1", 1.0, "silent")
    assert coordinator.model.workers == 1
    assert coordinator.revive(1, "s1", 60.0)
    assert coordinator.revive(1, "s1", 60.0)
    assert not coordinator.revive(1, "another", 60.0)
    assert coordinator.model.workers == 2
    player.push(0, 61.0)
    assert player.flush(61.0)[0].local_steps == 5, "worker 1 has its ten steps again"
    player.push(1, 62.0)
    assert player.flush(62.0) == {}, "all that is left is in worker 0's hands"
    player.push(0, 63.0)
    assert {reply.refused for reply in player.flush(63.0).values()} == {None}
    assert coordinator.budget.done == 25
    assert coordinator.totals[1].departures == 1
    assert coordinator.totals[1].sessions == 1


def test_a_push_alone_brings_its_session_back() -> None:
    coordinator, player = started()
    coordinator.leave(1, "s1", 1.0, "silent")
    player.push(1, 3600.0)
    assert player.refused is None
    assert player.flush(3600.0)[1].refused is None
    assert coordinator.live == [0, 1]


def test_whoever_waited_for_an_answer_gets_it_when_it_comes_back() -> None:
    coordinator, player = started(workers=3, grace=50.0)
    push = player.push(1, 1.0)
    coordinator.leave(1, "s1", 2.0, "silent")
    assert player.flush(2.0) == {}
    assert coordinator.revive(1, "s1", 3.0)
    assert player.flush(3.0)[1].sequence == 1
    # Nobody knows whether that has reached it.
    assert coordinator.push(push, torch.ones(LAYOUT.numel), 4.0) is None
    assert player.flush(4.0)[1].refused == ALREADY_APPLIED
    assert coordinator.model.version == 1


def test_a_session_whose_place_was_taken_never_comes_back() -> None:
    coordinator, player = started()
    coordinator.leave(1, "s1", 1.0, "silent")
    assert coordinator.join(hello(1, "newer"), 2.0) is None
    player.flush(2.0)
    assert not coordinator.revive(1, "s1", 3.0)
    for rejoining in (True, False):
        assert "newer session" in (coordinator.join(hello(1, rejoining=rejoining), 3.0) or "")
    player.push(1, 3.0)
    assert "newer session" in (player.refused or "")
    assert coordinator.session_of(1) == "newer"
    assert coordinator.view().refusals == {"session": 1}


def test_a_second_answer_may_come_after_the_first_has_arrived() -> None:
    coordinator, player = started()
    push = player.push(0, 1.0)
    player.flush(1.0)
    reply = player.replies[0]
    player.push(1, 2.0)
    player.flush(2.0)
    assert coordinator.push(push, torch.ones(LAYOUT.numel), 3.0) is None
    assert player.flush(3.0)[0].version == 2
    player.replies[0] = reply
    player.push(0, 4.0)
    assert player.flush(4.0)[0].refused is None
    assert coordinator.model.version == 3


def test_a_worker_that_hands_in_twice_without_an_answer_in_between_is_refused() -> None:
    coordinator, player = started(grace=50.0)
    player.push(0, 1.0)
    assert player.flush(1.0) == {}
    player.push(0, 2.0)
    player.push(1, 3.0)
    assert "not this worker's last dispatch" in (player.flush(3.0)[0].refused or "")
    assert coordinator.model.version == 2


def test_an_old_push_disturbs_nothing() -> None:
    coordinator, player = started()
    old = player.push(0, 1.0)
    player.flush(1.0)
    player.push(0, 2.0)
    player.flush(2.0)
    assert coordinator.push(old, torch.ones(LAYOUT.numel), 3.0) is None
    assert player.flush(3.0) == {}
    player.push(0, 4.0)
    assert player.flush(4.0)[0].refused is None


# ---------------------------------------------------------------------- the end


def test_whoever_comes_back_after_the_end_goes_home_with_the_final_model() -> None:
    coordinator, player, _ = finished()
    theta = coordinator.model.theta.clone()
    assert coordinator.revive(1, "s1", 3600.0)
    assert coordinator.wanted() == {1: 0}, "it need not finish its round first"
    player.push(1, 3601.0)
    reply = player.flush(3601.0)[1]
    assert (reply.stop, reply.version, reply.refused) == (True, 2, TOO_LATE.text)
    assert torch.equal(coordinator.model.theta, theta)
    assert coordinator.budget.done == 20


def test_the_final_model_is_given_again_to_whom_it_did_not_reach() -> None:
    coordinator, player, last = finished()
    coordinator.leave(0, "s0", 4.0, "its connection ended")
    assert coordinator.join(hello(0, rejoining=True), 5.0) is None
    assert coordinator.push(last, torch.ones(LAYOUT.numel), 5.0) is None
    reply = player.flush(5.0)[0]
    assert (reply.stop, reply.version, reply.refused) == (True, 2, ALREADY_APPLIED)
    assert "too late" in (coordinator.join(hello(0, "newer"), 6.0) or "")


def test_steps_that_were_not_taken_go_to_those_who_rest() -> None:
    coordinator, player = started(workers=2, total=20)
    player.push(0, 1.0)
    assert player.flush(1.0) == {}
    player.push(1, 2.0, steps=4, final=True)
    assert player.flush(2.0)[0].local_steps == 6
    player.push(0, 3.0)
    assert {reply.stop for reply in player.flush(3.0).values()} == {True}
    assert coordinator.budget.done == 20


# ----------------------------------------------------------------- exactly once


def test_a_push_that_was_refused_is_refused_again_for_the_same_reason() -> None:
    coordinator, player = started()
    push = player.push(0, 1.0, NAN)
    assert player.flush(1.0)[0].refused.startswith(NOT_FINITE)
    for now in (2.0, 3.0):
        assert coordinator.push(push, NAN, now) is None
        assert player.flush(now)[0].refused.startswith(NOT_FINITE)
    assert coordinator.view().refusals == {"not_finite": 1}


def test_a_push_of_an_older_incarnation_is_refused_though_its_version_has_come_round() -> None:
    first, player = started()
    state = first.state_dict()
    player.push(0, 1.0)
    player.flush(1.0)
    lost = player.push(0, 2.0)  # On version 1, of a timeline that ends here.
    second = make(workers=2)
    second.incarnation = "that"
    second.load_state_dict(state)
    later = Player(second)
    later.join_all(2)
    later.push(1, 1.0)
    later.flush(1.0)
    assert second.model.version == lost.base_version == 1
    theta = second.model.theta.clone()
    stale = dataclasses.replace(lost, sequence=1)
    assert second.push(stale, torch.ones(LAYOUT.numel), 2.0) is None
    assert "another incarnation" in (later.flush(2.0)[0].refused or "")
    assert torch.equal(second.model.theta, theta)
    assert second.view().refusals == {"incarnation": 1}


def test_every_push_is_told_of_with_what_became_of_it() -> None:
    told: list[Settled] = []
    coordinator, player = started()
    coordinator.on_settled = told.append
    player.push(0, 1.5)
    player.flush(1.5)
    push = player.push(1, 2.5, NAN)
    coordinator.leave(1, "s1", 3.0, "test")
    coordinator.join(hello(1, "newer"), 3.0)
    coordinator.push(push, NAN, 3.5)
    assert told[0] == Settled(0, "s0", 1, "this", 0, 1, 10, 0, None, 1.5)
    assert told[1] == Settled(1, "s1", 1, "this", 0, 1, 10, 0, f"{NOT_FINITE} in parameter 'weight'", 2.5)
    assert [settled.seconds for settled in told] == [1.5, 2.5, 3.5]
    assert "not a live one" in (told[2].refused or "")


def test_refusals_are_counted_by_kind_in_a_fixed_amount_of_memory() -> None:
    coordinator, player = started(total=None)
    for now in range(1, 200):
        player.push(0, float(now), base_version=1000 + now)
        player.flush(float(now))
    assert coordinator.view().refusals == {"base": 199}
    assert coordinator.view().refused_pushes == coordinator.totals[0].refused == 199


# -------------------------------------------------------------------- quarantine


def test_a_worker_that_offends_again_and_again_is_sent_away_for_good(caplog: pytest.LogCaptureFixture) -> None:
    coordinator, player = started(workers=3, total=None)
    lease = ask(coordinator, 1, 1)
    for now in range(1, 5):
        player.push(1, float(now), NAN)
        assert player.flush(float(now))[1].refused.startswith(NOT_FINITE)
    player.push(1, 5.0)
    assert player.flush(5.0)[1].refused is None
    push = player.push(1, 6.0, NAN)
    reason = player.refused or ""
    assert "worker 1 is quarantined for the rest of the run: 5 of its last 6 pushes were refused" in reason
    assert NOT_FINITE in reason
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [reason]
    assert coordinator.live == [0, 2]
    assert coordinator.model.workers == 2
    assert coordinator.view().quarantined == {1}
    assert free(coordinator) == [[0, 0, 40]], f"others get {lease}"
    # Neither this session nor any later one has a part in the run.
    assert coordinator.push(push, NAN, 7.0) == reason
    assert not coordinator.revive(1, "s1", 7.0)
    assert [coordinator.join(hello(1, name), 7.0) for name in ("s1", "newer")] == [reason, reason]
    assert coordinator.attendance.refuses(1) == reason
    assert ask(coordinator, 1, 2).refused == reason
    player.push(0, 8.0)
    assert player.flush(8.0)[0].refused is None


def test_a_quarantined_worker_is_waited_for_by_nobody() -> None:
    coordinator, player = started(workers=2, total=60)
    for now in range(1, 5):
        player.push(1, float(now), NAN)
        player.flush(float(now))
    player.push(0, 5.0)
    assert player.flush(5.0) == {}, "the rest of the budget is in worker 1's hands"
    player.push(1, 6.0, torch.ones(1))
    assert "quarantined" in (player.refused or "")
    assert player.flush(6.0)[0].local_steps == 10
    player.push(0, 7.0)
    assert player.flush(7.0)[0].stop
    assert coordinator.budget.done == 60


def test_the_worker_beside_the_server_begins_anew_instead(caplog: pytest.LogCaptureFixture) -> None:
    coordinator, player = started(workers=2, total=None)
    for now in range(1, 5):
        player.push(0, float(now), NAN)
        assert not player.flush(float(now))[0].renew
    player.push(0, 5.0, NAN)
    reply = player.flush(5.0)[0]
    assert (reply.renew, reply.refused.startswith(NOT_FINITE)) == (True, True)
    assert player.refused is None
    [error] = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "worker 0: 5 of its last 5 pushes were refused" in error
    assert "its optimizer begins anew" in error
    assert coordinator.live == [0, 1]
    assert coordinator.view().quarantined == frozenset()
    player.push(0, 6.0)
    reply = player.flush(6.0)[0]
    assert (reply.renew, reply.refused) == (False, None)
    # It is judged like any other, and with nobody else there the run has come to its end.
    coordinator.leave(1, "s1", 7.0, "gone")
    for now in range(8, 13):
        player.push(0, float(now), NAN)
        player.flush(float(now))
    assert "worker 0 is quarantined for the rest of the run: 5 of its last 6 pushes" in (player.refused or "")


def test_a_norm_that_is_too_large_is_refused_and_told() -> None:
    coordinator, player = started()
    coordinator._guard = UpdateGuard(10.0)
    player.push(0, 1.0, torch.full((LAYOUT.numel,), 100.0))
    assert "max_update_norm=10" in (player.flush(1.0)[0].refused or "")
    assert coordinator.view().refusals == {"norm": 1}
    assert coordinator.model.version == 0
    assert coordinator.view().update_norm is None
    assert coordinator.budget.done == 10, "a run must come to its end"


def test_the_guard_goes_on_after_a_restart_and_the_quarantine_does_not() -> None:
    coordinator, player = started(total=None)
    for now in range(1, 30):
        player.push(0, float(now))
        player.flush(float(now))
    for now in range(30, 35):
        player.push(1, float(now), NAN)
        player.flush(float(now))
    state = coordinator.state_dict()
    later = make(total=None)
    later.load_state_dict(state)
    again = Player(later)
    again.join_all(2)
    again.push(1, 1.0, torch.full((LAYOUT.numel,), 100 * FACTOR))
    assert f"more than {FACTOR:g} times" in (again.flush(1.0)[1].refused or "")
    assert later.view().quarantined == frozenset()


# ------------------------------------------------------------------ inner states


def test_the_names_of_saved_optimizer_states_are_kept() -> None:
    coordinator, player = started()
    player.push(0, 1.0, inner="worker-0-000001-aa.pt")
    player.push(1, 1.0, NAN, inner="worker-1-000001-bb.pt")
    player.flush(1.0)
    player.push(0, 2.0)
    player.flush(2.0)
    expected = {0: "worker-0-000001-aa.pt", 1: "worker-1-000001-bb.pt"}
    assert coordinator.attendance.inner_states == expected
    later = make()
    later.load_state_dict(coordinator.state_dict())
    assert later.attendance.inner_states == expected


@pytest.mark.parametrize("name", ["../worker.pt", "a/b", "..", ".hidden", "a\\b", "a\0b", "x" * 256])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    coordinator, player = started()
    player.push(0, 1.0, inner=name)
    assert "no name of a file" in (player.flush(1.0)[0].refused or "")
    assert coordinator.attendance.inner_states == {}
