"""The base class of outer optimizers that wrap another outer optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.outer.base import OuterOptimizer


class OptimizerWrapper(OuterOptimizer):
    """Base class of outer optimizers that wrap another one.

    Every call is forwarded to the wrapped optimizer. Subclasses override the methods that they change.

    Args:
        optimizer: outer optimizer to wrap.

    Raises:
        TypeError: ``optimizer`` is not an outer optimizer.

    """

    def __init__(self, optimizer: OuterOptimizer) -> None:
        # The type is not checked by Python: a configuration file may hold anything.
        given: object = optimizer
        if not isinstance(given, OuterOptimizer):
            raise TypeError(
                f"{type(self).__name__}: optimizer must be an outer optimizer, got {optimizer!r}; use for example"
                " LookAhead(lr=0.2)"
            )
        self.optimizer = optimizer

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        self.optimizer.setup(theta, views, workers)

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        self.optimizer.step(gradient, views)

    @override
    def set_workers(self, workers: int) -> None:
        self.optimizer.set_workers(workers)

    @override
    def set_local_steps(self, local_steps: int) -> None:
        self.optimizer.set_local_steps(local_steps)

    @property
    @override
    def momentum_buffer(self) -> Tensor | None:
        return self.optimizer.momentum_buffer

    @override
    def restart_momentum(self) -> None:
        self.optimizer.restart_momentum()

    @property
    @override
    def averages_pushes(self) -> bool:
        return self.optimizer.averages_pushes

    @property
    @override
    def in_period(self) -> bool:
        return self.optimizer.in_period

    @property
    @override
    def unapplied_pushes(self) -> int:
        return self.optimizer.unapplied_pushes

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"name": type(self.optimizer).__name__, "optimizer": self.optimizer.state_dict()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        wrapper, name = type(self).__name__, type(self.optimizer).__name__
        missing = [key for key in ("name", "optimizer") if key not in state]
        if missing:
            raise ValueError(f"the saved state of {wrapper} lacks {missing}")
        if state["name"] != name:
            raise ValueError(
                f"the checkpoint was written with {wrapper}({state['name']}(...)), this run has"
                f" {wrapper}({name}(...)); use the same outer optimizer, or load the checkpoint's weights only"
            )
        self.optimizer.load_state_dict(state["optimizer"])
