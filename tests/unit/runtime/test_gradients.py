"""Gradients as a flat vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.protocol.moments import SecondMoments
from lightning_async_localsgd.runtime.gradients import drop_gradients, read_gradients, write_gradients


def module(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_and_buffers_are_copied_there_and_back(dtype: torch.dtype) -> None:
    one, other = module(dtype), module(dtype)
    optimizer = torch.optim.Adam(one.parameters())
    moments = SecondMoments([optimizer])
    binding = Binding(Layout.of(one, moments=moments), one, moments)
    for index, parameter in enumerate(one.parameters()):
        parameter.grad = torch.full_like(parameter, index + 1.0) if index != 1 else None
    one[1].running_mean.fill_(3.0)
    flat = torch.full((binding.layout.numel,), float("nan"))
    assert read_gradients(binding, flat, 0.5) == [1]
    views = binding.layout.views(flat)
    assert float(views["0.weight"][0, 0]) == 0.5
    assert not views["0.bias"].any()
    assert float(views["1.running_mean"][0]) == 3.0
    assert not flat[binding.layout.model_numel :].any()
    target = Binding(Layout.of(other), other)
    write_gradients(target, flat[: target.layout.numel], [1])
    assert other[0].bias.grad is None
    assert torch.equal(other[2].weight.grad, torch.full_like(other[2].weight, 2.5))
    assert other[2].weight.grad.dtype == dtype
    assert float(other[1].running_mean[0]) == 3.0
    # Present gradients keep their memory, and become None if no worker has one.
    memory = other[2].weight.grad.data_ptr()
    write_gradients(target, flat[: target.layout.numel].neg(), [0])
    assert other[2].weight.grad.data_ptr() == memory
    assert float(other[2].weight.grad[0, 0]) == -2.5
    assert other[0].weight.grad is None
    assert other[0].bias.grad is not None
    # Without any gradient, the buffers stay.
    write_gradients(target, torch.zeros(target.layout.numel), range(6))
    assert float(other[1].running_mean[0]) == -3.0
    assert all(parameter.grad is None for parameter in other.parameters())


def test_gradients_are_dropped() -> None:
    net = module()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    drop_gradients(Binding(Layout.of(net), net))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_sparse_gradient_is_refused() -> None:
    net = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1))
    net(torch.tensor([1])).sum().backward()
    binding = Binding(Layout.of(net), net)
    with pytest.raises(RuntimeError, match=r"'0.weight' has a sparse gradient.*sync_warmup_steps=0"):
        read_gradients(binding, binding.new_flat())
