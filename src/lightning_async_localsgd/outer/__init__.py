"""Outer optimizers, which change the global model by the workers' pseudo-gradients."""

from __future__ import annotations

import copy

from torch.optim import Optimizer

from lightning_async_localsgd.outer.adam import Adam
from lightning_async_localsgd.outer.base import OuterOptimizer
from lightning_async_localsgd.outer.buffer import Buffer
from lightning_async_localsgd.outer.delayed_nesterov import DelayedNesterov
from lightning_async_localsgd.outer.heloco import HeLoCo
from lightning_async_localsgd.outer.look_ahead import LookAhead
from lightning_async_localsgd.outer.momentum import Momentum
from lightning_async_localsgd.outer.momentum_restart import MomentumRestart
from lightning_async_localsgd.outer.nesterov import Nesterov
from lightning_async_localsgd.outer.sgd import SGD
from lightning_async_localsgd.outer.torch_optimizer import TorchOptimizer

__all__ = [
    "SGD",
    "Adam",
    "Buffer",
    "DelayedNesterov",
    "HeLoCo",
    "LookAhead",
    "Momentum",
    "MomentumRestart",
    "Nesterov",
    "OuterOptimizer",
    "TorchOptimizer",
    "resolve_outer_optimizer",
]


def resolve_outer_optimizer(value: object) -> OuterOptimizer:
    """Return the outer optimizer that the value of an ``outer_optimizer`` option stands for.

    The result is a new object, so its state is not shared with the option.

    Args:
        value: None for ``DelayedNesterov(lr="auto", momentum="auto")``, an :class:`OuterOptimizer`, a torch optimizer
            class, or a callable that makes a torch optimizer from parameters, such as a ``functools.partial``.

    Raises:
        TypeError: ``value`` is anything else.
        ValueError: the torch optimizer cannot be used as an outer optimizer.

    """
    if value is None:
        return DelayedNesterov(lr="auto", momentum="auto")
    if isinstance(value, OuterOptimizer):
        return copy.deepcopy(value)
    is_class = isinstance(value, type) and issubclass(value, OuterOptimizer)
    if is_class or isinstance(value, Optimizer) or not callable(value):
        shown = f"object {type(value).__name__}(...)" if isinstance(value, Optimizer) else repr(value)
        raise TypeError(
            f"unknown outer optimizer {shown}; use an instance such as DelayedNesterov(lr=0.7), a"
            " torch.optim.Optimizer class, or functools.partial(torch.optim.SGD, lr=0.7)"
        )
    return TorchOptimizer(value)
