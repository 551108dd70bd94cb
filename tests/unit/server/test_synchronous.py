"""With a quorum of all workers, training is synchronous DiLoCo to the last bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async_localsgd.outer import Buffer, DelayedNesterov, Nesterov, OuterOptimizer
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.server.merge_policy import MergeOptions
from tests.harness import Workers
from tests.unit.server.merging import cluster_of


def network(seed: int, statistics: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    # A bias before BatchNorm has no gradient but rounding errors, and AdamW makes whole steps of them.
    between = nn.BatchNorm1d(8) if statistics else nn.Identity()
    return nn.Sequential(nn.Linear(4, 8), between, nn.Tanh(), nn.Linear(8, 1))


class Trainee:
    """One worker: a module of its own, AdamW whose state stays, data of its own."""

    def __init__(self, number: int, statistics: bool) -> None:
        self.module = network(100 + number, statistics)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2)
        self.generator = torch.Generator().manual_seed(number)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            inputs = torch.randn(8, 4, generator=self.generator)
            self.optimizer.zero_grad()
            (self.module(inputs) - inputs[:, :1] * inputs[:, 1:2]).square().mean().backward()
            self.optimizer.step()


def diloco(workers: int, rounds: int, steps: int, statistics: bool = True) -> dict[str, Tensor]:
    """Synchronous DiLoCo as one writes it down, without any of this package."""
    model = network(0, statistics)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    trainees = [Trainee(number, statistics) for number in range(workers)]
    for _ in range(rounds):
        for trainee in trainees:
            with torch.no_grad():
                for mine, theirs in zip(trainee.module.parameters(), model.parameters(), strict=True):
                    mine.copy_(theirs)
                for mine, theirs in zip(trainee.module.buffers(), model.buffers(), strict=True):
                    mine.copy_(theirs)
            trainee.train(steps)
        locals_ = [list(trainee.module.parameters()) for trainee in trainees]
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = sum(parameter.detach() - mine[index].detach() for mine in locals_) / workers  # type: ignore[assignment]
        outer.step()
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(sum(dict(trainee.module.named_buffers())[name] for trainee in trainees) / workers)
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def run(
    cluster: Workers, workers: int, rounds: int, order: random.Random, statistics: bool = True
) -> dict[str, Tensor]:
    """The same through the coordinator, pushes in any order within a round."""
    Binding(cluster.layout, network(0, statistics)).read(cluster.theta)
    trainees = [Trainee(number, statistics) for number in range(workers)]
    bindings = [Binding(cluster.layout, trainee.module) for trainee in trainees]
    base = torch.empty(cluster.layout.numel)
    replies = cluster.join_all(workers)
    now = 0.0
    for _ in range(rounds):
        assert set(replies) == set(range(workers))
        cluster.model.copy_to(base)
        gradients = []
        for binding, trainee in zip(bindings, trainees, strict=True):
            binding.load(base)
            trainee.train(replies[0].local_steps)
            gradients.append(binding.new_flat())
            binding.subtract_from(base, gradients[-1])
        now += 10.0
        for worker in order.sample(range(workers), workers):
            now += 0.1
            steps = replies[worker].local_steps
            after = cluster.push(worker, now, gradients[worker], timed_steps=steps, compute_seconds=10.0)
        replies = after
    return dict(cluster.layout.views(cluster.theta).items())


@pytest.mark.parametrize("quorum", ["all", 3])
def test_quorum_of_all_equals_synchronous_diloco_bit_for_bit(quorum: Any) -> None:
    layout = Layout.of(network(0))
    cluster = cluster_of(outer_optimizer=Nesterov(lr=0.7), quorum=quorum, total=3 * 6 * 5, local_steps=5, layout=layout)
    wanted = diloco(workers=3, rounds=6, steps=5)
    found = run(cluster, 3, 6, random.Random(0))
    assert cluster.coordinator.finished
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("outer_optimizer", "options"),
    [
        (lambda: Buffer(lr=0.7, momentum=0.9), {"grace": 1.0}),
        (lambda: DelayedNesterov(lr=0.7, momentum=0.9), {"grace": 1.0}),
        (lambda: DelayedNesterov(lr=0.7, momentum=0.9), {"grace": "auto", "dynamic": True}),
        (lambda: Nesterov(lr=0.7), {"quorum": 2, "grace": 1.0}),
        (lambda: Nesterov(lr=0.7), {"quorum": "all", "options": MergeOptions(weights="samples")}),
        (lambda: Nesterov(lr=0.7), {"quorum": "all", "options": MergeOptions(weights="tokens^2/steps")}),
    ],
    ids=["buffer", "grace", "dylu+grace", "quorum+grace", "samples", "tokens"],
)
def test_equal_workers_are_synchronous_diloco_up_to_rounding(
    outer_optimizer: Callable[[], OuterOptimizer], options: dict[str, Any]
) -> None:
    layout = Layout.of(network(0, statistics=False))
    cluster = cluster_of(outer_optimizer=outer_optimizer(), total=3 * 6 * 5, local_steps=5, layout=layout, **options)
    wanted = diloco(workers=3, rounds=6, steps=5, statistics=False)
    found = run(cluster, 3, 6, random.Random(1), statistics=False)
    assert cluster.coordinator.finished
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
