"""Gradient descent with Nesterov momentum, one step per push."""

from __future__ import annotations

import torch

from lightning_async_localsgd.outer.torch_optimizer import TorchOptimizer
from lightning_async_localsgd.protocol.checks import check_fraction, check_positive


class Nesterov(TorchOptimizer):
    """Nesterov momentum on the pseudo-gradient g of each push, computed by ``torch.optim.SGD(nesterov=True)``.

    With beta the momentum and eps the learning rate::

        m = beta*m + g
        theta -= eps*(g + beta*m)

    With a quorum of all workers, this is the outer optimizer of synchronous DiLoCo (Douillard et al.,
    arXiv 2311.08105). Without a quorum, it is the plain asynchronous method that Liu et al. (arXiv 2401.09135,
    section 4) advise against: with beta = 0.9, four equal pushes applied in turn move the model by 12.1 times their
    length, while one step on their mean moves it by 1.9 times. The learning rate then has to be about k times smaller.
    :class:`.DelayedNesterov` does not have this problem.

    Args:
        lr: eps, > 0. This is the learning rate of a single push, or of one synchronous round if the strategy merges the
            pushes of all workers into one step (``quorum``).
        momentum: beta, in [0, 1).

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> from lightning_async_localsgd.outer import Nesterov
        >>> theta = torch.zeros(1)
        >>> outer_optimizer = Nesterov(lr=1.0, momentum=0.9)
        >>> outer_optimizer.setup(theta, {"w": theta}, workers=4)
        >>> for gradient in torch.ones(4, 1):
        ...     outer_optimizer.step(gradient, {"w": gradient})
        >>> theta
        tensor([-12.1441])

    """

    def __init__(self, lr: float, momentum: float = 0.9) -> None:
        self.lr = check_positive("Nesterov", "lr", lr, "0.7 is usual for synchronous rounds, 0.07 for single pushes")
        self.momentum = check_fraction("Nesterov", "momentum", momentum, "0.9 is usual, 0 turns it off")
        # torch rejects nesterov=True with momentum=0, which is plain gradient descent.
        super().__init__(torch.optim.SGD, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0.0)

    def __repr__(self) -> str:
        return f"Nesterov(lr={self.lr}, momentum={self.momentum})"
