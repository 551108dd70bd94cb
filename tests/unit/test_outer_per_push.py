"""SGD, Momentum, Nesterov, Adam: torch's classes, stepped once per push."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.outer import SGD, Adam, LookAhead, Momentum, Nesterov, OuterOptimizer
from lightning_async_localsgd.outer.torch_optimizer import TorchOptimizer

PAIRS = {
    "SGD": (lambda: SGD(lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
    "Momentum": (lambda: Momentum(0.3, 0.8), lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8)),
    "Nesterov": (lambda: Nesterov(0.3, 0.8), lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8, nesterov=True)),
    "Adam": (
        lambda: Adam(0.3, (0.8, 0.95), 1e-3),
        lambda p: torch.optim.Adam(p, lr=0.3, betas=(0.8, 0.95), eps=1e-3),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch_bit_for_bit_whatever_the_workers(name: str) -> None:
    make, torchs = PAIRS[name]
    rule: OuterOptimizer = make()
    theta = torch.linspace(-1.0, 1.0, 9)
    views = {"a": theta[:6].view(2, 3), "b": theta[6:]}
    parameters = [torch.nn.Parameter(view.clone()) for view in views.values()]
    optimizer = torchs(parameters)
    rule.setup(theta, views, workers=4)
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        gradient = torch.randn(9, generator=generator)
        gradient[::4] = -0.0
        rule.step(gradient, {"a": gradient[:6].view(2, 3), "b": gradient[6:]})
        rule.set_workers(1 + number)
        parameters[0].grad, parameters[1].grad = gradient[:6].view(2, 3).clone(), gradient[6:].clone()
        optimizer.step()
        expected = torch.cat([parameter.detach().flatten() for parameter in parameters])
        assert torch.equal(theta.view(torch.int32), expected.view(torch.int32))
        key = {"Momentum": "momentum_buffer", "Nesterov": "momentum_buffer", "Adam": "exp_avg"}.get(name)
        if key is not None:
            momentum = torch.cat([optimizer.state[parameter][key].flatten() for parameter in parameters])
            assert rule.momentum_buffer is not None
            assert torch.equal(rule.momentum_buffer, momentum)


def test_momentum_of_a_parameter_that_nobody_moved_is_zero() -> None:
    theta = torch.zeros(3)
    rule = Nesterov(lr=0.1)
    rule.setup(theta, {"a": theta[:1], "b": theta[1:]}, 2)
    momentum = rule.momentum_buffer
    assert momentum is not None
    gradient = torch.tensor([1.0, 0.0, 0.0])
    rule.step(gradient, {"a": gradient[:1], "b": gradient[1:]})
    assert rule.momentum_buffer is momentum
    assert momentum.tolist() == [1.0, 0.0, 0.0]
    # The momentum is the optimizer's own, restored ones included.
    other = Nesterov(lr=0.1)
    other.setup(theta, {"a": theta[:1], "b": theta[1:]}, 2)
    other.load_state_dict(rule.state_dict())
    assert other.momentum_buffer is not None
    assert other.momentum_buffer.tolist() == [1.0, 0.0, 0.0]
    other.step(gradient, {"a": gradient[:1], "b": gradient[1:]})
    assert other.momentum_buffer.tolist() == pytest.approx([1.9, 0.0, 0.0])
    assert momentum.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("make", [lambda: Momentum(0.3), lambda: Nesterov(0.3)], ids=["Momentum", "Nesterov"])
def test_a_restarted_momentum_is_a_fresh_one_bit_for_bit(make: type[OuterOptimizer]) -> None:
    theta = torch.zeros(4)
    rule = make()
    rule.setup(theta, {"w": theta}, 1)
    generator = torch.Generator().manual_seed(1)
    pushes = torch.randn(6, 4, generator=generator)
    for push in pushes[:3]:
        rule.step(push, {"w": push})
    rule.restart_momentum()
    again = theta.clone()
    fresh = make()
    fresh.setup(again, {"w": again}, 1)
    for push in pushes[3:]:
        rule.step(push, {"w": push})
        fresh.step(push, {"w": push})
    assert torch.equal(theta, again)


def test_an_optimizer_that_makes_its_momentum_anew_is_followed() -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
            super().__init__(parameters, {"lr": 1.0})

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    before = self.state[parameter].get("exp_avg", torch.zeros_like(parameter))
                    self.state[parameter]["exp_avg"] = before + parameter.grad

    theta = torch.zeros(2)
    rule = TorchOptimizer(Own)
    rule.setup(theta, {"w": theta}, 1)
    for _ in range(3):
        rule.step(torch.ones(2), {"w": torch.ones(2)})
    assert rule.momentum_buffer is not None
    assert rule.momentum_buffer.tolist() == [3.0, 3.0]


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 2.0), st.floats(0.0, 0.99), st.integers(1, 12), st.integers(0, 2**16))
def test_look_ahead_is_its_formula(lr: float, momentum: float, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(5, generator=generator)
    expected, m = theta.double(), torch.zeros(5, dtype=torch.float64)
    rule = LookAhead(lr, momentum)
    rule.setup(theta, {"w": theta}, workers=3)
    for _ in range(count):
        push = torch.randn(5, generator=generator)
        rule.step(push, {})
        m = momentum * m + (1 - momentum) * push.double()
        expected = expected - lr * (momentum * m + push.double())
        rule.set_workers(2)
    torch.testing.assert_close(theta.double(), expected, rtol=1e-4, atol=1e-4)
    assert rule.momentum_buffer is not None
    torch.testing.assert_close(rule.momentum_buffer.double(), m, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 2.0), st.floats(0.0, 0.95))
def test_look_ahead_s_steady_gain(lr: float, momentum: float) -> None:
    """eta*(1 + gamma), against eta/(1 - beta) of classic momentum."""
    gains = []
    for rule in (LookAhead(lr, momentum), Nesterov(lr, momentum)):
        theta = torch.zeros(1)
        rule.setup(theta, {"w": theta}, workers=1)
        for _ in range(200):
            theta.zero_()
            rule.step(torch.ones(1), {"w": torch.ones(1)})
        gains.append(-float(theta))
    assert gains == pytest.approx([lr * (1 + momentum), lr / (1 - momentum)], rel=1e-3)


def test_chunks_change_no_bit_of_look_ahead() -> None:
    from lightning_async_localsgd.outer.base import CHUNK

    size = CHUNK + 3
    generator = torch.Generator().manual_seed(size)
    theta = torch.randn(size, generator=generator)
    push = torch.randn(size, generator=generator)
    ends = theta[-10:].clone()
    rule, other = LookAhead(0.3), LookAhead(0.3)
    rule.setup(theta, {"w": theta}, 1)
    other.setup(ends, {"w": ends}, 1)
    for _ in range(2):
        rule.step(push, {})
        other.step(push[-10:], {})
    assert torch.equal(theta[-10:], ends)
