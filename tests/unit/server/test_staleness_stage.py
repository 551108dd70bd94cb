"""What the staleness stage does to pushes that are merged at once or in groups."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from lightning_async_localsgd.outer import SGD, Momentum
from lightning_async_localsgd.staleness import (
    Composed,
    DelayCompensation,
    ExponentialCosine,
    PolynomialThreshold,
    Staleness,
)
from tests.harness import Workers
from tests.unit.server.merging import LAYOUT, SPLIT, RecordingStage, cluster_of, noise, saved_and_loaded


def test_stage_gets_staleness_and_cosine_and_its_factor_scales_only_parameters() -> None:
    stage = RecordingStage([1.0, 1.0, 0.25])
    cluster = cluster_of(workers=2, outer_optimizer=Momentum(lr=1.0, momentum=0.5), staleness=stage)
    cluster.join_all(2)
    cluster.push(0, 1.0, noise(0))
    cluster.push(0, 2.0, noise(1))
    before = cluster.theta.clone()
    cluster.push(1, 3.0, noise(2))
    assert [staleness for staleness, _ in stage.weighed] == [0, 0, 2]
    cosines = [cosine for _, cosine in stage.weighed]
    assert cosines[0] is None
    momentum = noise(0)[:SPLIT] * 0.5 + noise(1)[:SPLIT]
    assert cosines[2] == pytest.approx(float(torch.cosine_similarity(noise(2)[:SPLIT], momentum, dim=0)), abs=1e-5)
    torch.testing.assert_close(cluster.theta[:SPLIT], before[:SPLIT] - 0.5 * momentum - 0.25 * noise(2)[:SPLIT])
    assert torch.equal(cluster.theta[SPLIT:], before[SPLIT:].lerp(noise(2)[SPLIT:], 0.5))


@pytest.mark.parametrize("quorum", [1, 2])
def test_dropped_push_counts_for_budget_and_data_and_is_not_a_strike(quorum: int) -> None:
    cluster = cluster_of(quorum=quorum, outer_optimizer=SGD(lr=1.0), staleness=RecordingStage([0.0] * 20))
    cluster.join_all(3)
    before = cluster.theta.clone()
    for turn in range(10):
        reply = cluster.push(0, float(turn))[0]
        assert "staleness is 0" in (reply.refused or "")
        assert reply.local_steps == 10
    assert cluster.coordinator.budget.done == 100
    assert cluster.coordinator.snapshot().refusals == {"stale": 10}
    assert torch.equal(cluster.theta, before)
    assert cluster.model.version == 0
    assert cluster.coordinator.totals[0].rounds == 0


def test_bases_are_kept_as_long_as_a_worker_may_compute_on_them() -> None:
    stage = RecordingStage([], needs_base=True)
    cluster = cluster_of(workers=3, outer_optimizer=SGD(lr=0.5), staleness=stage)
    cluster.join_all(3)
    start = cluster.theta.clone()
    for turn in range(20):
        cluster.push(0, float(turn), noise(turn))
        assert len(cluster.coordinator._merging._bases) <= 3
    now = cluster.theta.clone()
    cluster.push(1, 30.0, noise(30))
    ((theta, base),) = stage.bases
    assert torch.equal(theta, now[:SPLIT])
    assert torch.equal(base, start[:SPLIT])
    torch.testing.assert_close(cluster.theta[:SPLIT], now[:SPLIT] - 0.5 * (noise(30)[:SPLIT] + 1.0))
    # Of those who are gone a few are kept, the latest.
    cluster.leave(2, 31.0)
    cluster.push(0, 32.0, noise(32))
    assert 0 in cluster.coordinator._merging._bases
    for number in range(12):
        joined = cluster.coordinator.membership.new_number(0.0)
        cluster.join(joined, 40.0 + number)
        cluster.push(0, 40.2 + number, noise(number))
        cluster.leave(joined, 40.5 + number)
    assert len(cluster.coordinator._merging._bases) <= 3 + 8
    cluster.coordinator.revive(2, cluster.sessions[2], 60.0)
    assert "no longer kept" in (cluster.push(2, 61.0)[2].refused or "")


def test_delay_compensation_in_a_group_and_one_that_overflows() -> None:
    cluster = cluster_of(quorum=2, outer_optimizer=SGD(lr=0.5), staleness=DelayCompensation(0.5))
    cluster.join_all(3)
    start = cluster.theta.clone()
    cluster.push(0, 1.0, noise(0))
    cluster.push(1, 1.0, noise(1))
    middle = cluster.theta.clone()
    cluster.push(2, 2.0, noise(2))
    cluster.push(0, 3.0, noise(3))
    late = noise(2) + 0.5 * noise(2) * noise(2) * (middle - start)
    torch.testing.assert_close(cluster.theta[:SPLIT], (middle - 0.5 * (late + noise(3)) / 2)[:SPLIT])
    huge = torch.full((LAYOUT.numel,), 1e30)
    assert "infinite" in (cluster.push(1, 4.0, huge)[1].refused or "")
    assert cluster.coordinator._merging.held == {}


def pulled(staleness: Staleness, workers: int = 3) -> Workers:
    """A momentum of ones, from worker 0's first push."""
    cluster = cluster_of(workers=workers, outer_optimizer=Momentum(lr=1.0, momentum=0.5), staleness=staleness)
    cluster.join_all(workers)
    cluster.push(0, 1.0, 1.0)
    return cluster


def taken(cluster: Workers, worker: int, gradient: float, now: float = 2.0) -> bool:
    version = cluster.model.version
    refused = cluster.push(worker, now, gradient)[worker].refused
    assert (refused is None) == (cluster.model.version == version + 1)
    assert refused is None or "misdirected" in refused
    return refused is None


def test_momentum_that_all_pushes_point_against_is_overruled() -> None:
    cluster = pulled(ExponentialCosine(0.5, 0.0), workers=4)
    assert [taken(cluster, worker, -2.0) for worker in (0, 1, 2, 0)] == [False] * 4
    start = cluster.theta[:SPLIT].clone()
    # Worker 3 is the fifth. Its push is one version old, and that still counts.
    assert taken(cluster, 3, -2.0)
    momentum = 0.5 - 2.0 * math.exp(-0.5)
    assert momentum < 0
    torch.testing.assert_close(cluster.theta[:SPLIT], start - momentum)
    # Now the others are those who point against it, and the count is a new one.
    assert [taken(cluster, worker, 1.0) for worker in (0, 1, 2, 0, 1)] == [False] * 4 + [True]


def test_misdirected_pushes_are_counted_in_a_row_and_against_live_workers() -> None:
    cluster = pulled(ExponentialCosine(0.0, 0.0))
    assert [taken(cluster, 0, -2.0), taken(cluster, 1, -2.0), taken(cluster, 0, 1.0)] == [False, False, True]
    assert [taken(cluster, worker, -2.0) for worker in (0, 1, 2)] == [False] * 3
    cluster = pulled(ExponentialCosine(0.0, 0.0))
    cluster.leave(2, 2.0)
    assert [taken(cluster, worker, -2.0) for worker in (0, 1, 0)] == [False, False, True]


def test_too_stale_pushes_are_not_counted_as_misdirected() -> None:
    cluster = pulled(Composed([ExponentialCosine(0.0, 0.0), PolynomialThreshold(threshold=0)]))
    for _ in range(4):
        # Based on version 0 all of them, as if the answers had not arrived.
        reply = cluster.replies[1]
        assert not taken(cluster, 1, -2.0)
        cluster.replies[1] = dataclasses.replace(cluster.replies[1], version=reply.version)
        cluster.coordinator.membership.live[1].bases.append(reply.version)
    assert cluster.coordinator._merging.state_dict()["misdirected"] == 0
    assert not taken(cluster, 0, -2.0)
    assert cluster.coordinator._merging.state_dict()["misdirected"] == 1


def test_count_of_misdirected_pushes_is_restored() -> None:
    first = pulled(ExponentialCosine(0.0, 0.0))
    assert [taken(first, worker, -2.0) for worker in (0, 1)] == [False] * 2
    state = saved_and_loaded(first.coordinator.state_dict())
    old = copy.deepcopy(state)
    del old["merging"]["misdirected"]  # As it was written before there was one.
    for saved, row in ((state, [False, True]), (old, [False, False])):
        second = cluster_of(outer_optimizer=Momentum(lr=1.0, momentum=0.5), staleness=ExponentialCosine(0.0, 0.0))
        second.coordinator.load_state_dict(saved)
        second.join_all(3, now=3.0)
        assert [taken(second, worker, -2.0, 4.0) for worker in (2, 0)] == row
