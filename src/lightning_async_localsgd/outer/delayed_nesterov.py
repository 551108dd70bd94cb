"""Delayed Nesterov: pushes act at once, the momentum only every N-th push."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.hyperparameters import fraction, is_number, positive
from lightning_async_localsgd.outer.base import CHUNK, OuterOptimizer, chunks
from lightning_async_localsgd.outer.vectors import ModelVectors, check_integers

log = logging.getLogger(__name__)


class DelayedNesterov(OuterOptimizer):
    r"""Algorithm 3 of *Asynchronous Local-SGD Training for Language Modeling* (Liu et al., arXiv 2401.09135v2).

    With N the period, c the activation, beta the momentum, k live workers and t counting pushes::

        Delta += g
        if (t+1) % N == 0:  m = beta*m + Delta/N;  theta -= eps*((1 - c*N + c)*beta*m + g/N);  Delta = 0
        else:               theta -= eps*(c*beta*m + g/N)
        t += 1

    where eps = lr * N / k, so that ``lr`` means the same whatever the period: k pushes together move the model as far
    as one synchronous round with learning rate ``lr``.

    When membership changes within a period, after n pushes, the period ends there: m = beta*m + Delta/n and
    theta -= eps*(1 - c*n)*beta*m, so that the momentum's weights within a period add up to 1 in any case. The pushes
    themselves are in the model already.

    Args:
        lr: learning rate of one synchronous round of k pushes, > 0.
        momentum: beta, in [0, 1). With 0, pushes are averaged and nothing else.
        period: N >= 1, or ``"auto"`` for the number of live workers.
        activation: c, in [0, 1/N]: share of the momentum that acts already between two updates of it.

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> from lightning_async_localsgd.outer import DelayedNesterov
        >>> theta = torch.ones(2)
        >>> rule = DelayedNesterov(lr=0.5, momentum=0.0)
        >>> rule.setup(theta, {"w": theta}, workers=2)
        >>> rule.step(torch.tensor([0.4, 0.0]), {})
        >>> theta
        tensor([0.9000, 1.0000])

    """

    def __init__(
        self,
        lr: float = 0.7,
        momentum: float = 0.9,
        period: int | Literal["auto"] = "auto",
        activation: float = 0.0,
    ) -> None:
        self.lr = positive("DelayedNesterov", "lr", lr, "the paper's scale is lr=0.7")
        self.momentum = fraction("DelayedNesterov", "momentum", momentum, "0.9 is usual, 0 is off")
        if period != "auto" and (type(period) is not int or period < 1):
            raise ValueError(f'DelayedNesterov: period must be an integer >= 1 or "auto", got {period!r}')
        if not (is_number(activation) and 0.0 <= activation <= 1.0):
            raise ValueError(
                f"DelayedNesterov: activation must be in [0, 1/period], got {activation!r}; 0 is the paper's choice"
            )
        self.period = period
        self.activation = float(activation)
        if period != "auto":
            self._check_activation(period)
        self._warned = False
        self._theta: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"DelayedNesterov(lr={self.lr}, momentum={self.momentum}, period={self.period!r},"
            f" activation={self.activation})"
        )

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        if workers < 1:
            raise ValueError(f"DelayedNesterov: workers must be >= 1, got {workers}")
        self._period = workers if self.period == "auto" else self.period
        self._check_activation(self._period)
        self._workers = workers
        self._theta = theta
        self._vectors = ModelVectors("DelayedNesterov", theta, views, ["momentum", "delta"])
        self._m, self._delta = self._vectors["momentum"], self._vectors["delta"]
        self._scratch = torch.empty(min(CHUNK, theta.numel()), dtype=theta.dtype)
        self._pushes = 0
        self._collected = 0

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        theta = self._ready()
        self._pushes += 1
        self._collected += 1
        closing = self._collected >= self._period
        activation = min(self.activation, 1.0 / self._period)
        share = 1.0 - activation * self._period + activation if closing else activation
        # theta -= eps*(share*beta*m + g/N) as theta -= lr/k * (g + N*share*beta*m): for N = k = 1 these are the very
        # operations of torch.optim.SGD(nesterov=True), in its order.
        weight = self._period * share * self.momentum
        for flat, m, delta, g in chunks(theta, self._m, self._delta, gradient):
            delta.add_(g)
            if closing:
                m.mul_(self.momentum).add_(delta, alpha=1.0 / self._period)
                delta.fill_(-0.0)
            if closing or weight != 0.0:
                scratch = torch.add(g, m, alpha=weight, out=self._scratch[: g.numel()])
                flat.add_(scratch, alpha=-self.lr / self._workers)
            else:
                flat.add_(g, alpha=-self.lr / self._workers)
        if closing:
            self._collected = 0

    @override
    def set_workers(self, workers: int) -> None:
        self._ready()
        if workers < 1:
            raise ValueError(f"DelayedNesterov: workers must be >= 1, got {workers}")
        if workers == self._workers:
            return
        self._close_period(self._period, self._workers)
        self._workers = workers
        if self.period == "auto":
            self._period = workers
        if self.activation * self._period > 1.0 + 1e-9 and not self._warned:
            # Training must not end because a worker has joined.
            self._warned = True
            log.warning(
                f"DelayedNesterov: activation={self.activation} is more than 1/{self._period} now that there are"
                f" {workers} workers; 1/{self._period} is used while they are that many"
            )

    @property
    @override
    def momentum_buffer(self) -> Tensor | None:
        self._ready()
        return self._m

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
    def replaces_model(self) -> bool:
        self._ready()
        return self.momentum == 0.0 and self.lr == 1.0 and self._workers == 1

    @override
    def state_dict(self) -> dict[str, Any]:
        self._ready()
        return {
            **self._vectors.state_dict(),
            "pushes": self._pushes,
            "collected": self._collected,
            "period": self._period,
            "workers": self._workers,
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ready()
        check_integers("DelayedNesterov", state, ["pushes", "collected", "period", "workers"])
        self._vectors.load_state_dict(state)
        self._pushes = state["pushes"]
        self._collected = state["collected"]
        if (state["period"], state["workers"]) != (self._period, self._workers):
            # Saved in the middle of a period that other workers, or another setting, had begun.
            self._close_period(state["period"], state["workers"])

    def _close_period(self, period: int, workers: int) -> None:
        """Ends a period of ``period`` pushes from ``workers`` workers after those that it has so far."""
        n = self._collected
        if n == 0:
            return
        eps = self.lr * period / workers
        share = 1.0 - min(self.activation, 1.0 / period) * n
        for flat, m, delta in chunks(self._ready(), self._m, self._delta):
            m.mul_(self.momentum).add_(delta, alpha=1.0 / n)
            flat.add_(m, alpha=-eps * share * self.momentum)
            delta.fill_(-0.0)
        self._collected = 0

    def _check_activation(self, period: int) -> None:
        if self.activation * period > 1.0 + 1e-9:
            raise ValueError(
                f"DelayedNesterov: activation must be in [0, 1/period] = [0, {1 / period:.4g}] with a period of"
                f" {period}, got {self.activation}; lower it (0 is the paper's choice) or shorten the period"
            )

    def _ready(self) -> Tensor:
        if self._theta is None:
            raise RuntimeError("DelayedNesterov was used before setup()")
        return self._theta
