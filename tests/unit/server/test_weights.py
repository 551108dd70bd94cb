"""Weights, limits and averages of pushes."""

from __future__ import annotations

import pytest
import torch

from lightning_async_localsgd.outer import SGD
from lightning_async_localsgd.policies.guard import WARM_UP
from lightning_async_localsgd.server.merge_policy import MergeOptions
from tests.unit.server.merging import LAYOUT, SPLIT, RecordingStage, cluster_of, noise


def test_weights_in_a_group_are_relative_to_the_mean_of_the_group() -> None:
    cluster = cluster_of(quorum=2, outer_optimizer=SGD(lr=1.0), options=MergeOptions(weights="samples"))
    cluster.join_all(3)
    cluster.push(0, 1.0, noise(0), samples=30)
    cluster.push(1, 1.0, noise(1), samples=10)
    wanted = -(1.5 * noise(0) + 0.5 * noise(1)) / 2
    torch.testing.assert_close(cluster.theta[:SPLIT], wanted[:SPLIT])
    plain = ((noise(0) + noise(1)) / 2)[SPLIT:]
    torch.testing.assert_close(cluster.theta[SPLIT:], torch.zeros(4).lerp(plain, 2 / 3))


def test_weights_without_groups_are_relative_to_the_latest_pushes_of_live_workers() -> None:
    cluster = cluster_of(outer_optimizer=SGD(lr=1.0), options=MergeOptions(weights="tokens^2/steps"))
    cluster.join_all(3)
    theta = torch.zeros(SPLIT)
    for seed, (worker, tokens, steps, factor) in enumerate(
        [(0, 20, 4, 1.0), (1, 10, 1, 2 * 100 / 200), (2, 10, 4, 3 * 25 / 225), (0, 10, 4, 3 * 25 / 150)]
    ):
        cluster.push(worker, float(seed), noise(seed), tokens=tokens, steps=steps)
        theta -= factor * noise(seed)[:SPLIT]
        torch.testing.assert_close(cluster.theta[:SPLIT], theta)
    cluster.leave(1, 10.0)
    cluster.push(2, 11.0, noise(9), tokens=0, steps=4)
    torch.testing.assert_close(cluster.theta[:SPLIT], theta)
    assert cluster.coordinator.state_dict()["merging"]["weights"] == {"0": 25.0, "2": 0.0}


def test_pushes_with_zero_weight_have_equal_weight() -> None:
    cluster = cluster_of(quorum=2, outer_optimizer=SGD(lr=1.0), options=MergeOptions(weights="samples"))
    cluster.join_all(3)
    cluster.push(0, 1.0, 1.0, samples=0)
    cluster.push(1, 1.0, 2.0, samples=0)
    torch.testing.assert_close(cluster.theta[:SPLIT], torch.full((SPLIT,), -1.5))


@pytest.mark.parametrize("quorum", [1, 2])
def test_weighted_pushes_are_clipped(quorum: int) -> None:
    cluster = cluster_of(
        quorum=quorum, outer_optimizer=SGD(lr=1.0), options=MergeOptions(clip_norm=2.0), staleness=RecordingStage([4.0])
    )
    cluster.join_all(3)
    long = noise(0)[:SPLIT] / noise(0)[:SPLIT].norm()
    cluster.push(0, 1.0, torch.cat((long, noise(0)[SPLIT:])))  # 1 * 4, so 2.
    cluster.push(1, 1.0, torch.cat((long, noise(0)[SPLIT:])))  # 1, as it is.
    torch.testing.assert_close(cluster.theta[:SPLIT], -long * (3.0 if quorum == 1 else 1.5))


@pytest.mark.parametrize("quorum", [1, 2])
def test_push_that_the_guard_scales_down_is_merged_with_its_expected_norm(quorum: int) -> None:
    cluster = cluster_of(quorum=quorum, outer_optimizer=SGD(lr=1.0))
    cluster.join_all(3)
    for now in range(WARM_UP):
        cluster.push(now % 2, float(now), noise(0))
    before, longer = cluster.theta.clone(), noise(0) * 1000.0
    longer[SPLIT:] = noise(0)[SPLIT:]
    cluster.push(0, 100.0, longer)
    cluster.push(1, 100.0, noise(0))
    moved = (2.0 if quorum == 1 else 1.0) * noise(0)[:SPLIT]
    torch.testing.assert_close(cluster.theta[:SPLIT], before[:SPLIT] - moved)


def test_rda_averages_directions_and_lengths_separately() -> None:
    cluster = cluster_of(quorum="all", outer_optimizer=SGD(lr=1.0), options=MergeOptions(average="rda"))
    cluster.join_all(3)
    pushes = [noise(seed) * (1.0 + 9.0 * seed) for seed in range(3)]
    # One tensor is zero in one push, and opposite in the others.
    first = LAYOUT.views(pushes[0])
    LAYOUT.views(pushes[1])["0.bias"].copy_(-5.0 * first["0.bias"])
    LAYOUT.views(pushes[2])["0.bias"].zero_()
    kept = [push.clone() for push in pushes]
    for worker in (1, 2, 0):
        cluster.push(worker, 1.0, pushes[worker])
    for name, found in LAYOUT.views(cluster.theta, "parameter").items():
        parts = [LAYOUT.views(push)[name] for push in kept]
        if name == "0.bias":
            assert not found.any()
            continue
        direction = sum(part / part.norm() for part in parts) / 3
        wanted = sum(part.norm() for part in parts) / 3 * direction / direction.norm()
        torch.testing.assert_close(found, -wanted)
    plain = sum(kept)[SPLIT:] / 3  # type: ignore[index]
    torch.testing.assert_close(cluster.theta[SPLIT:], plain)


def test_pushes_that_cancel_out_change_nothing() -> None:
    cluster = cluster_of(workers=2, quorum="all", outer_optimizer=SGD(lr=1.0), options=MergeOptions(average="rda"))
    cluster.join_all(2)
    cluster.push(0, 1.0, 1.0)
    cluster.push(1, 1.0, -4.0)
    assert not cluster.theta[:SPLIT].any()
