"""The inner optimizers' second moments: read and written without bias, and carried by the layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.protocol.moments import SecondMoments

OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
]


class Derived(torch.optim.AdamW):
    """A user's own variant."""


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def trained(kind: Callable[..., torch.optim.Optimizer], steps: int, **options: Any) -> tuple[nn.Linear, SecondMoments]:
    module = nn.Linear(3, 2)
    optimizer = kind(module.parameters(), lr=0.01, **options)
    train(module, optimizer, steps)
    return module, SecondMoments([optimizer])


# ------------------------------------------------------------------- the moments


@pytest.mark.parametrize("kind", [*OPTIMIZERS, Derived])
def test_is_read_without_bias(kind: Callable[..., torch.optim.Optimizer]) -> None:
    module = nn.Linear(3, 2)
    optimizer = kind(module.parameters(), lr=0.01)
    moments = SecondMoments([optimizer])
    assert moments.has(module.weight)
    assert moments.read(module.weight) is None, "there is no state before the first step"
    for _ in range(3):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, -3.0)
        optimizer.step()
    read = moments.read(module.weight)
    assert read is not None
    torch.testing.assert_close(read, torch.full((2, 3), 9.0))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@given(steps=st.integers(1, 30), others=st.integers(1, 30))
def test_what_is_written_is_read_whatever_the_numbers_of_steps(
    kind: Callable[..., torch.optim.Optimizer], steps: int, others: int
) -> None:
    module, moments = trained(kind, steps)
    other, of_other = trained(kind, others)
    value = of_other.read(other.weight)
    assert value is not None
    moments.write(module.weight, value)
    read = moments.read(module.weight)
    assert read is not None
    torch.testing.assert_close(read, value)


def test_only_known_elements_are_written() -> None:
    module, moments = trained(torch.optim.Adam, 2)
    before = moments.read(module.weight)
    assert before is not None
    value = torch.full((2, 3), 5.0)
    value[0] = math.nan
    moments.write(module.weight, value)
    after = moments.read(module.weight)
    assert after is not None
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1], value[1])


def test_nothing_is_written_before_the_first_step() -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    SecondMoments([optimizer]).write(module.weight, torch.ones(2, 3))
    assert not optimizer.state


def test_follows_a_loaded_state() -> None:
    """``load_state_dict`` replaces the optimizer's groups and tensors."""
    module = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters(), betas=(0.9, 0.5))
    moments = SecondMoments([optimizer])
    train(module, optimizer, 3)
    before = moments.read(module.weight)
    optimizer.load_state_dict(optimizer.state_dict())
    after = moments.read(module.weight)
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def test_optimizers_without_a_second_moment_have_none() -> None:
    module = nn.Linear(3, 2)
    for kind in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adamax):
        assert not SecondMoments([kind(module.parameters(), lr=0.1)]).has(module.weight)


def test_parameter_of_several_optimizers_is_left_out() -> None:
    module = nn.Linear(3, 2)
    both = [torch.optim.Adam(module.parameters()), torch.optim.SGD([module.weight], lr=0.1)]
    for optimizers in (both, both[::-1], [both[0], torch.optim.Adam([module.weight])]):
        moments = SecondMoments(optimizers)
        assert not moments.has(module.weight)
        assert moments.has(module.bias)


# ---------------------------------------------------------- in the flat vector


class Model(nn.Module):
    """Tied, frozen and half-precision parameters, and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.low = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.plain = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)


def bound(steps: int) -> tuple[Model, Binding, SecondMoments]:
    module = Model()
    adam = torch.optim.AdamW(
        [{"params": [module.first.weight], "betas": (0.9, 0.9)}, {"params": [module.first.bias, module.low]}]
    )
    sgd = torch.optim.SGD([module.plain, *module.norm.parameters()], lr=0.1)
    moments = SecondMoments([adam, sgd])
    train(module, adam, steps)
    module.zero_grad()
    return module, Binding(Layout.of(module, moments=moments), module, moments), moments


def test_moments_follow_the_buffers() -> None:
    module, binding, moments = bound(0)
    layout, without = binding.layout, Layout.of(module)
    assert layout.model_numel == without.numel == without.model_numel
    assert layout.parameter_numel == without.parameter_numel
    assert [(e.name, e.shape) for e in layout.entries if e.kind == "moment"] == [
        ("low:second_moment", (2,)),
        ("first.weight:second_moment", (3, 3)),
        ("first.bias:second_moment", (3,)),
    ]
    assert [entry.name for entry in binding.entries] == [entry.name for entry in without.entries]
    assert Layout.from_description(layout.describe()).fingerprint == layout.fingerprint != without.fingerprint
    assert "moment 0: nothing here, 'low:second_moment' bfloat16 [2] there" in without.difference(layout)
    assert Layout.of(module, moments=moments).fingerprint == layout.fingerprint


def test_push_holds_the_moments_themselves() -> None:
    module, binding, moments = bound(4)
    flat = binding.new_flat()
    binding.subtract_from(torch.zeros_like(flat), flat)
    views = binding.layout.views(flat, "moment")
    expected = moments.read(module.first.weight)
    assert expected is not None
    assert torch.equal(views["first.weight:second_moment"], expected)
    assert views["low:second_moment"].dtype == torch.float32
    assert (flat[binding.layout.model_numel :] >= 0).all()


def test_push_without_a_step_holds_unknown_moments() -> None:
    _, binding, _ = bound(0)
    flat = binding.new_flat()
    binding.subtract_from(torch.zeros_like(flat), flat)
    assert torch.isnan(flat[binding.layout.model_numel :]).all()
    assert torch.isfinite(flat[: binding.layout.model_numel]).all()


def test_moments_are_loaded_apart_from_the_model() -> None:
    module, binding, moments = bound(4)
    before = moments.read(module.first.weight)
    flat = torch.full((binding.layout.numel,), 2.0)
    binding.load(flat)
    now = moments.read(module.first.weight)
    assert before is not None
    assert now is not None
    assert torch.equal(before, now)
    assert torch.equal(module.first.weight, torch.full((3, 3), 2.0))
    binding.load_moments(flat)
    now = moments.read(module.first.weight)
    assert now is not None
    torch.testing.assert_close(now, torch.full((3, 3), 2.0))


def test_model_without_moments_ignores_them() -> None:
    module = nn.Linear(3, 2)
    binding = Binding(Layout.of(module), module)
    binding.load_moments(binding.new_flat())
    flat = binding.new_flat()
    binding.subtract_from(torch.zeros_like(flat), flat)
    assert torch.equal(flat[:6].view(2, 3), -module.weight)
