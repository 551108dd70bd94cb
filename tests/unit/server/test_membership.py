"""Workers that join, leave, come back, stay away or are quarantined."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.policies.guard import REFUSE_ABOVE, UpdateGuard
from lightning_async_localsgd.protocol.messages import ALREADY_APPLIED, NOT_FINITE, Push
from lightning_async_localsgd.protocol.rejections import TOO_LATE
from lightning_async_localsgd.protocol.traits import WorkerTraits, shuffle_digest
from lightning_async_localsgd.server import membership as membership
from lightning_async_localsgd.server.coordinator import Coordinator
from lightning_async_localsgd.server.run_stats import FORMER, PushOutcome, WorkerTotals
from tests.harness import LAYOUT, Workers, hello, make_coordinator
from tests.observing import RecordingObserver
from tests.unit.server.test_leases import ask, free

NAN = torch.full((LAYOUT.numel,), float("nan"))


def started(workers: int = 2, **options: object) -> tuple[Coordinator, Workers]:
    coordinator = make_coordinator(workers, **options)  # type: ignore[arg-type]
    player = Workers(coordinator)
    player.join_all(workers)
    return coordinator, player


def finished() -> tuple[Coordinator, Workers, Push]:
    """Worker 1 is gone with a round of its own, the others have come to the end."""
    coordinator, workers = started(workers=2, total=20)
    coordinator.leave(1, "s1", 1.0, "silent")
    workers.send(0, 2.0)
    assert workers.dispatch(2.0)[0].local_steps == 10
    last = workers.send(0, 3.0)
    assert workers.dispatch(3.0)[0].stop
    assert coordinator.finished
    return coordinator, workers, last


# ---------------------------------------------------------------- coming and going


def test_late_joiners_get_unique_numbers_also_after_a_restart_of_the_server() -> None:
    coordinator, _ = started(workers=3)
    assert [coordinator.membership.new_number(0.0) for _ in range(3)] == [3, 4, 5]
    later = make_coordinator(workers=2)
    later.load_state_dict(coordinator.state_dict())
    assert later.membership.new_number(0.0) == 6
    # Of a state that says nothing of numbers, those that have done something are taken.
    state = coordinator.state_dict()
    del state["next_number"]
    later = make_coordinator(workers=2)
    later.load_state_dict(state)
    assert later.membership.new_number(0.0) == 3


def test_traits_are_those_of_the_latest_session_and_outlive_it() -> None:
    coordinator, workers = started(workers=2)
    coordinator.join(hello(1, "another", device="cpu", precision="32-true"), 1.0)
    assert coordinator.membership.new_number(1.0) == 2
    coordinator.join(hello(2, "late", device="NVIDIA H200", precision="bf16-mixed"), 1.0)
    coordinator.leave(2, "late", 2.0, "silent")
    seen = coordinator.snapshot().traits
    assert seen == {
        0: WorkerTraits(), 1: WorkerTraits("cpu", "32-true"), 2: WorkerTraits("NVIDIA H200", "bf16-mixed")
    }  # fmt: skip
    later = make_coordinator(workers=2)
    later.load_state_dict(coordinator.state_dict())
    assert later.snapshot().traits == seen
    workers.join(1, 3.0)
    assert coordinator.snapshot().traits[1] == WorkerTraits()
    assert seen[1].device == "cpu", "a snapshot does not change"


def test_worker_that_shuffles_in_another_order_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    coordinator = make_coordinator(workers=2)
    coordinator.join(hello(0, shuffle=shuffle_digest()), 0.0)
    assert not caplog.text
    coordinator.join(hello(1, software="torch 1.0", system="macOS 14.5 arm64", shuffle="another"), 0.0)
    assert "worker 1 (torch 1.0, macOS 14.5 arm64) shuffles in another order than rank 0" in caplog.text


@pytest.mark.parametrize("worker", [-1, 2, 1000])
def test_unknown_number_is_refused_with_the_way_to_join(worker: int) -> None:
    coordinator, _ = started(workers=2)
    assert "ASYNC_LOCALSGD_JOIN" in (coordinator.join(hello(worker), 1.0) or "")
    assert "no worker" in (coordinator.membership.check_number(worker) or "")
    assert coordinator.live == [0, 1]


def test_late_joiner_takes_part_like_initial_workers() -> None:
    coordinator, workers = started(workers=2, grace=5.0, total=100)
    worker = coordinator.membership.new_number(0.0)
    assert coordinator.join(hello(worker), 1.0) is None
    assert workers.dispatch(1.0)[worker].local_steps == 10
    assert coordinator.model.workers == 3
    first = ask(coordinator, worker, 1)
    assert first.start < first.stop
    workers.send(0, 10.0)
    assert workers.dispatch(10.0) == {}, "the window is open for the late joiner, too"
    workers.send(1, 11.0)
    assert workers.dispatch(11.0) == {}
    workers.send(worker, 12.0, items_used=f'{{"0":{first.stop - first.start}}}', timed_steps=10, compute_seconds=1.0)
    assert set(workers.dispatch(12.0)) == {0, 1, 2}
    assert coordinator.totals[worker].rounds == 1
    coordinator.leave(worker, f"s{worker}", 13.0, "it said goodbye")
    assert coordinator.model.workers == 2
    state = coordinator.state_dict()
    later = make_coordinator(workers=2, total=100)
    later.load_state_dict(state)
    assert later.totals[worker].rounds == 1
    assert later.budget.done == 30


def test_late_joiner_before_the_start_does_not_start_the_run() -> None:
    coordinator = make_coordinator(workers=2)
    workers = Workers(coordinator)
    coordinator.join(hello(0), 0.0)
    worker = coordinator.membership.new_number(0.0)
    assert coordinator.join(hello(worker), 0.0) is None
    assert coordinator.membership.missing == [1]
    assert workers.dispatch(0.0) == {}
    coordinator.join(hello(1), 1.0)
    assert set(workers.dispatch(1.0)) == {0, 1, 2}


def test_only_the_sum_of_totals_is_kept_of_late_joiners_that_left_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MAX_LATE_JOINERS", 3)
    coordinator, workers = started(workers=1, total=None)
    for _ in range(10):
        worker = coordinator.membership.new_number(0.0)
        coordinator.join(hello(worker), 1.0)
        workers.dispatch(1.0)
        lease = ask(coordinator, worker, 1)
        used = f'{{"0":{lease.stop - lease.start}}}' if lease.stop > lease.start else ""
        workers.send(worker, 2.0, items_used=used, optimizer_file="worker-1.pt", timed_steps=1, compute_seconds=1.0)
        workers.dispatch(2.0)
        coordinator.leave(worker, f"s{worker}", 3.0, "goodbye")
    state = coordinator.state_dict()
    assert sorted(state["workers"], key=int) == [str(FORMER), "0", "8", "9", "10"]
    assert coordinator.totals[FORMER].rounds == coordinator.totals[FORMER].sessions == 7
    assert coordinator.totals[FORMER].steps == 70
    assert sorted(state["optimizer_files"]) == ["10", "8", "9"]
    assert sorted(state["pacing"]["speeds"]) == ["10", "8", "9"]
    assert coordinator.membership.departed == {8, 9, 10}
    assert "is not active" in (coordinator.join(hello(1, reconnecting=True), 4.0) or "")
    later = make_coordinator(workers=1)
    later.load_state_dict(state)
    assert later.totals[FORMER] == coordinator.totals[FORMER]
    assert later.membership.new_number(0.0) == 11


def test_totals_add_up() -> None:
    total = WorkerTotals(1, 2, 3, 4, 5.0, 6.0, 7.0, 8, 9, 10)
    total.add(total)
    assert total == WorkerTotals(2, 4, 6, 8, 10.0, 12.0, 14.0, 16, 18, 20)


def test_worker_that_comes_back_continues_its_round_with_its_steps() -> None:
    coordinator, workers = started(workers=2, total=25)
    coordinator.leave(1, "s1", 1.0, "silent")
    assert coordinator.model.workers == 1
    assert coordinator.revive(1, "s1", 60.0)
    assert coordinator.revive(1, "s1", 60.0)
    assert not coordinator.revive(1, "another", 60.0)
    assert coordinator.model.workers == 2
    workers.send(0, 61.0)
    assert workers.dispatch(61.0)[0].local_steps == 5, "worker 1 has its ten steps again"
    workers.send(1, 62.0)
    assert workers.dispatch(62.0) == {}, "all that is left is in worker 0's hands"
    workers.send(0, 63.0)
    assert {reply.refused for reply in workers.dispatch(63.0).values()} == {None}
    assert coordinator.budget.done == 25
    assert coordinator.totals[1].departures == 1
    assert coordinator.totals[1].sessions == 1


def test_push_brings_its_departed_session_back() -> None:
    coordinator, workers = started()
    coordinator.leave(1, "s1", 1.0, "silent")
    workers.send(1, 3600.0)
    assert workers.refused is None
    assert workers.dispatch(3600.0)[1].refused is None
    assert coordinator.live == [0, 1]


def test_waiting_worker_gets_its_answer_when_it_comes_back() -> None:
    coordinator, workers = started(workers=3, grace=50.0)
    push = workers.send(1, 1.0)
    coordinator.leave(1, "s1", 2.0, "silent")
    assert workers.dispatch(2.0) == {}
    assert coordinator.revive(1, "s1", 3.0)
    assert workers.dispatch(3.0)[1].sequence == 1
    # The reply may have reached the worker or not.
    assert coordinator.push(push, torch.ones(LAYOUT.numel), 4.0) is None
    assert workers.dispatch(4.0)[1].refused == ALREADY_APPLIED
    assert coordinator.model.version == 1


def test_replaced_session_never_comes_back() -> None:
    coordinator, workers = started()
    coordinator.leave(1, "s1", 1.0, "silent")
    assert coordinator.join(hello(1, "newer"), 2.0) is None
    workers.dispatch(2.0)
    assert not coordinator.revive(1, "s1", 3.0)
    for reconnecting in (True, False):
        assert "newer session" in (coordinator.join(hello(1, reconnecting=reconnecting), 3.0) or "")
    workers.send(1, 3.0)
    assert "newer session" in (workers.refused or "")
    assert coordinator.session_of(1) == "newer"
    assert coordinator.snapshot().refusals == {"session": 1}


def test_second_reply_may_follow_a_received_one() -> None:
    coordinator, workers = started()
    push = workers.send(0, 1.0)
    workers.dispatch(1.0)
    reply = workers.replies[0]
    workers.send(1, 2.0)
    workers.dispatch(2.0)
    assert coordinator.push(push, torch.ones(LAYOUT.numel), 3.0) is None
    assert workers.dispatch(3.0)[0].version == 2
    workers.replies[0] = reply
    workers.send(0, 4.0)
    assert workers.dispatch(4.0)[0].refused is None
    assert coordinator.model.version == 3


def test_second_push_without_an_answer_in_between_is_refused() -> None:
    coordinator, workers = started(grace=50.0)
    workers.send(0, 1.0)
    assert workers.dispatch(1.0) == {}
    workers.send(0, 2.0)
    workers.send(1, 3.0)
    assert "not this worker's last dispatch" in (workers.dispatch(3.0)[0].refused or "")
    assert coordinator.model.version == 2


def test_old_push_changes_nothing() -> None:
    coordinator, workers = started()
    old = workers.send(0, 1.0)
    workers.dispatch(1.0)
    workers.send(0, 2.0)
    workers.dispatch(2.0)
    assert coordinator.push(old, torch.ones(LAYOUT.numel), 3.0) is None
    assert workers.dispatch(3.0) == {}
    workers.send(0, 4.0)
    assert workers.dispatch(4.0)[0].refused is None


# ---------------------------------------------------------------------- the end


def test_worker_that_comes_back_after_the_end_gets_the_final_model() -> None:
    coordinator, workers, _ = finished()
    theta = coordinator.model.theta.clone()
    assert coordinator.revive(1, "s1", 3600.0)
    assert coordinator.recalled() == {1: 0}, "it need not finish its round first"
    workers.send(1, 3601.0)
    reply = workers.dispatch(3601.0)[1]
    assert (reply.stop, reply.version, reply.refused) == (True, 2, TOO_LATE.text)
    assert torch.equal(coordinator.model.theta, theta)
    assert coordinator.budget.done == 20


def test_lost_final_model_is_sent_again() -> None:
    coordinator, workers, last = finished()
    coordinator.leave(0, "s0", 4.0, "its connection ended")
    assert coordinator.join(hello(0, reconnecting=True), 5.0) is None
    assert coordinator.push(last, torch.ones(LAYOUT.numel), 5.0) is None
    reply = workers.dispatch(5.0)[0]
    assert (reply.stop, reply.version, reply.refused) == (True, 2, ALREADY_APPLIED)
    assert "too late" in (coordinator.join(hello(0, "newer"), 6.0) or "")


def test_steps_that_were_not_taken_are_granted_to_resting_workers() -> None:
    coordinator, workers = started(workers=2, total=20)
    workers.send(0, 1.0)
    assert workers.dispatch(1.0) == {}
    workers.send(1, 2.0, steps=4, final=True)
    assert workers.dispatch(2.0)[0].local_steps == 6
    workers.send(0, 3.0)
    assert {reply.stop for reply in workers.dispatch(3.0).values()} == {True}
    assert coordinator.budget.done == 20


# ----------------------------------------------------------------- exactly once


def test_refused_push_is_refused_again_for_the_same_reason() -> None:
    coordinator, workers = started()
    push = workers.send(0, 1.0, NAN)
    assert workers.dispatch(1.0)[0].refused.startswith(NOT_FINITE)
    for now in (2.0, 3.0):
        assert coordinator.push(push, NAN, now) is None
        assert workers.dispatch(now)[0].refused.startswith(NOT_FINITE)
    assert coordinator.snapshot().refusals == {"not_finite": 1}


def test_push_of_an_older_incarnation_is_refused_even_if_its_version_exists_again() -> None:
    first, workers = started()
    state = first.state_dict()
    workers.send(0, 1.0)
    workers.dispatch(1.0)
    lost = workers.send(0, 2.0)  # On version 1, of a timeline that ends here.
    second = make_coordinator(workers=2, incarnation="that")
    second.load_state_dict(state)
    later = Workers(second)
    later.join_all(2)
    later.push(1, 1.0)
    later.dispatch(1.0)
    assert second.model.version == lost.base_version == 1
    theta = second.model.theta.clone()
    stale = dataclasses.replace(lost, sequence=1)
    assert second.push(stale, torch.ones(LAYOUT.numel), 2.0) is None
    assert "another incarnation" in (later.dispatch(2.0)[0].refused or "")
    assert torch.equal(second.model.theta, theta)
    assert second.snapshot().refusals == {"incarnation": 1}


def test_observers_see_the_outcome_of_every_push() -> None:
    recorder = RecordingObserver()
    coordinator, workers = started()
    coordinator.observers.add([recorder])
    workers.send(0, 1.5)
    workers.dispatch(1.5)
    push = workers.send(1, 2.5, NAN)
    coordinator.leave(1, "s1", 3.0, "test")
    coordinator.join(hello(1, "newer"), 3.0)
    coordinator.push(push, NAN, 3.5)
    assert recorder.pushes[0] == PushOutcome(0, "s0", 1, "this", 0, 1, 10, 0, None, 1.5)
    assert recorder.pushes[1] == PushOutcome(
        1, "s1", 1, "this", 0, 1, 10, 0, f"{NOT_FINITE} in parameter 'weight'", 2.5
    )
    assert [push.seconds for push in recorder.pushes] == [1.5, 2.5, 3.5]
    assert "is not active" in (recorder.pushes[2].refused or "")


def test_refusals_are_counted_by_kind_in_a_fixed_amount_of_memory() -> None:
    coordinator, workers = started(total=None)
    for now in range(1, 200):
        workers.send(0, float(now), base_version=1000 + now)
        workers.dispatch(float(now))
    assert coordinator.snapshot().refusals == {"base": 199}
    assert coordinator.snapshot().refused_pushes == coordinator.totals[0].refused == 199


# -------------------------------------------------------------------- quarantine


def test_worker_with_too_many_strikes_is_quarantined(caplog: pytest.LogCaptureFixture) -> None:
    coordinator, workers = started(workers=3, total=None)
    lease = ask(coordinator, 1, 1)
    for now in range(1, 5):
        workers.send(1, float(now), NAN)
        assert workers.dispatch(float(now))[1].refused.startswith(NOT_FINITE)
    workers.send(1, 5.0)
    assert workers.dispatch(5.0)[1].refused is None
    push = workers.send(1, 6.0, NAN)
    reason = workers.refused or ""
    assert "worker 1 is quarantined for the rest of the run: 5 of its last 6 pushes were refused" in reason
    assert NOT_FINITE in reason
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [reason]
    assert coordinator.live == [0, 2]
    assert coordinator.model.workers == 2
    assert coordinator.snapshot().quarantined == {1}
    assert free(coordinator) == [[0, 0, 40]], f"others get {lease}"
    # Neither this session nor any later one has a part in the run.
    assert coordinator.push(push, NAN, 7.0) == reason
    assert not coordinator.revive(1, "s1", 7.0)
    assert [coordinator.join(hello(1, name), 7.0) for name in ("s1", "newer")] == [reason, reason]
    assert coordinator.membership.check_number(1) == reason
    assert ask(coordinator, 1, 2).refused == reason
    workers.send(0, 8.0)
    assert workers.dispatch(8.0)[0].refused is None


def test_no_worker_waits_for_a_quarantined_one() -> None:
    coordinator, workers = started(workers=2, total=60)
    for now in range(1, 5):
        workers.send(1, float(now), NAN)
        workers.dispatch(float(now))
    workers.send(0, 5.0)
    assert workers.dispatch(5.0) == {}, "the rest of the budget is in worker 1's hands"
    workers.send(1, 6.0, torch.ones(1))
    assert "quarantined" in (workers.refused or "")
    assert workers.dispatch(6.0)[0].local_steps == 10
    workers.send(0, 7.0)
    assert workers.dispatch(7.0)[0].stop
    assert coordinator.budget.done == 60


def test_optimizer_of_worker_0_is_reset_instead(caplog: pytest.LogCaptureFixture) -> None:
    coordinator, workers = started(workers=2, total=None)
    for now in range(1, 5):
        workers.send(0, float(now), NAN)
        assert not workers.dispatch(float(now))[0].reset_optimizer
    workers.send(0, 5.0, NAN)
    reply = workers.dispatch(5.0)[0]
    assert (reply.reset_optimizer, reply.refused.startswith(NOT_FINITE)) == (True, True)
    assert workers.refused is None
    [error] = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "worker 0: 5 of its last 5 pushes were refused" in error
    assert "Its optimizer is reset" in error
    assert coordinator.live == [0, 1]
    assert coordinator.snapshot().quarantined == frozenset()
    workers.send(0, 6.0)
    reply = workers.dispatch(6.0)[0]
    assert (reply.reset_optimizer, reply.refused) == (False, None)
    # It is judged like any other, and without other workers the run ends.
    coordinator.leave(1, "s1", 7.0, "gone")
    for now in range(8, 13):
        workers.send(0, float(now), NAN)
        workers.dispatch(float(now))
    assert "worker 0 is quarantined for the rest of the run: 5 of its last 6 pushes" in (workers.refused or "")


def test_norm_that_is_too_large_is_refused_and_reported() -> None:
    coordinator, workers = started()
    coordinator._guard = UpdateGuard(10.0)
    workers.send(0, 1.0, torch.full((LAYOUT.numel,), 100.0))
    assert "max_update_norm=10" in (workers.dispatch(1.0)[0].refused or "")
    assert coordinator.snapshot().refusals == {"norm": 1}
    assert coordinator.model.version == 0
    assert coordinator.snapshot().update_norm is None
    assert coordinator.budget.done == 10, "a run must come to its end"


def test_guard_outlives_a_restart_and_quarantines_do_not() -> None:
    coordinator, workers = started(total=None)
    for now in range(1, 30):
        workers.send(0, float(now))
        workers.dispatch(float(now))
    for now in range(30, 35):
        workers.send(1, float(now), NAN)
        workers.dispatch(float(now))
    state = coordinator.state_dict()
    later = make_coordinator(total=None)
    later.load_state_dict(state)
    again = Workers(later)
    again.join_all(2)
    again.send(1, 1.0, torch.full((LAYOUT.numel,), 10 * REFUSE_ABOVE))
    assert f"exceeds {REFUSE_ABOVE:g} times" in (again.dispatch(1.0)[1].refused or "")
    assert later.snapshot().quarantined == frozenset()


# --------------------------------------------------------------- optimizer files


def test_names_of_optimizer_files_are_kept() -> None:
    coordinator, workers = started()
    workers.send(0, 1.0, optimizer_file="worker-0-000001-aa.pt")
    workers.send(1, 1.0, NAN, optimizer_file="worker-1-000001-bb.pt")
    workers.dispatch(1.0)
    workers.send(0, 2.0)
    workers.dispatch(2.0)
    expected = {0: "worker-0-000001-aa.pt", 1: "worker-1-000001-bb.pt"}
    assert coordinator.membership.optimizer_files == expected
    later = make_coordinator()
    later.load_state_dict(coordinator.state_dict())
    assert later.membership.optimizer_files == expected


@pytest.mark.parametrize("name", ["../worker.pt", "a/b", "..", ".hidden", "a\\b", "a\0b", "x" * 256])
def test_file_name_outside_the_folder_is_refused(name: str) -> None:
    coordinator, workers = started()
    workers.send(0, 1.0, optimizer_file=name)
    assert "not a valid file name" in (workers.dispatch(1.0)[0].refused or "")
    assert coordinator.membership.optimizer_files == {}


# -------------------------------------------------------------------- expected workers


def test_run_begins_once_the_expected_workers_are_there() -> None:
    coordinator = make_coordinator(1, expected=3)
    workers = Workers(coordinator)
    membership = coordinator.membership
    first, second = membership.new_number(0.0), membership.new_number(0.0)
    assert workers.join(first, 0.0) == {}
    assert (membership.missing_count, membership.missing) == (2, [0])
    assert workers.join(0, 1.0) == {}, "every rank is there, but not every worker"
    assert workers.join(second, 2.0).keys() == {0, first, second}
    assert (membership.missing_count, coordinator.model.workers) == (0, 3)
    workers.leave(second, 3.0)
    assert membership.started, "later, the run goes on with those that are left"


def test_resumed_run_gives_expected_workers_their_numbers_again() -> None:
    coordinator = make_coordinator(1, expected=3)
    workers = Workers(coordinator)
    numbers = [coordinator.membership.new_number(0.0) for _ in range(2)]
    for worker in (0, *numbers):
        workers.join(worker, 0.0)
    late = coordinator.membership.new_number(0.0)
    assert (numbers, late) == ([1, 2], 3)
    resumed = make_coordinator(1, expected=3)
    resumed.load_state_dict(coordinator.state_dict())
    assert [resumed.membership.new_number(0.0) for _ in range(3)] == [1, 2, 4]


def test_attempts_to_join_that_fail_use_up_no_number_of_the_beginning() -> None:
    coordinator = make_coordinator(1, expected=3)
    workers, membership = Workers(coordinator), coordinator.membership
    assert [membership.new_number(now) for now in (0.0, 30.0, 31.0)] == [1, 2, 3], "1 and 2 may still set up"
    assert membership.new_number(70.0) == 1, "the first process did not join"
    workers.join(1, 75.0)
    workers.join(0, 75.0)
    assert membership.new_number(89.0) == 4
    assert membership.new_number(90.0) == 2
    assert workers.join(2, 95.0).keys() == {0, 1, 2}
    workers.leave(2, 100.0)
    assert membership.new_number(1000.0) == 5, "later workers have other numbers"


@given(st.lists(st.tuples(st.sampled_from(["ask", "join", "leave"]), st.floats(0.0, 40.0)), max_size=40))
def test_no_number_of_the_beginning_is_given_to_two_processes_within_a_minute(steps: list[tuple[str, float]]) -> None:
    coordinator = make_coordinator(2, expected=4)  # The ranks 0 and 1 never join, so training does not start.
    workers, membership = Workers(coordinator), coordinator.membership
    given_at: dict[int, float] = {}
    now = 0.0
    for step, seconds in steps:
        now += seconds
        if step == "ask":
            number = membership.new_number(now)
            assert number not in coordinator.live
            assert now - given_at.get(number, -math.inf) >= 60.0
            free = {n for n in (2, 3) if n not in coordinator.live and now - given_at.get(n, -math.inf) >= 60.0}
            assert number in free or not free
            given_at[number] = now
        elif step == "join" and given_at:
            workers.join(max(given_at, key=given_at.__getitem__), now)
        elif step == "leave" and coordinator.live:
            workers.leave(coordinator.live[0], now)


def test_worker_that_leaves_before_the_start_is_not_counted() -> None:
    coordinator = make_coordinator(1, expected=2)
    workers = Workers(coordinator)
    number = coordinator.membership.new_number(0.0)
    workers.join(number, 0.0)
    workers.leave(number, 1.0)
    assert workers.join(0, 2.0) == {}
    assert workers.join(coordinator.membership.new_number(0.0), 3.0).keys() == {0, 2}


def test_ranks_are_needed_even_if_as_many_others_have_joined() -> None:
    coordinator = make_coordinator(2, expected=3)
    workers = Workers(coordinator)
    for worker in (0, *(coordinator.membership.new_number(0.0) for _ in range(3))):
        assert workers.join(worker, 0.0) == {}
    assert coordinator.membership.missing_count == 1
    assert workers.join(1, 1.0).keys() == {0, 1, 2, 3, 4}


def test_worker_that_leaves_after_the_end_was_present() -> None:
    coordinator, workers = started(workers=2, total=20)
    workers.push(0, 1.0)
    assert {reply.stop for reply in workers.push(1, 2.0).values()} == {True}
    workers.leave(1, 3.0)
    assert coordinator.membership.stayed == {1}
    assert coordinator.totals[1].departures == 0
