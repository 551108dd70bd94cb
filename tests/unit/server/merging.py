"""Workers under a merge policy, for the tests of merging."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from lightning_async_localsgd.outer import SGD, OuterOptimizer
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.server.merge_policy import MergeOptions, MergePolicy
from lightning_async_localsgd.staleness import Staleness
from tests.harness import Workers, make_coordinator

LAYOUT = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
SPLIT = LAYOUT.parameter_numel


def cluster_of(
    workers: int = 3,
    outer_optimizer: OuterOptimizer | None = None,
    *,
    quorum: Any = 1,
    staleness: Staleness | None = None,
    options: MergeOptions | None = None,
    layout: Layout = LAYOUT,
    **coordinator: Any,
) -> Workers:
    """Make a coordinator with a merge policy, and its workers, which have not joined yet."""
    policy = MergePolicy(quorum, staleness=staleness, options=options or MergeOptions())
    made = make_coordinator(
        workers, outer_optimizer or SGD(lr=1.0), policy=policy, layout=layout, **{"dynamic": False, **coordinator}
    )
    return Workers(made)


def noise(seed: int, numel: int = LAYOUT.numel) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint with this state holds."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


class RecordingStage(Staleness):
    """Records what the coordinator passes, and returns given factors."""

    def __init__(self, factors: list[float], needs_base: bool = False) -> None:
        self.factors = factors
        self.needs_base = needs_base
        self.weighed: list[tuple[int, float | None]] = []
        self.bases: list[tuple[Tensor, Tensor]] = []

    def weigh(self, staleness: int, cosine: float | None) -> float:
        self.weighed.append((staleness, cosine))
        return self.factors.pop(0) if self.factors else 1.0

    def correct(self, gradient: Tensor, theta: Tensor, base: Tensor) -> None:
        self.bases.append((theta.clone(), base.clone()))
        gradient.add_(1.0)
