"""The module ``staleness``, which both of Lightning's packages share."""

from lightning_async_localsgd.staleness import Composed as Composed
from lightning_async_localsgd.staleness import Constant as Constant
from lightning_async_localsgd.staleness import DelayCompensation as DelayCompensation
from lightning_async_localsgd.staleness import ExponentialCosine as ExponentialCosine
from lightning_async_localsgd.staleness import Hinge as Hinge
from lightning_async_localsgd.staleness import Polynomial as Polynomial
from lightning_async_localsgd.staleness import PolynomialThreshold as PolynomialThreshold
from lightning_async_localsgd.staleness import Staleness as Staleness
