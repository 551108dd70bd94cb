"""Gradient descent with heavy-ball momentum, one step per push."""

from __future__ import annotations

import torch

from lightning_async_localsgd.outer.torch_optimizer import TorchOptimizer
from lightning_async_localsgd.protocol.checks import check_fraction, check_positive


class Momentum(TorchOptimizer):
    """Heavy-ball momentum (Polyak) on the pseudo-gradient g of each push, computed by ``torch.optim.SGD``.

    With beta the momentum and eps the learning rate::

        m = beta*m + g
        theta -= eps*m

    With a quorum of all workers and a constant inner learning rate, this is the outer step of SlowMo (Wang et al.,
    arXiv 1910.00643, Algorithm 1), where ``lr`` is alpha. With k workers and no quorum, the momentum is applied k times
    in the time of one synchronous round. See :class:`.Nesterov` for the effect.

    Args:
        lr: eps, the learning rate of a single push, > 0. In the long run, each push moves the model by lr/(1 - beta)
            times its own length.
        momentum: beta, in [0, 1).

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> from lightning_async_localsgd.outer import Momentum
        >>> theta = torch.zeros(1)
        >>> outer_optimizer = Momentum(lr=1.0, momentum=0.5)
        >>> outer_optimizer.setup(theta, {"w": theta}, workers=1)
        >>> for gradient in torch.ones(2, 1):
        ...     outer_optimizer.step(gradient, {"w": gradient})
        >>> theta, outer_optimizer.momentum_buffer
        (tensor([-2.5000]), tensor([1.5000]))

    """

    def __init__(self, lr: float, momentum: float = 0.9) -> None:
        self.lr = check_positive("Momentum", "lr", lr, "try 0.07 with 4 workers and no quorum")
        self.momentum = check_fraction("Momentum", "momentum", momentum, "0.9 is usual, 0 turns it off")
        super().__init__(torch.optim.SGD, lr=self.lr, momentum=self.momentum)

    def __repr__(self) -> str:
        return f"Momentum(lr={self.lr}, momentum={self.momentum})"
