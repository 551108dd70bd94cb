"""Momentum restart: the momentum of another outer optimizer is reset to zero at regular intervals."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.outer.base import OuterOptimizer, check_saved_integers
from lightning_async_localsgd.outer.wrapper import OptimizerWrapper
from lightning_async_localsgd.protocol.checks import check_count


class MomentumRestart(OptimizerWrapper):
    """Momentum restart (arXiv 2605.28585): the momentum of ``optimizer`` is set to zero after every S of its steps.

    A step is an update of the momentum. That is one push, or one period if ``optimizer`` averages N pushes
    (:class:`.DelayedNesterov`, :class:`.Buffer`). A period that a change of the number of workers ends early counts as
    a step, too.

    Args:
        optimizer: outer optimizer with momentum > 0. This can also be a :class:`.HeLoCo`. Its learning rate has the
            same meaning as without restarts.
        every: S, >= 1. With 1, the momentum is reset after every step.

    Raises:
        TypeError: ``optimizer`` is not an outer optimizer.
        ValueError: ``every`` is outside its range, or ``optimizer`` has no momentum that can be restarted.

    Example::

        >>> from lightning_async_localsgd.outer import Momentum, MomentumRestart
        >>> theta = torch.zeros(1)
        >>> outer_optimizer = MomentumRestart(Momentum(lr=1.0, momentum=0.5), every=2)
        >>> outer_optimizer.setup(theta, {"w": theta}, workers=1)
        >>> for gradient in torch.ones(3, 1):
        ...     outer_optimizer.step(gradient, {"w": gradient})
        >>> theta  # 1 + 1.5, a restart, and 1 again
        tensor([-3.5000])

    """

    def __init__(self, optimizer: OuterOptimizer, every: int) -> None:
        super().__init__(optimizer)
        self.every = check_count("MomentumRestart", "every", every, "it is the number of steps between two restarts")
        # A trial on a model with one parameter shows now whether the momentum can be restarted.
        trial, theta = copy.deepcopy(optimizer), torch.zeros(1)
        trial.setup(theta, {"": theta.view(1, 1)}, 1)
        try:
            trial.restart_momentum()
        except ValueError as error:
            raise ValueError(f"MomentumRestart: {error}") from error

    def __repr__(self) -> str:
        return f"MomentumRestart({self.optimizer!r}, every={self.every})"

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        super().setup(theta, views, workers)
        self._steps = 0

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        super().step(gradient, views)
        if not self.in_period:
            self._set_steps(self._steps + 1)

    @override
    def set_workers(self, workers: int) -> None:
        was_in_period = self.in_period
        super().set_workers(workers)
        if was_in_period and not self.in_period:
            self._set_steps(self._steps + 1)

    @override
    def restart_momentum(self) -> None:
        super().restart_momentum()
        self._steps = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self._steps, "in_period": self.in_period}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_saved_integers("MomentumRestart", state, ["steps"])
        if type(state.get("in_period")) is not bool:
            raise ValueError("the saved state of MomentumRestart has no boolean 'in_period'")
        super().load_state_dict(state)
        # If the number of workers differs from the saved one, loading may have ended the saved period.
        self._set_steps(state["steps"] + (state["in_period"] and not self.in_period))

    def _set_steps(self, steps: int) -> None:
        self._steps = steps
        if self._steps >= self.every:
            self.restart_momentum()
