"""HeLoCo: pushes that disagree with the momentum are corrected before another rule applies them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.outer.base import OuterOptimizer, chunks
from lightning_async_localsgd.outer.delayed_nesterov import DelayedNesterov
from lightning_async_localsgd.outer.look_ahead import LookAhead
from lightning_async_localsgd.outer.vectors import slices
from lightning_async_localsgd.outer.wrapper import Wrapper

KEEP = 0.2
"""From this cosine on a push is applied as it is."""


class HeLoCo(Wrapper):
    """A filter in front of :class:`.LookAhead` or :class:`.DelayedNesterov` (HeLoCo, arXiv 2606.00271).

    For each tensor of the model, with g the push, m the momentum of ``rule`` before it, v = m/|m|, c the cosine between
    g and m, and conf = |g| / (|g| + 3 |m|)::

        c >= 0.2:  g as it is
        c < 0:     g - beta*c*|g|*v,  beta = min(0.5*(-c)*conf, 0.5)    part of what opposes the momentum is taken away
        between:   g rotated towards m, |g| kept, until its cosine is c + conf*c*(1 - c/0.2)

    How far to rotate is our choice: nothing at both ends, so that a little noise in c never makes a large difference,
    and never beyond a cosine of 0.2. A tensor whose push or momentum is zero is left as it is.

    Args:
        rule: what applies the outcome, with a momentum > 0; its learning rate and the rest are meant as without the
            filter.

    Raises:
        TypeError: ``rule`` is of another kind.
        ValueError: ``rule`` has no momentum.

    Example::

        >>> theta = torch.zeros(2)
        >>> rule = HeLoCo(LookAhead(lr=1.0, momentum=0.5))
        >>> rule.setup(theta, {"w": theta}, workers=2)
        >>> rule.step(torch.tensor([1.0, 0.0]), {})
        >>> theta
        tensor([-1.2500,  0.0000])
        >>> rule.step(torch.tensor([-1.0, 0.0]), {})  # conf = 0.4, beta = 0.2: takes one fifth away.
        >>> theta
        tensor([-0.3750,  0.0000])

    """

    def __init__(self, rule: OuterOptimizer) -> None:
        super().__init__(rule)
        if not isinstance(rule, (LookAhead, DelayedNesterov)):
            raise TypeError(
                f"HeLoCo: rule must be LookAhead(...) or DelayedNesterov(...), got {rule!r}; a MomentumRestart goes"
                " around HeLoCo, not into it"
            )
        if rule.momentum == 0.0:
            raise ValueError(f"HeLoCo: the momentum of its rule must be > 0, got {rule!r}; 0.9 is usual")

    def __repr__(self) -> str:
        return f"HeLoCo({self.rule!r})"

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        super().setup(theta, views, workers)
        self._places = slices(theta, views)
        self._views = dict(views)
        self._corrected: Tensor | None = None

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        momentum = self.momentum_buffer
        assert momentum is not None
        mixtures = {name: mixture(gradient[place], momentum[place]) for name, place in self._places.items()}
        if all(mixed == (1.0, 0.0) for mixed in mixtures.values()):
            self.rule.step(gradient, views)
            return
        if self._corrected is None:
            self._corrected = torch.empty_like(gradient)
        self._corrected.copy_(gradient)
        for name, place in self._places.items():
            own, other = mixtures[name]
            if (own, other) != (1.0, 0.0):
                self._corrected[place].mul_(own).add_(momentum[place], alpha=other)
        corrected = {name: self._corrected[place].view_as(self._views[name]) for name, place in self._places.items()}
        self.rule.step(self._corrected, corrected)


def mixture(gradient: Tensor, momentum: Tensor) -> tuple[float, float]:
    """What of a flat tensor's push and of its momentum the corrected push consists."""
    squares, other_squares, product = _products(gradient, momentum, torch.float32)
    if not all(map(math.isfinite, (squares, other_squares, product))):
        # Squares of large but finite elements overflow in fp32.
        squares, other_squares, product = _products(gradient, momentum, torch.float64)
    norm, other = math.sqrt(squares), math.sqrt(other_squares)
    # A momentum so small beside the push that fp32 could not hold the quotient is none.
    if norm == 0.0 or norm >= 1e30 * other:
        return 1.0, 0.0
    own, direction = correction(max(-1.0, min(1.0, product / (norm * other))), norm / (norm + 3.0 * other))
    return own, direction * norm / other


def _products(gradient: Tensor, momentum: Tensor, dtype: torch.dtype) -> tuple[float, float, float]:
    """Of the gradient with itself, the momentum with itself, and one with the other."""
    squares = other_squares = product = 0.0
    for pair in chunks(gradient, momentum):
        g, m = (part.to(dtype) for part in pair)
        squares += float(torch.dot(g, g))
        other_squares += float(torch.dot(m, m))
        product += float(torch.dot(g, m))
    return squares, other_squares, product


def correction(cosine: float, confidence: float) -> tuple[float, float]:
    """The three regimes: the corrected push is the first number times g, plus the second times |g| v.

    Args:
        cosine: c, between push and momentum.
        confidence: conf.

    Example::

        >>> correction(0.5, 0.25), correction(-1.0, 0.5)
        ((1.0, 0.0), (1.0, 0.25))

    """
    if cosine >= KEEP:
        return 1.0, 0.0
    if cosine < 0.0:
        return 1.0, -min(0.5 * -cosine * confidence, 0.5) * cosine
    wanted = cosine + confidence * cosine * (1.0 - cosine / KEEP)
    # g = |g| (c v + sqrt(1 - c*c) w) with w orthogonal to v; only the cosine changes.
    own = math.sqrt((1.0 - wanted * wanted) / (1.0 - cosine * cosine))
    return own, wanted - own * cosine
