"""The staleness stage: what becomes of a push that was made from an old model, before it reaches the outer optimizer.

With s the staleness of a push (pushes that were applied since its worker was dispatched), a stage gives the factor by
which the pseudo-gradient g is multiplied, and may correct g itself. A factor of 0 drops the push: it moves nothing, but
its steps were taken and its data was trained on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.hyperparameters import count, is_number, not_negative, positive
from lightning_async_localsgd.outer.base import chunks


class Staleness(ABC):
    """What is done to a push for its age. Stages hold no state: the same push is always answered alike.

    Attributes:
        needs_base: whether :meth:`correct` changes anything. The server then keeps, for each worker, a copy of the
            model that it was dispatched.
        needs_momentum: whether :meth:`weigh` looks at the cosine, so that only outer optimizers with a momentum fit.

    """

    needs_base: bool = False
    needs_momentum: bool = False

    @abstractmethod
    def weigh(self, staleness: int, cosine: float | None) -> float:
        """The factor for a push, >= 0; 0 drops it.

        Args:
            staleness: pushes that were applied since the worker's dispatch, >= 0.
            cosine: between the push and the outer momentum; None while either is zero, and where it is not to count.

        """

    # Most stages have nothing to correct.
    def correct(self, gradient: Tensor, theta: Tensor, base: Tensor) -> None:  # noqa: B027
        """Changes ``gradient`` in place, before it is multiplied by the factor. Called where :attr:`needs_base`.

        Args:
            gradient: the pseudo-gradient, flat.
            theta: the global model as it is now; must not be changed.
            base: the model that the worker was dispatched; must not be changed.

        """


class Constant(Staleness):
    """Factor 1 whatever the age: what happens without a staleness stage, to compare with.

    Example::

        >>> Constant().weigh(7, None)
        1.0

    """

    def __repr__(self) -> str:
        return "Constant()"

    @override
    def weigh(self, staleness: int, cosine: float | None) -> float:
        return 1.0


class Polynomial(Staleness):
    """Factor (1 + s)^-a: the older, the less (FedAsync, Xie et al., arXiv 1903.03934; *Poly* in arXiv 2401.09135).

    Args:
        power: a, > 0.

    Raises:
        ValueError: ``power`` is out of its range.

    Example::

        >>> Polynomial(power=0.5).weigh(3, None)
        0.5

    """

    def __init__(self, power: float = 0.5) -> None:
        self.power = positive(type(self).__name__, "power", power, "0.5 is usual, and Constant() weighs all alike")

    def __repr__(self) -> str:
        return f"Polynomial(power={self.power})"

    @override
    def weigh(self, staleness: int, cosine: float | None) -> float:
        return float((1.0 + staleness) ** -self.power)


class PolynomialThreshold(Polynomial):
    """Factor (1 + s)^-a up to an age, and nothing beyond it (*PolyThres* in arXiv 2401.09135).

    Args:
        power: a, > 0.
        threshold: largest staleness of a push that is not dropped, >= 0.

    Raises:
        ValueError: a value is out of its range.

    Example::

        >>> stage = PolynomialThreshold(power=0.5, threshold=10)
        >>> stage.weigh(3, None), stage.weigh(11, None)
        (0.5, 0.0)

    """

    def __init__(self, power: float = 0.5, threshold: int = 10) -> None:
        super().__init__(power)
        self.threshold = count(
            "PolynomialThreshold", "threshold", threshold, "it is the largest staleness that is let in", least=0
        )

    def __repr__(self) -> str:
        return f"PolynomialThreshold(power={self.power}, threshold={self.threshold})"

    @override
    def weigh(self, staleness: int, cosine: float | None) -> float:
        return 0.0 if staleness > self.threshold else super().weigh(staleness, cosine)


class Hinge(Staleness):
    """Factor 1 up to an age b, then 1 / (a (s - b) + 1) (FedAsync, Xie et al., arXiv 1903.03934).

    Args:
        slope: a, > 0; how fast the factor falls.
        start: b, >= 0; the largest staleness that costs nothing. With k workers of equal speed k - 1 is normal.

    Raises:
        ValueError: a value is out of its range.

    Example::

        >>> stage = Hinge(slope=0.5, start=4)
        >>> stage.weigh(4, None), stage.weigh(6, None)
        (1.0, 0.5)

    """

    def __init__(self, slope: float, start: int) -> None:
        self.slope = positive("Hinge", "slope", slope, "a larger one falls faster, and Constant() does not fall")
        self.start = count("Hinge", "start", start, "it is the largest staleness that costs nothing", least=0)

    def __repr__(self) -> str:
        return f"Hinge(slope={self.slope}, start={self.start})"

    @override
    def weigh(self, staleness: int, cosine: float | None) -> float:
        return 1.0 / (self.slope * max(0, staleness - self.start) + 1.0)


class ExponentialCosine(Staleness):
    """Factor e^(-a s), and nothing for pushes that point against the momentum (CGAD, arXiv 2605.09126).

    A push without a cosine, because there is no momentum yet, is not dropped. Nor is the one that follows as many
    dropped ones in a row as there are live workers, for their direction alone: then it is the momentum that points the
    wrong way. Only pushes that are merged change it, and so that one is weighed by its age alone.

    Args:
        rate: a, >= 0.
        cutoff: in [-1, 1); a push whose cosine with the outer momentum is smaller is dropped. -1 drops none.

    Raises:
        ValueError: a value is out of its range.

    Example::

        >>> stage = ExponentialCosine(rate=0.5, cutoff=0.0)
        >>> round(stage.weigh(2, 0.3), 3), stage.weigh(2, -0.3)
        (0.368, 0.0)

    """

    needs_momentum = True

    def __init__(self, rate: float, cutoff: float) -> None:
        self.rate = not_negative("ExponentialCosine", "rate", rate, "0 weighs all alike")
        if not (is_number(cutoff) and -1.0 <= cutoff < 1.0):
            raise ValueError(
                f"ExponentialCosine: cutoff must be in [-1, 1), got {cutoff!r}; 0 drops what points against the"
                " momentum, -1 drops nothing"
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
    """Corrects g for where the model has gone since: g + lambda g*g*(theta_now - theta_base), element by element.

    A first-order estimate of the pseudo-gradient at the present model, with g*g in the place of the Hessian's diagonal
    (Zheng et al., arXiv 1609.08326). The factor is 1. Rank 0 holds one model more for every worker.

    Args:
        strength: lambda, > 0.

    Raises:
        ValueError: ``strength`` is out of its range.

    Example::

        >>> gradient = torch.tensor([2.0, 2.0])
        >>> DelayCompensation(0.5).correct(gradient, theta=torch.tensor([1.0, 3.0]), base=torch.ones(2))
        >>> gradient
        tensor([2., 6.])

    """

    needs_base = True

    def __init__(self, strength: float) -> None:
        self.strength = positive("DelayCompensation", "strength", strength, "leave the stage out for no correction")

    def __repr__(self) -> str:
        return f"DelayCompensation(strength={self.strength})"

    @override
    def weigh(self, staleness: int, cosine: float | None) -> float:
        return 1.0

    @override
    def correct(self, gradient: Tensor, theta: Tensor, base: Tensor) -> None:
        for g, now, then in chunks(gradient, theta, base):
            # The distance first: where the model has not moved there is no square of g that could overflow.
            g.addcmul_(torch.sub(now, then).mul_(g), g, value=self.strength)


class Composed(Staleness):
    """Several stages together: their factors multiplied, their corrections one after the other.

    A push that one of them drops is dropped. All corrections come before any factor.

    Args:
        stages: one stage at least.

    Raises:
        TypeError: something among them is no stage.
        ValueError: there is none.

    Example::

        >>> Composed([Polynomial(0.5), Hinge(slope=1.0, start=2)]).weigh(3, None)
        0.25

    """

    def __init__(self, stages: Sequence[Staleness]) -> None:
        given: object = stages
        if not isinstance(given, Sequence) or not all(isinstance(stage, Staleness) for stage in given):
            raise TypeError(
                f"Composed: stages must be a list of staleness stages, got {stages!r}; write for example"
                " Composed([Polynomial(0.5), DelayCompensation(0.1)])"
            )
        if not stages:
            raise ValueError("Composed: stages must not be empty, got []; Constant() weighs all pushes alike")
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
