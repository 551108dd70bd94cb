"""Nesterov's momentum, one step per push."""

from __future__ import annotations

import torch

from lightning_async_localsgd.hyperparameters import fraction, positive
from lightning_async_localsgd.outer.torch_optimizer import TorchOptimizer


class Nesterov(TorchOptimizer):
    """m = beta*m + g; theta -= eps*(g + beta*m) for every push, by ``torch.optim.SGD(nesterov=True)``.

    With a quorum of all workers this is the outer optimizer of synchronous DiLoCo (Douillard et al., arXiv 2311.08105).
    Applied to each push on its own it is the plain asynchronous rule that Liu et al. (arXiv 2401.09135, section 4) warn
    of: four equal pushes in turn move the model by 12.1 times their length, where one step on their mean moves it by
    1.9. Its learning rate has to be about k times smaller there, and :class:`.DelayedNesterov` does not need that.

    Args:
        lr: eps, learning rate of a single push, > 0, or of one synchronous round where the strategy merges the pushes
            of all workers into one (``quorum``).
        momentum: beta, in [0, 1).

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> theta = torch.zeros(1)
        >>> rule = Nesterov(lr=1.0, momentum=0.9)
        >>> rule.setup(theta, {"w": theta}, workers=4)
        >>> for gradient in torch.ones(4, 1):
        ...     rule.step(gradient, {"w": gradient})
        >>> theta
        tensor([-12.1441])

    """

    def __init__(self, lr: float, momentum: float = 0.9) -> None:
        self.lr = positive("Nesterov", "lr", lr, "0.7 is usual for synchronous rounds, a tenth of it for single pushes")
        self.momentum = fraction("Nesterov", "momentum", momentum, "0.9 is usual, 0 is off")
        # torch refuses nesterov=True without a momentum, where it is plain gradient descent.
        super().__init__(torch.optim.SGD, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0.0)

    def __repr__(self) -> str:
        return f"Nesterov(lr={self.lr}, momentum={self.momentum})"
