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
from lightning_async_localsgd.policies.outer_step import automatic_lr, automatic_momentum


def set_up(outer_optimizer: DelayedNesterov, theta: torch.Tensor, workers: int) -> DelayedNesterov:
    outer_optimizer.setup(theta, {"w": theta}, workers)
    return outer_optimizer


def algorithm_3(
    theta: torch.Tensor, pushes: list[torch.Tensor], lr: float, beta: float, period: int, c: float, workers: int
) -> torch.Tensor:
    """Compute the paper's Algorithm 3 in fp64, line by line."""
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


hyperparameters = st.tuples(
    st.floats(0.01, 2.0),  # lr
    st.floats(0.0, 0.99),  # momentum
    st.integers(1, 6),  # period
    st.floats(0.0, 1.0),  # activation, as a share of 1/period
    st.integers(1, 6),  # workers
    st.integers(0, 2**16),  # seed
)


@settings(max_examples=60)
@given(hyperparameters, st.integers(1, 20))
def test_equals_algorithm_3_of_the_paper(values: tuple[float, float, int, float, int, int], count: int) -> None:
    lr, momentum, period, share, workers, seed = values
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(5, generator=generator)
    pushes = [torch.randn(5, generator=generator) for _ in range(count)]
    expected = algorithm_3(theta, pushes, lr, momentum, period, share / period, workers)
    outer_optimizer = set_up(DelayedNesterov(lr, momentum, period, share / period), theta, workers)
    for push in pushes:
        outer_optimizer.step(push, {})
    torch.testing.assert_close(theta.double(), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=60)
@given(hyperparameters, st.integers(1, 4))
def test_period_of_pushes_is_one_nesterov_step_on_their_mean(
    values: tuple[float, float, int, float, int, int], periods: int
) -> None:
    """For c = 0 in every period. For restored c, the momentum of the first period is zero until the last push."""
    lr, momentum, period, share, _, seed = values
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(7, generator=generator)
    outer_optimizer = set_up(
        DelayedNesterov(lr, momentum, "auto", share / period if periods == 1 else 0.0), theta, period
    )
    start = theta.clone()
    mean_steps = torch.nn.Parameter(theta.clone())
    sgd = torch.optim.SGD([mean_steps], lr=lr, momentum=momentum, nesterov=momentum > 0)
    for _ in range(periods):
        pushes = [torch.randn(7, generator=generator) for _ in range(period)]
        for push in pushes:
            outer_optimizer.step(push, {})
        mean_steps.grad = torch.stack(pushes).mean(0)
        sgd.step()
    if share == 0.0 or periods > 1 or period == 1:
        torch.testing.assert_close(theta, mean_steps.detach(), rtol=1e-4, atol=1e-4)
    else:
        # The momentum has the weight c at N - 1 pushes, where it is still zero, and 1 - c*N + c at the last push.
        c = share / period
        mean = torch.stack(pushes).mean(0)
        expected = start - lr * (mean + (1 - c * period + c) * momentum * mean)
        torch.testing.assert_close(theta, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=40)
@given(st.integers(1, 6), st.floats(0.0, 1.0), st.floats(0.0, 0.99))
def test_weights_of_the_momentum_in_a_period_sum_to_one(period: int, share: float, momentum: float) -> None:
    """With a constant momentum (m = beta*m + mean), N pushes equal saved Nesterov step for every c."""
    theta = torch.zeros(1, dtype=torch.float32)
    outer_optimizer = set_up(DelayedNesterov(1.0, momentum, period, share / period), theta, period)
    mean = 1.0 - momentum
    if outer_optimizer.momentum_buffer is not None:
        outer_optimizer.momentum_buffer.fill_(1.0)  # The fixed point of m = beta*m + (1 - beta).
    for _ in range(period):
        outer_optimizer.step(torch.tensor([mean]), {})
    assert float(theta) == pytest.approx(-(mean + momentum), rel=1e-4)


@settings(max_examples=30)
@given(
    st.integers(1, 300),
    st.floats(0.01, 2.0),
    st.floats(0.01, 0.99),
    st.integers(0, 2**16),
)
def test_period_one_equals_torch_nesterov_bit_for_bit(size: int, lr: float, momentum: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(size, generator=generator)
    theta[::5] = -0.0
    parameter = torch.nn.Parameter(theta.clone())
    sgd = torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=True)
    outer_optimizer = set_up(DelayedNesterov(lr, momentum, period=1), theta, workers=1)
    for _ in range(4):
        push = torch.randn(size, generator=generator)
        push[::5] = -0.0
        outer_optimizer.step(push, {})
        parameter.grad = push
        sgd.step()
        assert torch.equal(theta.view(torch.int32), parameter.detach().view(torch.int32))


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, 2 * CHUNK + 17])
def test_chunks_do_not_change_bits(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    theta = torch.randn(size, generator=generator)
    parameter = torch.nn.Parameter(theta.clone())
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    outer_optimizer = set_up(DelayedNesterov(period=1), theta, workers=1)
    for _ in range(2):
        push = torch.randn(size, generator=generator)
        outer_optimizer.step(push, {})
        parameter.grad = push
        sgd.step()
    assert torch.equal(theta, parameter.detach())


@settings(max_examples=25)
@given(hyperparameters, st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_same_events_give_the_same_bits(
    values: tuple[float, float, int, float, int, int], worker_counts: list[int]
) -> None:
    lr, momentum, period, share, workers, seed = values
    outcomes = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(seed)
        theta = torch.randn(33, generator=generator)
        outer_optimizer = set_up(DelayedNesterov(lr, momentum, period, share / period), theta, workers)
        for count in worker_counts:
            outer_optimizer.set_workers(count)
            outer_optimizer.step(torch.randn(33, generator=generator), {})
        outcomes.append(theta)
    assert torch.equal(*outcomes)


def test_movement_per_round_does_not_depend_on_the_period() -> None:
    """Without momentum, k equal pushes move the model by lr*g for every N."""
    for period in (1, 2, 3, 4, 8):
        theta = torch.zeros(3)
        outer_optimizer = set_up(DelayedNesterov(lr=0.5, momentum=0.0, period=period), theta, workers=4)
        for _ in range(4):
            outer_optimizer.step(torch.ones(3), {})
        torch.testing.assert_close(theta, torch.full((3,), -0.5))


def test_each_push_counts_once() -> None:
    theta = torch.zeros(1)
    outer_optimizer = set_up(DelayedNesterov(lr=1.0, momentum=0.9), theta, workers=4)
    for _ in range(4):
        outer_optimizer.step(torch.ones(1), {})
    assert float(theta) == pytest.approx(-1.9)


@pytest.mark.parametrize("activation", [0.0, 0.2])
def test_change_of_workers_ends_the_period(activation: float) -> None:
    theta = torch.zeros(1)
    outer_optimizer = set_up(DelayedNesterov(lr=0.8, momentum=0.5, activation=activation), theta, workers=4)
    for push in (1.0, 3.0):
        outer_optimizer.step(torch.tensor([push]), {})
    assert float(theta) == pytest.approx(-0.8 / 4 * 4.0)
    before = float(theta)
    outer_optimizer.set_workers(3)
    assert outer_optimizer.momentum_buffer is not None
    assert float(outer_optimizer.momentum_buffer) == pytest.approx(2.0)
    assert float(theta) == pytest.approx(before - 0.8 * (1 - 2 * activation) * 0.5 * 2.0)
    # The new period has three pushes, each of which is applied with lr/3.
    before = float(theta)
    m = 2.0
    for push in (1.0, 1.0, 1.0):
        outer_optimizer.step(torch.tensor([push]), {})
    new = 0.5 * m + 1.0
    moved = 0.8 * (1.0 + 0.5 * (2 * activation * m + (1 - 2 * activation) * new))
    assert float(theta) == pytest.approx(before - moved)


def test_change_of_workers_between_periods_does_not_change_the_model() -> None:
    theta = torch.zeros(1)
    outer_optimizer = set_up(DelayedNesterov(), theta, workers=2)
    outer_optimizer.step(torch.ones(1), {})
    outer_optimizer.step(torch.ones(1), {})
    before = theta.clone()
    outer_optimizer.set_workers(5)
    outer_optimizer.set_workers(5)
    assert torch.equal(theta, before)


def test_too_many_workers_for_the_activation_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    theta = torch.zeros(1)
    outer_optimizer = set_up(DelayedNesterov(activation=0.5), theta, workers=2)
    outer_optimizer.set_workers(4)
    outer_optimizer.set_workers(3)
    assert [record.getMessage() for record in caplog.records] == [
        "DelayedNesterov: activation=0.5 is larger than 1/period = 1/4 with 4 live workers; it is limited to 1/period"
    ]
    for _ in range(30):
        outer_optimizer.step(torch.ones(1), {})
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
def test_invalid_hyperparameters_are_rejected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DelayedNesterov(**arguments)


def test_activation_is_checked_against_the_number_of_workers() -> None:
    outer_optimizer = DelayedNesterov(activation=0.3)
    with pytest.raises(ValueError, match=r"\[0, 0.25\].*got 0.3"):
        set_up(outer_optimizer, torch.zeros(1), workers=4)
    set_up(DelayedNesterov(activation=1 / 3), torch.zeros(1), workers=3)


def test_state_is_restored_by_parameter_name() -> None:
    def make(order: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], DelayedNesterov]:
        theta = torch.zeros(5)
        parts = {"a": 2, "b": 3}
        views, offset = {}, 0
        for name in order:
            views[name] = theta[offset : offset + parts[name]]
            offset += parts[name]
        outer_optimizer = DelayedNesterov(period=3)
        outer_optimizer.setup(theta, views, 2)
        return theta, views, outer_optimizer

    _, _, saved = make("ab")
    for _ in range(4):
        saved.step(torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0]), {})
    _, _, restored = make("ba")
    restored.load_state_dict(saved.state_dict())
    assert restored.momentum_buffer is not None
    torch.testing.assert_close(restored.momentum_buffer, torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0]))
    assert restored.state_dict()["pushes"] == 4
    assert restored.state_dict()["pushes_in_period"] == 1


def test_period_saved_with_another_number_of_workers_is_ended() -> None:
    theta = torch.zeros(1)
    saved = set_up(DelayedNesterov(lr=0.8, momentum=0.5), theta, workers=4)
    saved.step(torch.ones(1), {})
    restored_theta = theta.clone()
    restored = set_up(DelayedNesterov(lr=0.8, momentum=0.5), restored_theta, workers=2)
    restored.load_state_dict(saved.state_dict())
    saved.set_workers(2)
    assert torch.equal(theta, restored_theta)
    assert restored.state_dict() == saved.state_dict()
    assert restored.state_dict()["pushes_in_period"] == 0


def test_invalid_state_changes_nothing() -> None:
    theta = torch.ones(2)
    outer_optimizer = set_up(DelayedNesterov(), theta, workers=2)
    outer_optimizer.step(torch.ones(2), {})
    good = outer_optimizer.state_dict()
    good["momentum"]["w"] = torch.full((2,), 5.0)
    for key in good:
        with pytest.raises(ValueError, match=key):
            outer_optimizer.load_state_dict({name: value for name, value in good.items() if name != key})
    assert outer_optimizer.momentum_buffer is not None
    assert not outer_optimizer.momentum_buffer.any()


def test_can_be_copied_and_pickled() -> None:
    outer_optimizer = DelayedNesterov(lr=0.5, activation=0.25, period=3)
    for again in (copy.deepcopy(outer_optimizer), pickle.loads(pickle.dumps(outer_optimizer))):
        assert repr(again) == "DelayedNesterov(lr=0.5, momentum=0.9, period=3, activation=0.25)"


def test_replaces_model() -> None:
    for lr, momentum, workers, expected in [
        (1.0, 0.0, 1, True),
        (1.0, 0.0, 2, False),
        (0.7, 0.0, 1, False),
        (1.0, 0.9, 1, False),
    ]:
        outer_optimizer = set_up(DelayedNesterov(lr, momentum, period=3), torch.ones(2), workers)
        assert outer_optimizer.replaces_model is expected


def test_use_before_setup_raises() -> None:
    outer_optimizer = DelayedNesterov()
    with pytest.raises(RuntimeError, match="before setup"):
        outer_optimizer.step(torch.zeros(1), {})
    with pytest.raises(RuntimeError, match="before setup"):
        outer_optimizer.state_dict()


AUTO: dict[str, Any] = {"lr": "auto", "momentum": "auto"}


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 12)), min_size=1, max_size=6), st.integers(0, 2**16))
def test_automatic_step_of_short_rounds_applies_each_push_with_one_over_the_root_of_the_workers(
    clusters: list[tuple[int, int]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(5, generator=generator)
    expected = theta.double()
    outer_optimizer = set_up(DelayedNesterov(**AUTO), theta, clusters[0][0])
    for workers, local_steps in clusters:
        before = theta.clone()
        outer_optimizer.set_workers(workers)
        outer_optimizer.set_local_steps(local_steps)
        assert torch.equal(theta, before), "nothing jumps when workers come and go"
        push = torch.randn(5, generator=generator)
        outer_optimizer.step(push, {})
        expected -= push / workers**0.5
    torch.testing.assert_close(theta, expected.float())


@given(st.integers(1, 100), st.integers(1, 500))
def test_automatic_momentum_keeps_the_movement_and_limits_what_is_moved_at_once(workers: int, local_steps: int) -> None:
    momentum = automatic_momentum(workers, local_steps)
    lr = automatic_lr(workers, momentum)
    assert 0.0 <= momentum <= 0.9
    assert lr / (1.0 - momentum) == pytest.approx(workers**0.5)
    if workers == 1 or workers**0.5 * local_steps <= 50:
        assert momentum == 0.0
    elif momentum < 0.9:
        assert lr * local_steps == pytest.approx(50.0)
    automatic, explicit = torch.ones(3), torch.ones(3)
    optimizers = [
        set_up(DelayedNesterov(**AUTO), automatic, workers),
        set_up(DelayedNesterov(lr, momentum), explicit, workers),
    ]
    for outer_optimizer in optimizers:
        outer_optimizer.set_local_steps(local_steps)
    for push in torch.randn(2 * workers + 1, 3):
        for outer_optimizer in optimizers:
            outer_optimizer.step(push, {})
    assert torch.equal(automatic, explicit)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 60)), min_size=2, max_size=6), st.integers(0, 2**16))
def test_automatic_momentum_follows_workers_and_rounds(clusters: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.zeros(2)
    outer_optimizer = set_up(DelayedNesterov(**AUTO), theta, clusters[0][0])
    for workers, local_steps in clusters:
        outer_optimizer.set_workers(workers)
        outer_optimizer.set_local_steps(local_steps)
        assert outer_optimizer.momentum == automatic_momentum(workers, local_steps)
        for _ in range(int(torch.randint(1, 2 * workers + 1, (1,), generator=generator))):
            outer_optimizer.step(torch.ones(2), {})
        # A state can be restored by any number of workers, and by the same number without a difference.
        saved = outer_optimizer.state_dict()
        assert outer_optimizer.momentum == 0.0 or "momentum" in saved
        set_up(DelayedNesterov(**AUTO), theta.clone(), workers % 20 + 1).load_state_dict(saved)
        here, there = theta.clone(), theta.clone()
        again = set_up(DelayedNesterov(**AUTO), there, workers)
        again.load_state_dict(saved)
        assert torch.equal(here, there)
        again.step(torch.ones(2), {})
        outer_optimizer.step(torch.ones(2), {})
        assert torch.equal(theta, there)
    assert theta.isfinite().all()
    assert theta[0] < 0.0


def test_automatic_step_of_a_single_worker_is_plain_training() -> None:
    outer_optimizer = set_up(DelayedNesterov(**AUTO), torch.ones(2), 1)
    assert outer_optimizer.replaces_model
    outer_optimizer.set_local_steps(500)
    assert outer_optimizer.replaces_model
    outer_optimizer.set_workers(2)
    assert not outer_optimizer.replaces_model


def test_without_momentum_there_are_no_vectors() -> None:
    for options in (AUTO, {"momentum": 0.0}):
        outer_optimizer = set_up(DelayedNesterov(**options), torch.ones(2), 2)
        assert outer_optimizer.momentum_buffer is None
        assert set(outer_optimizer.state_dict()) == {"pushes", "pushes_in_period", "period", "workers", "local_steps"}
        with pytest.raises(ValueError, match="has no momentum"):
            outer_optimizer.restart_momentum()


def test_momentum_may_be_switched_on_and_off_between_runs() -> None:
    theta = torch.ones(2)
    without, with_momentum = (set_up(DelayedNesterov(momentum=value), theta, 3) for value in (0.0, 0.9))
    for _ in range(4):
        without.step(torch.ones(2), {})
        with_momentum.step(torch.ones(2), {})
    saved = with_momentum.state_dict()
    before = theta.clone()
    with_momentum.load_state_dict(without.state_dict())
    assert with_momentum.momentum_buffer is not None
    assert not with_momentum.momentum_buffer.any()
    assert not with_momentum.in_period, "the pushes of the period are not in its sum"
    without.load_state_dict(saved)
    assert torch.equal(theta, before)
    assert without.state_dict()["pushes"] == 4


def test_shows_what_was_given() -> None:
    shown = "DelayedNesterov(lr='auto', momentum='auto', period='auto', activation=0.0)"
    outer_optimizer = DelayedNesterov(**AUTO)
    assert repr(outer_optimizer) == shown
    assert repr(set_up(outer_optimizer, torch.ones(1), 16)) == shown
