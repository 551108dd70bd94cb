"""Momentum look-ahead: the momentum is an average of the pushes and acts at each of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.outer.flat import FlatOptimizer
from lightning_async_localsgd.protocol.checks import check_fraction, check_positive


class LookAhead(FlatOptimizer):
    """Momentum look-ahead (MLA, arXiv 2606.00271).

    With g a push, gamma the momentum and eta the learning rate::

        m = gamma*m + (1 - gamma)*g
        theta -= eta*(gamma*m + g)

    Here m is an average of the pushes, not a sum as in classic momentum. In the long run, equal pushes move the model
    by eta*(1 + gamma) times their length, compared with eta/(1 - beta) for classic momentum. Since k pushes in turn
    hardly accelerate, the momentum can be applied at each push.

    Args:
        lr: eta, the learning rate of a single push, > 0. It is not divided by the number of workers. For k workers, try
            values from 1/k up to ``L / ((1 - beta) * (1 + gamma) * k)``. At the upper end, k equal pushes move the
            model as far in the long run as :class:`.DelayedNesterov` with learning rate L and momentum beta, but more
            of this movement is immediate. With L = 0.7, beta = gamma = 0.9 and k = 4 the upper end is 0.92.
        momentum: gamma, in [0, 1).

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> import torch
        >>> from lightning_async_localsgd.outer import LookAhead
        >>> theta = torch.zeros(1)
        >>> outer_optimizer = LookAhead(lr=1.0, momentum=0.5)
        >>> outer_optimizer.setup(theta, {"w": theta}, workers=2)
        >>> outer_optimizer.step(torch.ones(1), {})
        >>> theta, outer_optimizer.momentum_buffer
        (tensor([-1.2500]), tensor([0.5000]))

    """

    def __init__(self, lr: float, momentum: float = 0.9) -> None:
        super().__init__(
            lr=check_positive("LookAhead", "lr", lr, "try 1/(number of workers), since it applies to a single push"),
            momentum=check_fraction("LookAhead", "momentum", momentum, "0.9 is usual, 0 turns it off"),
        )

    def __repr__(self) -> str:
        return f"LookAhead(lr={self.lr}, momentum={self.momentum})"

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        for theta, m, g in self._chunks(gradient):
            m.mul_(self.momentum).add_(g, alpha=1.0 - self.momentum)
            self._descend(theta, g, m, self.lr, self.momentum)

    @override
    def set_workers(self, workers: int) -> None:
        pass  # The learning rate applies to a single push.

    @property
    @override
    def replaces_model(self) -> bool:
        return self.momentum == 0.0 and self.lr == 1.0
