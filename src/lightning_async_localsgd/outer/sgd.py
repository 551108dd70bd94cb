"""Gradient descent without momentum, one step per push."""

from __future__ import annotations

import torch

from lightning_async_localsgd.outer.torch_optimizer import TorchOptimizer
from lightning_async_localsgd.protocol.checks import check_positive


class SGD(TorchOptimizer):
    """Gradient descent on the pseudo-gradient g of each push, computed by ``torch.optim.SGD``.

    With eps the learning rate::

        theta -= eps*g

    This is *Async SGD* in Liu et al. (arXiv 2401.09135). With ``lr=1/k``, k pushes from the same global model set it to
    the mean of the k local models, as in federated averaging (McMahan et al., arXiv 1602.05629). With one worker and
    ``lr=1``, the global model becomes the local model.

    Args:
        lr: eps, the learning rate of a single push, > 0. For the same movement as a synchronous round of k workers with
            learning rate L, use L/k, or use L if the strategy merges the k pushes into one step (``quorum``).

    Raises:
        ValueError: ``lr`` is outside its range.

    Example::

        >>> from lightning_async_localsgd.outer import SGD
        >>> theta = torch.ones(2)
        >>> outer_optimizer = SGD(lr=0.5)
        >>> outer_optimizer.setup(theta, {"w": theta}, workers=2)
        >>> gradient = torch.tensor([0.4, 0.0])
        >>> outer_optimizer.step(gradient, {"w": gradient})
        >>> theta
        tensor([0.8000, 1.0000])

    """

    def __init__(self, lr: float) -> None:
        self.lr = check_positive("SGD", "lr", lr, "1/(number of workers) averages the workers' models")
        super().__init__(torch.optim.SGD, lr=self.lr)

    def __repr__(self) -> str:
        return f"SGD(lr={self.lr})"
