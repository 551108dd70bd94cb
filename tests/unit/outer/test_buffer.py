from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.outer import Buffer
from lightning_async_localsgd.outer.base import CHUNK


def set_up(outer_optimizer: Buffer, theta: torch.Tensor, workers: int) -> Buffer:
    outer_optimizer.setup(theta, {"w": theta}, workers)
    return outer_optimizer


@settings(max_examples=50)
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
    """With N = k this is synchronous DiLoCo, written with torch's optimizer."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(7, generator=generator)
    parameter = torch.nn.Parameter(theta.clone())
    diloco = torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=True)
    outer_optimizer = set_up(Buffer(lr, momentum, "auto" if period == workers else period), theta, workers)
    for _ in range(rounds):
        total = None
        for _ in range(period):
            assert torch.equal(theta, parameter.detach())
            push = torch.randn(7, generator=generator)
            push[0] = -0.0
            outer_optimizer.step(push, {})
            total = push.clone() if total is None else total + push
        assert total is not None
        parameter.grad = total / period
        diloco.step()
        assert torch.equal(theta.view(torch.int32), parameter.detach().view(torch.int32))


def test_model_does_not_change_before_the_period_is_full() -> None:
    theta = torch.ones(1)
    outer_optimizer = set_up(Buffer(lr=1.0, momentum=0.5), theta, workers=3)
    for _ in range(2):
        outer_optimizer.step(torch.ones(1), {})
    assert float(theta) == 1.0
    assert outer_optimizer.in_period
    outer_optimizer.step(torch.ones(1), {})
    assert float(theta) == pytest.approx(1.0 - 1.5)
    assert not outer_optimizer.in_period


def test_step_is_taken_when_fewer_workers_shorten_the_period() -> None:
    theta = torch.zeros(1)
    outer_optimizer = set_up(Buffer(lr=1.0, momentum=0.5), theta, workers=4)
    for push in (1.0, 3.0):
        outer_optimizer.step(torch.tensor([push]), {})
    outer_optimizer.set_workers(3)
    assert float(theta) == 0.0
    outer_optimizer.set_workers(2)
    assert float(theta) == pytest.approx(-3.0)
    assert not outer_optimizer.in_period
    outer_optimizer.set_workers(1)
    assert float(theta) == pytest.approx(-3.0)


def test_more_workers_extend_the_running_period() -> None:
    theta = torch.zeros(1)
    outer_optimizer = set_up(Buffer(lr=1.0, momentum=0.0), theta, workers=2)
    outer_optimizer.step(torch.ones(1), {})
    outer_optimizer.set_workers(3)
    outer_optimizer.step(torch.ones(1), {})
    assert float(theta) == 0.0
    outer_optimizer.step(torch.tensor([4.0]), {})
    assert float(theta) == pytest.approx(-2.0)


def test_fixed_period_ignores_the_number_of_workers() -> None:
    theta = torch.zeros(1)
    outer_optimizer = set_up(Buffer(lr=1.0, momentum=0.0, period=2), theta, workers=4)
    outer_optimizer.step(torch.ones(1), {})
    for workers in (1, 5):
        outer_optimizer.set_workers(workers)
    assert float(theta) == 0.0
    outer_optimizer.step(torch.ones(1), {})
    assert float(theta) == -1.0


def test_restored_pushes_beyond_a_shorter_period_are_applied() -> None:
    saved = set_up(Buffer(lr=1.0, momentum=0.0, period=4), torch.zeros(1), workers=4)
    for push in (1.0, 2.0, 6.0):
        saved.step(torch.tensor([push]), {})
    theta = torch.zeros(1)
    set_up(Buffer(lr=1.0, momentum=0.0, period=2), theta, workers=4).load_state_dict(saved.state_dict())
    assert float(theta) == pytest.approx(-3.0)


def test_momentum_restart_keeps_the_buffered_pushes() -> None:
    theta = torch.zeros(1)
    outer_optimizer = set_up(Buffer(lr=1.0, momentum=0.5, period=2), theta, workers=2)
    for _ in range(3):
        outer_optimizer.step(torch.ones(1), {})
    before = float(theta)
    outer_optimizer.restart_momentum()
    outer_optimizer.step(torch.ones(1), {})
    assert float(theta) == pytest.approx(before - 1.5)


def test_chunks_do_not_change_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(CHUNK + 17, generator=generator)
    parameter = torch.nn.Parameter(theta.clone())
    diloco = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    outer_optimizer = set_up(Buffer(), theta, workers=2)
    for _ in range(2):
        first, second = torch.randn(2, CHUNK + 17, generator=generator)
        outer_optimizer.step(first, {})
        outer_optimizer.step(second, {})
        parameter.grad = (first + second) / 2
        diloco.step()
    assert torch.equal(theta, parameter.detach())


def test_number_of_workers_is_checked() -> None:
    outer_optimizer = set_up(Buffer(), torch.zeros(1), 1)
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        outer_optimizer.set_workers(0)
