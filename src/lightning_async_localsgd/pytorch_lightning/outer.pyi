"""The module ``outer``, which both of Lightning's packages share."""

from lightning_async_localsgd.outer import SGD as SGD
from lightning_async_localsgd.outer import Adam as Adam
from lightning_async_localsgd.outer import Buffer as Buffer
from lightning_async_localsgd.outer import DelayedNesterov as DelayedNesterov
from lightning_async_localsgd.outer import HeLoCo as HeLoCo
from lightning_async_localsgd.outer import LookAhead as LookAhead
from lightning_async_localsgd.outer import Momentum as Momentum
from lightning_async_localsgd.outer import MomentumRestart as MomentumRestart
from lightning_async_localsgd.outer import Nesterov as Nesterov
from lightning_async_localsgd.outer import OuterOptimizer as OuterOptimizer
from lightning_async_localsgd.outer import TorchOptimizer as TorchOptimizer
from lightning_async_localsgd.outer import resolve_outer_optimizer as resolve_outer_optimizer
