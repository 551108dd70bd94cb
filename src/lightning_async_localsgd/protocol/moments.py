"""Second moments of the inner optimizers, which workers average like the model.

Adam divides each step by the root of a running average of squared gradients. A worker that has taken few steps knows
this average badly, and a slow worker takes few steps. The average of all workers is a better estimate for each of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

if TYPE_CHECKING:
    from torch import nn

_KEYS: dict[type[Optimizer], str] = {
    AdamW: "exp_avg_sq",
    Adam: "exp_avg_sq",
    NAdam: "exp_avg_sq",
    RAdam: "exp_avg_sq",
    RMSprop: "square_avg",
}
"""Key of the running average of squared gradients in the state of an inner optimizer."""


class _Place(NamedTuple):
    """Where the second moment of a parameter is kept."""

    optimizer: Optimizer
    group: int
    key: str


class SecondMoments:
    """Reads and writes the running averages of squared gradients in the states of inner optimizers.

    The optimizers are those of torch that keep such an average: Adam, AdamW, NAdam, RAdam, RMSprop and their
    subclasses. What is read and written is free of the average's bias towards zero (algorithm 1 of arXiv 1412.6980), so
    that workers which have taken different numbers of steps can average it.

    Args:
        optimizers: inner optimizers. A parameter that belongs to several of them is left out.

    Example::

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.Adam([weight])
        >>> moments = SecondMoments([optimizer])
        >>> weight.grad = torch.tensor([1.0, 2.0])
        >>> _ = optimizer.step()
        >>> moments.read(weight).round(decimals=4)
        tensor([1., 4.])

    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._places: dict[int, _Place] = {}
        owners: Counter[int] = Counter()
        for optimizer in optimizers:
            key = next((key for kind, key in _KEYS.items() if isinstance(optimizer, kind)), None)
            for number, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    owners[id(parameter)] += 1
                    if key is not None:
                        self._places[id(parameter)] = _Place(optimizer, number, key)
        for parameter_id, count in owners.items():
            if count > 1:
                self._places.pop(parameter_id, None)

    def has(self, parameter: nn.Parameter) -> bool:
        """Return whether an optimizer keeps, or will keep, a second moment of ``parameter``."""
        return id(parameter) in self._places

    def read(self, parameter: nn.Parameter, out: Tensor | None = None) -> Tensor | None:
        """Return the second moment of ``parameter``, with its shape; None before the optimizer's first step.

        Args:
            parameter: the parameter.
            out: receives and becomes the result, if the optimizer's state is on its device and has its dtype.

        """
        moment, unbias = self._find(parameter)
        if moment is None:
            return None
        if out is not None and _are_alike(moment, out):
            torch.div(moment, unbias, out=out)
            return out
        unbiased: Tensor = moment / unbias
        return unbiased

    def write(self, parameter: nn.Parameter, moment: Tensor) -> None:
        """Replace the second moment of ``parameter``. Elements of ``moment`` that are NaN, for unknown, stay.

        Does nothing before the optimizer's first step, because there is no state yet.
        """
        own, unbias = self._find(parameter)
        if own is None:
            return
        if own.device.type == "cpu" and _are_alike(own, moment) and math.isfinite(float(moment.sum())):
            torch.mul(moment, unbias, out=own)  # Nothing is unknown, so one pass is enough.
            return
        biased = moment.to(own.device, own.dtype, non_blocking=True) * unbias
        own.copy_(torch.where(torch.isnan(biased), own, biased))

    def _find(self, parameter: nn.Parameter) -> tuple[Tensor | None, Any]:
        """Return the running average in the optimizer's state, and the factor by which it is too small."""
        optimizer, number, key = self._places[id(parameter)]
        state = optimizer.state.get(parameter, {})
        moment = state.get(key)
        if not isinstance(moment, Tensor) or moment.shape != parameter.shape:
            return None, 1.0
        group = optimizer.param_groups[number]
        decay = group["alpha"] if key == "square_avg" else group["betas"][1]
        steps = state["step"]
        if isinstance(steps, Tensor) and steps.device.type == "cpu":
            steps = steps.item()
        # On a device, the number of steps stays there: reading it would wait for the device.
        return moment, 1.0 - decay**steps


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype
