"""HeLoCo: pushes that disagree with the momentum are corrected before an outer optimizer applies them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.outer.base import OuterOptimizer, chunks, parameter_slices
from lightning_async_localsgd.outer.delayed_nesterov import DelayedNesterov
from lightning_async_localsgd.outer.look_ahead import LookAhead
from lightning_async_localsgd.outer.wrapper import OptimizerWrapper

KEEP_COSINE = 0.2
"""Pushes whose cosine with the momentum is at least this large are applied unchanged."""


class HeLoCo(OptimizerWrapper):
    """HeLoCo (arXiv 2606.00271): correction of pushes that disagree with the momentum of ``optimizer``.

    ``optimizer``, a :class:`.LookAhead` or a :class:`.DelayedNesterov`, then applies the corrected push.

    For each tensor of the model, let g be the push, m the momentum of ``optimizer`` before the push, v = m/|m|, c the
    cosine between g and m, and conf = |g| / (|g| + 3 |m|). The corrected push is::

        c >= 0.2:      g
        0 <= c < 0.2:  g rotated towards m with the same length, to the cosine c + conf*c*(1 - c/0.2)
        c < 0:         g - beta*c*|g|*v  with  beta = min(0.5*(-c)*conf, 0.5)

    For c < 0 this removes a part of the component that opposes the momentum. The angle of the rotation is a choice of
    this implementation: it is zero at c = 0 and at c = 0.2, so a small change of c never makes a large difference, and
    the cosine stays below 0.2. A tensor is left unchanged if its push or its momentum is zero.

    Args:
        optimizer: outer optimizer that applies the corrected push, with momentum > 0. Its options have the same meaning
            as without the correction.

    Raises:
        TypeError: ``optimizer`` is neither :class:`.LookAhead` nor :class:`.DelayedNesterov`.
        ValueError: ``optimizer`` has no momentum.

    Example::

        >>> from lightning_async_localsgd.outer import HeLoCo, LookAhead
        >>> theta = torch.zeros(2)
        >>> outer_optimizer = HeLoCo(LookAhead(lr=1.0, momentum=0.5))
        >>> outer_optimizer.setup(theta, {"w": theta}, workers=2)
        >>> outer_optimizer.step(torch.tensor([1.0, 0.0]), {})
        >>> theta
        tensor([-1.2500,  0.0000])
        >>> outer_optimizer.step(torch.tensor([-1.0, 0.0]), {})  # conf = 0.4 and beta = 0.2: one fifth is removed
        >>> theta
        tensor([-0.3750,  0.0000])

    """

    def __init__(self, optimizer: OuterOptimizer) -> None:
        super().__init__(optimizer)
        if not isinstance(optimizer, (LookAhead, DelayedNesterov)):
            raise TypeError(
                f"HeLoCo: optimizer must be LookAhead(...) or DelayedNesterov(...), got {optimizer!r}; to restart the"
                " momentum, use MomentumRestart(HeLoCo(...), every=...)"
            )
        if optimizer.momentum == 0.0:
            raise ValueError(f"HeLoCo: optimizer must have momentum > 0, got {optimizer!r}; 0.9 is usual")

    def __repr__(self) -> str:
        return f"HeLoCo({self.optimizer!r})"

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        super().setup(theta, views, workers)
        self._slices = parameter_slices(theta, views)
        self._views = dict(views)
        self._corrected: Tensor | None = None

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        momentum = self.momentum_buffer
        assert momentum is not None
        weights = {name: tensor_weights(gradient[part], momentum[part]) for name, part in self._slices.items()}
        if all(pair == (1.0, 0.0) for pair in weights.values()):
            self.optimizer.step(gradient, views)
            return
        if self._corrected is None:
            self._corrected = torch.empty_like(gradient)
        self._corrected.copy_(gradient)
        for name, part in self._slices.items():
            push_weight, momentum_weight = weights[name]
            if (push_weight, momentum_weight) != (1.0, 0.0):
                self._corrected[part].mul_(push_weight).add_(momentum[part], alpha=momentum_weight)
        corrected = {name: self._corrected[part].view_as(self._views[name]) for name, part in self._slices.items()}
        self.optimizer.step(self._corrected, corrected)


def tensor_weights(push: Tensor, momentum: Tensor) -> tuple[float, float]:
    """Return a and b for which the corrected push of a flat tensor is ``a*push + b*momentum``."""
    push_square, momentum_square, product = _products(push, momentum, torch.float32)
    if not all(map(math.isfinite, (push_square, momentum_square, product))):
        # Squares of large but finite elements overflow in fp32.
        push_square, momentum_square, product = _products(push, momentum, torch.float64)
    push_norm, momentum_norm = math.sqrt(push_square), math.sqrt(momentum_square)
    # A momentum counts as zero if the quotient of the two norms does not fit into fp32.
    if push_norm == 0.0 or push_norm >= 1e30 * momentum_norm:
        return 1.0, 0.0
    cosine = max(-1.0, min(1.0, product / (push_norm * momentum_norm)))
    push_weight, direction_weight = correction_weights(cosine, push_norm / (push_norm + 3.0 * momentum_norm))
    return push_weight, direction_weight * push_norm / momentum_norm


def _products(push: Tensor, momentum: Tensor, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return the dot products push.push, momentum.momentum and push.momentum, computed in ``dtype``."""
    push_square = momentum_square = product = 0.0
    for pair in chunks(push, momentum):
        g, m = (part.to(dtype) for part in pair)
        push_square += float(torch.dot(g, g))
        momentum_square += float(torch.dot(m, m))
        product += float(torch.dot(g, m))
    return push_square, momentum_square, product


def correction_weights(cosine: float, confidence: float) -> tuple[float, float]:
    """Return a and b for which the corrected push is ``a*g + b*|g|*v``, as in :class:`HeLoCo`.

    Args:
        cosine: c, the cosine between push and momentum.
        confidence: conf.

    Example::

        >>> correction_weights(0.5, 0.25), correction_weights(-1.0, 0.5)
        ((1.0, 0.0), (1.0, 0.25))

    """
    if cosine >= KEEP_COSINE:
        return 1.0, 0.0
    if cosine < 0.0:
        return 1.0, -min(0.5 * -cosine * confidence, 0.5) * cosine
    target = cosine + confidence * cosine * (1.0 - cosine / KEEP_COSINE)
    # g = |g|*(c*v + sqrt(1 - c*c)*w) with a unit vector w orthogonal to v. The rotation changes c to the target.
    push_weight = math.sqrt((1.0 - target * target) / (1.0 - cosine * cosine))
    return push_weight, target - push_weight * cosine
