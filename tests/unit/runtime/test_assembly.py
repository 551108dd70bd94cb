"""build_coordinator makes the coordinator that the settings describe, and adapt_saved_state fits saved states to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_async_localsgd import DelayedNesterov, MergeOptions
from lightning_async_localsgd.outer import SGD, OuterOptimizer
from lightning_async_localsgd.policies.grace import GraceWindow
from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
from lightning_async_localsgd.policies.plan import RunBudget
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, Hello, Push
from lightning_async_localsgd.runtime.assembly import adapt_saved_state, build_coordinator
from lightning_async_localsgd.runtime.settings import RuntimeSettings
from lightning_async_localsgd.server.coordinator import Coordinator
from lightning_async_localsgd.server.merge_policy import MergePolicy
from lightning_async_localsgd.staleness import Polynomial

LAYOUT = Layout.of(nn.Linear(3, 2))


def settings(
    outer_optimizer: OuterOptimizer | None = None, total: int | None = 100, **changes: object
) -> RuntimeSettings:
    options: dict[str, object] = {
        "pacing": SpeedAwareSteps(10, dynamic=False),
        "outer_optimizer": outer_optimizer or SGD(lr=1.0),
        "grace": GraceWindow(0.0),
        "budget": RunBudget(total, None),
    }
    return RuntimeSettings(**{**options, **changes})  # type: ignore[arg-type]


def start(coordinator: Coordinator, workers: int) -> None:
    for worker in range(workers):
        assert coordinator.join(Hello(PROTOCOL_VERSION, worker, f"s{worker}", LAYOUT.fingerprint), 0.0) is None
    coordinator.dispatch(0.0)


def push(coordinator: Coordinator, worker: int, value: float, sequence: int = 1, base: int = 0) -> set[int]:
    """Push a constant pseudo-gradient, and return the workers that are dispatched after it."""
    header = Push(worker, f"s{worker}", sequence, coordinator.incarnation, base, 10, 30, 0, 0.0, 0.0, False, False)
    assert coordinator.push(header, torch.full((LAYOUT.numel,), value), 1.0) is None
    return set(coordinator.dispatch(1.0)) if coordinator.ready(1.0) else set()


def test_by_default_the_model_is_zero_and_each_push_is_applied_at_once() -> None:
    coordinator = build_coordinator(settings(), LAYOUT, 2, "name")
    assert coordinator.incarnation == "name"
    assert not coordinator.model.theta.any()
    start(coordinator, 2)
    assert push(coordinator, 1, 2.0) == {1}
    assert coordinator.model.version == 1
    assert (coordinator.budget.total, coordinator.budget.done) == (100, 10)


def test_quorum_warmup_staleness_and_merge_options_are_used() -> None:
    options = MergeOptions(clip_norm=1e-3, quorum_seconds=7.0)
    coordinator = build_coordinator(settings(merge=MergePolicy("all", options=options)), LAYOUT, 2, "name")
    start(coordinator, 2)
    assert push(coordinator, 1, 2.0) == set()
    assert coordinator.deadline() == 8.0
    assert push(coordinator, 0, 2.0) == {0, 1}
    assert float(coordinator.model.theta.norm()) == pytest.approx(1e-3)

    coordinator = build_coordinator(settings(DelayedNesterov(), sync_warmup_steps=50), LAYOUT, 2, "name")
    start(coordinator, 2)
    assert coordinator.state_dict()["beginning"] == {"on": True, "steps": 50, "gradients": []}

    coordinator = build_coordinator(settings(merge=MergePolicy(staleness=Polynomial(power=1.0))), LAYOUT, 2, "name")
    start(coordinator, 2)
    assert push(coordinator, 1, 2.0) == {1}
    assert push(coordinator, 0, 2.0) == {0}
    torch.testing.assert_close(coordinator.model.theta, torch.full((LAYOUT.numel,), -3.0))


@pytest.mark.parametrize(("single_worker", "refused"), [(False, True), (True, False)])
def test_plain_training_of_a_single_worker_has_no_norm_limit(single_worker: bool, refused: bool) -> None:
    coordinator = build_coordinator(settings(total=None), LAYOUT, 1, "name", single_worker)
    start(coordinator, 1)
    for sequence in range(1, 31):
        push(coordinator, 0, 1.0, sequence, sequence - 1)
    push(coordinator, 0, 1e6, 31, 30)
    assert (coordinator.model.version == 30) == refused


def test_single_worker_with_a_bf16_model_has_a_norm_limit() -> None:
    # Rounding to bf16 makes it something else than plain training.
    layout = Layout.of(nn.Linear(3, 2).bfloat16())
    coordinator = build_coordinator(settings(total=None), layout, 1, "name", single_worker=True)
    start(coordinator, 1)
    for sequence in range(1, 31):
        push(coordinator, 0, 1.0, sequence, sequence - 1)
    push(coordinator, 0, 1e6, 31, 30)
    assert coordinator.model.version == 30


def test_outer_optimizer_that_does_not_fit_the_number_of_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="activation"):
        build_coordinator(settings(DelayedNesterov(activation=0.6)), LAYOUT, 2, "name")


@pytest.mark.parametrize("virtual", [False, True])
def test_saved_speeds_are_kept_only_in_the_same_kind_of_time(virtual: bool) -> None:
    pacing = {"speeds": {0: 2.0}, "ratios": {0: 1.0}}
    saved = {"initial_workers": 2, "budget": {"done": 10, "total": 100}, "pacing": pacing}
    if virtual:
        saved["simulation"] = {}
    same = adapt_saved_state(saved, RunBudget(100, 50), 2, virtual)
    assert (same["pacing"], same["budget"]) == (pacing, {"done": 10, "total": 100})
    other = adapt_saved_state(saved, RunBudget(100, 50), 2, not virtual)
    assert other["pacing"] == {"speeds": {}, "ratios": {}}


def test_saved_progress_is_scaled_to_the_number_of_workers() -> None:
    saved = {"initial_workers": 2, "budget": {"done": 10}, "pacing": {}}
    assert adapt_saved_state(saved, RunBudget(200, 50), 4, virtual=False)["budget"]["done"] == 20
    assert saved["budget"] == {"done": 10}
