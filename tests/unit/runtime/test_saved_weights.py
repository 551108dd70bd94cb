"""Replacement of a module's weights in its state_dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.runtime.saved_weights import replace_weights, restores_weights


class Tied(nn.Module):
    """Two layers with one weight, a frozen parameter and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


def replaced(module: nn.Module, state: dict[str, Any], value: float) -> tuple[dict[str, Any], list[Tensor]]:
    binding = Binding(Layout.of(module), module)
    weights = {spec.name: torch.full(spec.shape, value) for spec in binding.layout.entries}
    return replace_weights(state, module, binding, weights)


def test_tied_weights_stay_tied_and_the_module_keeps_its_own() -> None:
    module = Tied()
    before = module.first.weight.clone()
    state, tensors = replaced(module, module.state_dict(), 5.0)
    assert state["first.weight"] is state["second.weight"] is tensors[0]
    assert len(tensors) == 1
    assert bool((state["first.weight"] == 5.0).all())
    assert torch.equal(module.first.weight, before)


def test_renamed_entries_are_found() -> None:
    module = nn.Linear(2, 1)
    renamed = {f"net.{name}": tensor for name, tensor in module.state_dict().items()}
    state, tensors = replaced(module, renamed, 5.0)
    assert all(bool((tensor == 5.0).all()) for tensor in state.values())
    assert len(tensors) == 2


def test_only_state_that_training_may_change_is_copied() -> None:
    module = Tied()
    own = module.state_dict()
    state, _ = replaced(module, {**own, "note": "text"}, 5.0)
    assert state["frozen"] is own["frozen"]
    assert state["count"].data_ptr() != module.count.data_ptr()
    assert state["note"] == "text"


def test_weights_are_restored_from_a_complete_fp32_state_only() -> None:
    module = nn.Linear(2, 1)
    binding = Binding(Layout.of(module), module)
    assert restores_weights(module.state_dict(), binding)
    assert not restores_weights({"weight": module.weight}, binding)
    rounded = nn.Linear(2, 1).bfloat16()
    assert not restores_weights(rounded.state_dict(), Binding(Layout.of(rounded), rounded))
