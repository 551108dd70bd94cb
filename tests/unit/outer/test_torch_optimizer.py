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


def set_up(
    outer_optimizer: TorchOptimizer, order: str = "ab"
) -> tuple[torch.Tensor, dict[str, torch.Tensor], TorchOptimizer]:
    flat, views = flat_and_views(order)
    outer_optimizer.setup(flat, views, workers=3)
    return flat, views, outer_optimizer


def step(outer_optimizer: TorchOptimizer, seed: int, order: str = "ab") -> None:
    flat, views = flat_and_views(order)
    generator = torch.Generator().manual_seed(seed)
    for name in "ab":
        views[name].copy_(torch.randn(views[name].shape, generator=generator))
    kept = flat.clone()
    outer_optimizer.step(flat, views)
    assert torch.equal(flat, kept)


TORCH_OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
    (torch.optim.SGD, {"lr": 0.1, "maximize": True, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5, "centered": True}),
    (torch.optim.Adagrad, {"lr": 0.1}),
    (torch.optim.Rprop, {"lr": 0.1}),
    (torch.optim.Adafactor, {"lr": 0.1}),
]


@pytest.mark.parametrize(("cls", "arguments"), TORCH_OPTIMIZERS, ids=lambda value: getattr(value, "__name__", ""))
def test_equals_the_torch_optimizer_bit_for_bit(cls: type[torch.optim.Optimizer], arguments: dict[str, Any]) -> None:
    flat, _, outer_optimizer = set_up(TorchOptimizer(cls, **arguments))
    expected = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    optimizer = cls(expected, **arguments)
    for seed in range(5):
        step(outer_optimizer, seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in expected:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    assert torch.equal(flat, torch.cat([parameter.detach().flatten() for parameter in expected]))


@pytest.mark.parametrize(("cls", "arguments"), TORCH_OPTIMIZERS, ids=lambda value: getattr(value, "__name__", ""))
def test_state_is_restored_by_parameter_name(cls: type[torch.optim.Optimizer], arguments: dict[str, Any]) -> None:
    _, views, saved = set_up(TorchOptimizer(cls, **arguments))
    for seed in range(3):
        step(saved, seed)
    _, restored_views, restored = set_up(TorchOptimizer(cls, **arguments), "ba")
    for name, view in views.items():
        restored_views[name].copy_(view)
    restored.load_state_dict(copy.deepcopy(saved.state_dict()))
    step(saved, 7)
    step(restored, 7, "ba")
    assert all(torch.equal(views[name], restored_views[name]) for name in "ab")


def test_state_is_a_copy() -> None:
    _, _, outer_optimizer = set_up(TorchOptimizer(torch.optim.SGD, lr=0.1, momentum=0.9))
    step(outer_optimizer, 0)
    state = outer_optimizer.state_dict()
    kept = copy.deepcopy(state)
    step(outer_optimizer, 1)
    assert torch.equal(state["state"]["a"]["momentum_buffer"], kept["state"]["a"]["momentum_buffer"])


def test_parameters_are_skipped_until_a_push_changes_them() -> None:
    flat, views, outer_optimizer = set_up(TorchOptimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
    flat.fill_(1.0)
    gradient, gradients = flat_and_views()
    gradients["a"].fill_(1.0)
    outer_optimizer.step(gradient, gradients)
    assert views["a"].max() < 1.0
    assert torch.equal(views["b"], torch.ones(4))
    # From the first change on, the parameter takes part even with a zero gradient. A restored state knows this.
    gradients["b"].fill_(1.0)
    outer_optimizer.step(gradient, gradients)
    _, restored_views, restored = set_up(TorchOptimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
    for name, view in views.items():
        restored_views[name].copy_(view)
    restored.load_state_dict(outer_optimizer.state_dict())
    gradient.zero_()
    before = views["b"].clone()
    outer_optimizer.step(gradient, gradients)
    restored.step(gradient, gradients)
    assert not torch.equal(views["b"], before)
    assert torch.equal(views["b"], restored_views["b"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TorchOptimizer("sgd"), TypeError, "'sgd'.*TorchOptimizer\\(torch.optim.SGD, lr=0.7\\)"),
        (
            lambda: TorchOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)),
            TypeError,
            "class or a callable",
        ),
        (lambda: TorchOptimizer(lambda parameters: None), TypeError, "made None, which is not a torch.optim.Optimizer"),
        (lambda: TorchOptimizer(torch.optim.SGD, rate=1.0), TypeError, "rate"),
        (lambda: TorchOptimizer(torch.optim.SGD, lr=0.0), ValueError, "lr of SGD must be > 0, got 0.0"),
        (lambda: TorchOptimizer(torch.optim.SGD, lr=-1.0), ValueError, "Invalid learning rate"),
        (lambda: TorchOptimizer(torch.optim.SGD, lr=1.0, momentum=-1.0), ValueError, "Invalid momentum"),
        (lambda: TorchOptimizer(torch.optim.LBFGS), ValueError, "LBFGS evaluates the loss"),
        (lambda: TorchOptimizer(torch.optim.SparseAdam), ValueError, "SparseAdam cannot step on a dense"),
    ],
)
def test_invalid_arguments_are_rejected(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_state_of_another_model_is_rejected() -> None:
    _, _, outer_optimizer = set_up(TorchOptimizer(torch.optim.Adam, lr=0.1))
    step(outer_optimizer, 0)
    good = outer_optimizer.state_dict()
    with pytest.raises(ValueError, match=r"lacks.*groups"):
        outer_optimizer.load_state_dict({key: value for key, value in good.items() if key != "groups"})
    with pytest.raises(ValueError, match=r"does not match this model.*'extra'"):
        outer_optimizer.load_state_dict({**good, "parameters": {**good["parameters"], "extra": [1]}})
    with pytest.raises(ValueError, match=r"does not match this model.*'b'"):
        outer_optimizer.load_state_dict({**good, "parameters": {"a": [2, 3]}})
    with pytest.raises(ValueError, match=r"names or shapes of \['a'\]"):
        outer_optimizer.load_state_dict({**good, "parameters": {"a": [3, 2], "b": [4]}})
    with pytest.raises(ValueError, match="parameter groups of the saved outer optimizer differ"):
        outer_optimizer.load_state_dict({**good, "groups": [{**good["groups"][0], "params": ["a"]}]})


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


def test_can_be_copied_and_pickled() -> None:
    outer_optimizer = TorchOptimizer(torch.optim.SGD, lr=0.5)
    for again in (copy.deepcopy(outer_optimizer), pickle.loads(pickle.dumps(outer_optimizer))):
        flat, _, _ = set_up(again)
        step(again, 0)
        assert flat.any()


def test_resolve_accepts_every_kind_of_option_value() -> None:
    default = resolve_outer_optimizer(None)
    assert repr(default) == repr(DelayedNesterov(lr="auto", momentum="auto"))
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
def test_resolve_rejects_other_values(value: object) -> None:
    with pytest.raises(TypeError, match=r"unknown outer optimizer .*; use an instance such as DelayedNesterov"):
        resolve_outer_optimizer(value)


def test_jsonargparse_makes_it_from_a_config() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    from lightning_async_localsgd.outer import OuterOptimizer

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--outer", type=OuterOptimizer)
    prefix = "lightning_async_localsgd.outer"
    config = {
        "class_path": f"{prefix}.TorchOptimizer",
        "init_args": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}},
    }
    outer_optimizer = parser.instantiate(parser.parse_object({"outer": config})).outer
    assert outer_optimizer.replaces_model
    config = {"class_path": f"{prefix}.DelayedNesterov", "init_args": {"lr": 0.4, "period": "auto"}}
    outer_optimizer = parser.instantiate(parser.parse_object({"outer": config})).outer
    assert repr(outer_optimizer) == repr(DelayedNesterov(lr=0.4))
