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
COLLECTING = {"DelayedNesterov": DelayedNesterov, "Buffer": Buffer}


def ready(rule: OuterOptimizer, theta: torch.Tensor, workers: int) -> OuterOptimizer:
    rule.setup(theta, {"w": theta}, workers)
    return rule


@pytest.mark.parametrize("name", [*PER_PUSH, *COLLECTING])
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**16))
def test_every_s_steps_begin_anew(name: str, every: int, workers: int, count: int, seed: int) -> None:
    """The same as a fresh rule on the same model after every S steps; N pushes are one step where the rule collects."""
    make = {**PER_PUSH, **COLLECTING}[name]
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(5, generator=generator)
    expected = theta.clone()
    rule = ready(MomentumRestart(make(), every), theta, workers)
    for number in range(count):
        if number % (every * (workers if name in COLLECTING else 1)) == 0:
            fresh = ready(make(), expected, workers)
        push = torch.randn(5, generator=generator)
        rule.step(push, {"w": push})
        fresh.step(push, {"w": push})
        assert torch.equal(theta, expected)


def test_a_period_that_membership_cuts_short_counts() -> None:
    theta = torch.zeros(1)
    rule = ready(MomentumRestart(DelayedNesterov(), every=2), theta, workers=2)
    assert rule.momentum_buffer is not None
    for _ in range(3):
        rule.step(torch.ones(1), {})
    assert rule.momentum_buffer.any()
    rule.set_workers(1)
    assert not rule.momentum_buffer.any()


def test_a_state_with_more_steps_than_now_begins_anew() -> None:
    saved = ready(MomentumRestart(LookAhead(0.3), every=5), torch.zeros(1), 1)
    for _ in range(3):
        saved.step(torch.ones(1), {})
    rule = ready(MomentumRestart(LookAhead(0.3), every=3), torch.zeros(1), 1)
    rule.load_state_dict(saved.state_dict())
    assert rule.momentum_buffer is not None
    assert not rule.momentum_buffer.any()
    assert rule.state_dict()["steps"] == 0


def test_wrappers_say_what_their_rule_says() -> None:
    for inner in (LookAhead(0.3), DelayedNesterov()):
        rule = ready(MomentumRestart(HeLoCo(inner), 3), torch.zeros(1), 2)
        assert rule.collects is inner.collects
        assert rule.momentum_buffer is not None
        rule.step(torch.ones(1), {})
        assert rule.in_period is inner.collects
