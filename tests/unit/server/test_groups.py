"""Groups of pushes: when a group is merged, how long workers wait for each other, and the synchronous warm-up."""

from __future__ import annotations

import random

import torch

from lightning_async_localsgd.outer import SGD, DelayedNesterov
from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, Hello
from lightning_async_localsgd.server.global_model import GlobalModel
from lightning_async_localsgd.server.merge_policy import MergeOptions, MergePolicy
from lightning_async_localsgd.server.merging import Merging
from tests.unit.server.merging import LAYOUT, SPLIT, cluster_of, noise


def test_quorum_is_merged_as_one_step_on_the_mean_in_the_order_of_workers() -> None:
    cluster = cluster_of(quorum=2, outer_optimizer=SGD(lr=1.0))
    cluster.join_all(3)
    before = cluster.theta.clone()
    assert cluster.push(2, 1.0, noise(2)) == {}
    assert cluster.model.version == 0
    assert torch.equal(cluster.theta, before)
    replies = cluster.push(0, 2.0, noise(0))
    assert {worker: (reply.version, reply.staleness) for worker, reply in replies.items()} == {0: (2, 0), 2: (2, 0)}
    assert replies[2].wait_seconds == 1.0
    assert torch.equal(cluster.theta[:SPLIT], before[:SPLIT] - ((noise(0) + noise(2)) / 2)[:SPLIT])
    # Running statistics: two of three workers, two thirds of the way.
    mean = ((noise(0) + noise(2)) / 2)[SPLIT:]
    torch.testing.assert_close(cluster.theta[SPLIT:], before[SPLIT:].lerp(mean, 2 / 3))
    assert cluster.push(1, 3.0) == {}
    assert cluster.push(0, 4.0)[1].staleness == 2
    reported = [(line.worker, line.version, line.staleness, line.refused) for line in cluster.outcomes]
    assert reported == [(0, 2, 0, None), (2, 2, 0, None), (0, 4, 0, None), (1, 4, 2, None)]


def test_quorum_of_all_waits_for_all_workers() -> None:
    cluster = cluster_of(quorum="all", total=None)
    cluster.join_all(3)
    for turn in range(4):
        order = random.Random(turn).sample(range(3), 3)
        for worker in order[:2]:
            assert cluster.push(worker, 10.0 * turn + 1) == {}
        replies = cluster.push(order[2], 10.0 * turn + 9)
        assert {reply.version for reply in replies.values()} == {3 * (turn + 1)}
        assert len(replies) == 3
        assert all(reply.staleness == 0 and reply.progress_per_step == 3.0 for reply in replies.values())


def test_departure_completes_a_group_and_the_push_of_the_departed_counts() -> None:
    cluster = cluster_of(quorum="all")
    cluster.join_all(3)
    cluster.push(0, 1.0, 3.0)
    cluster.push(1, 2.0, 6.0)
    assert set(cluster.leave(2, 3.0)) == {0, 1}
    assert cluster.model.version == 2
    cluster.push(0, 4.0, 1.0)
    cluster.leave(0, 5.0)
    assert cluster.model.version == 2
    replies = cluster.push(1, 6.0, 2.0)
    assert set(replies) == {1}
    assert replies[1].version == 4
    torch.testing.assert_close(cluster.theta[:SPLIT], torch.full((SPLIT,), -4.5 - 1.5))
    assert [line.worker for line in cluster.outcomes] == [0, 1, 0, 1]
    assert cluster.coordinator.budget.done == 40


def test_worker_that_comes_back_waits_for_the_group_of_its_push() -> None:
    cluster = cluster_of(quorum="all")
    cluster.join_all(3)
    cluster.push(0, 1.0)
    cluster.leave(0, 2.0)
    assert cluster.join(0, 3.0) == {}, "a worker of this number has pushed"
    cluster.push(1, 4.0)
    assert set(cluster.push(2, 5.0)) == {0, 1, 2}
    assert cluster.model.version == 3
    # The same holds for a newer session that replaces a live one.
    cluster.push(1, 6.0)
    assert cluster.join(1, 7.0) == {}
    cluster.push(0, 8.0)
    assert set(cluster.push(2, 9.0)) == {0, 1, 2}
    assert cluster.model.version == 6


def test_joining_worker_is_dispatched_at_once_and_waited_for() -> None:
    cluster = cluster_of(workers=2, quorum="all")
    cluster.join_all(2)
    cluster.push(0, 1.0)
    number = cluster.coordinator.membership.new_number(0.0)
    assert set(cluster.join(number, 2.0)) == {number}
    assert cluster.push(1, 3.0) == {}
    assert set(cluster.push(number, 4.0)) == {0, 1, number}
    assert cluster.model.version == 3


def test_refused_push_is_not_part_of_the_group_and_its_worker_continues() -> None:
    cluster = cluster_of(quorum="all")
    cluster.join_all(3)
    cluster.push(0, 1.0, 3.0)
    cluster.push(1, 1.0, 6.0)
    replies = cluster.push(2, 2.0, float("nan"))
    assert set(replies) == {2}
    assert "NaN" in (replies[2].refused or "")
    assert cluster.model.version == 0
    assert set(cluster.push(2, 3.0, 9.0)) == {0, 1, 2}
    torch.testing.assert_close(cluster.theta[:SPLIT], torch.full((SPLIT,), -6.0))
    assert [line.worker for line in cluster.outcomes] == [2, 0, 1, 2]


def test_group_waits_for_a_worker_that_validates() -> None:
    cluster = cluster_of(quorum="all")
    cluster.join_all(3)
    cluster.coordinator.interrupt(0, 0.5)
    cluster.push(1, 1.0)
    assert cluster.push(2, 2.0) == {}
    cluster.coordinator.continue_round(0, 50.0)
    assert set(cluster.push(0, 60.0)) == {0, 1, 2}


def test_group_waits_no_longer_than_its_limit() -> None:
    cluster = cluster_of(quorum="all", options=MergeOptions(quorum_seconds=5.0))
    cluster.join_all(3)
    assert cluster.coordinator.deadline() is None
    cluster.push(1, 10.0)
    assert cluster.coordinator.deadline() == 15.0
    cluster.push(0, 12.0)
    assert cluster.coordinator.deadline() == 15.0, "counted from the first push"
    assert cluster.dispatch(14.9) == {}
    assert set(cluster.dispatch(15.0)) == {0, 1}
    assert cluster.model.version == 2
    assert cluster.coordinator.deadline() is None
    cluster.push(2, 16.0)
    assert cluster.outcomes[-1].staleness == 0
    assert set(cluster.dispatch(21.0)) == {2}
    assert cluster.outcomes[-1].staleness == 2


def test_limit_merges_held_pushes_of_departed_workers() -> None:
    cluster = cluster_of(quorum=2, options=MergeOptions(quorum_seconds=5.0))
    cluster.join_all(3)
    cluster.push(1, 10.0)
    cluster.leave(1, 11.0)
    assert cluster.dispatch(15.0) == {}
    assert cluster.model.version == 1


def test_window_of_a_complete_group_waits_for_workers_about_to_arrive() -> None:
    cluster = cluster_of(workers=4, quorum=2, grace=3.0)
    cluster.join_all(4)
    cluster.push(0, 10.0)
    assert cluster.coordinator.deadline() is None
    cluster.push(1, 20.0)
    assert cluster.coordinator.deadline() == 23.0
    cluster.push(2, 22.0)
    assert set(cluster.dispatch(23.0)) == {0, 1, 2}
    assert cluster.model.version == 3
    # The limit of the group ends the window early. A window also closes when no expected worker is left.
    cluster = cluster_of(workers=4, quorum=2, grace=3.0, options=MergeOptions(quorum_seconds=11.0))
    cluster.join_all(4)
    cluster.push(0, 10.0)
    cluster.push(1, 20.0)
    assert cluster.coordinator.deadline() == 21.0
    assert set(cluster.dispatch(21.0)) == {0, 1}
    cluster.push(0, 30.0)
    cluster.push(1, 31.0)
    cluster.push(2, 31.5)
    assert set(cluster.push(3, 32.0)) == {0, 1, 2, 3}


def test_open_window_ends_even_if_a_worker_of_its_group_dies() -> None:
    cluster = cluster_of(workers=4, quorum=2, grace=3.0)
    cluster.join_all(4)
    cluster.push(0, 10.0)
    cluster.push(1, 20.0)
    cluster.leave(0, 21.0)
    assert set(cluster.dispatch(23.0)) == {1}
    assert cluster.model.version == 2


def test_stop_merges_held_pushes_and_those_that_still_arrive() -> None:
    cluster = cluster_of(quorum="all", total=None)
    cluster.join_all(3)
    cluster.push(0, 1.0)
    cluster.coordinator.stop(1.0)
    assert cluster.dispatch(1.0) == {}
    assert cluster.coordinator.recalled() == {1: 0, 2: 0}
    assert cluster.push(1, 2.0, steps=3) == {}
    replies = cluster.push(2, 3.0, steps=0)
    assert {reply.stop for reply in replies.values()} == {True}
    assert {reply.version for reply in replies.values()} == {2}
    assert cluster.coordinator.finished
    assert cluster.coordinator._merging.held == {}


def test_last_push_is_merged_with_its_group_and_its_worker_is_not_waited_for_again() -> None:
    cluster = cluster_of(quorum="all", total=None)
    cluster.join_all(3)
    cluster.push(1, 1.0, final=True)
    cluster.push(0, 2.0)
    assert set(cluster.push(2, 3.0)) == {0, 2}
    assert cluster.model.version == 3
    cluster.push(0, 4.0)
    assert set(cluster.push(2, 5.0)) == {0, 2}
    assert cluster.model.version == 5


def test_no_group_waits_for_resting_workers_and_last_rounds_are_equal() -> None:
    cluster = cluster_of(quorum="all", total=3 * 14)
    cluster.join_all(3)
    seconds = [1.0, 2.0, 40.0]
    for turn in range(2):
        for worker in range(3):
            last = cluster.push(worker, 100.0 * turn + seconds[worker], timed_steps=10, compute_seconds=seconds[worker])
        if turn == 0:
            assert {reply.local_steps for reply in last.values()} == {4}, "though their speeds differ"
    assert {reply.stop for reply in last.values()} == {True}
    assert cluster.coordinator.budget.done == 42
    # A quorum of more than those that are left with steps.
    cluster = cluster_of(quorum=2, total=31, local_steps=10)
    cluster.join_all(3)
    cluster.push(0, 1.0)
    assert {worker: reply.local_steps for worker, reply in cluster.push(1, 2.0).items()} == {0: 1}
    cluster.push(0, 3.0)
    replies = cluster.push(2, 4.0)
    assert {reply.stop for reply in replies.values()} == {True}
    assert cluster.model.version == 4


def test_held_push_sent_again_after_a_reconnect_counts_once() -> None:
    cluster = cluster_of(quorum="all")
    cluster.join_all(3)
    cluster.push(0, 1.0)
    held = cluster.coordinator._merging.held[0].push
    cluster.coordinator.leave(0, cluster.sessions[0], 2.0, "its connection broke")
    hello = Hello(PROTOCOL_VERSION, 0, cluster.sessions[0], LAYOUT.fingerprint, reconnecting=True)
    assert cluster.coordinator.join(hello, 3.0) is None
    cluster.dispatch(3.0)
    cluster.coordinator.push(held, noise(0), 3.5)
    assert cluster.dispatch(3.5) == {}
    cluster.push(1, 4.0)
    replies = cluster.push(2, 5.0)
    assert set(replies) == {0, 1, 2}
    assert (cluster.model.version, cluster.coordinator.budget.done) == (3, 30)
    assert [line.worker for line in cluster.outcomes if line.refused is None] == [0, 1, 2]


def test_quorum_is_limited_to_live_workers() -> None:
    merging = Merging(GlobalModel(LAYOUT, DelayedNesterov(), 8), MergePolicy(3))
    assert [merging.quorum(live) for live in (1, 2, 8, 9)] == [1, 2, 3, 3]
