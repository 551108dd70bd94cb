"""Groups in checkpoints, and after any order of events."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_async_localsgd.outer import SGD, Nesterov
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.server.global_model import GlobalModel
from lightning_async_localsgd.server.merge_policy import MergeOptions, MergePolicy
from lightning_async_localsgd.server.merging import Merging
from lightning_async_localsgd.staleness import ExponentialCosine, PolynomialThreshold
from tests.harness import Workers
from tests.unit.server.merging import LAYOUT, cluster_of, noise, saved_and_loaded


@pytest.mark.parametrize("average", ["mean", "rda"])
def test_run_resumed_within_a_group_continues_as_if_never_interrupted(average: Any) -> None:
    def begun() -> Workers:
        options = MergeOptions(average=average, weights="samples", clip_norm=3.0)
        cluster = cluster_of(outer_optimizer=Nesterov(lr=0.7), quorum="all", options=options, total=90)
        cluster.join_all(3)
        for worker in (1, 0, 2):
            cluster.push(worker, 1.0, noise(worker))
        cluster.push(1, 2.0, noise(11), samples=5)
        return cluster

    whole, first = begun(), begun()
    second = cluster_of(
        outer_optimizer=Nesterov(lr=0.7),
        quorum="all",
        options=MergeOptions(average=average, weights="samples", clip_norm=3.0),
        total=90,
    )
    second.coordinator.load_state_dict(saved_and_loaded(first.coordinator.state_dict()))
    assert set(second.join_all(3, now=0.5)) == {0, 2}, "worker 1 has pushed"
    for cluster in (whole, second):
        cluster.push(0, 3.0, noise(10))
        assert set(cluster.push(2, 4.0, noise(12))) == {0, 1, 2}
        for worker in range(3):
            replies = cluster.push(worker, 5.0, noise(20 + worker))
        assert all(reply.stop for reply in replies.values())
    assert torch.equal(whole.theta, second.theta)
    assert whole.model.version == second.model.version == 9
    assert whole.coordinator.budget.done == second.coordinator.budget.done == 90
    assert {n: t.rounds for n, t in whole.coordinator.totals.items()} == {
        n: t.rounds for n, t in second.coordinator.totals.items()
    }
    # In the ledger of both processes together there is a line for each push.
    lines = first.outcomes + second.outcomes
    assert [line.worker for line in lines] == [line.worker for line in whole.outcomes]


def test_time_limit_of_a_restored_group_starts_with_the_first_dispatch() -> None:
    first = cluster_of(quorum=2, options=MergeOptions(quorum_seconds=5.0))
    first.join_all(3)
    first.push(0, 100.0)
    second = cluster_of(quorum=2, options=MergeOptions(quorum_seconds=5.0))
    second.coordinator.load_state_dict(first.coordinator.state_dict())
    assert second.coordinator.deadline() is None
    assert set(second.join_all(3, now=7.0)) == {1, 2}
    assert second.coordinator.deadline() == 12.0
    assert set(second.dispatch(12.0)) == {0}


def test_held_pushes_are_merged_with_fewer_workers_or_without_a_quorum() -> None:
    first = cluster_of(quorum=3)
    first.join_all(3)
    first.push(0, 1.0, 3.0)
    first.push(2, 1.0, 6.0)
    for quorum in (1, 2, "all"):
        cluster = cluster_of(workers=2, quorum=quorum)
        cluster.coordinator.load_state_dict(first.coordinator.state_dict())
        cluster.join_all(2)
        replies = cluster.push(1, 2.0, 0.0) if 1 in cluster.replies else {}
        assert cluster.model.version >= 2, quorum
        assert {*replies, *cluster.replies} == {0, 1}
        assert cluster.coordinator._merging.held == {}


def test_held_push_of_another_model_is_refused() -> None:
    first = cluster_of(quorum=2)
    first.join_all(3)
    first.push(0, 1.0)
    merging = Merging(GlobalModel(Layout.of(nn.Linear(3, 2)), SGD(lr=1.0), 2), MergePolicy(2))
    with pytest.raises(ValueError, match=r"saved push.*does not match this model"):
        merging.load_state_dict(first.coordinator._merging.state_dict())


EVENT = st.tuples(
    st.sampled_from(["push", "push", "push", "part", "poison", "leave", "back", "interrupt", "continue", "wait"]),
    st.integers(0, 3),
    st.floats(0.0, 8.0),
)
POLICY = st.sampled_from(
    [
        {"quorum": "all"},
        {"quorum": 2},
        {"quorum": 3, "grace": 2.0},
        {"quorum": 2, "grace": "auto", "dynamic": True},
        {"quorum": 3, "options": MergeOptions(quorum_seconds=4.0)},
        {"quorum": "all", "options": MergeOptions(quorum_seconds=1.0)},
        {"quorum": 2, "staleness": PolynomialThreshold(power=0.5, threshold=3)},
        {"quorum": 2, "staleness": ExponentialCosine(rate=0.1, cutoff=0.2)},
        {"quorum": 2, "options": MergeOptions(average="rda", weights="tokens^2/steps", clip_norm=1.0)},
    ]
)


def play(events: list[tuple[str, int, float]], policy: dict[str, Any]) -> Workers:
    """Plays the events, then goes on until training is over."""
    policy = {"outer_optimizer": Nesterov(lr=0.7), **copy.deepcopy(policy)}
    cluster = cluster_of(workers=4, total=160, local_steps=5, **policy)
    cluster.join_all(4)
    coordinator = cluster.coordinator
    now, handed_in = 0.0, 0
    for number, (kind, worker, seconds) in enumerate(events):
        now += seconds
        cluster.dispatch(now)
        member = coordinator.membership.live.get(worker)
        computing = member is not None and member.computing and not coordinator.finished
        if kind in ("push", "part", "poison") and computing:
            changes = {"steps": 1} if kind == "part" else {}
            refused = len([line for line in cluster.outcomes if line.refused])
            gradient = torch.full((LAYOUT.numel,), float("nan")) if kind == "poison" else noise(number)
            cluster.push(worker, now, gradient, **changes)
            handed_in += len([line for line in cluster.outcomes if line.refused]) == refused
        elif kind == "leave" and member is not None and len(coordinator.live) > 1:
            cluster.leave(worker, now)
        elif kind == "back" and member is None and coordinator.membership.check_number(worker) is None:
            cluster.join(worker, now)
        elif kind == "interrupt":
            coordinator.interrupt(worker, now)
        elif kind == "continue":
            coordinator.continue_round(worker, now)
        cluster.dispatch(now)
        applied = [line for line in cluster.outcomes if line.refused is None]
        assert coordinator.model.version == len(applied)
        assert len(applied) + len(cluster.coordinator._merging.held) == handed_in
    for _ in range(400):
        deadline = coordinator.deadline()
        now = max(now + 0.5, deadline or 0.0)
        cluster.dispatch(now)
        computing_now = [n for n, member in coordinator.membership.live.items() if member.computing]
        if coordinator.finished or not coordinator.live:
            break
        assert computing_now or deadline is not None or coordinator.ready(now), "there is no worker left to wait for"
        if computing_now:
            cluster.push(computing_now[0], now, noise(1))
    assert coordinator.finished or not coordinator.live
    assert cluster.coordinator._merging.held == {}
    keys = [(line.worker, line.session, line.sequence) for line in cluster.outcomes]
    assert len(keys) == len(set(keys)), "a push was settled twice"
    assert sum(totals.steps for totals in coordinator.totals.values()) == sum(
        line.steps for line in cluster.outcomes if line.refused is None
    )
    assert torch.isfinite(cluster.theta).all()
    return cluster


@settings(max_examples=150)
@given(events=st.lists(EVENT, max_size=50), policy=POLICY)
def test_any_order_of_events_merges_each_push_once_and_ends(
    events: list[tuple[str, int, float]], policy: dict[str, Any]
) -> None:
    first, second = play(events, policy), play(events, policy)
    assert torch.equal(first.theta, second.theta)
    assert [line.worker for line in first.outcomes] == [line.worker for line in second.outcomes]
