"""Buffered aggregation: nothing is applied until N pushes are there, then one Nesterov step on their mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.hyperparameters import fraction, positive
from lightning_async_localsgd.outer.base import CHUNK, OuterOptimizer, chunks
from lightning_async_localsgd.outer.vectors import ModelVectors, check_integers


class Buffer(OuterOptimizer):
    """FedBuff (Nguyen et al., arXiv 2106.06639) with Nesterov's momentum: *Async Buffer* in arXiv 2401.09135.

    With N the period, beta the momentum and eps the learning rate::

        Delta += g
        every N-th push:  m = beta*m + Delta/N;  theta -= eps*(Delta/N + beta*m);  Delta = 0

    With N = k pushes from one model this is a round of synchronous DiLoCo, bit for bit. What sets it apart from
    :class:`.DelayedNesterov` is that a push that has arrived is not in the model yet when its worker is dispatched
    again. Pushes that are left at the end of training, fewer than N, are never applied, and a warning says how many.

    With ``period="auto"`` N follows the number of live workers; when it falls to what has been collected, the step is
    taken at once, on the mean of what is there.

    Args:
        lr: eps, the learning rate of one synchronous round, > 0. It is that of a step on N pushes, whatever N is: with
            N = k/2 the model moves twice as far in the same number of pushes.
        momentum: beta, in [0, 1).
        period: N >= 1, or ``"auto"`` for the number of live workers.

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> theta = torch.ones(1)
        >>> rule = Buffer(lr=0.5, momentum=0.0)
        >>> rule.setup(theta, {"w": theta}, workers=2)
        >>> rule.step(torch.tensor([0.4]), {})
        >>> theta
        tensor([1.])
        >>> rule.step(torch.tensor([0.8]), {})
        >>> theta
        tensor([0.7000])

    """

    def __init__(self, lr: float = 0.7, momentum: float = 0.9, period: int | Literal["auto"] = "auto") -> None:
        self.lr = positive("Buffer", "lr", lr, "0.7 is usual, as in synchronous DiLoCo")
        self.momentum = fraction("Buffer", "momentum", momentum, "0.9 is usual, 0 is off")
        if period != "auto" and (type(period) is not int or period < 1):
            raise ValueError(f'Buffer: period must be an integer >= 1 or "auto", got {period!r}; "auto" is usual')
        self.period = period
        self._theta: Tensor | None = None

    def __repr__(self) -> str:
        return f"Buffer(lr={self.lr}, momentum={self.momentum}, period={self.period!r})"

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        self._vectors = ModelVectors("Buffer", theta, views, ["momentum", "delta"])
        self._scratch = torch.empty(min(CHUNK, theta.numel()), dtype=theta.dtype)
        self._theta = theta
        self._collected = 0
        self._period = self._period_of(workers)

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        self._ready()
        self._vectors["delta"].add_(gradient)
        self._collected += 1
        if self._collected >= self._period:
            self._apply()

    @override
    def set_workers(self, workers: int) -> None:
        self._ready()
        self._period = self._period_of(workers)
        if self._collected >= self._period:
            self._apply()

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
    def collects(self) -> bool:
        return True

    @property
    @override
    def in_period(self) -> bool:
        self._ready()
        return self._collected > 0

    @property
    @override
    def held_back(self) -> int:
        self._ready()
        return self._collected

    @property
    @override
    def replaces_model(self) -> bool:
        self._ready()
        return self.momentum == 0.0 and self.lr == 1.0 and self._period == 1

    @override
    def state_dict(self) -> dict[str, Any]:
        self._ready()
        return {**self._vectors.state_dict(), "collected": self._collected}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ready()
        check_integers("Buffer", state, ["collected"])
        self._vectors.load_state_dict(state)
        self._collected = state["collected"]
        if self._collected >= self._period:
            # More workers, or another setting, would have collected more.
            self._apply()

    def _apply(self) -> None:
        """One Nesterov step on the mean of what is collected, in the operations and the order of torch's."""
        for flat, m, delta in chunks(self._ready(), self._vectors["momentum"], self._vectors["delta"]):
            delta.div_(self._collected)
            m.mul_(self.momentum).add_(delta)
            flat.add_(torch.add(delta, m, alpha=self.momentum, out=self._scratch[: flat.numel()]), alpha=-self.lr)
            delta.fill_(-0.0)
        self._collected = 0

    def _period_of(self, workers: int) -> int:
        if workers < 1:
            raise ValueError(f"Buffer: workers must be >= 1, got {workers}")
        return workers if self.period == "auto" else self.period

    def _ready(self) -> Tensor:
        if self._theta is None:
            raise RuntimeError("Buffer was used before setup()")
        return self._theta
