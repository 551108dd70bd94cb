"""Gradient descent with heavy-ball momentum, one step per push."""

from __future__ import annotations

import torch

from lightning_async_localsgd.hyperparameters import fraction, positive
from lightning_async_localsgd.outer.torch_optimizer import TorchOptimizer


class Momentum(TorchOptimizer):
    """m = beta*m + g; theta -= eps*m for every push, by ``torch.optim.SGD``: Polyak's heavy ball on pseudo-gradients.

    With a quorum of all workers, and an inner learning rate that stays the same, this is the outer step of SlowMo (Wang
    et al., arXiv 1910.00643, Algorithm 1) with lr in the place of its alpha.
    With several workers and no quorum the momentum acts k times in what a synchronous method calls a round: see
    :class:`.Nesterov`.

    Args:
        lr: eps, learning rate of a single push, > 0. In the long run a push moves the model by lr/(1 - beta) times its
            own length.
        momentum: beta, in [0, 1).

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> theta = torch.zeros(1)
        >>> rule = Momentum(lr=1.0, momentum=0.5)
        >>> rule.setup(theta, {"w": theta}, workers=1)
        >>> for gradient in torch.ones(2, 1):
        ...     rule.step(gradient, {"w": gradient})
        >>> theta, rule.momentum_buffer
        (tensor([-2.5000]), tensor([1.5000]))

    """

    def __init__(self, lr: float, momentum: float = 0.9) -> None:
        self.lr = positive("Momentum", "lr", lr, "0.07 is a start for 4 workers without a quorum")
        self.momentum = fraction("Momentum", "momentum", momentum, "0.9 is usual, 0 is off")
        super().__init__(torch.optim.SGD, lr=self.lr, momentum=self.momentum)

    def __repr__(self) -> str:
        return f"Momentum(lr={self.lr}, momentum={self.momentum})"
