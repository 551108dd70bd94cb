"""Momentum look-ahead: a step along the push and along an average of the pushes before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.hyperparameters import fraction, positive
from lightning_async_localsgd.outer.base import CHUNK, OuterOptimizer, chunks
from lightning_async_localsgd.outer.vectors import ModelVectors


class LookAhead(OuterOptimizer):
    """Momentum look-ahead (MLA, arXiv 2606.00271).

    With gamma the momentum and eta the learning rate, for every push::

        m = gamma*m + (1 - gamma)*g
        theta -= eta*(gamma*m + g)

    m is an average of the pushes, not a sum of them as in the other rules: equal pushes move the model by
    eta*(1 + gamma) times their length in the long run, where classic momentum comes to eta/(1 - beta). So k pushes in
    turn hardly accelerate, which is why the rule can be applied to each push at once.

    Args:
        lr: eta, learning rate of a single push, > 0; nothing is divided by the number of workers. In the long run k
            equal pushes move the model as far as :class:`.DelayedNesterov` with learning rate L and momentum beta does
            where ``lr = L / ((1 - beta) * (1 + gamma) * k)``: 0.92 for L = 0.7, beta = gamma = 0.9 and k = 4. More of
            it comes at once, so that this is the upper end of what to try, and 1/k the lower one.
        momentum: gamma, in [0, 1).

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> theta = torch.zeros(1)
        >>> rule = LookAhead(lr=1.0, momentum=0.5)
        >>> rule.setup(theta, {"w": theta}, workers=2)
        >>> rule.step(torch.ones(1), {})
        >>> theta, rule.momentum_buffer
        (tensor([-1.2500]), tensor([0.5000]))

    """

    def __init__(self, lr: float, momentum: float = 0.9) -> None:
        self.lr = positive("LookAhead", "lr", lr, "it is that of a single push; 1/(number of workers) is a start")
        self.momentum = fraction("LookAhead", "momentum", momentum, "0.9 is usual, 0 is off")
        self._theta: Tensor | None = None

    def __repr__(self) -> str:
        return f"LookAhead(lr={self.lr}, momentum={self.momentum})"

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        self._vectors = ModelVectors("LookAhead", theta, views, ["momentum"])
        self._scratch = torch.empty(min(CHUNK, theta.numel()), dtype=theta.dtype)
        self._theta = theta

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        for flat, m, g in chunks(self._ready(), self._vectors["momentum"], gradient):
            m.mul_(self.momentum).add_(g, alpha=1.0 - self.momentum)
            flat.add_(torch.add(g, m, alpha=self.momentum, out=self._scratch[: flat.numel()]), alpha=-self.lr)

    @override
    def set_workers(self, workers: int) -> None:
        """Changes nothing: the learning rate is per push."""

    @property
    @override
    def momentum_buffer(self) -> Tensor | None:
        self._ready()
        return self._vectors["momentum"]

    @override
    def restart_momentum(self) -> None:
        self._ready()
        if self.momentum == 0.0:
            super().restart_momentum()
        self._vectors.rest("momentum")

    @property
    @override
    def replaces_model(self) -> bool:
        return self.momentum == 0.0 and self.lr == 1.0

    @override
    def state_dict(self) -> dict[str, Any]:
        self._ready()
        return dict(self._vectors.state_dict())

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ready()
        self._vectors.load_state_dict(state)

    def _ready(self) -> Tensor:
        if self._theta is None:
            raise RuntimeError("LookAhead was used before setup()")
        return self._theta
