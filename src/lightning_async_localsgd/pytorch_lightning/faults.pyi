"""The module ``faults`` for ``pytorch_lightning``."""

from lightning_async_localsgd.faults import MOMENTS as MOMENTS
from lightning_async_localsgd.faults import Fault as Fault
from lightning_async_localsgd.faults import FaultKind as FaultKind
from lightning_async_localsgd.faults import Moment as Moment
from lightning_async_localsgd.pytorch_lightning import FaultInjection as FaultInjection
