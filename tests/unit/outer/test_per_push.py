"""SGD, Momentum, Nesterov, Adam and LookAhead, which take one step per push."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.outer import SGD, Adam, LookAhead, Momentum, Nesterov, OuterOptimizer
from lightning_async_localsgd.outer.base import CHUNK
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
def test_equals_torch_bit_for_bit_for_any_number_of_workers(name: str) -> None:
    make, make_torch = PAIRS[name]
    outer_optimizer: OuterOptimizer = make()
    theta = torch.linspace(-1.0, 1.0, 9)
    views = {"a": theta[:6].view(2, 3), "b": theta[6:]}
    parameters = [torch.nn.Parameter(view.clone()) for view in views.values()]
    optimizer = make_torch(parameters)
    outer_optimizer.setup(theta, views, workers=4)
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        gradient = torch.randn(9, generator=generator)
        gradient[::4] = -0.0
        outer_optimizer.step(gradient, {"a": gradient[:6].view(2, 3), "b": gradient[6:]})
        outer_optimizer.set_workers(1 + number)
        parameters[0].grad, parameters[1].grad = gradient[:6].view(2, 3).clone(), gradient[6:].clone()
        optimizer.step()
        expected = torch.cat([parameter.detach().flatten() for parameter in parameters])
        assert torch.equal(theta.view(torch.int32), expected.view(torch.int32))
        key = {"Momentum": "momentum_buffer", "Nesterov": "momentum_buffer", "Adam": "exp_avg"}.get(name)
        if key is not None:
            momentum = torch.cat([optimizer.state[parameter][key].flatten() for parameter in parameters])
            assert outer_optimizer.momentum_buffer is not None
            assert torch.equal(outer_optimizer.momentum_buffer, momentum)


def test_momentum_of_an_unchanged_parameter_is_zero() -> None:
    theta = torch.zeros(3)
    outer_optimizer = Nesterov(lr=0.1)
    outer_optimizer.setup(theta, {"a": theta[:1], "b": theta[1:]}, 2)
    momentum = outer_optimizer.momentum_buffer
    assert momentum is not None
    gradient = torch.tensor([1.0, 0.0, 0.0])
    outer_optimizer.step(gradient, {"a": gradient[:1], "b": gradient[1:]})
    assert outer_optimizer.momentum_buffer is momentum
    assert momentum.tolist() == [1.0, 0.0, 0.0]
    # After a restore, too, the buffer is the momentum that the torch optimizer uses.
    restored = Nesterov(lr=0.1)
    restored.setup(theta, {"a": theta[:1], "b": theta[1:]}, 2)
    restored.load_state_dict(outer_optimizer.state_dict())
    assert restored.momentum_buffer is not None
    assert restored.momentum_buffer.tolist() == [1.0, 0.0, 0.0]
    restored.step(gradient, {"a": gradient[:1], "b": gradient[1:]})
    assert restored.momentum_buffer.tolist() == pytest.approx([1.9, 0.0, 0.0])
    assert momentum.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("make", [lambda: Momentum(0.3), lambda: Nesterov(0.3)], ids=["Momentum", "Nesterov"])
def test_restarted_momentum_equals_a_new_one_bit_for_bit(make: type[OuterOptimizer]) -> None:
    theta = torch.zeros(4)
    outer_optimizer = make()
    outer_optimizer.setup(theta, {"w": theta}, 1)
    generator = torch.Generator().manual_seed(1)
    pushes = torch.randn(6, 4, generator=generator)
    for push in pushes[:3]:
        outer_optimizer.step(push, {"w": push})
    outer_optimizer.restart_momentum()
    fresh_theta = theta.clone()
    fresh = make()
    fresh.setup(fresh_theta, {"w": fresh_theta}, 1)
    for push in pushes[3:]:
        outer_optimizer.step(push, {"w": push})
        fresh.step(push, {"w": push})
    assert torch.equal(theta, fresh_theta)


def test_momentum_buffer_follows_an_optimizer_that_replaces_its_tensor() -> None:
    class Replacing(torch.optim.Optimizer):
        def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
            super().__init__(parameters, {"lr": 1.0})

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    before = self.state[parameter].get("exp_avg", torch.zeros_like(parameter))
                    self.state[parameter]["exp_avg"] = before + parameter.grad

    theta = torch.zeros(2)
    outer_optimizer = TorchOptimizer(Replacing)
    outer_optimizer.setup(theta, {"w": theta}, 1)
    for _ in range(3):
        outer_optimizer.step(torch.ones(2), {"w": torch.ones(2)})
    assert outer_optimizer.momentum_buffer is not None
    assert outer_optimizer.momentum_buffer.tolist() == [3.0, 3.0]


@settings(max_examples=40)
@given(st.floats(0.01, 2.0), st.floats(0.0, 0.99), st.integers(1, 12), st.integers(0, 2**16))
def test_look_ahead_equals_its_equations(lr: float, momentum: float, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(5, generator=generator)
    expected, m = theta.double(), torch.zeros(5, dtype=torch.float64)
    outer_optimizer = LookAhead(lr, momentum)
    outer_optimizer.setup(theta, {"w": theta}, workers=3)
    for _ in range(count):
        push = torch.randn(5, generator=generator)
        outer_optimizer.step(push, {})
        m = momentum * m + (1 - momentum) * push.double()
        expected = expected - lr * (momentum * m + push.double())
        outer_optimizer.set_workers(2)
    torch.testing.assert_close(theta.double(), expected, rtol=1e-4, atol=1e-4)
    assert outer_optimizer.momentum_buffer is not None
    torch.testing.assert_close(outer_optimizer.momentum_buffer.double(), m, rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(st.floats(0.01, 2.0), st.floats(0.0, 0.95))
def test_look_ahead_steady_movement(lr: float, momentum: float) -> None:
    """It is eta*(1 + gamma), compared with eta/(1 - beta) for classic momentum."""
    movements = []
    for outer_optimizer in (LookAhead(lr, momentum), Nesterov(lr, momentum)):
        theta = torch.zeros(1)
        outer_optimizer.setup(theta, {"w": theta}, workers=1)
        for _ in range(200):
            theta.zero_()
            outer_optimizer.step(torch.ones(1), {"w": torch.ones(1)})
        movements.append(-float(theta))
    assert movements == pytest.approx([lr * (1 + momentum), lr / (1 - momentum)], rel=1e-3)


def test_chunks_do_not_change_bits_of_look_ahead() -> None:
    size = CHUNK + 3
    generator = torch.Generator().manual_seed(size)
    theta = torch.randn(size, generator=generator)
    push = torch.randn(size, generator=generator)
    ends = theta[-10:].clone()
    whole, last = LookAhead(0.3), LookAhead(0.3)
    whole.setup(theta, {"w": theta}, 1)
    last.setup(ends, {"w": ends}, 1)
    for _ in range(2):
        whole.step(push, {})
        last.step(push[-10:], {})
    assert torch.equal(theta[-10:], ends)
