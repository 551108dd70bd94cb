from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.outer import DelayedNesterov
from lightning_async_localsgd.outer.base import CHUNK


def ready(rule: DelayedNesterov, theta: torch.Tensor, workers: int) -> DelayedNesterov:
    rule.setup(theta, {"w": theta}, workers)
    return rule


def algorithm_3(
    theta: torch.Tensor, pushes: list[torch.Tensor], lr: float, beta: float, period: int, c: float, workers: int
) -> torch.Tensor:
    """The paper's listing, in fp64, word for word."""
    theta = theta.double().clone()
    m, delta = torch.zeros_like(theta), torch.zeros_like(theta)
    eps = lr * period / workers
    for t, push in enumerate(pushes):
        g = push.double()
        delta += g
        if (t + 1) % period == 0:
            m = beta * m + delta / period
            theta -= eps * ((1 - c * period + c) * beta * m + g / period)
            delta.zero_()
        else:
            theta -= eps * (c * beta * m + g / period)
    return theta


rules = st.tuples(
    st.floats(0.01, 2.0),  # lr
    st.floats(0.0, 0.99),  # momentum
    st.integers(1, 6),  # period
    st.floats(0.0, 1.0),  # activation, as a share of 1/period
    st.integers(1, 6),  # workers
    st.integers(0, 2**16),  # seed
)


@settings(max_examples=60, deadline=None)
@given(rules, st.integers(1, 20))
def test_equals_the_paper_s_listing(values: tuple[float, float, int, float, int, int], count: int) -> None:
    lr, momentum, period, share, workers, seed = values
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(5, generator=generator)
    pushes = [torch.randn(5, generator=generator) for _ in range(count)]
    expected = algorithm_3(theta, pushes, lr, momentum, period, share / period, workers)
    rule = ready(DelayedNesterov(lr, momentum, period, share / period), theta, workers)
    for push in pushes:
        rule.step(push, {})
    torch.testing.assert_close(theta.double(), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(rules, st.integers(1, 4))
def test_a_period_of_pushes_is_one_nesterov_step_on_their_mean(
    values: tuple[float, float, int, float, int, int], periods: int
) -> None:
    """With c = 0 always; with any c in the first period (momentum at rest), but for the last push's smaller weight."""
    lr, momentum, period, share, _, seed = values
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(7, generator=generator)
    rule = ready(DelayedNesterov(lr, momentum, "auto", share / period if periods == 1 else 0.0), theta, period)
    start = theta.clone()
    mean_steps = torch.nn.Parameter(theta.clone())
    sgd = torch.optim.SGD([mean_steps], lr=lr, momentum=momentum, nesterov=momentum > 0)
    for _ in range(periods):
        pushes = [torch.randn(7, generator=generator) for _ in range(period)]
        for push in pushes:
            rule.step(push, {})
        mean_steps.grad = torch.stack(pushes).mean(0)
        sgd.step()
    if share == 0.0 or periods > 1 or period == 1:
        torch.testing.assert_close(theta, mean_steps.detach(), rtol=1e-4, atol=1e-4)
    else:
        # The weights of one period's momentum are c for N - 1 pushes (still zero here) and 1 - c*N + c for the last.
        c = share / period
        mean = torch.stack(pushes).mean(0)
        expected = start - lr * (mean + (1 - c * period + c) * momentum * mean)
        torch.testing.assert_close(theta, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.floats(0.0, 1.0), st.floats(0.0, 0.99))
def test_momentum_s_weights_in_a_period_sum_to_one(period: int, share: float, momentum: float) -> None:
    """With a constant momentum (m = beta*m + mean keeps m), N pushes move exactly like one Nesterov step, for any c."""
    theta = torch.zeros(1, dtype=torch.float32)
    rule = ready(DelayedNesterov(1.0, momentum, period, share / period), theta, period)
    mean = 1.0 - momentum
    rule._m.fill_(1.0)  # Fixed point of m = beta*m + (1 - beta).
    for _ in range(period):
        rule.step(torch.tensor([mean]), {})
    assert float(theta) == pytest.approx(-(mean + momentum), rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 300),
    st.floats(0.01, 2.0),
    st.floats(0.01, 0.99),
    st.integers(0, 2**16),
)
def test_period_one_is_torch_nesterov_bit_for_bit(size: int, lr: float, momentum: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(size, generator=generator)
    theta[::5] = -0.0
    parameter = torch.nn.Parameter(theta.clone())
    sgd = torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=True)
    rule = ready(DelayedNesterov(lr, momentum, period=1), theta, workers=1)
    for _ in range(4):
        push = torch.randn(size, generator=generator)
        push[::5] = -0.0
        rule.step(push, {})
        parameter.grad = push
        sgd.step()
        assert torch.equal(theta.view(torch.int32), parameter.detach().view(torch.int32))


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, 2 * CHUNK + 17])
def test_chunks_change_no_bit(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    theta = torch.randn(size, generator=generator)
    parameter = torch.nn.Parameter(theta.clone())
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    rule = ready(DelayedNesterov(period=1), theta, workers=1)
    for _ in range(2):
        push = torch.randn(size, generator=generator)
        rule.step(push, {})
        parameter.grad = push
        sgd.step()
    assert torch.equal(theta, parameter.detach())


@settings(max_examples=25, deadline=None)
@given(rules, st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_same_events_same_bits(values: tuple[float, float, int, float, int, int], members: list[int]) -> None:
    lr, momentum, period, share, workers, seed = values
    outcomes = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(seed)
        theta = torch.randn(33, generator=generator)
        rule = ready(DelayedNesterov(lr, momentum, period, share / period), theta, workers)
        for count in members:
            rule.set_workers(count)
            rule.step(torch.randn(33, generator=generator), {})
        outcomes.append(theta)
    assert torch.equal(*outcomes)


def test_the_size_of_a_round_does_not_depend_on_the_period() -> None:
    """k equal pushes move the model by lr*g, momentum aside, whatever N is."""
    for period in (1, 2, 3, 4, 8):
        theta = torch.zeros(3)
        rule = ready(DelayedNesterov(lr=0.5, momentum=0.0, period=period), theta, workers=4)
        for _ in range(4):
            rule.step(torch.ones(3), {})
        torch.testing.assert_close(theta, torch.full((3,), -0.5))


def test_each_gradient_counts_once() -> None:
    theta = torch.zeros(1)
    rule = ready(DelayedNesterov(lr=1.0, momentum=0.9), theta, workers=4)
    for _ in range(4):
        rule.step(torch.ones(1), {})
    assert float(theta) == pytest.approx(-1.9)


@pytest.mark.parametrize("activation", [0.0, 0.2])
def test_membership_change_closes_the_period(activation: float) -> None:
    theta = torch.zeros(1)
    rule = ready(DelayedNesterov(lr=0.8, momentum=0.5, activation=activation), theta, workers=4)
    for push in (1.0, 3.0):
        rule.step(torch.tensor([push]), {})
    assert float(theta) == pytest.approx(-0.8 / 4 * 4.0)
    before = float(theta)
    rule.set_workers(3)
    assert rule.momentum_buffer is not None
    assert float(rule.momentum_buffer) == pytest.approx(2.0)
    assert float(theta) == pytest.approx(before - 0.8 * (1 - 2 * activation) * 0.5 * 2.0)
    # The new period has three pushes and takes each of them with lr/3.
    before = float(theta)
    m = 2.0
    for push in (1.0, 1.0, 1.0):
        rule.step(torch.tensor([push]), {})
    new = 0.5 * m + 1.0
    moved = 0.8 * (1.0 + 0.5 * (2 * activation * m + (1 - 2 * activation) * new))
    assert float(theta) == pytest.approx(before - moved)


def test_membership_change_between_periods_moves_nothing() -> None:
    theta = torch.zeros(1)
    rule = ready(DelayedNesterov(), theta, workers=2)
    rule.step(torch.ones(1), {})
    rule.step(torch.ones(1), {})
    before = theta.clone()
    rule.set_workers(5)
    rule.set_workers(5)
    assert torch.equal(theta, before)


def test_more_workers_than_the_activation_allows_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    theta = torch.zeros(1)
    rule = ready(DelayedNesterov(activation=0.5), theta, workers=2)
    rule.set_workers(4)
    rule.set_workers(3)
    assert [record.getMessage() for record in caplog.records] == [
        "DelayedNesterov: activation=0.5 is more than 1/4 now that there are 4 workers; 1/4 is used while they are that"
        " many"
    ]
    for _ in range(30):
        rule.step(torch.ones(1), {})
    assert torch.isfinite(theta).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr must be a number > 0, got 0.0"),
        ({"lr": -1}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"lr": "0.7"}, "lr"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"period": 0}, 'period must be an integer >= 1 or "auto", got 0'),
        ({"period": "all"}, "period.*'all'"),
        ({"period": 2.0}, "period"),
        ({"period": True}, "period"),
        ({"activation": -0.1}, "activation"),
        ({"activation": 1.1}, "activation"),
        ({"activation": 0.5, "period": 4}, r"activation must be in \[0, 1/period\] = \[0, 0.25\].*got 0.5"),
    ],
)
def test_bad_hyperparameters_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DelayedNesterov(**arguments)


def test_activation_is_checked_against_the_workers() -> None:
    rule = DelayedNesterov(activation=0.3)
    with pytest.raises(ValueError, match=r"\[0, 0.25\].*got 0.3"):
        ready(rule, torch.zeros(1), workers=4)
    ready(DelayedNesterov(activation=1 / 3), torch.zeros(1), workers=3)


def test_restored_by_name_in_another_order() -> None:
    def make(order: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], DelayedNesterov]:
        theta = torch.zeros(5)
        parts = {"a": 2, "b": 3}
        views, offset = {}, 0
        for name in order:
            views[name] = theta[offset : offset + parts[name]]
            offset += parts[name]
        rule = DelayedNesterov(period=3)
        rule.setup(theta, views, 2)
        return theta, views, rule

    _, _, one = make("ab")
    for _ in range(4):
        one.step(torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0]), {})
    _, _, other = make("ba")
    other.load_state_dict(one.state_dict())
    assert other.momentum_buffer is not None
    torch.testing.assert_close(other.momentum_buffer, torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0]))
    assert other.state_dict()["pushes"] == 4
    assert other.state_dict()["collected"] == 1


def test_state_of_a_period_with_other_workers_is_closed() -> None:
    theta = torch.zeros(1)
    one = ready(DelayedNesterov(lr=0.8, momentum=0.5), theta, workers=4)
    one.step(torch.ones(1), {})
    restored = theta.clone()
    other = ready(DelayedNesterov(lr=0.8, momentum=0.5), restored, workers=2)
    other.load_state_dict(one.state_dict())
    one.set_workers(2)
    assert torch.equal(theta, restored)
    assert other.state_dict() == one.state_dict()
    assert other.state_dict()["collected"] == 0


def test_bad_states_change_nothing() -> None:
    theta = torch.ones(2)
    rule = ready(DelayedNesterov(), theta, workers=2)
    rule.step(torch.ones(2), {})
    good = rule.state_dict()
    good["momentum"]["w"] = torch.full((2,), 5.0)
    for key in good:
        with pytest.raises(ValueError, match=key):
            rule.load_state_dict({name: value for name, value in good.items() if name != key})
    assert rule.momentum_buffer is not None
    assert not rule.momentum_buffer.any()


def test_recipe_is_cheap_to_copy_and_pickle() -> None:
    rule = DelayedNesterov(lr=0.5, activation=0.25, period=3)
    for again in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert repr(again) == "DelayedNesterov(lr=0.5, momentum=0.9, period=3, activation=0.25)"


def test_replaces_model_only_where_it_does() -> None:
    for lr, momentum, workers, expected in [
        (1.0, 0.0, 1, True),
        (1.0, 0.0, 2, False),
        (0.7, 0.0, 1, False),
        (1.0, 0.9, 1, False),
    ]:
        rule = ready(DelayedNesterov(lr, momentum, period=3), torch.ones(2), workers)
        assert rule.replaces_model is expected


def test_use_before_setup_is_an_error() -> None:
    rule = DelayedNesterov()
    with pytest.raises(RuntimeError, match="before setup"):
        rule.step(torch.zeros(1), {})
    with pytest.raises(RuntimeError, match="before setup"):
        rule.state_dict()
