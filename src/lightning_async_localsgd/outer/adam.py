"""Adam on pseudo-gradients, one step per push."""

from __future__ import annotations

import torch

from lightning_async_localsgd.outer.torch_optimizer import TorchOptimizer
from lightning_async_localsgd.protocol.checks import check_fraction, check_positive


class Adam(TorchOptimizer):
    """``torch.optim.Adam`` on the pseudo-gradient g of each push.

    With beta1 and beta2 the ``betas``, lr the learning rate and t the number of pushes::

        m = beta1*m + (1 - beta1)*g
        v = beta2*v + (1 - beta2)*g*g
        theta -= lr * m/(1 - beta1^t) / (sqrt(v/(1 - beta2^t)) + eps)

    FedAdam (Reddi et al., arXiv 2003.00295) takes such a step once per round, without the bias correction. The momentum
    m cannot be restarted on its own, because its bias correction depends on t.

    Args:
        lr: learning rate of a single push, > 0. One step moves each weight by about ``lr``, whatever the length of the
            push, so learning rates of other outer optimizers do not carry over.
        betas: beta1 and beta2, the decay rates of the averages of g and g*g, both in [0, 1).
        eps: constant added to the denominator, > 0. Pseudo-gradients are small and few, so values much larger than
            torch's default are in use: 1e-3 in FedAdam, 0.1 in DiLoCo's comparison (arXiv 2311.08105).

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> from lightning_async_localsgd.outer import Adam
        >>> theta = torch.ones(2)
        >>> outer_optimizer = Adam(lr=0.1)
        >>> outer_optimizer.setup(theta, {"w": theta}, workers=2)
        >>> gradient = torch.tensor([0.4, 0.0])
        >>> outer_optimizer.step(gradient, {"w": gradient})
        >>> theta
        tensor([0.9000, 1.0000])

    """

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.lr = check_positive("Adam", "lr", lr, "try 0.001")
        # The type is not checked by Python: a configuration file may hold anything.
        pair: object = betas
        advice = "(0.9, 0.999) is usual"
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"Adam: betas must be two numbers, got {betas!r}; {advice}")
        self.betas = (
            check_fraction("Adam", "betas[0]", betas[0], advice),
            check_fraction("Adam", "betas[1]", betas[1], advice),
        )
        self.eps = check_positive("Adam", "eps", eps, "torch uses 1e-8, FedAdam 1e-3")
        super().__init__(torch.optim.Adam, lr=self.lr, betas=self.betas, eps=self.eps)

    def __repr__(self) -> str:
        return f"Adam(lr={self.lr}, betas={self.betas}, eps={self.eps})"
