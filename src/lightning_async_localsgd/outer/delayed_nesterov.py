"""Delayed Nesterov: each push is applied at once, and the momentum is updated at every N-th push."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.outer.base import check_saved_integers
from lightning_async_localsgd.outer.flat import FlatOptimizer
from lightning_async_localsgd.policies.outer_step import automatic_lr, automatic_momentum
from lightning_async_localsgd.protocol.checks import check_fraction, check_positive, is_number

_log = logging.getLogger(__name__)

_VECTORS = ("momentum", "delta")


class DelayedNesterov(FlatOptimizer):
    """Delayed Nesterov, Algorithm 3 of Liu et al., *Asynchronous Local-SGD Training for Language Modeling*.

    The paper is arXiv 2401.09135v2. With g a push, N the period, c the activation, beta the momentum, k the number of
    live workers and t the number of pushes so far::

        Delta += g
        if (t+1) % N == 0:  m = beta*m + Delta/N;  theta -= eps*((1 - c*N + c)*beta*m + g/N);  Delta = 0
        else:               theta -= eps*(c*beta*m + g/N)
        t += 1

    where eps = lr * N / k. This factor gives ``lr`` the same meaning for every period: k pushes together move the model
    as far as one synchronous round with learning rate ``lr``.

    If the number of workers or an automatic momentum changes after n pushes of a period, the period ends early with
    m = beta*m + Delta/n and theta -= eps*(1 - c*n)*beta*m. The n pushes themselves are already in the model. So the
    weights of the momentum within a period always sum to 1.

    Args:
        lr: learning rate of one synchronous round of k pushes, > 0. ``"auto"`` is sqrt(k) * (1 - momentum), so that k
            equal pushes move the model by sqrt(k) of one of them in the long run.
        momentum: beta, in [0, 1). With 0, pushes are only averaged, and no vectors are allocated. ``"auto"`` is
            1 - 50 / (sqrt(k) * H), from 0 to 0.9, where H is the number of local steps of the fastest worker's round.
            That is 0 if rounds are short and workers are few.
        period: N >= 1, or ``"auto"`` for the number of live workers.
        activation: c, in [0, 1/N]; the share of the momentum that is applied at each push between two updates of the
            momentum.

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> import torch
        >>> from lightning_async_localsgd.outer import DelayedNesterov
        >>> theta = torch.ones(2)
        >>> outer_optimizer = DelayedNesterov(lr=0.5, momentum=0.0)
        >>> outer_optimizer.setup(theta, {"w": theta}, workers=2)
        >>> outer_optimizer.step(torch.tensor([0.4, 0.0]), {})
        >>> theta
        tensor([0.9000, 1.0000])

    """

    def __init__(
        self,
        lr: float | Literal["auto"] = 0.7,
        momentum: float | Literal["auto"] = 0.9,
        period: int | Literal["auto"] = "auto",
        activation: float = 0.0,
    ) -> None:
        self._lr_is_automatic, self._momentum_is_automatic = lr == "auto", momentum == "auto"
        # Until setup(), values of a single worker.
        if momentum == "auto":
            momentum = automatic_momentum(1, 1)
        if lr == "auto":
            lr = automatic_lr(1, momentum if is_number(momentum) else 0.0)
        super().__init__(
            lr=check_positive("DelayedNesterov", "lr", lr, '"auto" is usual, the paper uses 0.7'),
            momentum=check_fraction(
                "DelayedNesterov", "momentum", momentum, '"auto" is usual, the paper uses 0.9, 0 turns it off'
            ),
        )
        self.vector_names = _VECTORS if self.momentum > 0.0 else ()
        if period != "auto" and (type(period) is not int or period < 1):
            raise ValueError(
                f'DelayedNesterov: period must be an integer >= 1 or "auto", got {period!r}; "auto" is usual'
            )
        if not (is_number(activation) and 0.0 <= activation <= 1.0):
            raise ValueError(
                f"DelayedNesterov: activation must be in [0, 1/period], got {activation!r}; the paper uses 0"
            )
        self.period = period
        self.activation = float(activation)
        if period != "auto":
            self._check_activation(period)
        self._warned = False

    def __repr__(self) -> str:
        lr = "auto" if self._lr_is_automatic else self.lr
        momentum = "auto" if self._momentum_is_automatic else self.momentum
        return (
            f"DelayedNesterov(lr={lr!r}, momentum={momentum!r}, period={self.period!r}, activation={self.activation})"
        )

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        self._check_workers(workers)
        period = workers if self.period == "auto" else self.period
        self._check_activation(period)
        if self._momentum_is_automatic:
            self.vector_names = ()  # Until there is a momentum.
        super().setup(theta, views, workers)
        self._views = views
        self._adapt_to(workers, local_steps=1)
        self._period = period
        self._pushes = 0
        self._pushes_in_period = 0

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        self._ready()
        self._pushes += 1
        self._pushes_in_period += 1
        closing = self._pushes_in_period >= self._period
        lr = self.lr / self._workers
        if not self.vector_names:
            for theta, g in self._chunks(gradient):
                theta.add_(g, alpha=-lr)
        else:
            self._step_with_momentum(gradient, lr, closing)
        if closing:
            self._pushes_in_period = 0

    def _step_with_momentum(self, gradient: Tensor, lr: float, closing: bool) -> None:
        activation = min(self.activation, 1.0 / self._period)
        share = 1.0 - activation * self._period + activation if closing else activation
        # theta -= eps*(share*beta*m + g/N) is computed as theta -= lr/k * (g + N*share*beta*m). For N = k = 1 these are
        # the operations of torch.optim.SGD(nesterov=True) in the same order.
        weight = self._period * share * self.momentum
        for theta, m, delta, g in self._chunks(gradient):
            delta.add_(g)
            if closing:
                m.mul_(self.momentum).add_(delta, alpha=1.0 / self._period)
                delta.fill_(-0.0)
            if closing or weight != 0.0:
                self._descend(theta, g, m, lr, weight)
            else:
                theta.add_(g, alpha=-lr)

    @override
    def set_workers(self, workers: int) -> None:
        self._ready()
        self._check_workers(workers)
        if workers == self._workers:
            return
        self._close_period(self._period, self._workers, self._local_steps)
        self._adapt_to(workers, self._local_steps)
        if self.period == "auto":
            self._period = workers
        if self.activation * self._period > 1.0 + 1e-9 and not self._warned:
            # A warning and not an error, because a worker that joins must not end the training.
            self._warned = True
            _log.warning(
                f"DelayedNesterov: activation={self.activation} is larger than 1/period = 1/{self._period} with"
                f" {workers} live workers; it is limited to 1/period"
            )

    @override
    def set_local_steps(self, local_steps: int) -> None:
        self._ready()
        if local_steps == self._local_steps:
            return
        if self._momentum_is_automatic and automatic_momentum(self._workers, local_steps) != self.momentum:
            self._close_period(self._period, self._workers, self._local_steps)
        self._adapt_to(self._workers, local_steps)

    @property
    @override
    def averages_pushes(self) -> bool:
        return True

    @property
    @override
    def in_period(self) -> bool:
        self._ready()
        return self._pushes_in_period > 0

    @property
    @override
    def replaces_model(self) -> bool:
        self._ready()
        return self.momentum == 0.0 and self.lr == 1.0 and self._workers == 1

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "pushes": self._pushes,
            "pushes_in_period": self._pushes_in_period,
            "period": self._period,
            "workers": self._workers,
            "local_steps": self._local_steps,
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        names = ["pushes", "pushes_in_period", "period", "workers", "local_steps"]
        check_saved_integers("DelayedNesterov", state, names)
        if self._momentum_is_automatic and "momentum" in state:
            self._allocate_momentum()
        begins_momentum = bool(self.vector_names) and "momentum" not in state and "delta" not in state
        if begins_momentum:  # With the next push, because the state was saved without momentum.
            for vector in self._vectors.values():
                vector.fill_(-0.0)
        else:
            super().load_state_dict(state)
        self._pushes = state["pushes"]
        self._pushes_in_period = 0 if begins_momentum else state["pushes_in_period"]
        if (state["period"], state["workers"]) != (self._period, self._workers):
            # The state may have been saved within a period with another length or number of workers.
            self._close_period(state["period"], state["workers"], state["local_steps"])
        self._adapt_to(self._workers, state["local_steps"])

    def _close_period(self, period: int, workers: int, local_steps: int) -> None:
        """End the current period early, if it has begun.

        Args:
            period: N, the number of pushes that the period was begun with.
            workers: k, the number of live workers that the period was begun with.
            local_steps: H at that time.

        """
        n = self._pushes_in_period
        self._pushes_in_period = 0
        if n == 0 or not self.vector_names:
            return
        momentum = automatic_momentum(workers, local_steps) if self._momentum_is_automatic else self.momentum
        lr = automatic_lr(workers, momentum) if self._lr_is_automatic else self.lr
        eps = lr * period / workers
        share = 1.0 - min(self.activation, 1.0 / period) * n
        for theta, m, delta in self._chunks():
            m.mul_(momentum).add_(delta, alpha=1.0 / n)
            theta.add_(m, alpha=-eps * share * momentum)
            delta.fill_(-0.0)

    def _adapt_to(self, workers: int, local_steps: int) -> None:
        self._workers, self._local_steps = workers, local_steps
        if self._momentum_is_automatic:
            self.momentum = automatic_momentum(workers, local_steps)
        if self._lr_is_automatic:
            self.lr = automatic_lr(workers, self.momentum)
        if self.momentum > 0.0:
            self._allocate_momentum()

    def _allocate_momentum(self) -> None:
        """Allocate the vectors, unless there are some. They are kept if there is no momentum again later."""
        if not self.vector_names:
            self.vector_names = _VECTORS
            super().setup(self._ready(), self._views, self._workers)

    def _check_activation(self, period: int) -> None:
        if self.activation * period > 1.0 + 1e-9:
            raise ValueError(
                f"DelayedNesterov: activation must be in [0, 1/period] = [0, {1 / period:.4g}] with a period of"
                f" {period}, got {self.activation}; lower it (the paper uses 0) or shorten the period"
            )
