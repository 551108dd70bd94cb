from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.outer import (
    Buffer,
    DelayedNesterov,
    HeLoCo,
    LookAhead,
    Momentum,
    MomentumRestart,
    Nesterov,
    OuterOptimizer,
)

PER_PUSH = {
    "Momentum": lambda: Momentum(0.3),
    "Nesterov": lambda: Nesterov(0.3),
    "LookAhead": lambda: LookAhead(0.3),
    "HeLoCo": lambda: HeLoCo(LookAhead(0.3)),
}
PERIODIC = {"DelayedNesterov": DelayedNesterov, "Buffer": Buffer}


def set_up(outer_optimizer: OuterOptimizer, theta: torch.Tensor, workers: int) -> OuterOptimizer:
    outer_optimizer.setup(theta, {"w": theta}, workers)
    return outer_optimizer


@pytest.mark.parametrize("name", [*PER_PUSH, *PERIODIC])
@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**16))
def test_momentum_is_reset_after_every_s_steps(name: str, every: int, workers: int, count: int, seed: int) -> None:
    """Equals a new outer optimizer on the same model after every S steps. With a period, N pushes are one step."""
    make = {**PER_PUSH, **PERIODIC}[name]
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(5, generator=generator)
    expected = theta.clone()
    outer_optimizer = set_up(MomentumRestart(make(), every), theta, workers)
    for number in range(count):
        if number % (every * (workers if name in PERIODIC else 1)) == 0:
            fresh = set_up(make(), expected, workers)
        push = torch.randn(5, generator=generator)
        outer_optimizer.step(push, {"w": push})
        fresh.step(push, {"w": push})
        assert torch.equal(theta, expected)


def test_period_ended_by_a_change_of_workers_counts_as_a_step() -> None:
    theta = torch.zeros(1)
    outer_optimizer = set_up(MomentumRestart(DelayedNesterov(), every=2), theta, workers=2)
    assert outer_optimizer.momentum_buffer is not None
    for _ in range(3):
        outer_optimizer.step(torch.ones(1), {})
    assert outer_optimizer.momentum_buffer.any()
    outer_optimizer.set_workers(1)
    assert not outer_optimizer.momentum_buffer.any()


def test_state_with_more_steps_than_the_new_interval_resets_the_momentum() -> None:
    saved = set_up(MomentumRestart(LookAhead(0.3), every=5), torch.zeros(1), 1)
    for _ in range(3):
        saved.step(torch.ones(1), {})
    outer_optimizer = set_up(MomentumRestart(LookAhead(0.3), every=3), torch.zeros(1), 1)
    outer_optimizer.load_state_dict(saved.state_dict())
    assert outer_optimizer.momentum_buffer is not None
    assert not outer_optimizer.momentum_buffer.any()
    assert outer_optimizer.state_dict()["steps"] == 0


def test_wrappers_report_the_properties_of_the_wrapped_optimizer() -> None:
    for inner in (LookAhead(0.3), DelayedNesterov()):
        outer_optimizer = set_up(MomentumRestart(HeLoCo(inner), 3), torch.zeros(1), 2)
        assert outer_optimizer.averages_pushes is inner.averages_pushes
        assert outer_optimizer.momentum_buffer is not None
        outer_optimizer.step(torch.ones(1), {})
        assert outer_optimizer.in_period is inner.averages_pushes
