"""Gradient descent without momentum, one step per push."""

from __future__ import annotations

import torch

from lightning_async_localsgd.hyperparameters import positive
from lightning_async_localsgd.outer.torch_optimizer import TorchOptimizer


class SGD(TorchOptimizer):
    """theta -= eps*g for every push, by ``torch.optim.SGD``.

    *Async SGD* in Liu et al. (arXiv 2401.09135). With ``lr=1/k`` a round of k pushes is the mean of the k local models,
    as in federated averaging (McMahan et al., arXiv 1602.05629). With one worker and ``lr=1`` the global model becomes
    the local one.

    Args:
        lr: eps, learning rate of a single push, > 0. What a synchronous round of k workers takes with learning rate
            ``lr`` is ``lr/k`` here, or ``lr`` where the strategy merges k pushes into one (``quorum``).

    Raises:
        ValueError: ``lr`` is outside its range.

    Example::

        >>> theta = torch.ones(2)
        >>> rule = SGD(lr=0.5)
        >>> rule.setup(theta, {"w": theta}, workers=2)
        >>> gradient = torch.tensor([0.4, 0.0])
        >>> rule.step(gradient, {"w": gradient})
        >>> theta
        tensor([0.8000, 1.0000])

    """

    def __init__(self, lr: float) -> None:
        self.lr = positive("SGD", "lr", lr, "1/(number of workers) averages the workers' models")
        super().__init__(torch.optim.SGD, lr=self.lr)

    def __repr__(self) -> str:
        return f"SGD(lr={self.lr})"
