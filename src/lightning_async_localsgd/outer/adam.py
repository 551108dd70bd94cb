"""Adam on pseudo-gradients, one step per push."""

from __future__ import annotations

import torch

from lightning_async_localsgd.hyperparameters import fraction, positive
from lightning_async_localsgd.outer.torch_optimizer import TorchOptimizer


class Adam(TorchOptimizer):
    """``torch.optim.Adam`` on the pseudo-gradient of every push: FedAdam (Reddi et al., arXiv 2003.00295) per push.

    The first average m is bias-corrected by the number of steps, so that it can't be restarted on its own.

    Args:
        lr: learning rate of a single push, > 0: about how far each weight moves, whatever the push's length. It is not
            comparable with that of the other rules.
        betas: decay rates of the averages of g and of g*g, both in [0, 1).
        eps: added to the root of the second average, > 0. Pseudo-gradients are small and few, so that values much
            larger than torch's are in use: 1e-3 in FedAdam, 0.1 in DiLoCo's comparison (arXiv 2311.08105).

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> theta = torch.ones(2)
        >>> rule = Adam(lr=0.1)
        >>> rule.setup(theta, {"w": theta}, workers=2)
        >>> gradient = torch.tensor([0.4, 0.0])
        >>> rule.step(gradient, {"w": gradient})
        >>> theta
        tensor([0.9000, 1.0000])

    """

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.lr = positive("Adam", "lr", lr, "0.001 is a start")
        given: object = betas
        advice = "(0.9, 0.999) is usual"
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise ValueError(f"Adam: betas must be two numbers, got {betas!r}; {advice}")
        self.betas = (fraction("Adam", "betas[0]", betas[0], advice), fraction("Adam", "betas[1]", betas[1], advice))
        self.eps = positive("Adam", "eps", eps, "1e-8 is torch's, 1e-3 FedAdam's")
        super().__init__(torch.optim.Adam, lr=self.lr, betas=self.betas, eps=self.eps)

    def __repr__(self) -> str:
        return f"Adam(lr={self.lr}, betas={self.betas}, eps={self.eps})"
