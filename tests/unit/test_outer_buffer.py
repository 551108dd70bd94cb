from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.outer import Buffer
from lightning_async_localsgd.outer.base import CHUNK


def ready(rule: Buffer, theta: torch.Tensor, workers: int) -> Buffer:
    rule.setup(theta, {"w": theta}, workers)
    return rule


@settings(max_examples=50, deadline=None)
@given(
    st.floats(0.01, 2.0),
    st.floats(0.01, 0.99),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 2**16),
)
def test_n_pushes_are_one_nesterov_step_on_their_mean_bit_for_bit(
    lr: float, momentum: float, period: int, workers: int, rounds: int, seed: int
) -> None:
    """With N = k this is synchronous DiLoCo as one would write it by hand."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(7, generator=generator)
    parameter = torch.nn.Parameter(theta.clone())
    diloco = torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=True)
    rule = ready(Buffer(lr, momentum, "auto" if period == workers else period), theta, workers)
    for _ in range(rounds):
        total = None
        for _ in range(period):
            assert torch.equal(theta, parameter.detach())
            push = torch.randn(7, generator=generator)
            push[0] = -0.0
            rule.step(push, {})
            total = push.clone() if total is None else total + push
        assert total is not None
        parameter.grad = total / period
        diloco.step()
        assert torch.equal(theta.view(torch.int32), parameter.detach().view(torch.int32))


def test_nothing_moves_before_the_period_is_full() -> None:
    theta = torch.ones(1)
    rule = ready(Buffer(lr=1.0, momentum=0.5), theta, workers=3)
    for _ in range(2):
        rule.step(torch.ones(1), {})
    assert float(theta) == 1.0
    assert rule.in_period
    rule.step(torch.ones(1), {})
    assert float(theta) == pytest.approx(1.0 - 1.5)
    assert not rule.in_period


def test_fewer_workers_take_the_step_that_is_due() -> None:
    theta = torch.zeros(1)
    rule = ready(Buffer(lr=1.0, momentum=0.5), theta, workers=4)
    for push in (1.0, 3.0):
        rule.step(torch.tensor([push]), {})
    rule.set_workers(3)
    assert float(theta) == 0.0
    rule.set_workers(2)
    assert float(theta) == pytest.approx(-3.0)
    assert not rule.in_period
    rule.set_workers(1)
    assert float(theta) == pytest.approx(-3.0)


def test_more_workers_make_the_running_period_longer() -> None:
    theta = torch.zeros(1)
    rule = ready(Buffer(lr=1.0, momentum=0.0), theta, workers=2)
    rule.step(torch.ones(1), {})
    rule.set_workers(3)
    rule.step(torch.ones(1), {})
    assert float(theta) == 0.0
    rule.step(torch.tensor([4.0]), {})
    assert float(theta) == pytest.approx(-2.0)


def test_a_fixed_period_ignores_membership() -> None:
    theta = torch.zeros(1)
    rule = ready(Buffer(lr=1.0, momentum=0.0, period=2), theta, workers=4)
    rule.step(torch.ones(1), {})
    for workers in (1, 5):
        rule.set_workers(workers)
    assert float(theta) == 0.0
    rule.step(torch.ones(1), {})
    assert float(theta) == -1.0


def test_a_state_with_more_than_this_period_is_applied() -> None:
    saved = ready(Buffer(lr=1.0, momentum=0.0, period=4), torch.zeros(1), workers=4)
    for push in (1.0, 2.0, 6.0):
        saved.step(torch.tensor([push]), {})
    theta = torch.zeros(1)
    ready(Buffer(lr=1.0, momentum=0.0, period=2), theta, workers=4).load_state_dict(saved.state_dict())
    assert float(theta) == pytest.approx(-3.0)


def test_a_restart_keeps_what_is_collected() -> None:
    theta = torch.zeros(1)
    rule = ready(Buffer(lr=1.0, momentum=0.5, period=2), theta, workers=2)
    for _ in range(3):
        rule.step(torch.ones(1), {})
    before = float(theta)
    rule.restart_momentum()
    rule.step(torch.ones(1), {})
    assert float(theta) == pytest.approx(before - 1.5)


def test_chunks_change_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(CHUNK + 17, generator=generator)
    parameter = torch.nn.Parameter(theta.clone())
    diloco = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    rule = ready(Buffer(), theta, workers=2)
    for _ in range(2):
        one, other = torch.randn(2, CHUNK + 17, generator=generator)
        rule.step(one, {})
        rule.step(other, {})
        parameter.grad = (one + other) / 2
        diloco.step()
    assert torch.equal(theta, parameter.detach())


def test_workers_are_checked() -> None:
    rule = ready(Buffer(), torch.zeros(1), 1)
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        rule.set_workers(0)
