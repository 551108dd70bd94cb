"""Asynchronous Local-SGD for Lightning: ``Trainer(strategy="async_localsgd")``.

Importing this package is cheap: it neither imports torch nor Lightning. What it exports is imported when it is first
used; the strategy's names are registered with Lightning as soon as both are there.

What depends on Lightning is made for the package ``lightning`` (``lightning.pytorch``) where that is installed,
otherwise for ``pytorch_lightning``. A project that uses ``pytorch_lightning`` although both are installed takes it from
:mod:`lightning_async_localsgd.pytorch_lightning`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd_autoload import install as register_when_lightning_is_imported

if TYPE_CHECKING:
    from lightning_async_localsgd.faults import Fault, FaultKind
    from lightning_async_localsgd.launch.restarts import WorkersLostError
    from lightning_async_localsgd.lightning.callback import AsyncLocalSGDCallback
    from lightning_async_localsgd.lightning.emulation import EmulatedDevices
    from lightning_async_localsgd.lightning.fault_injection import FaultInjection
    from lightning_async_localsgd.lightning.simulated.strategy import SimulatedAsyncLocalSGDStrategy
    from lightning_async_localsgd.lightning.strategy import AsyncLocalSGDStrategy
    from lightning_async_localsgd.outer import DelayedNesterov, OuterOptimizer, TorchOptimizer
    from lightning_async_localsgd.protocol.exchange import TooFewWorkersError
    from lightning_async_localsgd.protocol.options import ExchangeOptions
    from lightning_async_localsgd.server.merge_policy import MergeOptions
    from lightning_async_localsgd.server.observers import RunObserver
    from lightning_async_localsgd.simulation.devices import Arrival, Death, Link, Slowdown, StepSeconds
    from lightning_async_localsgd.staleness import Staleness

__version__ = "0.1.0"

__all__ = [
    "Arrival",
    "AsyncLocalSGDCallback",
    "AsyncLocalSGDStrategy",
    "Death",
    "DelayedNesterov",
    "EmulatedDevices",
    "ExchangeOptions",
    "Fault",
    "FaultInjection",
    "FaultKind",
    "Link",
    "MergeOptions",
    "OuterOptimizer",
    "RunObserver",
    "SimulatedAsyncLocalSGDStrategy",
    "Slowdown",
    "Staleness",
    "StepSeconds",
    "TooFewWorkersError",
    "TorchOptimizer",
    "WorkersLostError",
]

# The module of each exported name.
HOMES = {
    "Arrival": "simulation.devices",
    "AsyncLocalSGDCallback": "lightning.callback",
    "AsyncLocalSGDStrategy": "lightning.strategy",
    "Death": "simulation.devices",
    "DelayedNesterov": "outer",
    "EmulatedDevices": "lightning.emulation",
    "ExchangeOptions": "protocol.options",
    "Fault": "faults",
    "FaultInjection": "lightning.fault_injection",
    "FaultKind": "faults",
    "Link": "simulation.devices",
    "MergeOptions": "server.merge_policy",
    "OuterOptimizer": "outer",
    "RunObserver": "server.observers",
    "SimulatedAsyncLocalSGDStrategy": "lightning.simulated.strategy",
    "Slowdown": "simulation.devices",
    "Staleness": "staleness",
    "StepSeconds": "simulation.devices",
    "TorchOptimizer": "outer",
    "TooFewWorkersError": "protocol.exchange",
    "WorkersLostError": "launch.restarts",
}

register_when_lightning_is_imported()


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = HOMES[name]
    if home.startswith("lightning.") and not _lightning_is_installed():
        value = getattr(import_module(f"{__name__}.pytorch_lightning"), name)
    else:
        value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def _lightning_is_installed() -> bool:
    spec = find_spec("lightning")
    # A mere folder of that name on the path is a package to Python, but without a file.
    return spec is not None and spec.origin is not None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
