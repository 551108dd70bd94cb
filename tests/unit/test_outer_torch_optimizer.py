from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async_localsgd.outer import DelayedNesterov, TorchOptimizer, resolve_outer_optimizer


def flat_and_views(order: str = "ab") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    shapes = {"a": (2, 3), "b": (4,)}
    flat = torch.zeros(10)
    views, offset = {}, 0
    for name in order:
        numel = torch.Size(shapes[name]).numel()
        views[name] = flat[offset : offset + numel].view(shapes[name])
        offset += numel
    return flat, views


def ready(rule: TorchOptimizer, order: str = "ab") -> tuple[torch.Tensor, dict[str, torch.Tensor], TorchOptimizer]:
    flat, views = flat_and_views(order)
    rule.setup(flat, views, workers=3)
    return flat, views, rule


def step(rule: TorchOptimizer, seed: int, order: str = "ab") -> None:
    flat, views = flat_and_views(order)
    generator = torch.Generator().manual_seed(seed)
    for name in "ab":
        views[name].copy_(torch.randn(views[name].shape, generator=generator))
    kept = flat.clone()
    rule.step(flat, views)
    assert torch.equal(flat, kept)


RECIPES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
    (torch.optim.SGD, {"lr": 0.1, "maximize": True, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5, "centered": True}),
    (torch.optim.Adagrad, {"lr": 0.1}),
    (torch.optim.Rprop, {"lr": 0.1}),
    (torch.optim.Adafactor, {"lr": 0.1}),
]


@pytest.mark.parametrize(("cls", "arguments"), RECIPES, ids=lambda value: getattr(value, "__name__", ""))
def test_equals_the_torch_optimizer_bit_for_bit(cls: type[torch.optim.Optimizer], arguments: dict[str, Any]) -> None:
    flat, _, rule = ready(TorchOptimizer(cls, **arguments))
    expected = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    optimizer = cls(expected, **arguments)
    for seed in range(5):
        step(rule, seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in expected:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    assert torch.equal(flat, torch.cat([parameter.detach().flatten() for parameter in expected]))


@pytest.mark.parametrize(("cls", "arguments"), RECIPES, ids=lambda value: getattr(value, "__name__", ""))
def test_state_goes_by_name(cls: type[torch.optim.Optimizer], arguments: dict[str, Any]) -> None:
    _, views, one = ready(TorchOptimizer(cls, **arguments))
    for seed in range(3):
        step(one, seed)
    _, other_views, other = ready(TorchOptimizer(cls, **arguments), "ba")
    for name, view in views.items():
        other_views[name].copy_(view)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    step(one, 7)
    step(other, 7, "ba")
    assert all(torch.equal(views[name], other_views[name]) for name in "ab")


def test_state_is_a_copy() -> None:
    _, _, rule = ready(TorchOptimizer(torch.optim.SGD, lr=0.1, momentum=0.9))
    step(rule, 0)
    state = rule.state_dict()
    kept = copy.deepcopy(state)
    step(rule, 1)
    assert torch.equal(state["state"]["a"]["momentum_buffer"], kept["state"]["a"]["momentum_buffer"])


def test_parameters_nobody_moved_are_left_alone() -> None:
    flat, views, rule = ready(TorchOptimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
    flat.fill_(1.0)
    gradient, gradients = flat_and_views()
    gradients["a"].fill_(1.0)
    rule.step(gradient, gradients)
    assert views["a"].max() < 1.0
    assert torch.equal(views["b"], torch.ones(4))
    # Once moved it follows, also with a gradient of zero; and the checkpoint knows.
    gradients["b"].fill_(1.0)
    rule.step(gradient, gradients)
    _, again_views, again = ready(TorchOptimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
    for name, view in views.items():
        again_views[name].copy_(view)
    again.load_state_dict(rule.state_dict())
    gradient.zero_()
    before = views["b"].clone()
    rule.step(gradient, gradients)
    again.step(gradient, gradients)
    assert not torch.equal(views["b"], before)
    assert torch.equal(views["b"], again_views["b"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TorchOptimizer("sgd"), TypeError, "'sgd'.*TorchOptimizer\\(torch.optim.SGD, lr=0.7\\)"),
        (
            lambda: TorchOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)),
            TypeError,
            "class or a callable",
        ),
        (lambda: TorchOptimizer(lambda parameters: None), TypeError, "no torch.optim.Optimizer"),
        (lambda: TorchOptimizer(torch.optim.SGD, rate=1.0), TypeError, "rate"),
        (lambda: TorchOptimizer(torch.optim.SGD, lr=0.0), ValueError, "lr of SGD must be > 0, got 0.0"),
        (lambda: TorchOptimizer(torch.optim.SGD, lr=-1.0), ValueError, "Invalid learning rate"),
        (lambda: TorchOptimizer(torch.optim.SGD, lr=1.0, momentum=-1.0), ValueError, "Invalid momentum"),
        (lambda: TorchOptimizer(torch.optim.LBFGS), ValueError, "LBFGS evaluates the loss"),
        (lambda: TorchOptimizer(torch.optim.SparseAdam), ValueError, "SparseAdam cannot step on a dense"),
    ],
)
def test_bad_recipes_are_refused_at_once(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_foreign_states_are_refused() -> None:
    _, _, rule = ready(TorchOptimizer(torch.optim.Adam, lr=0.1))
    step(rule, 0)
    good = rule.state_dict()
    with pytest.raises(ValueError, match=r"lacks.*groups"):
        rule.load_state_dict({key: value for key, value in good.items() if key != "groups"})
    with pytest.raises(ValueError, match=r"another model.*'extra'"):
        rule.load_state_dict({**good, "parameters": {**good["parameters"], "extra": [1]}})
    with pytest.raises(ValueError, match=r"another model.*'b'"):
        rule.load_state_dict({**good, "parameters": {"a": [2, 3]}})
    with pytest.raises(ValueError, match=r"names or shapes of \['a'\]"):
        rule.load_state_dict({**good, "parameters": {"a": [3, 2], "b": [4]}})
    with pytest.raises(ValueError, match="other parameter groups"):
        rule.load_state_dict({**good, "groups": [{**good["groups"][0], "params": ["a"]}]})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"lr": 1.0}, True),
        ({"lr": 1}, True),
        ({"lr": 0.9}, False),
        ({"lr": 1.0, "momentum": 0.1}, False),
        ({"lr": 1.0, "weight_decay": 0.1}, False),
        ({"lr": 1.0, "maximize": True}, False),
    ],
)
def test_replaces_model(arguments: dict[str, Any], expected: bool) -> None:
    assert TorchOptimizer(torch.optim.SGD, **arguments).replaces_model is expected


def test_adam_does_not_replace_the_model() -> None:
    assert not TorchOptimizer(torch.optim.Adam, lr=1.0).replaces_model


def test_recipe_can_be_copied_and_pickled() -> None:
    rule = TorchOptimizer(torch.optim.SGD, lr=0.5)
    for again in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        flat, _, _ = ready(again)
        step(again, 0)
        assert flat.any()


def test_resolve_takes_what_the_option_takes() -> None:
    default = resolve_outer_optimizer(None)
    assert repr(default) == repr(DelayedNesterov())
    given = DelayedNesterov(lr=0.3)
    resolved = resolve_outer_optimizer(given)
    assert repr(resolved) == repr(given)
    assert resolved is not given
    assert isinstance(resolve_outer_optimizer(torch.optim.AdamW), TorchOptimizer)
    partial = resolve_outer_optimizer(functools.partial(torch.optim.SGD, lr=1.0))
    assert partial.replaces_model


@pytest.mark.parametrize(
    "value",
    ["nesterov", 3, DelayedNesterov, {"lr": 1.0}, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)],
    ids=lambda value: type(value).__name__,
)
def test_resolve_refuses_the_rest(value: object) -> None:
    with pytest.raises(TypeError, match=r"unknown outer optimizer .*; use an instance such as DelayedNesterov"):
        resolve_outer_optimizer(value)


def test_jsonargparse_builds_it_from_a_config() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    from lightning_async_localsgd.outer import OuterOptimizer

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--outer", type=OuterOptimizer)
    prefix = "lightning_async_localsgd.outer"
    config = {
        "class_path": f"{prefix}.TorchOptimizer",
        "init_args": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}},
    }
    rule = parser.instantiate(parser.parse_object({"outer": config})).outer
    assert rule.replaces_model
    config = {"class_path": f"{prefix}.DelayedNesterov", "init_args": {"lr": 0.4, "period": "auto"}}
    rule = parser.instantiate(parser.parse_object({"outer": config})).outer
    assert repr(rule) == repr(DelayedNesterov(lr=0.4))
