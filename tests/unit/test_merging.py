"""Groups of pushes: when they are merged, what of, and that each push in them counts once."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_async_localsgd.budget import Budget
from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.global_model import GlobalModel
from lightning_async_localsgd.grace import GraceWindow
from lightning_async_localsgd.layout import Binding, Layout
from lightning_async_localsgd.merging import MergeOptions, Merging
from lightning_async_localsgd.messages import PROTOCOL_VERSION, Hello, Push, Reply
from lightning_async_localsgd.outer import (
    SGD,
    Buffer,
    DelayedNesterov,
    Momentum,
    Nesterov,
    OuterOptimizer,
)
from lightning_async_localsgd.pacing import SpeedAwareSteps
from lightning_async_localsgd.records import Settled
from lightning_async_localsgd.staleness import (
    Composed,
    DelayCompensation,
    ExponentialCosine,
    PolynomialThreshold,
    Staleness,
)

LAYOUT = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
SPLIT = LAYOUT.parameter_numel


class Cluster:
    """Workers played against a coordinator, with what the ledger would say."""

    def __init__(
        self,
        workers: int = 3,
        rule: OuterOptimizer | None = None,
        *,
        quorum: Any = 1,
        warmup_steps: int = 0,
        staleness: Staleness | None = None,
        options: MergeOptions | None = None,
        grace: Any = 0.0,
        total: int | None = 1000,
        local_steps: int = 10,
        dynamic: bool = False,
        layout: Layout = LAYOUT,
    ) -> None:
        model = GlobalModel(layout, rule or SGD(lr=1.0), workers)
        self.merging = Merging(model, workers, quorum, warmup_steps, staleness, options)
        self.coordinator = Coordinator(
            model,
            SpeedAwareSteps(local_steps, dynamic),
            GraceWindow(grace),
            Budget(total),
            workers,
            "this",
            merging=self.merging,
        )
        self.layout = layout
        self.ledger: list[Settled] = []
        self.coordinator.on_settled = self.ledger.append
        self.replies: dict[int, Reply] = {}
        self.sequences: dict[int, int] = {}
        self.sessions: dict[int, str] = {}
        self.names = (f"s{number}" for number in itertools.count())

    @property
    def model(self) -> GlobalModel:
        return self.coordinator.model

    @property
    def theta(self) -> Tensor:
        return self.coordinator.model.theta

    def begin(self, workers: int = 3, now: float = 0.0) -> dict[int, Reply]:
        for worker in range(workers):
            self.join(worker, now, flush=False)
        return self.flush(now)

    def join(self, worker: int, now: float, flush: bool = True) -> dict[int, Reply]:
        self.sessions[worker] = next(self.names)
        self.sequences[worker] = 0
        hello = Hello(PROTOCOL_VERSION, worker, self.sessions[worker], self.layout.fingerprint)
        assert self.coordinator.join(hello, now) is None
        return self.flush(now) if flush else {}

    def flush(self, now: float) -> dict[int, Reply]:
        """As the server does it: one dispatch after each event has to be enough."""
        replies = self.coordinator.dispatch(now) if self.coordinator.ready(now) else {}
        assert not self.coordinator.ready(now)
        deadline = self.coordinator.deadline()
        assert deadline is None or deadline > now
        self.replies.update(replies)
        return replies

    def push(self, worker: int, now: float, gradient: Tensor | float = 1.0, **changes: Any) -> dict[int, Reply]:
        reply = self.replies[worker]
        self.sequences[worker] += 1
        steps = reply.local_steps
        push = Push(
            worker, self.sessions[worker], self.sequences[worker], "this", reply.version, steps, steps, 0, 0.0, 0.0,
            False, False, tokens=7 * steps,
        )  # fmt: skip
        if not isinstance(gradient, Tensor):
            gradient = torch.full((self.layout.numel,), gradient)
        kept = gradient.clone()
        self.coordinator.push(dataclasses.replace(push, **changes), gradient, now)
        assert torch.equal(gradient.view(torch.int32), kept.view(torch.int32))
        # The buffer is somebody else's as soon as the push is settled.
        gradient.fill_(float("nan"))
        return self.flush(now)

    def leave(self, worker: int, now: float) -> dict[int, Reply]:
        self.coordinator.leave(worker, self.sessions[worker], now, "test")
        return self.flush(now)


def noise(seed: int, numel: int = LAYOUT.numel) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- when a group is due


def test_a_quorum_is_merged_as_one_step_on_the_mean_in_the_order_of_the_workers() -> None:
    cluster = Cluster(quorum=2, rule=SGD(lr=1.0))
    cluster.begin()
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
    told = [(line.worker, line.version, line.staleness, line.refused) for line in cluster.ledger]
    assert told == [(0, 2, 0, None), (2, 2, 0, None), (0, 4, 0, None), (1, 4, 2, None)]


def test_all_wait_for_all() -> None:
    cluster = Cluster(quorum="all", total=None)
    cluster.begin()
    for turn in range(4):
        order = random.Random(turn).sample(range(3), 3)
        for worker in order[:2]:
            assert cluster.push(worker, 10.0 * turn + 1) == {}
        replies = cluster.push(order[2], 10.0 * turn + 9)
        assert {reply.version for reply in replies.values()} == {3 * (turn + 1)}
        assert len(replies) == 3
        assert all(reply.staleness == 0 and reply.pace == 3.0 for reply in replies.values())


def test_a_departure_completes_a_group_and_what_the_dead_had_handed_in_counts() -> None:
    cluster = Cluster(quorum="all")
    cluster.begin()
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
    assert [line.worker for line in cluster.ledger] == [0, 1, 0, 1]
    assert cluster.coordinator.budget.done == 40


def test_a_worker_that_comes_back_waits_for_the_group_that_has_its_push() -> None:
    cluster = Cluster(quorum="all")
    cluster.begin()
    cluster.push(0, 1.0)
    cluster.leave(0, 2.0)
    assert cluster.join(0, 3.0) == {}, "its number has handed in"
    cluster.push(1, 4.0)
    assert set(cluster.push(2, 5.0)) == {0, 1, 2}
    assert cluster.model.version == 3
    # A newer session in the place of a live one likewise.
    cluster.push(1, 6.0)
    assert cluster.join(1, 7.0) == {}
    cluster.push(0, 8.0)
    assert set(cluster.push(2, 9.0)) == {0, 1, 2}
    assert cluster.model.version == 6


def test_whoever_joins_is_dispatched_at_once_and_waited_for() -> None:
    cluster = Cluster(workers=2, quorum="all")
    cluster.begin(2)
    cluster.push(0, 1.0)
    number = cluster.coordinator.attendance.new_number()
    assert set(cluster.join(number, 2.0)) == {number}
    assert cluster.push(1, 3.0) == {}
    assert set(cluster.push(number, 4.0)) == {0, 1, number}
    assert cluster.model.version == 3


def test_a_push_that_is_refused_is_no_part_of_the_group_and_its_worker_tries_again() -> None:
    cluster = Cluster(quorum="all")
    cluster.begin()
    cluster.push(0, 1.0, 3.0)
    cluster.push(1, 1.0, 6.0)
    replies = cluster.push(2, 2.0, float("nan"))
    assert set(replies) == {2}
    assert "NaN" in (replies[2].refused or "")
    assert cluster.model.version == 0
    assert set(cluster.push(2, 3.0, 9.0)) == {0, 1, 2}
    torch.testing.assert_close(cluster.theta[:SPLIT], torch.full((SPLIT,), -6.0))
    assert [line.worker for line in cluster.ledger] == [2, 0, 1, 2]


def test_whoever_validates_is_waited_for() -> None:
    cluster = Cluster(quorum="all")
    cluster.begin()
    cluster.coordinator.pause(0, 0.5)
    cluster.push(1, 1.0)
    assert cluster.push(2, 2.0) == {}
    cluster.coordinator.resume(0, 50.0)
    assert set(cluster.push(0, 60.0)) == {0, 1, 2}


def test_a_group_waits_no_longer_than_its_limit() -> None:
    cluster = Cluster(quorum="all", options=MergeOptions(quorum_seconds=5.0))
    cluster.begin()
    assert cluster.coordinator.deadline() is None
    cluster.push(1, 10.0)
    assert cluster.coordinator.deadline() == 15.0
    cluster.push(0, 12.0)
    assert cluster.coordinator.deadline() == 15.0, "counted from the first push"
    assert cluster.flush(14.9) == {}
    assert set(cluster.flush(15.0)) == {0, 1}
    assert cluster.model.version == 2
    assert cluster.coordinator.deadline() is None
    cluster.push(2, 16.0)
    assert cluster.ledger[-1].staleness == 0
    assert set(cluster.flush(21.0)) == {2}
    assert cluster.ledger[-1].staleness == 2


def test_a_limit_merges_what_is_held_of_the_gone() -> None:
    cluster = Cluster(quorum=2, options=MergeOptions(quorum_seconds=5.0))
    cluster.begin()
    cluster.push(1, 10.0)
    cluster.leave(1, 11.0)
    assert cluster.flush(15.0) == {}
    assert cluster.model.version == 1


def test_a_full_group_keeps_its_window_open_for_those_about_to_arrive() -> None:
    cluster = Cluster(workers=4, quorum=2, grace=3.0)
    cluster.begin(4)
    cluster.push(0, 10.0)
    assert cluster.coordinator.deadline() is None
    cluster.push(1, 20.0)
    assert cluster.coordinator.deadline() == 23.0
    cluster.push(2, 22.0)
    assert set(cluster.flush(23.0)) == {0, 1, 2}
    assert cluster.model.version == 3
    # The limit of the group cuts the window short; and a window closes when nobody is left who could come.
    cluster = Cluster(workers=4, quorum=2, grace=3.0, options=MergeOptions(quorum_seconds=11.0))
    cluster.begin(4)
    cluster.push(0, 10.0)
    cluster.push(1, 20.0)
    assert cluster.coordinator.deadline() == 21.0
    assert set(cluster.flush(21.0)) == {0, 1}
    cluster.push(0, 30.0)
    cluster.push(1, 31.0)
    cluster.push(2, 31.5)
    assert set(cluster.push(3, 32.0)) == {0, 1, 2, 3}


def test_a_window_that_has_opened_ends_though_one_of_its_group_has_died() -> None:
    cluster = Cluster(workers=4, quorum=2, grace=3.0)
    cluster.begin(4)
    cluster.push(0, 10.0)
    cluster.push(1, 20.0)
    cluster.leave(0, 21.0)
    assert set(cluster.flush(23.0)) == {1}
    assert cluster.model.version == 2


def test_stop_merges_everything_that_is_held_or_still_comes() -> None:
    cluster = Cluster(quorum="all", total=None)
    cluster.begin()
    cluster.push(0, 1.0)
    cluster.coordinator.stop()
    assert cluster.flush(1.0) == {}
    assert cluster.coordinator.wanted() == {1: 0, 2: 0}
    assert cluster.push(1, 2.0, steps=3) == {}
    replies = cluster.push(2, 3.0, steps=0)
    assert {reply.stop for reply in replies.values()} == {True}
    assert {reply.version for reply in replies.values()} == {2}
    assert cluster.coordinator.finished
    assert cluster.merging.held == {}


def test_a_last_push_is_merged_with_its_group_and_its_worker_is_not_waited_for_again() -> None:
    cluster = Cluster(quorum="all", total=None)
    cluster.begin()
    cluster.push(1, 1.0, final=True)
    cluster.push(0, 2.0)
    assert set(cluster.push(2, 3.0)) == {0, 2}
    assert cluster.model.version == 3
    cluster.push(0, 4.0)
    assert set(cluster.push(2, 5.0)) == {0, 2}
    assert cluster.model.version == 5


def test_nobody_waits_for_those_who_rest_and_the_last_rounds_are_equally_long() -> None:
    cluster = Cluster(quorum="all", total=3 * 14)
    cluster.begin()
    seconds = [1.0, 2.0, 40.0]
    for turn in range(2):
        for worker in range(3):
            last = cluster.push(worker, 100.0 * turn + seconds[worker], timed_steps=10, compute_seconds=seconds[worker])
        if turn == 0:
            assert {reply.local_steps for reply in last.values()} == {4}, "though their speeds differ"
    assert {reply.stop for reply in last.values()} == {True}
    assert cluster.coordinator.budget.done == 42
    # A quorum of more than those that are left with steps.
    cluster = Cluster(quorum=2, total=31, local_steps=10)
    cluster.begin()
    cluster.push(0, 1.0)
    assert {worker: reply.local_steps for worker, reply in cluster.push(1, 2.0).items()} == {0: 1}
    cluster.push(0, 3.0)
    replies = cluster.push(2, 4.0)
    assert {reply.stop for reply in replies.values()} == {True}
    assert cluster.model.version == 4


def test_a_rejoining_worker_sends_its_held_push_again_and_it_counts_once() -> None:
    cluster = Cluster(quorum="all")
    cluster.begin()
    cluster.push(0, 1.0)
    held = cluster.merging.held[0].push
    cluster.coordinator.leave(0, cluster.sessions[0], 2.0, "its connection broke")
    hello = Hello(PROTOCOL_VERSION, 0, cluster.sessions[0], LAYOUT.fingerprint, rejoining=True)
    assert cluster.coordinator.join(hello, 3.0) is None
    cluster.flush(3.0)
    cluster.coordinator.push(held, noise(0), 3.5)
    assert cluster.flush(3.5) == {}
    cluster.push(1, 4.0)
    replies = cluster.push(2, 5.0)
    assert set(replies) == {0, 1, 2}
    assert (cluster.model.version, cluster.coordinator.budget.done) == (3, 30)
    assert [line.worker for line in cluster.ledger if line.refused is None] == [0, 1, 2]


# ----------------------------------------------------------------------------- warm-up


@pytest.mark.parametrize(("workers", "target", "wanted"), [
    (4, 1, [4, 4, 3, 3, 2, 2, 1, 1, 1]),
    (4, 2, [4, 4, 3, 3, 2, 2, 2, 2, 2]),
    (3, 1, [3, 3, 3, 2, 2, 2, 1, 1, 1]),
    (1, 1, [1] * 9),
])  # fmt: skip
def test_the_warm_up_lets_the_quorum_down_linearly(workers: int, target: int, wanted: list[int]) -> None:
    model = GlobalModel(LAYOUT, DelayedNesterov(), workers)
    merging = Merging(model, workers, target, warmup_steps=800)
    assert [merging.quorum(workers, done * 100 * workers) for done in range(9)] == wanted


def test_the_quorum_is_of_those_who_live() -> None:
    merging = Merging(GlobalModel(LAYOUT, DelayedNesterov(), 8), 8, 3, warmup_steps=800)
    assert [merging.quorum(live, 0) for live in (1, 2, 8, 9)] == [1, 2, 8, 9]
    assert [merging.quorum(live, 8 * 800) for live in (1, 2, 8, 9)] == [1, 2, 3, 3]


def test_in_the_warm_up_delayed_nesterov_takes_synchronous_steps() -> None:
    cluster = Cluster(rule=DelayedNesterov(lr=0.7, momentum=0.9), warmup_steps=1000)
    cluster.begin()
    theta = torch.zeros(SPLIT, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.7, momentum=0.9, nesterov=True)
    for turn in range(5):
        for worker in (2, 0, 1):
            replies = cluster.push(worker, float(turn), noise(10 * turn + worker))
        assert len(replies) == 3
        assert all(reply.staleness == 0 for reply in replies.values())
        theta.grad = sum(noise(10 * turn + worker) for worker in range(3))[:SPLIT] / 3  # type: ignore[index]
        optimizer.step()
        torch.testing.assert_close(cluster.theta[:SPLIT], theta.detach())
    assert cluster.model.version == 15


def test_after_the_warm_up_pushes_are_applied_as_they_come() -> None:
    cluster = Cluster(rule=DelayedNesterov(), warmup_steps=20)
    cluster.begin()
    dispatched = [set(cluster.push(worker, float(now))) for now, worker in enumerate([0, 1, 2, 0, 1, 0, 1, 2])]
    # A quorum of three, of two when a third of the 60 steps are taken, and of one after two thirds.
    assert dispatched == [set(), {0, 1}, set(), {0, 2}, {1}, {0}, {1}, {2}]
    assert [line.staleness for line in cluster.ledger] == [0, 0, 0, 2, 2, 1, 1, 3]
    assert [line.worker for line in cluster.ledger] == [0, 1, 0, 2, 1, 0, 1, 2]


# ------------------------------------------------------------- synchronous, to the last bit


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
    cluster: Cluster, workers: int, rounds: int, order: random.Random, statistics: bool = True
) -> dict[str, Tensor]:
    """The same through the coordinator, pushes in any order within a round."""
    Binding(cluster.layout, network(0, statistics)).read(cluster.theta)
    trainees = [Trainee(number, statistics) for number in range(workers)]
    bindings = [Binding(cluster.layout, trainee.module) for trainee in trainees]
    base = torch.empty(cluster.layout.numel)
    replies = cluster.begin(workers)
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
def test_a_quorum_of_all_is_synchronous_diloco_to_the_last_bit(quorum: Any) -> None:
    layout = Layout.of(network(0))
    cluster = Cluster(rule=Nesterov(lr=0.7), quorum=quorum, total=3 * 6 * 5, local_steps=5, layout=layout)
    wanted = diloco(workers=3, rounds=6, steps=5)
    found = run(cluster, 3, 6, random.Random(0))
    assert cluster.coordinator.finished
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (lambda: Buffer(lr=0.7, momentum=0.9), {"grace": 1.0}),
        (lambda: DelayedNesterov(lr=0.7, momentum=0.9), {"grace": 1.0}),
        (lambda: DelayedNesterov(lr=0.7, momentum=0.9), {"grace": "auto", "dynamic": True}),
        (lambda: Nesterov(lr=0.7), {"quorum": 2, "grace": 1.0}),
        (lambda: DelayedNesterov(lr=0.7), {"warmup_steps": 1000}),
        (lambda: Nesterov(lr=0.7), {"quorum": "all", "options": MergeOptions(weights="samples")}),
        (lambda: Nesterov(lr=0.7), {"quorum": "all", "options": MergeOptions(weights="tokens^2/steps")}),
    ],
    ids=["buffer", "grace", "dylu+grace", "quorum+grace", "warm-up", "samples", "tokens"],
)
def test_equal_workers_are_synchronous_diloco_up_to_rounding(
    rule: Callable[[], OuterOptimizer], options: dict[str, Any]
) -> None:
    layout = Layout.of(network(0, statistics=False))
    cluster = Cluster(rule=rule(), total=3 * 6 * 5, local_steps=5, layout=layout, **options)
    wanted = diloco(workers=3, rounds=6, steps=5, statistics=False)
    found = run(cluster, 3, 6, random.Random(1), statistics=False)
    assert cluster.coordinator.finished
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


# ---------------------------------------------------------------------------- staleness


class Recording(Staleness):
    """Notes what it is asked, and answers what it was told to."""

    def __init__(self, factors: list[float], needs_base: bool = False) -> None:
        self.factors = factors
        self.needs_base = needs_base
        self.asked: list[tuple[int, float | None]] = []
        self.bases: list[tuple[Tensor, Tensor]] = []

    def weigh(self, staleness: int, cosine: float | None) -> float:
        self.asked.append((staleness, cosine))
        return self.factors.pop(0) if self.factors else 1.0

    def correct(self, gradient: Tensor, theta: Tensor, base: Tensor) -> None:
        self.bases.append((theta.clone(), base.clone()))
        gradient.add_(1.0)


def test_the_stage_is_asked_with_age_and_cosine_and_its_factor_scales_parameters_only() -> None:
    stage = Recording([1.0, 1.0, 0.25])
    cluster = Cluster(workers=2, rule=Momentum(lr=1.0, momentum=0.5), staleness=stage)
    cluster.begin(2)
    cluster.push(0, 1.0, noise(0))
    cluster.push(0, 2.0, noise(1))
    before = cluster.theta.clone()
    cluster.push(1, 3.0, noise(2))
    assert [staleness for staleness, _ in stage.asked] == [0, 0, 2]
    cosines = [cosine for _, cosine in stage.asked]
    assert cosines[0] is None
    momentum = noise(0)[:SPLIT] * 0.5 + noise(1)[:SPLIT]
    assert cosines[2] == pytest.approx(float(torch.cosine_similarity(noise(2)[:SPLIT], momentum, dim=0)), abs=1e-5)
    torch.testing.assert_close(cluster.theta[:SPLIT], before[:SPLIT] - 0.5 * momentum - 0.25 * noise(2)[:SPLIT])
    assert torch.equal(cluster.theta[SPLIT:], before[SPLIT:].lerp(noise(2)[SPLIT:], 0.5))


@pytest.mark.parametrize("quorum", [1, 2])
def test_a_push_that_is_dropped_counts_for_budget_and_data_and_is_no_offence(quorum: int) -> None:
    cluster = Cluster(quorum=quorum, rule=SGD(lr=1.0), staleness=Recording([0.0] * 20))
    cluster.begin()
    before = cluster.theta.clone()
    for turn in range(10):
        reply = cluster.push(0, float(turn))[0]
        assert "staleness is 0" in (reply.refused or "")
        assert reply.local_steps == 10
    assert cluster.coordinator.budget.done == 100
    assert cluster.coordinator.view().refusals == {"stale": 10}
    assert torch.equal(cluster.theta, before)
    assert cluster.model.version == 0
    assert cluster.coordinator.totals[0].rounds == 0


def test_bases_are_kept_for_as_long_as_somebody_may_compute_on_them() -> None:
    stage = Recording([], needs_base=True)
    cluster = Cluster(workers=3, rule=SGD(lr=0.5), staleness=stage)
    cluster.begin()
    start = cluster.theta.clone()
    for turn in range(20):
        cluster.push(0, float(turn), noise(turn))
        assert len(cluster.merging._bases) <= 3
    now = cluster.theta.clone()
    cluster.push(1, 30.0, noise(30))
    ((theta, base),) = stage.bases
    assert torch.equal(theta, now[:SPLIT])
    assert torch.equal(base, start[:SPLIT])
    torch.testing.assert_close(cluster.theta[:SPLIT], now[:SPLIT] - 0.5 * (noise(30)[:SPLIT] + 1.0))
    # Of those who are gone a few are kept, the latest.
    cluster.leave(2, 31.0)
    cluster.push(0, 32.0, noise(32))
    assert 0 in cluster.merging._bases
    for number in range(12):
        joined = cluster.coordinator.attendance.new_number()
        cluster.join(joined, 40.0 + number)
        cluster.push(0, 40.2 + number, noise(number))
        cluster.leave(joined, 40.5 + number)
    assert len(cluster.merging._bases) <= 3 + 8
    cluster.coordinator.revive(2, cluster.sessions[2], 60.0)
    assert "not kept" in (cluster.push(2, 61.0)[2].refused or "")


def test_delay_compensation_in_a_group_and_one_that_overflows() -> None:
    cluster = Cluster(quorum=2, rule=SGD(lr=0.5), staleness=DelayCompensation(0.5))
    cluster.begin()
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
    assert cluster.merging.held == {}


def pulled(staleness: Staleness, workers: int = 3) -> Cluster:
    """A momentum of ones, from worker 0's first push."""
    cluster = Cluster(workers=workers, rule=Momentum(lr=1.0, momentum=0.5), staleness=staleness)
    cluster.begin(workers)
    cluster.push(0, 1.0, 1.0)
    return cluster


def taken(cluster: Cluster, worker: int, gradient: float, now: float = 2.0) -> bool:
    version = cluster.model.version
    refused = cluster.push(worker, now, gradient)[worker].refused
    assert (refused is None) == (cluster.model.version == version + 1)
    assert refused is None or "misdirected" in refused
    return refused is None


def test_a_momentum_that_all_workers_pull_against_gives_way() -> None:
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


def test_the_count_of_misdirected_pushes_is_of_a_row_and_of_the_living() -> None:
    cluster = pulled(ExponentialCosine(0.0, 0.0))
    assert [taken(cluster, 0, -2.0), taken(cluster, 1, -2.0), taken(cluster, 0, 1.0)] == [False, False, True]
    assert [taken(cluster, worker, -2.0) for worker in (0, 1, 2)] == [False] * 3
    cluster = pulled(ExponentialCosine(0.0, 0.0))
    cluster.leave(2, 2.0)
    assert [taken(cluster, worker, -2.0) for worker in (0, 1, 0)] == [False, False, True]


def test_pushes_that_are_too_old_as_well_are_not_counted() -> None:
    cluster = pulled(Composed([ExponentialCosine(0.0, 0.0), PolynomialThreshold(threshold=0)]))
    for _ in range(4):
        # Based on version 0 all of them, as if the answers had not arrived.
        reply = cluster.replies[1]
        assert not taken(cluster, 1, -2.0)
        cluster.replies[1] = dataclasses.replace(cluster.replies[1], version=reply.version)
        cluster.coordinator.attendance.live[1].bases.append(reply.version)
    assert cluster.merging.state_dict()["misdirected"] == 0
    assert not taken(cluster, 0, -2.0)
    assert cluster.merging.state_dict()["misdirected"] == 1


def test_the_count_of_misdirected_pushes_outlives_the_server() -> None:
    first = pulled(ExponentialCosine(0.0, 0.0))
    assert [taken(first, worker, -2.0) for worker in (0, 1)] == [False] * 2
    state = saved_and_loaded(first.coordinator.state_dict())
    old = copy.deepcopy(state)
    del old["merging"]["misdirected"]  # As it was written before there was one.
    for saved, row in ((state, [False, True]), (old, [False, False])):
        second = Cluster(rule=Momentum(lr=1.0, momentum=0.5), staleness=ExponentialCosine(0.0, 0.0))
        second.coordinator.load_state_dict(saved)
        second.begin(now=3.0)
        assert [taken(second, worker, -2.0, 4.0) for worker in (2, 0)] == row


# ------------------------------------------------------------------- weights, limits, average


def test_in_a_group_weights_are_relative_to_the_groups_mean() -> None:
    cluster = Cluster(quorum=2, rule=SGD(lr=1.0), options=MergeOptions(weights="samples"))
    cluster.begin()
    cluster.push(0, 1.0, noise(0), samples=30)
    cluster.push(1, 1.0, noise(1), samples=10)
    wanted = -(1.5 * noise(0) + 0.5 * noise(1)) / 2
    torch.testing.assert_close(cluster.theta[:SPLIT], wanted[:SPLIT])
    plain = ((noise(0) + noise(1)) / 2)[SPLIT:]
    torch.testing.assert_close(cluster.theta[SPLIT:], torch.zeros(4).lerp(plain, 2 / 3))


def test_without_groups_weights_are_relative_to_the_latest_pushes_of_the_living() -> None:
    cluster = Cluster(rule=SGD(lr=1.0), options=MergeOptions(weights="tokens^2/steps"))
    cluster.begin()
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
    assert cluster.coordinator.state_dict()["merging"]["shares"] == {"0": 25.0, "2": 0.0}


def test_pushes_that_all_count_nothing_count_alike() -> None:
    cluster = Cluster(quorum=2, rule=SGD(lr=1.0), options=MergeOptions(weights="samples"))
    cluster.begin()
    cluster.push(0, 1.0, 1.0, samples=0)
    cluster.push(1, 1.0, 2.0, samples=0)
    torch.testing.assert_close(cluster.theta[:SPLIT], torch.full((SPLIT,), -1.5))


@pytest.mark.parametrize("quorum", [1, 2])
def test_long_pushes_are_shortened_weight_included(quorum: int) -> None:
    cluster = Cluster(quorum=quorum, rule=SGD(lr=1.0), options=MergeOptions(clip_norm=2.0), staleness=Recording([4.0]))
    cluster.begin()
    long = noise(0)[:SPLIT] / noise(0)[:SPLIT].norm()
    cluster.push(0, 1.0, torch.cat((long, noise(0)[SPLIT:])))  # 1 * 4, so 2.
    cluster.push(1, 1.0, torch.cat((long, noise(0)[SPLIT:])))  # 1, as it is.
    torch.testing.assert_close(cluster.theta[:SPLIT], -long * (3.0 if quorum == 1 else 1.5))


def test_rda_averages_directions_and_lengths_apart() -> None:
    cluster = Cluster(quorum="all", rule=SGD(lr=1.0), options=MergeOptions(average="rda"))
    cluster.begin()
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


def test_pushes_that_cancel_out_move_nothing() -> None:
    cluster = Cluster(workers=2, quorum="all", rule=SGD(lr=1.0), options=MergeOptions(average="rda"))
    cluster.begin(2)
    cluster.push(0, 1.0, 1.0)
    cluster.push(1, 1.0, -4.0)
    assert not cluster.theta[:SPLIT].any()


# -------------------------------------------------------------------------------- state


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint does it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("average", ["mean", "rda"])
def test_a_run_that_is_resumed_within_a_group_goes_on_as_if_never_stopped(average: Any) -> None:
    def begun() -> Cluster:
        options = MergeOptions(average=average, weights="samples", clip_norm=3.0)
        cluster = Cluster(rule=Nesterov(lr=0.7), quorum="all", options=options, total=90)
        cluster.begin()
        for worker in (1, 0, 2):
            cluster.push(worker, 1.0, noise(worker))
        cluster.push(1, 2.0, noise(11), samples=5)
        return cluster

    whole, first = begun(), begun()
    second = Cluster(
        rule=Nesterov(lr=0.7),
        quorum="all",
        options=MergeOptions(average=average, weights="samples", clip_norm=3.0),
        total=90,
    )
    second.coordinator.load_state_dict(saved_and_loaded(first.coordinator.state_dict()))
    assert set(second.begin(now=0.5)) == {0, 2}, "worker 1 has handed in"
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
    lines = first.ledger + second.ledger
    assert [line.worker for line in lines] == [line.worker for line in whole.ledger]


def test_a_group_that_is_restored_has_its_time_from_the_first_dispatch_on() -> None:
    first = Cluster(quorum=2, options=MergeOptions(quorum_seconds=5.0))
    first.begin()
    first.push(0, 100.0)
    second = Cluster(quorum=2, options=MergeOptions(quorum_seconds=5.0))
    second.coordinator.load_state_dict(first.coordinator.state_dict())
    assert second.coordinator.deadline() is None
    assert set(second.begin(now=7.0)) == {1, 2}
    assert second.coordinator.deadline() == 12.0
    assert set(second.flush(12.0)) == {0}


def test_what_is_held_goes_on_with_fewer_workers_or_without_a_quorum() -> None:
    first = Cluster(quorum=3)
    first.begin()
    first.push(0, 1.0, 3.0)
    first.push(2, 1.0, 6.0)
    for quorum in (1, 2, "all"):
        cluster = Cluster(workers=2, quorum=quorum)
        cluster.coordinator.load_state_dict(first.coordinator.state_dict())
        cluster.begin(2)
        replies = cluster.push(1, 2.0, 0.0) if 1 in cluster.replies else {}
        assert cluster.model.version >= 2, quorum
        assert {*replies, *cluster.replies} == {0, 1}
        assert cluster.merging.held == {}


def test_a_held_push_of_another_model_is_refused_by_name() -> None:
    first = Cluster(quorum=2)
    first.begin()
    first.push(0, 1.0)
    merging = Merging(GlobalModel(Layout.of(nn.Linear(3, 2)), SGD(lr=1.0), 2), 2, 2)
    with pytest.raises(ValueError, match=r"saved push.*another model"):
        merging.load_state_dict(first.merging.state_dict())


# -------------------------------------------------------------------- any order of events

EVENT = st.tuples(
    st.sampled_from(["push", "push", "push", "part", "poison", "leave", "back", "pause", "resume", "wait"]),
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
        {"quorum": 1, "warmup_steps": 15, "rule": DelayedNesterov()},
        {"quorum": 2, "warmup_steps": 15, "grace": 1.0},
        {"quorum": 2, "staleness": PolynomialThreshold(power=0.5, threshold=3)},
        {"quorum": 2, "staleness": ExponentialCosine(rate=0.1, cutoff=0.2)},
        {"quorum": 2, "options": MergeOptions(average="rda", weights="tokens^2/steps", clip_norm=1.0)},
    ]
)


def play(events: list[tuple[str, int, float]], policy: dict[str, Any]) -> Cluster:
    """Plays the events, then goes on until training is over."""
    policy = {"rule": Nesterov(lr=0.7), **copy.deepcopy(policy)}
    cluster = Cluster(workers=4, total=160, local_steps=5, **policy)
    cluster.begin(4)
    coordinator = cluster.coordinator
    now, handed_in = 0.0, 0
    for number, (kind, worker, seconds) in enumerate(events):
        now += seconds
        cluster.flush(now)
        member = coordinator.attendance.live.get(worker)
        computing = member is not None and member.state == "computing" and not coordinator.finished
        if kind in ("push", "part", "poison") and computing:
            changes = {"steps": 1} if kind == "part" else {}
            refused = len([line for line in cluster.ledger if line.refused])
            gradient = torch.full((LAYOUT.numel,), float("nan")) if kind == "poison" else noise(number)
            cluster.push(worker, now, gradient, **changes)
            handed_in += len([line for line in cluster.ledger if line.refused]) == refused
        elif kind == "leave" and member is not None and len(coordinator.live) > 1:
            cluster.leave(worker, now)
        elif kind == "back" and member is None and coordinator.attendance.refuses(worker) is None:
            cluster.join(worker, now)
        elif kind == "pause":
            coordinator.pause(worker, now)
        elif kind == "resume":
            coordinator.resume(worker, now)
        cluster.flush(now)
        applied = [line for line in cluster.ledger if line.refused is None]
        assert coordinator.model.version == len(applied)
        assert len(applied) + len(cluster.merging.held) == handed_in
    for _ in range(400):
        deadline = coordinator.deadline()
        now = max(now + 0.5, deadline or 0.0)
        cluster.flush(now)
        computing_now = [n for n, member in coordinator.attendance.live.items() if member.state == "computing"]
        if coordinator.finished or not coordinator.live:
            break
        assert computing_now or deadline is not None or coordinator.ready(now), "nobody is left to wait for"
        if computing_now:
            cluster.push(computing_now[0], now, noise(1))
    assert coordinator.finished or not coordinator.live
    assert cluster.merging.held == {}
    keys = [(line.worker, line.session, line.sequence) for line in cluster.ledger]
    assert len(keys) == len(set(keys)), "a push was settled twice"
    assert sum(totals.steps for totals in coordinator.totals.values()) == sum(
        line.steps for line in cluster.ledger if line.refused is None
    )
    assert torch.isfinite(cluster.theta).all()
    return cluster


@settings(max_examples=150, deadline=None)
@given(events=st.lists(EVENT, max_size=50), policy=POLICY)
def test_any_order_of_events_merges_each_push_once_and_comes_to_an_end(
    events: list[tuple[str, int, float]], policy: dict[str, Any]
) -> None:
    first, second = play(events, policy), play(events, policy)
    assert torch.equal(first.theta, second.theta)
    assert [line.worker for line in first.ledger] == [line.worker for line in second.ledger]
