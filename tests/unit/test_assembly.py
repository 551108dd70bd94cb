"""The coordinator that comes of a run's settings is the one that they describe."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_async_localsgd import DelayedNesterov, ExchangeOptions, MergeOptions
from lightning_async_localsgd.assembly import build_coordinator
from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.grace import GraceWindow
from lightning_async_localsgd.layout import Layout
from lightning_async_localsgd.messages import PROTOCOL_VERSION, Hello, Push
from lightning_async_localsgd.outer import SGD, OuterOptimizer
from lightning_async_localsgd.plan import RunBudget
from lightning_async_localsgd.settings import PhaseSettings
from lightning_async_localsgd.staleness import Polynomial

LAYOUT = Layout.of(nn.Linear(3, 2))


def described(rule: OuterOptimizer | None = None, total: int | None = 100, **changes: object) -> PhaseSettings:
    options: dict[str, object] = {
        "local_steps": 10,
        "rule": rule or SGD(lr=1.0),
        "dynamic_local_steps": False,
        "grace": GraceWindow(0.0),
        "exchange": ExchangeOptions(),
        "start_timeout": 1.0,
        "silence_timeout": 1.0,
        "budget": RunBudget(total, None),
    }
    return PhaseSettings(**{**options, **changes})  # type: ignore[arg-type]


def begin(coordinator: Coordinator, workers: int) -> None:
    for worker in range(workers):
        assert coordinator.join(Hello(PROTOCOL_VERSION, worker, f"s{worker}", LAYOUT.fingerprint), 0.0) is None
    coordinator.dispatch(0.0)


def push(coordinator: Coordinator, worker: int, value: float, sequence: int = 1, base: int = 0) -> set[int]:
    header = Push(worker, f"s{worker}", sequence, coordinator.incarnation, base, 10, 30, 0, 0.0, 0.0, False, False)
    assert coordinator.push(header, torch.full((LAYOUT.numel,), value), 1.0) is None
    return set(coordinator.dispatch(1.0)) if coordinator.ready(1.0) else set()


def test_without_more_it_applies_each_push_at_once_to_a_model_of_zeros() -> None:
    coordinator = build_coordinator(described(), LAYOUT, 2, "name")
    assert coordinator.incarnation == "name"
    assert not coordinator.model.theta.any()
    begin(coordinator, 2)
    assert push(coordinator, 1, 2.0) == {1}
    assert coordinator.model.version == 1
    assert (coordinator.budget.total, coordinator.budget.done) == (100, 10)


def test_quorum_warm_up_staleness_and_merge_reach_it() -> None:
    options = MergeOptions(clip_norm=1e-3, quorum_seconds=7.0)
    coordinator = build_coordinator(described(quorum="all", merge=options), LAYOUT, 2, "name")
    begin(coordinator, 2)
    assert push(coordinator, 1, 2.0) == set()
    assert coordinator.deadline() == 8.0
    assert push(coordinator, 0, 2.0) == {0, 1}
    assert float(coordinator.model.theta.norm()) == pytest.approx(1e-3)

    coordinator = build_coordinator(described(DelayedNesterov(), warmup_steps=50), LAYOUT, 2, "name")
    begin(coordinator, 2)
    assert push(coordinator, 1, 2.0) == set()

    coordinator = build_coordinator(described(staleness=Polynomial(power=1.0)), LAYOUT, 2, "name")
    begin(coordinator, 2)
    assert push(coordinator, 1, 2.0) == {1}
    assert push(coordinator, 0, 2.0) == {0}
    torch.testing.assert_close(coordinator.model.theta, torch.full((LAYOUT.numel,), -3.0))


@pytest.mark.parametrize(("exact", "limited"), [(False, True), (True, False)])
def test_what_is_plain_training_leaves_out_no_step(exact: bool, limited: bool) -> None:
    coordinator = build_coordinator(described(total=None), LAYOUT, 1, "name", exact=exact)
    begin(coordinator, 1)
    for sequence in range(1, 31):
        push(coordinator, 0, 1.0, sequence, sequence - 1)
    push(coordinator, 0, 1e6, 31, 30)
    assert (coordinator.model.version == 30) == limited


def test_a_model_that_is_rounded_is_not_exact() -> None:
    layout = Layout.of(nn.Linear(3, 2).bfloat16())
    coordinator = build_coordinator(described(total=None), layout, 1, "name", exact=True)
    begin(coordinator, 1)
    for sequence in range(1, 31):
        push(coordinator, 0, 1.0, sequence, sequence - 1)
    push(coordinator, 0, 1e6, 31, 30)
    assert coordinator.model.version == 30


def test_a_rule_that_does_not_fit_the_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="activation"):
        build_coordinator(described(DelayedNesterov(activation=0.6)), LAYOUT, 2, "name")
