"""What inner optimizers remember of weights moves with the weights, and what they show is exchanged."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async_localsgd.runtime.optimizer_weights import OptimizerWeights, nested_optimizers
from tests.lightning_models import Lookahead, ScheduleFree


def trained(make: Any, steps: int = 3) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    module = nn.Linear(8, 4)
    optimizer = make(module.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (module(torch.randn(16, 8)) - 1.0).square().mean().backward()
        optimizer.step()
    return module, optimizer


def adopt(module: nn.Module, weights: OptimizerWeights, change: float) -> None:
    left = weights.leave()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(change)
    weights.arrive(left)


ORDINARY = [
    partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    partial(torch.optim.AdamW, lr=0.1),
    partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    partial(torch.optim.NAdam, lr=0.1),
    partial(torch.optim.RAdam, lr=0.1),
    partial(torch.optim.RMSprop, lr=0.1, momentum=0.9, centered=True),
    partial(torch.optim.Adagrad, lr=0.1),
    partial(torch.optim.Adadelta),
    partial(torch.optim.Adamax, lr=0.1),
    partial(torch.optim.Rprop, lr=0.1),
    partial(torch.optim.Adafactor),
]


@pytest.mark.parametrize("make", ORDINARY)
def test_running_averages_of_gradients_stay_to_the_last_bit(make: Any) -> None:
    module, optimizer = trained(make)
    before = {
        (id(parameter), key): value.clone()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    assert before
    weights = optimizer.param_groups[0]["params"][0].clone()
    adopt(module, OptimizerWeights([optimizer]), 1.0)
    assert torch.equal(module.weight, weights + 1.0)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, before[id(parameter), key]), key


@pytest.mark.parametrize(
    ("make", "key"), [(partial(torch.optim.ASGD, lr=0.1), "ax"), (partial(Lookahead, lr=0.1), "slow")]
)
def test_remembered_weights_move_by_the_same_difference(make: Any, key: str) -> None:
    module, optimizer = trained(make)
    before = [optimizer.state[parameter][key].clone() for parameter in module.parameters()]
    adopt(module, OptimizerWeights([optimizer]), 1.0)
    for parameter, remembered in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(optimizer.state[parameter][key], remembered + 1.0)


def test_weights_that_a_schedule_free_optimizer_shows_are_exchanged() -> None:
    module, optimizer = trained(partial(ScheduleFree, lr=0.1))
    trained_point = module.weight.detach().clone()
    z = optimizer.state[module.weight]["z"].clone()
    weights = OptimizerWeights([optimizer])
    left = weights.leave()
    shown = module.weight.detach().clone()
    torch.testing.assert_close(shown, trained_point.lerp(z, 1 - 1 / 0.9))
    with torch.no_grad():
        module.weight.add_(1.0)
    weights.arrive(left)
    torch.testing.assert_close(module.weight.detach(), trained_point + 1.0)
    torch.testing.assert_close(optimizer.state[module.weight]["z"], z + 1.0)
    assert optimizer.param_groups[0]["train_mode"]


def test_optimizer_that_shows_its_weights_is_not_switched() -> None:
    module, optimizer = trained(partial(ScheduleFree, lr=0.1))
    optimizer.eval()
    shown = module.weight.detach().clone()
    adopt(module, OptimizerWeights([optimizer]), 1.0)
    assert torch.equal(module.weight, shown + 1.0)
    assert not optimizer.param_groups[0]["train_mode"]


def test_first_model_is_adopted_as_what_is_shown() -> None:
    """The weights in a checkpoint are those that are shown, though the optimizer was saved while it trained."""
    module, optimizer = trained(partial(ScheduleFree, lr=0.1))
    z = optimizer.state[module.weight]["z"].clone()
    shown = module.weight.detach().clone()
    weights = OptimizerWeights([optimizer])
    left = weights.start()
    assert torch.equal(module.weight, shown)
    weights.arrive(left)
    assert optimizer.param_groups[0]["train_mode"]
    torch.testing.assert_close(module.weight.detach(), shown.lerp(z, 1 - 0.9))


def test_weights_remembered_by_a_diverged_worker_begin_again_with_the_adopted_ones() -> None:
    module, optimizer = trained(partial(Lookahead, lr=0.1))
    weights = OptimizerWeights([optimizer])
    adopt(module, weights, 0.0)
    with torch.no_grad():
        module.weight.fill_(math.nan)
    left = weights.leave()
    with torch.no_grad():
        module.weight.fill_(2.0)
    weights.arrive(left)
    assert torch.equal(optimizer.state[module.weight]["slow"], module.weight)


def test_optimizer_that_does_not_tell_what_it_shows_is_rejected_by_name() -> None:
    class Averaging(torch.optim.SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    with pytest.raises(ValueError, match=r"Averaging has train\(\) and eval\(\).*train_mode"):
        OptimizerWeights([Averaging([torch.nn.Parameter(torch.zeros(1))], lr=0.1)])


def test_wrapped_optimizers_are_found() -> None:
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    outer = torch.optim.SGD(inner.param_groups, lr=0.1)
    outer.base_optimizer = inner  # type: ignore[attr-defined]
    inner.owner = outer  # type: ignore[attr-defined]
    assert nested_optimizers(outer) == [outer, inner]
