"""Pauses for lack of workers: who is dispatched, what counts as waiting, and how a run ends in a pause."""

from __future__ import annotations

import pytest

from lightning_async_localsgd.policies.worker_minimum import WorkerMinimum
from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.exchange import ExchangeError, TooFewWorkersError
from lightning_async_localsgd.runtime.local_exchange import LocalExchange
from lightning_async_localsgd.server.merge_policy import MergePolicy
from lightning_async_localsgd.server.server import Server
from tests.harness import LAYOUT, Workers, hello, make_coordinator
from tests.unit.server.serving import RecordingChannel, join_all


def started(workers: int = 2, least: int = 2, **options: object) -> Workers:
    minimum = WorkerMinimum(least, timeout=60.0)
    player = Workers(make_coordinator(workers, minimum=minimum, **options))  # type: ignore[arg-type]
    player.join_all(workers)
    return player


def test_rounds_are_merged_in_a_pause_and_their_workers_wait() -> None:
    workers = started(3, 3)
    assert workers.leave(2, 1.0) == {}
    assert workers.coordinator.snapshot().paused
    assert workers.push(0, 5.0) == {}
    assert workers.push(1, 6.0) == {}
    assert (workers.model.version, workers.coordinator.budget.done) == (2, 20), "nothing is lost"
    assert workers.coordinator.deadline() == 61.0
    replies = workers.join(2, 20.0)
    assert replies.keys() == {0, 1, 2}
    assert {reply.version for reply in replies.values()} == {2}
    assert [replies[worker].wait_seconds for worker in (0, 1)] == [15.0, 14.0]
    assert workers.coordinator.totals[0].wait_seconds == 15.0
    snapshot = workers.coordinator.snapshot()
    assert (snapshot.paused, snapshot.pauses, snapshot.paused_seconds) == (False, 1, 19.0)


def test_session_that_comes_back_ends_the_pause() -> None:
    workers = started()
    workers.leave(1, 1.0)
    assert workers.push(0, 5.0) == {}
    assert workers.coordinator.revive(1, "s1", 7.0)
    assert workers.dispatch(7.0).keys() == {0}, "worker 1 still computes its round"
    assert workers.push(1, 8.0).keys() == {1}


def test_repeated_push_of_a_lost_worker_ends_the_pause() -> None:
    workers = started(3, 3)
    last = workers.send(1, 1.0)
    workers.leave(1, 2.0)
    workers.push(0, 3.0)
    assert workers.coordinator.push(last, None, 4.0) is None
    snapshot = workers.coordinator.snapshot()
    assert (snapshot.paused, snapshot.paused_seconds) == (False, 2.0)
    assert workers.dispatch(4.0).keys() == {0, 1}


def test_late_joiner_ends_the_pause_and_its_departure_begins_another() -> None:
    workers = started()
    workers.leave(1, 1.0)
    workers.push(0, 5.0)
    number = workers.coordinator.membership.new_number(0.0)
    assert workers.join(number, 7.0).keys() == {0, number}
    workers.leave(number, 8.0)
    assert workers.push(0, 9.0) == {}
    assert workers.coordinator.minimum.pauses == 2


def test_more_workers_than_at_the_start_may_be_needed() -> None:
    workers = started(1, 2)
    assert workers.replies == {}
    assert workers.join(workers.coordinator.membership.new_number(0.0), 3.0).keys() == {0, 1}


@pytest.mark.parametrize("grace", [5.0, "auto"])
def test_window_that_closes_in_a_pause_dispatches_no_worker(grace: float | str) -> None:
    workers = started(3, 3, grace=grace)
    assert workers.push(0, 1.0, timed_steps=10, compute_seconds=1.0) == {}
    workers.leave(2, 1.5)
    assert workers.dispatch(30.0) == {}
    assert workers.coordinator.deadline() == 61.5
    assert 0 in workers.join(2, 31.0)


@pytest.mark.parametrize("quorum", [2, "all"])
def test_group_is_merged_in_a_pause(quorum: int | str) -> None:
    workers = started(3, 3, policy=MergePolicy(quorum=quorum))  # type: ignore[arg-type]
    workers.leave(2, 1.0)
    for worker in (0, 1):
        assert workers.push(worker, 2.0) == {}
    assert workers.model.version == 2
    assert workers.join(2, 3.0).keys() == {0, 1, 2}


def test_run_without_steps_ends_although_workers_are_missing() -> None:
    workers = started(total=20)
    workers.push(1, 1.0)
    workers.leave(1, 2.0)
    assert not workers.coordinator.snapshot().paused, "worker 0 takes the last steps"
    assert workers.push(0, 3.0)[0].stop


def test_stop_ends_a_pause() -> None:
    workers = started(3, 3)
    workers.leave(2, 1.0)
    workers.push(0, 2.0)
    workers.push(1, 3.0, stop=True)
    snapshot = workers.coordinator.snapshot()
    assert (snapshot.paused, snapshot.pauses, snapshot.paused_seconds) == (False, 1, 2.0)
    assert workers.coordinator.finished


def test_freed_steps_of_a_dead_worker_wait_for_it() -> None:
    workers = started(total=20)
    assert workers.push(0, 1.0) == {}, "worker 1 has the other steps"
    assert not workers.coordinator.minimum.paused
    workers.leave(1, 2.0)
    assert workers.coordinator.minimum.paused
    assert workers.join(1, 3.0).keys() <= {0, 1}
    assert workers.coordinator.budget.exhausted


def test_too_long_a_pause_ends_the_run_for_all_and_the_model_can_be_saved() -> None:
    now = [0.0]
    coordinator = make_coordinator(2, minimum=WorkerMinimum(2, timeout=60.0))
    server = Server(coordinator, BufferPool(LAYOUT.numel), threaded=False, clock=lambda: now[0])
    channels = join_all(server, 2)
    server.lost(1, "s1", "silent")
    now[0] = 59.0
    server.dispatch_due()
    assert not channels[0].refusals
    now[0] = 60.0
    server.dispatch_due()
    assert server.deadline is None
    assert (server.snapshot.paused, server.snapshot.paused_seconds) == (False, 60.0)
    assert "exchange.pause_timeout=60 s" in channels[0].refusals[0]
    with pytest.raises(TooFewWorkersError, match="min_workers=2"):
        server.raise_failure()
    with pytest.raises(TooFewWorkersError):
        LocalExchange(server).check()
    late = RecordingChannel()
    server.join(hello(1, "new"), late)
    assert late.refusals == channels[0].refusals, "it is too late to come back"
    assert server.state_dict()["budget"]["done"] == 0
    assert issubclass(TooFewWorkersError, ExchangeError)
