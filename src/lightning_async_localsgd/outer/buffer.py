"""Buffered aggregation: one Nesterov step on the mean of every N pushes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.outer.base import check_saved_integers
from lightning_async_localsgd.outer.flat import FlatOptimizer
from lightning_async_localsgd.protocol.checks import check_fraction, check_positive


class Buffer(FlatOptimizer):
    """FedBuff (Nguyen et al., arXiv 2106.06639) with Nesterov momentum, called *Async Buffer* in arXiv 2401.09135.

    With g a push, N the period, beta the momentum and eps the learning rate::

        Delta += g
        every N-th push:  m = beta*m + Delta/N;  theta -= eps*(Delta/N + beta*m);  Delta = 0

    N = k pushes from one model give the same bits as a round of synchronous DiLoCo. In contrast to
    :class:`.DelayedNesterov`, a push is not in the model yet when its worker is dispatched again. The last pushes of a
    run, fewer than N, are never applied. A warning reports how many.

    With ``period="auto"``, N follows the number of live workers. If N falls to the number of buffered pushes or below,
    the step on their mean is taken at once.

    Args:
        lr: eps, the learning rate of one step on N pushes, > 0. With N = k this is one synchronous round. With N = k/2
            there are twice as many steps, so the model moves twice as far in the same number of pushes.
        momentum: beta, in [0, 1).
        period: N >= 1, or ``"auto"`` for the number of live workers.

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> import torch
        >>> from lightning_async_localsgd.outer import Buffer
        >>> theta = torch.ones(1)
        >>> outer_optimizer = Buffer(lr=0.5, momentum=0.0)
        >>> outer_optimizer.setup(theta, {"w": theta}, workers=2)
        >>> outer_optimizer.step(torch.tensor([0.4]), {})
        >>> theta
        tensor([1.])
        >>> outer_optimizer.step(torch.tensor([0.8]), {})
        >>> theta
        tensor([0.7000])

    """

    vector_names = ("momentum", "delta")

    def __init__(self, lr: float = 0.7, momentum: float = 0.9, period: int | Literal["auto"] = "auto") -> None:
        super().__init__(
            lr=check_positive("Buffer", "lr", lr, "0.7 is usual, as in synchronous DiLoCo"),
            momentum=check_fraction("Buffer", "momentum", momentum, "0.9 is usual, 0 turns it off"),
        )
        if period != "auto" and (type(period) is not int or period < 1):
            raise ValueError(f'Buffer: period must be an integer >= 1 or "auto", got {period!r}; "auto" is usual')
        self.period = period

    def __repr__(self) -> str:
        return f"Buffer(lr={self.lr}, momentum={self.momentum}, period={self.period!r})"

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        super().setup(theta, views, workers)
        self._pushes_in_period = 0
        self._period = workers if self.period == "auto" else self.period

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        self._ready()
        self._vectors["delta"].add_(gradient)
        self._pushes_in_period += 1
        if self._pushes_in_period >= self._period:
            self._apply()

    @override
    def set_workers(self, workers: int) -> None:
        self._ready()
        self._check_workers(workers)
        if self.period == "auto":
            self._period = workers
        if self._pushes_in_period >= self._period:
            self._apply()

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
    def unapplied_pushes(self) -> int:
        self._ready()
        return self._pushes_in_period

    @property
    @override
    def replaces_model(self) -> bool:
        self._ready()
        return self.momentum == 0.0 and self.lr == 1.0 and self._period == 1

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "pushes_in_period": self._pushes_in_period}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_saved_integers("Buffer", state, ["pushes_in_period"])
        super().load_state_dict(state)
        self._pushes_in_period = state["pushes_in_period"]
        if self._pushes_in_period >= self._period:
            # The state was saved with a longer period than the present one.
            self._apply()

    def _apply(self) -> None:
        """Take a Nesterov step on the mean of the buffered pushes."""
        for theta, m, delta in self._chunks():
            delta.div_(self._pushes_in_period)
            m.mul_(self.momentum).add_(delta)
            self._descend(theta, delta, m, self.lr, self.momentum)
            delta.fill_(-0.0)
        self._pushes_in_period = 0
