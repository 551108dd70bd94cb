"""Staleness stages, which weigh, correct or drop stale pushes before they reach the outer optimizer.

The staleness s of a push is the number of pushes that were applied since its worker was dispatched. A stage returns a
factor, by which the pseudo-gradient g is multiplied, and may also correct g. A factor of 0 drops the push. A dropped
push does not change the model, but its steps count towards the budget and its data counts as trained on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.outer.base import chunks
from lightning_async_localsgd.protocol.checks import check_count, check_not_negative, check_positive, is_number


class Staleness(ABC):
    """Base class of staleness stages.

    Stages have no state: the result depends only on the arguments.

    Attributes:
        needs_base: whether :meth:`correct` does anything. If so, the server keeps a copy of each model that workers
            compute on.
        needs_momentum: whether :meth:`weigh` uses the cosine. If so, the outer optimizer must have a momentum.

    """

    needs_base: bool = False
    needs_momentum: bool = False

    @abstractmethod
    def weigh(self, staleness: int, cosine: float | None) -> float:
        """Return the factor for a push, >= 0. A factor of 0 drops the push.

        Args:
            staleness: number of pushes that were applied since the worker was dispatched, >= 0.
            cosine: cosine between the push and the outer momentum. None if either is zero, or if the push must not be
                dropped for its direction.

        """

    # Not abstract, because most stages correct nothing.
    def correct(self, gradient: Tensor, theta: Tensor, base: Tensor) -> None:  # noqa: B027
        """Correct ``gradient`` in place, before it is multiplied by the factor.

        Called only if :attr:`needs_base` is set.

        Args:
            gradient: pseudo-gradient, flat.
            theta: current global model. Must not be changed.
            base: global model that the worker was dispatched. Must not be changed.

        """


class Constant(Staleness):
    """Factor 1 for every staleness, as without a staleness stage.

    Example::

        >>> from lightning_async_localsgd.staleness import Constant
        >>> Constant().weigh(7, None)
        1.0

    """

    def __repr__(self) -> str:
        return "Constant()"

    @override
    def weigh(self, staleness: int, cosine: float | None) -> float:
        return 1.0


class Polynomial(Staleness):
    """Factor (1 + s)^-a (FedAsync, Xie et al., arXiv 1903.03934).

    With a = 0.5 this is *Poly* in arXiv 2401.09135.

    Args:
        power: a, > 0. The factor falls faster with a larger value.

    Raises:
        ValueError: ``power`` is outside its range.

    Example::

        >>> from lightning_async_localsgd.staleness import Polynomial
        >>> Polynomial(power=0.5).weigh(3, None)
        0.5

    """

    def __init__(self, power: float = 0.5) -> None:
        self.power = check_positive(
            type(self).__name__, "power", power, "0.5 is usual, Constant() gives all pushes the same weight"
        )

    def __repr__(self) -> str:
        return f"Polynomial(power={self.power})"

    @override
    def weigh(self, staleness: int, cosine: float | None) -> float:
        return float((1.0 + staleness) ** -self.power)


class PolynomialThreshold(Polynomial):
    """Factor (1 + s)^-a up to a threshold, and 0 above it.

    With a = 0.5 and a threshold of 10 this is *PolyThres* in arXiv 2401.09135.

    Args:
        power: a, > 0.
        threshold: largest staleness at which a push is not dropped, >= 0.

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> from lightning_async_localsgd.staleness import PolynomialThreshold
        >>> stage = PolynomialThreshold(power=0.5, threshold=10)
        >>> stage.weigh(3, None), stage.weigh(11, None)
        (0.5, 0.0)

    """

    def __init__(self, power: float = 0.5, threshold: int = 10) -> None:
        super().__init__(power)
        self.threshold = check_count(
            "PolynomialThreshold",
            "threshold",
            threshold,
            "it is the largest staleness of a push that is not dropped",
            least=0,
        )

    def __repr__(self) -> str:
        return f"PolynomialThreshold(power={self.power}, threshold={self.threshold})"

    @override
    def weigh(self, staleness: int, cosine: float | None) -> float:
        return 0.0 if staleness > self.threshold else super().weigh(staleness, cosine)


class Hinge(Staleness):
    """Factor 1 where s <= b, and 1 / (a*(s - b) + 1) where s > b (FedAsync, Xie et al., arXiv 1903.03934).

    Args:
        slope: a, > 0. The factor falls faster with a larger value.
        start: b, >= 0, the largest staleness with factor 1. For comparison: k workers of equal speed have a staleness
            of k - 1 without a grace window.

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> from lightning_async_localsgd.staleness import Hinge
        >>> stage = Hinge(slope=0.5, start=4)
        >>> stage.weigh(4, None), stage.weigh(6, None)
        (1.0, 0.5)

    """

    def __init__(self, slope: float, start: int) -> None:
        self.slope = check_positive(
            "Hinge", "slope", slope, "the factor falls faster with a larger slope, Constant() keeps it at 1"
        )
        self.start = check_count("Hinge", "start", start, "it is the largest staleness with factor 1", least=0)

    def __repr__(self) -> str:
        return f"Hinge(slope={self.slope}, start={self.start})"

    @override
    def weigh(self, staleness: int, cosine: float | None) -> float:
        return 1.0 / (self.slope * max(0, staleness - self.start) + 1.0)


class ExponentialCosine(Staleness):
    """Factor e^(-a*s), and 0 for pushes that point away from the outer momentum (CGAD, arXiv 2605.09126).

    A push is not dropped while the momentum is zero, because it has no cosine then. When k pushes in a row were dropped
    for their direction alone, with k the number of live workers, the factor of the next push depends only on its
    staleness. Without this exception, a momentum with a wrong direction would never change, because only merged pushes
    change it.

    Args:
        rate: a, >= 0. With 0, the factor does not depend on the staleness.
        cutoff: in [-1, 1). A push is dropped if its cosine with the outer momentum is smaller. -1 drops no push.

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> from lightning_async_localsgd.staleness import ExponentialCosine
        >>> stage = ExponentialCosine(rate=0.5, cutoff=0.0)
        >>> round(stage.weigh(2, 0.3), 3), stage.weigh(2, -0.3)
        (0.368, 0.0)

    """

    needs_momentum = True

    def __init__(self, rate: float, cutoff: float) -> None:
        self.rate = check_not_negative("ExponentialCosine", "rate", rate, "0 gives all pushes the same weight")
        if not (is_number(cutoff) and -1.0 <= cutoff < 1.0):
            raise ValueError(
                f"ExponentialCosine: cutoff must be in [-1, 1), got {cutoff!r}; 0 drops pushes that point"
                " against the momentum, -1 drops no push"
            )
        self.cutoff = float(cutoff)

    def __repr__(self) -> str:
        return f"ExponentialCosine(rate={self.rate}, cutoff={self.cutoff})"

    @override
    def weigh(self, staleness: int, cosine: float | None) -> float:
        if cosine is not None and cosine < self.cutoff:
            return 0.0
        return math.exp(-self.rate * staleness)


class DelayCompensation(Staleness):
    """Delay compensation (Zheng et al., arXiv 1609.08326): g + lambda*g*g*(theta_now - theta_base), elementwise.

    This is a first-order estimate of the pseudo-gradient at the current global model, with g*g as an estimate of the
    Hessian's diagonal. The factor is 1. Rank 0 keeps up to one more copy of the model for each worker.

    Args:
        strength: lambda, > 0. A larger value corrects more.

    Raises:
        ValueError: ``strength`` is outside its range.

    Example::

        >>> import torch
        >>> from lightning_async_localsgd.staleness import DelayCompensation
        >>> gradient = torch.tensor([2.0, 2.0])
        >>> DelayCompensation(0.5).correct(gradient, theta=torch.tensor([1.0, 3.0]), base=torch.ones(2))
        >>> gradient
        tensor([2., 6.])

    """

    needs_base = True

    def __init__(self, strength: float) -> None:
        self.strength = check_positive(
            "DelayCompensation", "strength", strength, "to correct nothing, leave out this stage"
        )

    def __repr__(self) -> str:
        return f"DelayCompensation(strength={self.strength})"

    @override
    def weigh(self, staleness: int, cosine: float | None) -> float:
        return 1.0

    @override
    def correct(self, gradient: Tensor, theta: Tensor, base: Tensor) -> None:
        for g, current, dispatched in chunks(gradient, theta, base):
            # The difference is multiplied first. Where the model has not changed, the product is then zero even if g*g
            # would overflow.
            g.addcmul_(torch.sub(current, dispatched).mul_(g), g, value=self.strength)


class Composed(Staleness):
    """The product of the factors of several stages, and their corrections one after another.

    A push is dropped if any of the stages drops it. All corrections are applied before the factor.

    Args:
        stages: at least one stage.

    Raises:
        TypeError: ``stages`` is not a sequence of stages.
        ValueError: ``stages`` is empty.

    Example::

        >>> from lightning_async_localsgd.staleness import Composed, Hinge, Polynomial
        >>> Composed([Polynomial(0.5), Hinge(slope=1.0, start=2)]).weigh(3, None)
        0.25

    """

    def __init__(self, stages: Sequence[Staleness]) -> None:
        given: object = stages
        if not isinstance(given, Sequence) or not all(isinstance(stage, Staleness) for stage in given):
            raise TypeError(
                f"Composed: stages must be a list of staleness stages, got {stages!r}; use for example"
                " Composed([Polynomial(0.5), DelayCompensation(0.1)])"
            )
        if not stages:
            raise ValueError("Composed: stages must not be empty, got []; Constant() gives all pushes the same weight")
        self.stages = tuple(stages)
        self.needs_base = any(stage.needs_base for stage in stages)
        self.needs_momentum = any(stage.needs_momentum for stage in stages)

    def __repr__(self) -> str:
        return f"Composed({list(self.stages)})"

    @override
    def weigh(self, staleness: int, cosine: float | None) -> float:
        return math.prod(stage.weigh(staleness, cosine) for stage in self.stages)

    @override
    def correct(self, gradient: Tensor, theta: Tensor, base: Tensor) -> None:
        for stage in self.stages:
            if stage.needs_base:
                stage.correct(gradient, theta, base)
