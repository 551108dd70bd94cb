"""A rule whose momentum begins anew from time to time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.hyperparameters import count
from lightning_async_localsgd.outer.base import OuterOptimizer
from lightning_async_localsgd.outer.vectors import check_integers
from lightning_async_localsgd.outer.wrapper import Wrapper


class MomentumRestart(Wrapper):
    """Sets the momentum of ``rule`` to zero after every S of its steps (arXiv 2605.28585).

    A step is an update of the momentum: a push, or a whole period where the rule averages N pushes
    (:class:`.DelayedNesterov`, :class:`.Buffer`), whether or not a change of membership has cut it short.

    Args:
        rule: any with a momentum > 0, another wrapper included; its learning rate is meant as without restarts.
        every: S >= 1. With 1 the momentum never outlives its step.

    Raises:
        TypeError: ``rule`` is no outer optimizer.
        ValueError: ``every`` is outside its range, or ``rule`` has no momentum that could be restarted.

    Example::

        >>> from lightning_async_localsgd.outer import Momentum
        >>> theta = torch.zeros(1)
        >>> rule = MomentumRestart(Momentum(lr=1.0, momentum=0.5), every=2)
        >>> rule.setup(theta, {"w": theta}, workers=1)
        >>> for gradient in torch.ones(3, 1):
        ...     rule.step(gradient, {"w": gradient})
        >>> theta  # 1 + 1.5, and 1 again.
        tensor([-3.5000])

    """

    def __init__(self, rule: OuterOptimizer, every: int) -> None:
        super().__init__(rule)
        self.every = count("MomentumRestart", "every", every, "it is the number of steps between two restarts")
        # Whether there is something to restart: tried on a model of one parameter.
        trial, theta = copy.deepcopy(rule), torch.zeros(1)
        trial.setup(theta, {"": theta.view(1, 1)}, 1)
        try:
            trial.restart_momentum()
        except ValueError as error:
            raise ValueError(f"MomentumRestart: {error}") from error

    def __repr__(self) -> str:
        return f"MomentumRestart({self.rule!r}, every={self.every})"

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        super().setup(theta, views, workers)
        self._steps = 0

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        super().step(gradient, views)
        if not self.in_period:
            self._count(self._steps + 1)

    @override
    def set_workers(self, workers: int) -> None:
        was_in_period = self.in_period
        super().set_workers(workers)
        if was_in_period and not self.in_period:
            self._count(self._steps + 1)

    @override
    def restart_momentum(self) -> None:
        super().restart_momentum()
        self._steps = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self._steps, "in_period": self.in_period}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_integers("MomentumRestart", state, ["steps"])
        if type(state.get("in_period")) is not bool:
            raise ValueError("the saved state of MomentumRestart lacks 'in_period', or it is neither True nor False")
        super().load_state_dict(state)
        # With other workers than when it was saved, a period may have ended just now.
        self._count(state["steps"] + (state["in_period"] and not self.in_period))

    def _count(self, steps: int) -> None:
        self._steps = steps
        if self._steps >= self.every:
            self.restart_momentum()
